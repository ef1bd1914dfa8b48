//! How well a model predicts texts that it is not trained on.

use burn::module::Module;

use crate::train::Trainer;
use crate::train::backward::Inputs;
use crate::train::data::Batch;
use crate::train::loss::loss;

/// What an evaluation finds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// The mean cross-entropy of all targets, in nats.
    pub loss: f64,
    /// Tokens that were predicted.
    pub targets: usize,
}

impl Evaluation {
    /// `exp(loss)`: among how many tokens the model is undecided.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

impl Trainer {
    /// The loss of batches, without dropout and gradients. Nothing of the run changes. Without a target it is
    /// NaN.
    pub fn evaluate(&self, batches: impl IntoIterator<Item = Batch>) -> Evaluation {
        let model = self.model.valid();
        let device = model.device();
        let mut rope = self.rope.on(&device);
        let (mut sum, mut targets) = (0.0, 0);
        for batch in batches {
            let of_batch = batch.targets();
            if of_batch == 0 {
                continue;
            }
            let inputs = Inputs::new(&batch, of_batch, &model, &mut rope);
            let Inputs {
                ids,
                labels,
                factor,
                pass,
            } = inputs;
            let mut x = model.embed(ids);
            for layer in &model.layers {
                x = layer.forward(x, &pass, None);
            }
            let mean = loss(&model, x, labels, factor).into_scalar::<f32>();
            sum += f64::from(mean) * of_batch as f64;
            targets += of_batch;
        }
        Evaluation {
            loss: sum / targets as f64,
            targets,
        }
    }
}
