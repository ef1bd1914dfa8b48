//! The loss of a batch and its gradients, with and without gradient checkpointing.

use std::cell::{RefCell, RefMut};

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Int, Tensor, TensorData, s};
use burn_nf4::op::{OffloadStack, Seed};

use crate::error::ModelError;
use crate::model::RopeTables;
use crate::model::{Decoder, Residual};
use crate::model::{Pass, PassSizes};
use crate::train::data::Batch;
use crate::train::loss::loss;
use crate::train::optimizer::Optimizer;
use crate::train::parallel::{Layers, Shards};
use crate::train::phases::{Phase, PhaseHook};

/// How a pass through the layers is made.
#[derive(Clone, Copy)]
pub struct PassOptions<'a> {
    /// Keep only the input of each layer, and run the layer again for its gradients.
    pub checkpointing: bool,
    /// Where those inputs wait on the host, if not on the device.
    pub offload: Option<&'a RefCell<OffloadStack<3>>>,
    /// Seed of the dropout, if there is any.
    pub dropout_seed: Option<u64>,
    /// Is told of each phase.
    pub on_phase: Option<&'a PhaseHook>,
    /// The weights of the layers, if this rank has only a part of them. Only with checkpointing.
    pub shards: Option<&'a Shards>,
}

impl PassOptions<'_> {
    fn in_phase(&self, phase: Phase) {
        if let Some(on_phase) = self.on_phase {
            on_phase(phase);
        }
    }

    fn seed_dropout(&self, device: &Device, layer: usize) {
        if let Some(seed) = self.dropout_seed {
            device.seed(seed.wrapping_add(layer as u64));
        }
    }
}

/// What a pass over a batch reads, on the device.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// `[rows, length]`.
    pub ids: Tensor<2, Int>,
    /// `[rows * length]`: what each position predicts.
    pub labels: Tensor<1, Int>,
    /// `[1]`, f32: what the sum of the losses is multiplied by.
    pub factor: Tensor<1>,
    /// Positions, and which tokens see which.
    pub pass: Pass,
}

/// The sizes of [`Inputs`]: rows and length, and those of the pass.
pub type InputSizes = ([usize; 2], PassSizes);

/// Most elements of each tensor in a [probe](Inputs::probe).
const PROBED: usize = 256;

impl Inputs {
    /// Those of a batch whose losses are divided by `targets`.
    pub fn new(batch: &Batch, targets: usize, model: &Decoder, rope: &mut RopeTables) -> Self {
        let device = model.device();
        let ids = TensorData::new(batch.ids.clone(), [batch.rows, batch.length]);
        let labels = TensorData::new(batch.labels().to_vec(), [batch.rows * batch.length]);
        let factor = TensorData::new(vec![(1.0 / targets as f64) as f32], [1]);
        Self {
            ids: Tensor::from_data(ids, &device),
            labels: Tensor::from_data(labels, &device),
            factor: Tensor::from_data(factor, (&device, DType::F32)),
            pass: batch.pass(model, rope),
        }
    }

    /// The same in buffers of their own.
    pub fn copied(&self) -> Self {
        Self {
            ids: self.ids.clone() + 0,
            labels: self.labels.clone() + 0,
            factor: self.factor.clone() + 0.0,
            pass: self.pass.copied(),
        }
    }

    /// Some of the tokens, labels and ranges, and the factor, in f32, to see whether a recorded pass reads them.
    pub fn probe(&self) -> Tensor<1> {
        // From everywhere: the last may be padding.
        let some = |all: Tensor<1, Int>| {
            let step = all.dims()[0].div_ceil(PROBED) as isize;
            all.slice(s![..;step]).float().cast(DType::F32)
        };
        let ranges = self.pass.ranges_of_windows().map(|ranges| {
            let ranges = ranges.tensor().clone().flatten(0, 2);
            Tensor::from_inner(some(ranges))
        });
        let ids = self.ids.clone().flatten(0, 1);
        let parts = [some(ids), some(self.labels.clone()), self.factor.clone()];
        Tensor::cat(parts.into_iter().chain(ranges).collect(), 0)
    }

    /// Its sizes: [`write`](Self::write) takes inputs of the same ones.
    pub fn sizes(&self) -> InputSizes {
        (self.ids.dims(), self.pass.sizes())
    }

    /// Writes others of the same sizes into the buffers of these, where nobody else holds them.
    ///
    /// # Panics
    /// If the sizes differ.
    #[allow(clippy::single_range_in_vec_init, reason = "one axis")]
    pub fn write(&mut self, other: Self) {
        let [rows, length] = self.ids.dims();
        self.ids
            .inplace(|held| held.slice_assign([0..rows, 0..length], other.ids));
        self.labels
            .inplace(|held| held.slice_assign([0..rows * length], other.labels));
        self.factor
            .inplace(|held| held.slice_assign([0..1], other.factor));
        self.pass.write(other.pass);
    }
}

/// The loss of a batch, in f32, and its gradients added to `grads`.
///
/// The loss is the mean cross-entropy, if the targets of the inputs are those of this batch; with those of
/// all batches of a step, the sum over the batches is the mean over the step.
///
/// # Errors
/// Those of [`Layers::get`], where layers are in parts, and of [`OffloadStack`], where their inputs wait on the host.
/// Some gradients may be added then.
pub fn backward(
    model: &Decoder,
    inputs: Inputs,
    options: PassOptions<'_>,
    grads: &mut Optimizer,
) -> Result<Tensor<1>, ModelError> {
    let Inputs {
        ids,
        labels,
        factor,
        pass,
    } = inputs;
    let device = model.device();
    let x = model.embed(ids.clone());
    if !options.checkpointing {
        let mut residual = Residual::new(x);
        for (index, layer) in model.layers.iter().enumerate() {
            options.seed_dropout(&device, index);
            residual = layer.add_to(residual, &pass, None);
            options.in_phase(Phase::Forward);
        }
        let loss = loss(model, residual.sum(), labels, factor);
        options.in_phase(Phase::Loss);
        let gradients = GradientsParams::from_grads(loss.backward(), model);
        grads.accumulate(gradients);
        options.in_phase(Phase::Backward);
        return Ok(loss.detach());
    }

    // Only the inputs stay. Without a parameter that wants a gradient no graph is kept; dropping one
    // would not do, as Burn frees the graphs of dropped tensors in a later backward pass only.
    let mut layers = Layers::new(model, options.shards);
    let last = layers.len().saturating_sub(1);
    let mut inputs = LayerInputs::new(options.offload);
    let mut x = x.detach();
    for index in 0..layers.len() {
        inputs.push(x.clone())?;
        options.seed_dropout(&device, index);
        // The last one comes first in the backward pass.
        let layer = layers.get(index, Some((index + 1).min(last)))?;
        x = layer.into_owned().no_grad().forward(x, &pass, None);
        options.in_phase(Phase::Forward);
    }
    let x = x.require_grad();
    let loss = loss(model, x.clone(), labels, factor);
    let mut gradients = loss.backward();
    let mut flow = x.grad_remove(&mut gradients);
    grads.accumulate(GradientsParams::from_grads(gradients, model));
    options.in_phase(Phase::Loss);
    for index in (0..layers.len()).rev() {
        let (Some(x), Some(gradient)) = (inputs.pop()?, flow.take()) else {
            break;
        };
        let x = x.require_grad();
        options.seed_dropout(&device, index);
        let layer = layers.get(index, index.checked_sub(1))?;
        let mut gradients = layer.seed(x.clone(), &pass, gradient).backward();
        flow = x.grad_remove(&mut gradients);
        grads.accumulate(GradientsParams::from_grads(gradients, layer.as_ref()));
        inputs.prefetch()?;
        options.in_phase(Phase::Backward);
    }
    if let Some(gradient) = flow.filter(|_| model.embed_tokens.is_require_grad()) {
        let seed = Seed::of(model.embed(ids), gradient).expect("it is the gradient of x");
        grads.accumulate(GradientsParams::from_grads(seed.backward(), model));
        options.in_phase(Phase::Backward);
    }
    Ok(loss.detach())
}

/// The inputs of the layers, from the pass forward to the pass backward.
enum LayerInputs<'a> {
    OnDevice(Vec<Tensor<3>>),
    OnHost(RefMut<'a, OffloadStack<3>>),
}

impl<'a> LayerInputs<'a> {
    fn new(offload: Option<&'a RefCell<OffloadStack<3>>>) -> Self {
        match offload {
            None => Self::OnDevice(Vec::new()),
            Some(stack) => {
                let mut stack = stack.borrow_mut();
                // Of a pass that ended in an error.
                stack.clear();
                Self::OnHost(stack)
            }
        }
    }

    fn push(&mut self, x: Tensor<3>) -> Result<(), ModelError> {
        match self {
            Self::OnDevice(inputs) => inputs.push(x),
            Self::OnHost(stack) => stack.push(x)?,
        }
        Ok(())
    }

    /// The one that was pushed last.
    fn pop(&mut self) -> Result<Option<Tensor<3>>, ModelError> {
        match self {
            Self::OnDevice(inputs) => Ok(inputs.pop()),
            Self::OnHost(stack) => Ok(stack.pop()?),
        }
    }

    /// Has the next one come, now that the work on the last one has been launched.
    fn prefetch(&mut self) -> Result<(), ModelError> {
        match self {
            Self::OnDevice(_) => Ok(()),
            Self::OnHost(stack) => Ok(stack.prefetch()?),
        }
    }
}
