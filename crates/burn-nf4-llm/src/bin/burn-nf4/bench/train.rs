//! Steps of training.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use burn_nf4::model::LinearLayers;
use burn_nf4::peft::{LoraConfig, TargetModules};
use burn_nf4_llm::ModelError;
use burn_nf4_llm::model::{Decoder, DecoderConfig};
use burn_nf4_llm::train::data::Batch;
use burn_nf4_llm::train::schedule::{Decay, Schedule};
use burn_nf4_llm::train::{Settings, Trainer};
use serde::Serialize;

use super::measure::{median, milliseconds, tokens};
use super::report::{Memory, TrainRow};
use crate::finetune::memory::MemoryReport;

/// Steps that are timed, after three: the first, the one whose memory is seen, and one that may be recorded.
const STEPS: usize = 3;
/// Rank of the branches, if none is asked for.
const RANK: usize = 16;

/// A batch, and whether layers are computed once or twice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TrainShape {
    pub rows: usize,
    /// Of a row.
    pub tokens: usize,
    /// Whether all is kept that the gradients need. Else that is the input of each layer, which is computed again.
    pub keep_all: bool,
}

impl FromStr for TrainShape {
    type Err = &'static str;

    /// `4x2048` or `4x2048:keep`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (shape, keep_all) = match text.strip_suffix(":keep") {
            Some(shape) => (shape, true),
            None => (text, false),
        };
        let sizes: Option<Vec<usize>> = shape.split('x').map(|size| size.parse().ok()).collect();
        match sizes.as_deref() {
            Some(&[rows, tokens]) if rows > 0 && tokens > 1 => Ok(Self {
                rows,
                tokens,
                keep_all,
            }),
            _ => Err("expected rows and tokens, such as 4x2048 or 4x2048:keep"),
        }
    }
}

impl fmt::Display for TrainShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keeping = if self.keep_all { ", keeping all" } else { "" };
        write!(f, "{} x {}{keeping}", self.rows, self.tokens)
    }
}

/// What is trained and how, by ours and by the peer: branches on all linear layers but the head, AdamW.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Recipe {
    pub rank: usize,
    pub alpha: f64,
    pub learning_rate: f64,
    pub weight_decay: f64,
}

impl Recipe {
    pub fn new(rank: Option<usize>) -> Self {
        let rank = rank.unwrap_or(RANK);
        Self {
            rank,
            alpha: 2.0 * rank as f64,
            learning_rate: 1e-4,
            weight_decay: 0.01,
        }
    }

    /// A run from the start, of a model without branches.
    fn trainer(
        &self,
        model: Decoder,
        config: &DecoderConfig,
        keep_all: bool,
    ) -> Result<Trainer, ModelError> {
        let lora = LoraConfig {
            r: self.rank,
            lora_alpha: self.alpha,
            ..LoraConfig::new(TargetModules::AllLinear)
        };
        let schedule = Schedule {
            peak: self.learning_rate,
            decay: Decay::Constant,
            warmup: 0,
            total: usize::MAX,
        };
        let settings = Settings {
            weight_decay: self.weight_decay as f32,
            ..Settings::new(schedule, &lora)?
        };
        let device = model.device();
        let model = model.with_lora(&lora, &device)?;
        Trainer::new(model, config, lora, settings, !keep_all)
    }
}

/// Times steps of a run of its own, so that nothing is there of other shapes.
///
/// - `device`: that of the model, without autodiff
pub fn train(
    model: Decoder,
    config: &DecoderConfig,
    recipe: Recipe,
    shape: TrainShape,
    eager: bool,
    device: &Device,
) -> Result<TrainRow, ModelError> {
    let TrainShape {
        rows,
        tokens: length,
        keep_all,
    } = shape;
    let mut trainer = recipe.trainer(model, config, keep_all)?;
    trainer.capture = !eager;
    let ids = tokens(rows * length, config);
    let batch = Batch::new(&ids.chunks(length).collect::<Vec<_>>());
    let first = step(&mut trainer, &batch)?;
    // This one waits for the device after each layer, and is launched. With the hook none would be replayed.
    let seen = MemoryReport::new(device);
    trainer.on_phase = Some(seen.hook());
    step(&mut trainer, &batch)?;
    trainer.on_phase = None;
    let peak_in_use_bytes = seen.most();
    // Nobody may ask the device for anything while a pass is recorded or timed.
    drop(seen);
    step(&mut trainer, &batch)?;
    let times = (0..STEPS).map(|_| step(&mut trainer, &batch));
    let time = median(times.collect::<Result<_, _>>()?);
    Ok(TrainRow {
        rows,
        tokens: length,
        keep_all,
        rank: recipe.rank,
        ms: milliseconds(time),
        tokens_s: (rows * length) as f64 / time.as_secs_f64(),
        first_ms: milliseconds(first),
        passes: trainer.passes(),
        peak_in_use_bytes,
        memory: Memory::of(device),
    })
}

/// The time of a step, up to its loss on the host.
fn step(trainer: &mut Trainer, batch: &Batch) -> Result<Duration, ModelError> {
    let start = Instant::now();
    let loss = trainer.step(std::slice::from_ref(batch))?.loss;
    let time = start.elapsed();
    if !loss.is_finite() {
        return Err(ModelError::setting("the loss", loss, "a finite number"));
    }
    Ok(time)
}
