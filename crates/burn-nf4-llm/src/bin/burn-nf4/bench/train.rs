//! Steps of training.

use std::time::Instant;

use burn_nf4::model::LinearLayers;
use burn_nf4::peft::{LoraConfig, TargetModules};
use burn_nf4_llm::ModelError;
use burn_nf4_llm::model::{Decoder, DecoderConfig};
use burn_nf4_llm::train::data::Batch;
use burn_nf4_llm::train::schedule::{Decay, Schedule};
use burn_nf4_llm::train::{Settings, Trainer};

use super::measure::{median, milliseconds, tokens};
use super::report::TrainRow;

/// Steps that are timed, after two.
const STEPS: usize = 3;
/// Rank of the branches, if none is asked for.
const RANK: usize = 16;

/// The training of all linear layers but the head.
pub fn trainer(
    model: Decoder,
    config: &DecoderConfig,
    rank: Option<usize>,
    keep_all: bool,
) -> Result<Trainer, ModelError> {
    let rank = rank.unwrap_or(RANK);
    let lora = LoraConfig {
        r: rank,
        lora_alpha: 2.0 * rank as f64,
        ..LoraConfig::new(TargetModules::AllLinear)
    };
    let schedule = Schedule {
        peak: 1e-4,
        decay: Decay::Constant,
        warmup: 0,
        total: usize::MAX,
    };
    let settings = Settings {
        weight_decay: 0.01,
        ..Settings::new(schedule, &lora)?
    };
    let device = model.device();
    let model = model.with_lora(&lora, &device)?;
    Trainer::new(model, config, lora, settings, !keep_all)
}

/// Times steps of training.
pub fn train(
    trainer: &mut Trainer,
    config: &DecoderConfig,
    [rows, length]: [usize; 2],
) -> Result<TrainRow, ModelError> {
    let ids = tokens(rows * length, config);
    let batch = Batch::new(&ids.chunks(length).collect::<Vec<_>>());
    let mut times = Vec::new();
    for step in 0..STEPS + 2 {
        let start = Instant::now();
        let loss = trainer.step(std::slice::from_ref(&batch))?.loss;
        if step >= 2 {
            times.push(start.elapsed());
        }
        if !loss.is_finite() {
            return Err(ModelError::setting("the loss", loss, "a finite number"));
        }
    }
    let time = median(times);
    Ok(TrainRow {
        rows,
        tokens: length,
        ms: milliseconds(time),
        tokens_s: (rows * length) as f64 / time.as_secs_f64(),
    })
}
