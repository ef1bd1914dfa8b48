//! Steps of training.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::model::LinearLayers;
use burn_nf4::parallel;
use burn_nf4::peft::{LoraConfig, TargetModules};
use burn_nf4_llm::ModelError;
use burn_nf4_llm::model::{Decoder, DecoderConfig, random, random_by_layers};
use burn_nf4_llm::train::data::Batch;
use burn_nf4_llm::train::schedule::{Decay, Schedule};
use burn_nf4_llm::train::{Settings, Shards, Trainer};
use serde::Serialize;

use super::measure::{median, milliseconds, tokens};
use super::report::{Memory, TrainRow};
use crate::device::sync;
use crate::finetune::memory::MemoryReport;

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

/// How a run is made.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    /// Whether passes are launched where they could be replayed.
    pub eager: bool,
    /// Steps that are timed.
    pub steps: usize,
    /// Whether each of several devices keeps a part of the packed weights only.
    pub shard: bool,
    /// What the linear layers are packed in.
    pub quant: QuantConfig,
}

/// Times steps of a run of its own, so that nothing is there of other shapes.
///
/// - `device`: that of the model, without autodiff
pub fn train(
    model: Decoder,
    config: &DecoderConfig,
    recipe: Recipe,
    shape: TrainShape,
    method: Method,
    device: &Device,
) -> Result<TrainRow, ModelError> {
    let trainer = recipe.trainer(model, config, shape.kept)?;
    let run = Run {
        trainer,
        device,
        devices: 1,
    };
    run.time(config, recipe, shape, method)
}

/// Times steps on several devices, each of which has a batch of the shape in every step.
pub fn train_on(
    devices: Vec<Device>,
    config: &DecoderConfig,
    dtype: FloatType,
    recipe: Recipe,
    shape: TrainShape,
    method: Method,
) -> Result<TrainRow, ModelError> {
    let config = config.clone();
    // Sharded weights are drawn by each rank for itself: what is gathered is of several draws, but the same on each.
    let rows = parallel::run(devices, move |rank| {
        let rank = Arc::new(rank);
        let device = rank.device().clone();
        let on = device.clone().autodiff();
        let (model, shards) = match method.shard {
            true => {
                let mut shards = Shards::new(&rank);
                let mut take = |layer| shards.take(layer);
                let model = random_by_layers(&config, method.quant, dtype, None, &on, &mut take)?;
                (model, Some(shards))
            }
            false => {
                // The same weights on each.
                let model = rank.in_turn(|| {
                    on.seed(0);
                    let model = random(&config, method.quant, dtype, None, &on)?;
                    sync(&on)?;
                    Ok::<_, ModelError>(model)
                })??;
                (model, None)
            }
        };
        sync(&device)?;
        device.memory_cleanup();
        let kept_bytes = shards.as_ref().map(Shards::size_bytes);
        let trainer = recipe.trainer(model, &config, shape.kept)?;
        let run = Run {
            trainer: trainer.in_group(rank.clone(), shards)?,
            device: &device,
            devices: rank.size(),
        };
        let row = run.time(&config, recipe, shape, method)?;
        Ok::<_, ModelError>(TrainRow {
            sharded_bytes: kept_bytes,
            ..row
        })
    })?;
    // All wait for each other in every step.
    let most = |of: fn(&TrainRow) -> Option<u64>| rows.iter().filter_map(of).max();
    let peak_in_use_bytes = most(|row| row.peak_in_use_bytes);
    let first = rows.into_iter().next().expect("there is a device");
    Ok(TrainRow {
        peak_in_use_bytes,
        ..first
    })
}

/// A run whose steps are timed.
struct Run<'a> {
    trainer: Trainer,
    /// Without autodiff.
    device: &'a Device,
    devices: usize,
}

impl Run<'_> {
    fn time(
        mut self,
        config: &DecoderConfig,
        recipe: Recipe,
        shape: TrainShape,
        method: Method,
    ) -> Result<TrainRow, ModelError> {
        let TrainShape {
            rows,
            tokens: length,
            kept,
        } = shape;
        self.trainer.capture = !method.eager;
        let ids = tokens(rows * length, config);
        let batch = Batch::new(&ids.chunks(length).collect::<Vec<_>>());
        let batches = vec![batch; self.devices];
        let first = self.step(&batches)?;
        // This one waits for the device after each layer, and is launched. With the hook none would be replayed.
        let seen = MemoryReport::new(self.device);
        self.trainer.on_phase = Some(seen.hook());
        self.step(&batches)?;
        self.trainer.on_phase = None;
        let peak_in_use_bytes = seen.most();
        // Nobody may ask the device for anything while a pass is recorded or timed.
        drop(seen);
        if self.trainer.can_replay(&batches[0]) {
            self.step(&batches)?;
        }
        let times = (0..method.steps).map(|_| self.step(&batches));
        let time = median(times.collect::<Result<_, _>>()?);
        if let Some(warning) = self.trainer.warn_of_offload() {
            eprintln!("{warning}");
        }
        Ok(TrainRow {
            devices: self.devices,
            sharded_bytes: None,
            rows,
            tokens: length,
            keep_all: kept == Kept::All,
            kept,
            rank: recipe.rank,
            ms: milliseconds(time),
            tokens_s: (self.devices * rows * length) as f64 / time.as_secs_f64(),
            first_ms: milliseconds(first),
            passes: self.trainer.passes(),
            peak_in_use_bytes,
            memory: Memory::of(self.device),
        })
    }

    /// The time of a step, up to its loss on the host.
    fn step(&mut self, batches: &[Batch]) -> Result<Duration, ModelError> {
        let start = Instant::now();
        let loss = self.trainer.step(batches)?.loss;
        let time = start.elapsed();
        if !loss.is_finite() {
            return Err(ModelError::setting("the loss", loss, "a finite number"));
        }
        Ok(time)
    }
}
