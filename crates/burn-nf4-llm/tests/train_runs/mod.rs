//! Small runs on the device whose runs are compared, one test at a time.

#![allow(dead_code, reason = "no test has use for all of it")]

#[path = "../models/fixtures.rs"]
mod fixtures;

use std::sync::{Mutex, MutexGuard};

use burn::tensor::Device;
use burn_nf4::model::LinearLayers;
use burn_nf4::peft::{LoraConfig, TargetModules};
use burn_nf4_llm::model::{Decoder, DecoderConfig};
use burn_nf4_llm::train::data::{Batch, Example};
use burn_nf4_llm::train::schedule::{Decay, Schedule};
use burn_nf4_llm::train::{Settings, Trainer};

use fixtures::{fixture, open, random_model};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub fn alone() -> MutexGuard<'static, ()> {
    let lock = ONE_AT_A_TIME.lock();
    lock.unwrap_or_else(|poisoned| poisoned.into_inner())
}

pub fn device() -> Device {
    #[cfg(feature = "cuda")]
    if std::env::var_os("BURN_NF4_TEST_CUDA").is_some() {
        return Device::cuda(0).autodiff();
    }
    #[cfg(feature = "wgpu")]
    return Device::wgpu(Default::default()).autodiff();
    #[cfg(not(feature = "wgpu"))]
    Device::cuda(0).autodiff()
}

pub fn trainer(family: &str, checkpointing: bool, dropout: f64) -> Trainer {
    let device = device();
    device.seed(5);
    let (model, config) = open(&format!("families/{family}/model"), None, &device);
    of_model(model, &config, checkpointing, dropout)
}

/// A run of a model with random weights and so many layers of a family.
pub fn deep_trainer(family: &str, layers: usize, checkpointing: bool, dropout: f64) -> Trainer {
    let device = device();
    device.seed(5);
    let folder = fixture(&format!("families/{family}/model"));
    let mut config = DecoderConfig::from_folder(&folder).expect("it is there");
    config.layers = config.layers.iter().cycle().take(layers).cloned().collect();
    let model = random_model(&config, &device);
    of_model(model, &config, checkpointing, dropout)
}

fn of_model(model: Decoder, config: &DecoderConfig, checkpointing: bool, dropout: f64) -> Trainer {
    let device = model.device();
    let lora = LoraConfig {
        r: 4,
        lora_dropout: dropout,
        ..LoraConfig::new(TargetModules::AllLinear)
    };
    let model = model.with_lora(&lora, &device).expect("it fits");
    let schedule = Schedule {
        peak: 1e-2,
        decay: Decay::Constant,
        warmup: 0,
        total: 100,
    };
    let settings = Settings::new(schedule, &lora).expect("it has a JSON form");
    Trainer::new(model, config, lora, settings, checkpointing).expect("it is trained")
}

/// Rows of 12 tokens, other ones for each number.
pub fn rows(number: usize) -> Batch {
    let row = |row: usize| -> Vec<u32> {
        (0..12)
            .map(|i| ((number * 31 + row * 17 + i * 7) % 50) as u32)
            .collect()
    };
    Batch::new(&[&row(0), &row(1)])
}

/// A row of 24 tokens, in which examples end elsewhere for each number.
pub fn packed(number: usize) -> Batch {
    let first = 5 + number % 7;
    let example = |from: usize, length: usize| {
        Example::whole(
            (from..from + length)
                .map(|i| ((i * 11 + number) % 50) as u32)
                .collect(),
        )
    };
    Batch::packed(&[&example(3, first), &example(8, 24 - first)])
}

/// The losses and norms of steps, each of some batches.
pub fn steps(trainer: &mut Trainer, batches: &[Vec<Batch>]) -> Vec<[f32; 2]> {
    let step = |batches: &Vec<Batch>| {
        let step = trainer.step(batches).expect("a step");
        assert!(!step.skipped);
        [step.loss, step.grad_norm]
    };
    batches.iter().map(step).collect()
}
