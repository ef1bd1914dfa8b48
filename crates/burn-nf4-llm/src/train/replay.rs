//! A pass over a batch, forward and backward, as one graph that the device replays.
//!
//! A pass is thousands of launches, and for few tokens they take the host longer than the device. Where batches
//! of one size follow each other it is recorded once. What changes from pass to pass lies in buffers on the
//! device: tokens, labels and positions, which are written to before it, and the values and the gradients of the
//! optimizer, which are written in place.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;
use std::sync::PoisonError;

use burn::tensor::{DType, Device, Graph, Tensor, capture};
use burn_nf4::op::has_graphs;
use serde::Serialize;

use crate::error::ModelError;
use crate::generate::replay::RECORDING;
use crate::model::{Decoder, DecoderLayer, Mlp};
use crate::train::backward::{InputSizes, Inputs, PassOptions, backward};
use crate::train::optimizer::Optimizer;

/// The optimizer, which a recorded pass shares.
pub(super) type SharedOptimizer = Rc<RefCell<Optimizer>>;

type Run = Box<dyn FnMut() -> Output>;

/// What a pass gives.
struct Output {
    loss: Tensor<1>,
    /// See [`probe`].
    probe: Tensor<1>,
}

/// How the passes of a run are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Passes {
    /// Launch by launch: the device has no graphs, no two batches of one size have followed each other, or inputs
    /// of layers wait on the host.
    Launched,
    /// Launch by launch, though the device has graphs: it could not begin or end a recording, which is not tried
    /// again.
    NotRecorded,
    /// As replays of a recorded one.
    Replayed,
}

impl fmt::Display for Passes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Launched => "launched",
            Self::NotRecorded => "launched: the device could not record",
            Self::Replayed => "replayed",
        })
    }
}

/// A recorded pass.
struct Recorded {
    sizes: InputSizes,
    inputs: Rc<RefCell<Inputs>>,
    graph: Graph<Output, Run>,
    /// The tensors that have gradients after it.
    trained: Vec<usize>,
}

/// Passes of a run that are recorded: those over the last size of batches that came twice in a row.
#[derive(Default)]
pub(super) struct Replays {
    recorded: Option<Recorded>,
    /// The sizes of the last pass.
    last: Option<InputSizes>,
    /// Whether a device that says that it records did not.
    failed: bool,
    /// What replays should have begun with, and what they did.
    unchecked: Vec<[Tensor<1>; 2]>,
}

impl Replays {
    /// Makes the pass by a replay, if it was recorded, or records it.
    ///
    /// - `is_first`: whether no gradients of this step are there yet, which a recording would spoil
    ///
    /// Returns the loss, `[1]`, or nothing, if it is to be launched.
    pub fn run(
        &mut self,
        model: &Decoder,
        optimizer: &SharedOptimizer,
        inputs: &Inputs,
        checkpointing: bool,
        is_first: bool,
    ) -> Option<Tensor<1>> {
        let device = model.device().without_autodiff();
        // The host sends tokens to experts.
        let is_mixture = |layer: &DecoderLayer| matches!(layer.mlp, Mlp::Mixture(_));
        if self.failed || !has_graphs(&device) || model.layers.iter().any(is_mixture) {
            return None;
        }
        let sizes = inputs.sizes();
        let came_before = self.last.replace(sizes.clone()).as_ref() == Some(&sizes);
        let is_known = |recorded: &Recorded| recorded.sizes == sizes;
        if !self.recorded.as_ref().is_some_and(is_known) {
            if !(came_before && is_first) {
                return None;
            }
            // The pages of another are of no use to it.
            self.recorded = None;
            let recorded = Recorded::new(model, optimizer, inputs, checkpointing, &device);
            self.failed = recorded.is_none();
            self.recorded = recorded;
        }
        let recorded = self.recorded.as_mut()?;
        recorded.inputs.borrow_mut().write(inputs.clone());
        let before = probe(&optimizer.borrow(), inputs);
        // SAFETY: what `Graph::replay` asks for is there.
        // - What the launches touch is alive: the frozen weights are those of the model that the closure holds,
        //   the inputs and the output belong to it. Values and gradients are those of the optimizer that it
        //   shares; should they move to other buffers, the old ones lie, as the intermediates do, on pages that
        //   cubecl keeps from others as long as the graph lives.
        // - All of it is this thread's alone, as `Rc` is not `Send`, and replays, writes and reads follow each
        //   other on its stream.
        let output = unsafe { recorded.graph.replay() };
        let (loss, read) = (output.loss.clone(), output.probe.clone() + 0.0);
        // A pass that read something else has no finite loss, and the optimizer leaves its step out.
        let same = before.clone().equal(read.clone()).all().float();
        let loss = loss / same.cast(DType::F32);
        self.unchecked.push([before, read]);
        optimizer.borrow_mut().set_with_gradients(&recorded.trained);
        Some(loss)
    }

    /// Checks that the replays of a step read what they should. The optimizer copies its values if somebody holds
    /// a clone of the model's, and a replay reads the old ones; its step was left out, so that one that was
    /// applied needs no look.
    ///
    /// # Errors
    /// [`ModelError::Replay`].
    pub fn check(&mut self, applied: bool, device: &Device) -> Result<(), ModelError> {
        let unchecked = std::mem::take(&mut self.unchecked);
        for probes in unchecked.into_iter().filter(|_| !applied) {
            let [expected, read] = probes.map(|probe| {
                let values: Vec<f32> = probe.into_data().iter().collect();
                values.into_iter().map(f32::to_bits).collect::<Vec<u32>>()
            });
            if expected != read {
                self.recorded = None;
                let message = "a training pass read other values, gradients or tokens than there are, and its step \
                               was left out: parameters of the trainer's model must not be held across a step";
                return Err(ModelError::replay(device, message.into()));
            }
        }
        Ok(())
    }

    /// How the passes are made.
    pub fn passes(&self) -> Passes {
        match (&self.recorded, self.failed) {
            (Some(_), _) => Passes::Replayed,
            (None, false) => Passes::Launched,
            (None, true) => Passes::NotRecorded,
        }
    }
}

/// Some of the values and gradients that a pass begins with, and of what it reads, in f32.
fn probe(optimizer: &Optimizer, inputs: &Inputs) -> Tensor<1> {
    Tensor::cat(vec![optimizer.probe(), inputs.probe().inner()], 0) + 0.0
}

impl Recorded {
    /// Records a pass, if the device does so. Gradients that were there are dropped.
    fn new(
        model: &Decoder,
        optimizer: &SharedOptimizer,
        inputs: &Inputs,
        checkpointing: bool,
        device: &Device,
    ) -> Option<Self> {
        // Without the values: it would hold them across steps.
        let model = optimizer.borrow().without_values(model.clone());
        let sizes = inputs.sizes();
        // Buffers of their own, or they could not be written in place.
        let inputs = Rc::new(RefCell::new(inputs.copied()));
        let (of_graph, shared) = (inputs.clone(), optimizer.clone());
        let run: Run = Box::new(move || {
            let mut optimizer = shared.borrow_mut();
            let model = optimizer.with_values(model.clone());
            let inputs = of_graph.borrow().clone();
            let probe = probe(&optimizer, &inputs);
            let options = PassOptions {
                checkpointing,
                offload: None,
                dropout_seed: None,
                on_phase: None,
            };
            let loss = backward(&model, inputs, options, &mut optimizer);
            let loss = loss.expect("all stays on the device");
            Output {
                loss: loss.inner(),
                probe,
            }
        });
        // What launched passes left in the pools is of no use to the recorded one.
        device.memory_cleanup();
        let graph = {
            let _alone = RECORDING.lock().unwrap_or_else(PoisonError::into_inner);
            capture(device, run)
        };
        let mut optimizer = optimizer.borrow_mut();
        let trained = optimizer.with_gradients();
        optimizer.drop_gradients();
        graph.is_hardware().then_some(Self {
            sizes,
            inputs,
            graph,
            trained,
        })
    }
}
