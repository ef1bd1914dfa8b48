//! Repeats the run of `scripts/peer_losses.py` from its adapter, with its batches, and compares the losses.
//!
//! ```text
//! cargo run --release -p burn-nf4-llm --example peer_losses -- FOLDER RUN [DEVICE]
//! ```
//!
//! `FOLDER` is the model in NF4, `RUN` what the script has written, `DEVICE` cuda or cpu; without it Burn chooses.
//! Computes in the type of the run, and writes `RUN/ours.json` for the script's table.

use std::error::Error;
use std::fs;
use std::path::Path;

use burn::tensor::Device;
use burn_nf4::checkpoint::{CheckpointStore, SafetensorsFile};
use burn_nf4::format::FloatType;
use burn_nf4::model::LinearLayers;
use burn_nf4::peft::Adapter;
use burn_nf4_llm::model::{DecoderConfig, load};
use burn_nf4_llm::train::data::Batch;
use burn_nf4_llm::train::schedule::{Decay, Schedule};
use burn_nf4_llm::train::{Settings, Step, Trainer};
use serde::Deserialize;
use serde_json::json;

/// `train.json`.
#[derive(Deserialize)]
struct PeerRun {
    lr: f64,
    max_grad_norm: f32,
    dtype: FloatType,
    losses: Vec<f32>,
}

fn device(name: Option<&str>) -> Result<Device, String> {
    match name {
        None => Ok(Device::default()),
        #[cfg(feature = "flex")]
        Some("cpu") => Ok(Device::flex()),
        #[cfg(feature = "cuda")]
        Some("cuda") => Ok(Device::cuda(0)),
        Some(name) => Err(format!(
            "no device {name}: expected cpu or cuda, with its cargo feature (flex, cuda)"
        )),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (folder, run, name) = match arguments.as_slice() {
        [folder, run] => (folder, run, None),
        [folder, run, name] => (folder, run, Some(name.as_str())),
        _ => return Err("usage: peer_losses FOLDER RUN [DEVICE]".into()),
    };
    let (folder, run) = (Path::new(folder), Path::new(run));
    let peer: PeerRun = serde_json::from_slice(&fs::read(run.join("train.json"))?)?;
    let batches = SafetensorsFile::open(run.join("batches.safetensors"))?;
    let shape = batches.tensor_info("batches")?.shape.to_vec();
    let ids: Vec<u32> = batches
        .tensor_bytes("batches")?
        .chunks_exact(8)
        .map(|id| Ok(u32::try_from(i64::from_le_bytes(id.try_into()?))?))
        .collect::<Result<_, Box<dyn Error>>>()?;

    let device = device(name)?.autodiff();
    let config = DecoderConfig::from_folder(folder)?;
    let store = CheckpointStore::open(folder)?;
    let model = load(store, &config, peer.dtype, &device)?;
    let adapter = Adapter::open(run.join("adapter_init"))?;
    let lora = adapter.config().clone();
    let model = model.apply_adapter(&adapter, &device)?;
    let schedule = Schedule {
        peak: peer.lr,
        decay: Decay::Constant,
        warmup: 0,
        total: peer.losses.len(),
    };
    let settings = Settings {
        max_grad_norm: peer.max_grad_norm,
        ..Settings::new(schedule, &lora)?
    };
    let mut trainer = Trainer::new(model, &config, lora, settings, true)?;
    let mut losses = Vec::new();
    let mut largest = 0f32;
    let steps = ids.chunks_exact(shape[1] * shape[2]).zip(peer.losses);
    for (step, (batch, theirs)) in (1..).zip(steps) {
        let batch = Batch::new(&batch.chunks_exact(shape[2]).collect::<Vec<_>>());
        let Step {
            loss: ours,
            skipped,
            ..
        } = trainer.step(&[batch])?;
        if skipped {
            return Err(format!("step {step} is not finite").into());
        }
        let difference = (ours - theirs).abs();
        largest = largest.max(difference);
        losses.push(ours);
        println!("step {step}: {ours:.6}, PEFT {theirs:.6}, apart by {difference:.1e}");
    }
    println!("the largest difference is {largest:.1e}");
    fs::write(
        run.join("ours.json"),
        serde_json::to_vec_pretty(&json!({ "losses": losses }))?,
    )?;
    Ok(())
}
