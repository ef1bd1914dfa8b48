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

/// What is kept from the pass forward to the pass backward.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kept {
    /// The input of each layer, which is computed again.
    Inputs,
    /// The same, in the memory of the host.
    OffloadedInputs,
    /// All that the gradients need.
    All,
}

impl Kept {
    /// How often layers are computed, for people.
    pub fn layers(self) -> &'static str {
        match self {
            Self::Inputs => "twice",
            Self::OffloadedInputs => "offloaded",
            Self::All => "once",
        }
    }
}

/// A batch, and what is kept of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TrainShape {
    pub rows: usize,
    /// Of a row.
    pub tokens: usize,
    pub kept: Kept,
}

impl FromStr for TrainShape {
    type Err = &'static str;

    /// `4x2048`, `4x2048:keep` or `4x2048:offload`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str =
            "expected rows and tokens, such as 4x2048, 4x2048:keep or 4x2048:offload";
        let (shape, kept) = match text.split_once(':') {
            None => (text, Kept::Inputs),
            Some((shape, "keep")) => (shape, Kept::All),
            Some((shape, "offload")) => (shape, Kept::OffloadedInputs),
            Some(_) => return Err(EXPECTED),
        };
        let sizes: Option<Vec<usize>> = shape.split('x').map(|size| size.parse().ok()).collect();
        match sizes.as_deref() {
            Some(&[rows, tokens]) if rows > 0 && tokens > 1 => Ok(Self { rows, tokens, kept }),
            _ => Err(EXPECTED),
        }
    }
}

impl fmt::Display for TrainShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.kept {
            Kept::Inputs => "",
            Kept::OffloadedInputs => ", offloading",
            Kept::All => ", keeping all",
        };
        write!(f, "{} x {}{how}", self.rows, self.tokens)
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
        kept: Kept,
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
        let mut trainer = Trainer::new(model, config, lora, settings, kept != Kept::All)?;
        if kept == Kept::OffloadedInputs {
            trainer.offload_inputs()?;
        }
        Ok(trainer)
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
        kept,
    } = shape;
    let mut trainer = recipe.trainer(model, config, kept)?;
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
    if let Some(warning) = trainer.warn_of_offload() {
        eprintln!("{warning}");
    }
    Ok(TrainRow {
        rows,
        tokens: length,
        keep_all: kept == Kept::All,
        kept,
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
