//! The loss of a batch and its gradients, with and without gradient checkpointing.

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::model::Pass;
use crate::model::RopeTables;
use crate::model::{Decoder, DecoderLayer};
use crate::train::data::Batch;
use crate::train::optimizer::Optimizer;

/// How a pass through the layers is made.
#[derive(Debug, Clone, Copy)]
pub struct PassOptions {
    /// Keep only the input of each layer, and run the layer again for its gradients.
    pub checkpointing: bool,
    /// Seed of the dropout, if there is any.
    pub dropout_seed: Option<u64>,
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
    options: PassOptions,
    grads: &mut Optimizer,
) -> Tensor<1> {
    let device = model.device();
    let ids = TensorData::new(batch.ids.clone(), [batch.rows, batch.length]);
    let ids = Tensor::<2, Int>::from_data(ids, &device);
    let pass = model.pass(batch.length, rope, None);
    let mut x = model.embed(ids.clone());
    if !options.checkpointing {
        for (index, layer) in model.layers.iter().enumerate() {
            x = forward(layer, x, &pass, index, options);
        }
        let loss = loss(model, x, ids, batch, targets);
        let gradients = GradientsParams::from_grads(loss.backward(), model);
        grads.accumulate(model, gradients);
        return loss.detach();
    }

    // Only the inputs stay. Without a parameter that wants a gradient no graph is kept; dropping one
    // would not do, as Burn frees the graphs of dropped tensors in a later backward pass only.
    let mut inputs = Vec::with_capacity(model.layers.len());
    for (index, layer) in model.layers.iter().enumerate() {
        inputs.push(x.clone());
        x = forward(&layer.clone().no_grad(), x, &pass, index, options);
    }
    let x = x.require_grad();
    let loss = loss(model, x.clone(), ids, batch, targets);
    let mut gradients = loss.backward();
    let mut flow = x.grad_remove(&mut gradients);
    grads.accumulate(model, GradientsParams::from_grads(gradients, model));
    for (index, layer) in model.layers.iter().enumerate().rev() {
        let (Some(x), Some(gradient)) = (inputs.pop(), flow.take()) else {
            break;
        };
        let x = x.require_grad();
        let y = forward(layer, x.clone(), &pass, index, options);
        // The gradient of this sum with respect to `y` is the gradient that came from above.
        let mut gradients = (y * gradient.autodiff()).sum().backward();
        flow = x.grad_remove(&mut gradients);
        grads.accumulate(model, GradientsParams::from_grads(gradients, model));
    }
    loss.detach()
}

/// One layer; its dropout is the same whenever it runs for the same step.
fn forward(
    layer: &DecoderLayer,
    x: Tensor<3>,
    pass: &Pass,
    index: usize,
    options: PassOptions,
) -> Tensor<3> {
    if let Some(seed) = options.dropout_seed {
        x.device().seed(seed.wrapping_add(index as u64));
    }
    layer.forward(x, pass, None)
}

/// The cross-entropy of every token given those before it, summed, over `targets`.
fn loss(
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
