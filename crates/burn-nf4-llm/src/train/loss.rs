//! The loss of a batch.

use burn::tensor::{Int, Tensor};
use burn_nf4::nn;
use burn_nf4::op::{
    CrossEntropyOptions, LinearCrossEntropyOptions, LossReduction, linear_cross_entropy,
};

use crate::model::Decoder;
use crate::train::data::NO_LABEL;

/// The cross-entropy of all positions that have a label, in f32: their sum times `factor`. The logits of all
/// positions are never held at once.
///
/// # Shapes
/// - `x`: `[rows, length, hidden_size]`, the output of the last layer
/// - `labels`: `[rows * length]`, [`NO_LABEL`] or a token of the vocabulary
/// - `factor`: `[1]`, f32, and so the result
pub fn loss(model: &Decoder, x: Tensor<3>, labels: Tensor<1, Int>, factor: Tensor<1>) -> Tensor<1> {
    let [rows, length, hidden_size] = x.dims();
    let x = model.norm.forward(x).reshape([rows * length, hidden_size]);
    let options = LinearCrossEntropyOptions {
        loss: CrossEntropyOptions {
            ignore_index: NO_LABEL as i32,
            soft_cap: model.logits_softcap,
            logit_scale: 1.0 / model.logits_scaling,
            ..CrossEntropyOptions::default()
        },
        reduction: LossReduction::Sum,
        ..LinearCrossEntropyOptions::default()
    };
    let sum = match &model.lm_head {
        Some(head) => nn::linear_cross_entropy(head, x, labels, &options),
        None => linear_cross_entropy(x, model.embed_tokens.val(), None, labels, &options),
    };
    sum.expect("the head fits, and labels are tokens") * factor
}

#[cfg(test)]
mod tests {
    use burn::tensor::activation::log_softmax;
    use burn::tensor::{DType, Distribution};
    use rstest::rstest;

    use super::*;
    use crate::generate::replay::tests::fixture_model;

    /// Heads of their own and tied ones, with a cap (Gemma 2) and a factor (Granite).
    #[rstest]
    fn the_loss_is_that_of_the_models_logits(
        #[values(
            "families/gemma2",
            "families/granite",
            "families/llama3_tied",
            "families/mistral_window"
        )]
        name: &str,
    ) {
        let (model, config) = fixture_model(name);
        let (device, hidden) = (model.device().autodiff(), config.hidden_size);
        let x = Tensor::<3>::random([2, 3, hidden], Distribution::Default, &device);
        let x = x.require_grad();
        let none = NO_LABEL;
        let labels = Tensor::from_ints([6, 7, none, 9, none, none], &device);
        let third = Tensor::from_floats([1.0 / 3.0], &device);
        let ours = loss(&model, x.clone(), labels, third);

        let log = log_softmax(model.head(x.clone()).cast(DType::F32), 2);
        let chosen = [(0, 0, 6), (0, 1, 7), (1, 0, 9)].map(|(row, position, token)| {
            log.clone()
                .slice([row..row + 1, position..position + 1, token..token + 1])
        });
        let theirs = Tensor::cat(chosen.to_vec(), 0).sum() / -3.0;
        let [a, b] = [&ours, &theirs].map(|loss| loss.clone().into_scalar::<f32>());
        assert!((a - b).abs() < 1e-5, "{a} {b}");
        let [a, b] = [ours, theirs].map(|loss| {
            let gradients = loss.backward();
            x.grad(&gradients).expect("a gradient")
        });
        let largest = b.clone().abs().max().into_scalar::<f32>();
        let difference = (a - b).abs().max().into_scalar::<f32>();
        assert!(difference < 1e-5 * largest, "{difference:e} of {largest:e}");
    }
}
