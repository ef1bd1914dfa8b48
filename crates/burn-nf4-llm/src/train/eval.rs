//! How well a model predicts texts that it is not trained on.

use burn::module::Module;

use crate::error::ModelError;
use crate::train::Trainer;
use crate::train::backward::Inputs;
use crate::train::data::Batch;
use crate::train::loss::loss;
use crate::train::parallel::Layers;

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
    /// NaN. Of several ranks, which are given the same batches, each takes its own in turns.
    ///
    /// # Errors
    /// [`ModelError::Device`] if the device fails, [`ModelError::Nf4`] if another rank has.
    pub fn evaluate(
        &self,
        batches: impl IntoIterator<Item = Batch>,
    ) -> Result<Evaluation, ModelError> {
        let model = self.model.valid();
        let mut rope = self.rope.on(&model.device());
        let [rank, ranks] = self.place();
        let (mut sum, mut targets) = (0.0, 0);
        let mut batches = batches.into_iter().filter(|batch| batch.targets() > 0);
        loop {
            let round: Vec<Batch> = batches.by_ref().take(ranks).collect();
            let Some(first) = round.first() else {
                break;
            };
            let own = round.get(rank);
            // Where layers are gathered all ranks have to come to each.
            let Some(batch) = own.or(self.shards.as_ref().map(|_| first)) else {
                break;
            };
            let of_batch = batch.targets();
            let inputs = Inputs::new(batch, of_batch, &model, &mut rope);
            let Inputs {
                ids,
                labels,
                factor,
                pass,
            } = inputs;
            let mut x = model.embed(ids);
            let mut layers = Layers::new(&model, self.shards.as_ref());
            for index in 0..layers.len() {
                let then = Some(index + 1).filter(|&next| next < layers.len());
                x = layers.get(index, then)?.forward(x, &pass, None);
            }
            let mean = loss(&model, x, labels, factor).try_into_data();
            let mean = mean.map_err(|error| ModelError::device(&model.device(), error))?;
            let mean: f32 = mean.iter::<f32>().sum();
            if own.is_some() {
                sum += f64::from(mean) * of_batch as f64;
                targets += of_batch;
            }
        }
        if let Some(rank) = &self.rank {
            let all = rank.exchange((sum, targets))?;
            (sum, targets) = all
                .into_iter()
                .fold((0.0, 0), |(sum, targets), (s, t)| (sum + s, targets + t));
        }
        Ok(Evaluation {
            loss: sum / targets as f64,
            targets,
        })
    }
}
