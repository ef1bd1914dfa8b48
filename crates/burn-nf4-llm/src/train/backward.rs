//! The loss of a batch and its gradients, with and without gradient checkpointing.

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::model::Pass;
use crate::model::RopeTables;
use crate::model::{Decoder, DecoderLayer, Residual};
use crate::train::data::Batch;
use crate::train::phases::{Phase, PhaseHook};

/// How a pass through the layers is made.
#[derive(Clone, Copy)]
pub struct PassOptions<'a> {
    /// Keep only the input of each layer, and run the layer again for its gradients.
    pub checkpointing: bool,
    /// Seed of the dropout, if there is any.
    pub dropout_seed: Option<u64>,
    /// Is told of each phase.
    pub on_phase: Option<&'a PhaseHook>,
}

impl PassOptions<'_> {
    fn in_phase(&self, phase: Phase) {
        if let Some(on_phase) = self.on_phase {
            on_phase(phase);
        }
    }
}

/// The loss of a batch, divided by `targets`, and its gradients added to `grads`.
///
/// The loss is the mean cross-entropy, in f32, if `targets` are those of this batch; with those of
/// all batches of a step, the sum over the batches is the mean over the step.
pub fn backward(
    model: &Decoder,
    rope: &mut RopeTables,
    batch: &Batch,
    targets: usize,
    options: PassOptions<'_>,
    grads: &mut GradientsAccumulator<Decoder>,
) -> Tensor<1> {
    let device = model.device();
    let ids = TensorData::new(batch.ids.clone(), [batch.rows, batch.length]);
    let ids = Tensor::<2, Int>::from_data(ids, &device);
    let pass = batch.pass(model, rope);
    let mut x = model.embed(ids.clone());
    if !options.checkpointing {
        let mut residual = Residual::new(x);
        for (index, layer) in model.layers.iter().enumerate() {
            seed_dropout(&device, index, options);
            residual = layer.add_to(residual, &pass, None);
            options.in_phase(Phase::Forward);
        }
        let loss = loss(model, residual.sum(), ids, batch, targets);
        options.in_phase(Phase::Loss);
        let gradients = GradientsParams::from_grads(loss.backward(), model);
        grads.accumulate(model, gradients);
        options.in_phase(Phase::Backward);
        return loss.detach();
    }

    // Only the inputs stay. Without a parameter that wants a gradient no graph is kept; dropping one
    // would not do, as Burn frees the graphs of dropped tensors in a later backward pass only.
    let mut inputs = Vec::with_capacity(model.layers.len());
    x = x.detach();
    for (index, layer) in model.layers.iter().enumerate() {
        inputs.push(x.clone());
        x = forward(&layer.clone().no_grad(), x, &pass, index, options);
        options.in_phase(Phase::Forward);
    }
    let x = x.require_grad();
    let loss = loss(model, x.clone(), ids.clone(), batch, targets);
    let mut gradients = loss.backward();
    let mut flow = x.grad_remove(&mut gradients);
    grads.accumulate(model, GradientsParams::from_grads(gradients, model));
    options.in_phase(Phase::Loss);
    for (index, layer) in model.layers.iter().enumerate().rev() {
        let (Some(x), Some(gradient)) = (inputs.pop(), flow.take()) else {
            break;
        };
        let x = x.require_grad();
        seed_dropout(&device, index, options);
        let mut gradients = layer.seed(x.clone(), &pass, gradient).backward();
        flow = x.grad_remove(&mut gradients);
        grads.accumulate(model, GradientsParams::from_grads(gradients, model));
        options.in_phase(Phase::Backward);
    }
    if let Some(gradient) = flow.filter(|_| model.embed_tokens.is_require_grad()) {
        let gradients = (model.embed(ids) * gradient.autodiff()).sum().backward();
        grads.accumulate(model, GradientsParams::from_grads(gradients, model));
        options.in_phase(Phase::Backward);
    }
    loss.detach()
}

/// One layer; its dropout is the same whenever it runs for the same step.
fn forward(
    layer: &DecoderLayer,
    x: Tensor<3>,
    pass: &Pass,
    index: usize,
    options: PassOptions<'_>,
) -> Tensor<3> {
    seed_dropout(&x.device(), index, options);
    layer.forward(x, pass, None)
}

fn seed_dropout(device: &Device, index: usize, options: PassOptions) {
    if let Some(seed) = options.dropout_seed {
        device.seed(seed.wrapping_add(index as u64));
    }
}

/// The cross-entropy of every token given those before it, summed, over `targets`.
pub(super) fn loss(
    model: &Decoder,
    x: Tensor<3>,
    ids: Tensor<2, Int>,
    batch: &Batch,
    targets: usize,
) -> Tensor<1> {
    let (rows, positions) = (batch.rows, batch.length - 1);
    let logits = model.head(x.narrow(1, 0, positions)).cast(DType::F32);
    let vocabulary = logits.dims()[2];
    let next = ids.narrow(1, 1, positions).reshape([rows * positions, 1]);
    let log_probabilities = log_softmax(logits.reshape([rows * positions, vocabulary]), 1);
    let chosen = log_probabilities.gather(1, next);
    let weights = TensorData::new(batch.weights(), [rows * positions, 1]);
    let weights = Tensor::<2>::from_data(weights, (&chosen.device(), DType::F32));
    (chosen * weights).sum() * (-1.0 / targets as f64)
}
