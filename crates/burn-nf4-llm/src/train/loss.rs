//! What a batch predicts, and its loss.

use burn::tensor::{Int, Tensor, TensorData};
use burn_nf4::nn;
use burn_nf4::op::{
    CrossEntropyOptions, LinearCrossEntropyOptions, LossReduction, linear_cross_entropy,
};

use crate::model::Decoder;
use crate::train::data::Batch;

/// The label of a position after which nothing is predicted, as in transformers.
pub const NOT_PREDICTED: i64 = -100;

/// What each position of a batch is to predict, the token after it, `[rows, length]`.
pub fn labels(batch: &Batch) -> Vec<i64> {
    let positions = batch.length - 1;
    let weights = batch.weights();
    let mut labels = vec![NOT_PREDICTED; batch.ids.len()];
    for row in 0..batch.rows {
        for position in 0..positions {
            if weights[row * positions + position] > 0.0 {
                let at = row * batch.length + position;
                labels[at] = batch.ids[at + 1];
            }
        }
    }
    labels
}

/// The cross-entropy of all positions that have a label, in f32, summed, over `targets`. The logits of all
/// positions are never held at once.
///
/// # Shapes
/// - `x`: `[rows, length, hidden_size]`, the output of the last layer
/// - `labels`: `[rows, length]`, [`NOT_PREDICTED`] or a token of the vocabulary
/// - returns `[1]`
pub fn loss(model: &Decoder, x: Tensor<3>, labels: Vec<i64>, targets: usize) -> Tensor<1> {
    let [rows, length, hidden_size] = x.dims();
    let x = model.norm.forward(x).reshape([rows * length, hidden_size]);
    let labels = TensorData::new(labels, [rows * length]);
    let labels = Tensor::<1, Int>::from_data(labels, &x.device());
    let options = LinearCrossEntropyOptions {
        loss: CrossEntropyOptions {
            ignore_index: NOT_PREDICTED as i32,
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
    sum.expect("the head fits, and labels are tokens") * (1.0 / targets as f64)
}

#[cfg(test)]
mod tests {
    use burn::tensor::activation::log_softmax;
    use burn::tensor::{DType, Distribution};
    use rstest::rstest;

    use super::*;
    use crate::generate::replay::tests::fixture_model;

    /// Padding and the ends of rows predict nothing.
    #[test]
    fn labels_are_the_next_tokens() {
        let batch = Batch::new(&[&[5, 6, 7], &[8, 9]]);
        let none = NOT_PREDICTED;
        assert_eq!(labels(&batch), [6, 7, none, 9, none, none]);
        let count = labels(&batch)
            .iter()
            .filter(|&&label| label != none)
            .count();
        assert_eq!(count, batch.targets());
    }

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
        let none = NOT_PREDICTED;
        let ours = loss(&model, x.clone(), vec![6, 7, none, 9, none, none], 3);

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
