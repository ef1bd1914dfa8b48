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

use crate::generate::replay::RECORDING;
use crate::model::{Decoder, DecoderLayer, Mlp};
use crate::train::backward::{InputSizes, Inputs, PassOptions, backward};
use crate::train::optimizer::Optimizer;

/// The optimizer, which a recorded pass shares.
pub(super) type SharedOptimizer = Rc<RefCell<Optimizer>>;

/// Tokens of a pass from which on a recording gains nothing: the device takes longer than the host. It would hold
/// all pages of the pass, and cost four passes.
const MAX_TOKENS: usize = 16_384;

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
    /// Launch by launch, though the device has graphs: somebody holds parameters of the model at every step, so that
    /// a recorded pass would read old values. It is not tried again.
    Held,
}

/// So many recordings in a row that serve one step only end it.
const MAX_STALE: usize = 2;

impl fmt::Display for Passes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Launched => "launched",
            Self::NotRecorded => "launched: the device could not record",
            Self::Replayed => "replayed",
            Self::Held => "launched: parameters of the model are held across steps",
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
    /// Steps that had replays of it.
    steps: usize,
}

/// Passes of a run that are recorded: those over the last size of batches that came twice in a row.
#[derive(Default)]
pub(super) struct Replays {
    recorded: Option<Recorded>,
    /// The sizes of the last pass.
    last: Option<InputSizes>,
    /// Whether a device that says that it records did not.
    failed: bool,
    /// Recordings in a row that served one step only.
    stale: usize,
    /// What replays should have begun with, and what they did.
    unchecked: Vec<[Tensor<1>; 2]>,
}

impl Replays {
    /// Whether passes of a model are replayed where batches of one size follow each other.
    pub fn can_replay(&self, model: &Decoder) -> bool {
        // The host sends tokens to experts.
        let is_mixture = |layer: &DecoderLayer| matches!(layer.mlp, Mlp::Mixture(_));
        !self.failed
            && self.stale < MAX_STALE
            && has_graphs(&model.device().without_autodiff())
            && !model.layers.iter().any(is_mixture)
    }

    /// Whether the first pass of a step should be [recorded](Self::record) now, where passes
    /// [can be replayed](Self::can_replay): the last step began with a pass of the same sizes, and none of these is
    /// recorded.
    pub fn is_due(&mut self, inputs: &Inputs) -> bool {
        let [rows, length] = inputs.ids.dims();
        let sizes = inputs.sizes();
        let came_before = self.last.replace(sizes.clone()).as_ref() == Some(&sizes);
        came_before && Self::is_worth_it(rows * length) && !self.knows(&sizes)
    }

    /// Whether a replay of a pass over so many tokens would gain anything.
    pub fn is_worth_it(tokens: usize) -> bool {
        tokens <= MAX_TOKENS
    }

    fn knows(&self, sizes: &InputSizes) -> bool {
        let recorded = self.recorded.as_ref();
        recorded.is_some_and(|recorded| recorded.sizes == *sizes)
    }

    /// Records a pass, if the device does so, before any gradients of a step are there. In the meantime nothing else
    /// of the process may use a device.
    pub fn record(
        &mut self,
        model: &Decoder,
        optimizer: &SharedOptimizer,
        inputs: &Inputs,
        checkpointing: bool,
    ) {
        let device = model.device().without_autodiff();
        // The pages of another are of no use to it.
        self.recorded = None;
        self.recorded = Recorded::new(model, optimizer, inputs, checkpointing, &device);
        self.failed = self.recorded.is_none();
    }

    /// Makes a pass by a replay, if one of its sizes was recorded. Returns the loss, `[1]`.
    pub fn replay(&mut self, optimizer: &SharedOptimizer, inputs: &Inputs) -> Option<Tensor<1>> {
        if !self.knows(&inputs.sizes()) {
            return None;
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

    /// Whether the replays of a step read what they should; if not, the recording is dropped, and the passes of the
    /// step are to be made again, launched. The optimizer copies its values if somebody holds a clone of the
    /// model's, and a replay reads the old ones; its step was left out, so that one that was applied needs no look.
    pub fn check(&mut self, applied: bool) -> bool {
        let bits = |probe: Tensor<1>| -> Vec<u32> {
            let values = probe.into_data();
            values.iter::<f32>().map(f32::to_bits).collect()
        };
        let unchecked = std::mem::take(&mut self.unchecked);
        let Some(recorded) = self.recorded.as_mut().filter(|_| !unchecked.is_empty()) else {
            return true;
        };
        recorded.steps += 1;
        let served_several = recorded.steps > 2;
        let mut unchecked = unchecked.into_iter();
        let is_right = applied || unchecked.all(|[expected, read]| bits(expected) == bits(read));
        if served_several {
            self.stale = 0;
        }
        if !is_right {
            self.recorded = None;
            self.last = None;
            self.stale += usize::from(!served_several);
        }
        is_right
    }

    /// Drops what replays of a step have read that ended in an error.
    pub fn forget(&mut self) {
        self.unchecked.clear();
    }

    /// How the passes are made.
    pub fn passes(&self) -> Passes {
        match (&self.recorded, self.failed) {
            (Some(_), _) => Passes::Replayed,
            (None, true) => Passes::NotRecorded,
            (None, false) if self.stale >= MAX_STALE => Passes::Held,
            (None, false) => Passes::Launched,
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
                shards: None,
            };
            let loss = backward(&model, inputs, options, &mut optimizer);
            let loss = loss.expect("all that it needs is on the device");
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
            steps: 0,
        })
    }
}
