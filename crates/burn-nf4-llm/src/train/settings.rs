//! What decides what a run computes.

use std::collections::BTreeSet;

use burn_nf4::checkpoint::Checkpoint;
use burn_nf4::op::{AdamWMoments, AdamWSettings};
use burn_nf4::peft::LoraConfig;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::train::data::StableHash;
use crate::train::schedule::{Decay, Schedule};

/// The largest norm of gradients where none is asked for: that of transformers' trainer.
pub const MAX_GRAD_NORM: f32 = 1.0;

/// Which optimizer a run has, by the names of transformers' trainer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Optim {
    /// AdamW as PyTorch has it, moments in f32.
    #[default]
    #[serde(rename = "adamw_torch")]
    #[cfg_attr(feature = "cli", value(name = "adamw_torch"))]
    AdamwTorch,
    /// AdamW as bitsandbytes has it, moments in 8 bit.
    #[serde(rename = "adamw_8bit")]
    #[cfg_attr(feature = "cli", value(name = "adamw_8bit", alias = "adamw_bnb_8bit"))]
    Adamw8bit,
}

impl From<Optim> for AdamWMoments {
    fn from(optim: Optim) -> Self {
        match optim {
            Optim::AdamwTorch => Self::F32,
            Optim::Adamw8bit => Self::Bits8,
        }
    }
}

/// All that decides what a run computes. A run is continued only under the same settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The learning rate, step by step.
    pub schedule: Schedule,
    /// The optimizer.
    #[serde(default)]
    pub optim: Optim,
    /// Of AdamW.
    pub weight_decay: f32,
    /// The largest norm of all gradients together, to which larger ones are scaled down; 0 for none.
    #[serde(default)]
    pub max_grad_norm: f32,
    /// Rows of a batch.
    pub batch_size: usize,
    /// Batches whose gradients make a step, on all devices together.
    pub grad_accum: usize,
    /// Most tokens of a row.
    pub seq_len: usize,
    /// Seed of the order of texts.
    pub seed: u64,
    /// Of the data, see `Dataset::fingerprint`.
    pub data: u64,
    /// Of the model, see [`model_fingerprint`]; 0 for none in particular.
    #[serde(default)]
    pub model: u64,
    /// What the model computes in, if that is to stay the same.
    #[serde(default)]
    pub compute: Option<String>,
    /// `adapter_config.json`.
    pub lora: Value,
}

/// Bytes of each tensor that a fingerprint looks at.
const FINGERPRINT_BYTES: usize = 4096;

/// Tells models apart: their names, types and shapes of tensors, and the first bytes of each. The same wherever the
/// folder lies.
///
/// # Errors
/// Those of [`Checkpoint::tensor_bytes`].
pub fn model_fingerprint(checkpoint: &Checkpoint) -> Result<u64, ModelError> {
    let mut keys: Vec<&str> = checkpoint.keys().collect();
    keys.sort_unstable();
    let mut hash = StableHash::new();
    for key in keys {
        let info = checkpoint.tensor_info(key)?;
        hash.add(format!("{key} {} {:?}", info.dtype, info.shape).as_bytes());
        let bytes = checkpoint.tensor_bytes(key)?;
        hash.add(&bytes[..bytes.len().min(FINGERPRINT_BYTES)]);
    }
    Ok(hash.0)
}

impl Settings {
    /// Steps of one row of at most 512 tokens, without weight decay, a largest norm of 1, seed 42, on no data in
    /// particular.
    ///
    /// # Errors
    /// [`ModelError::Json`] if the settings of the adapter have no JSON form.
    pub fn new(schedule: Schedule, lora: &LoraConfig) -> Result<Self, ModelError> {
        // The model may lie elsewhere when the run goes on.
        let lora = LoraConfig {
            base_model_name_or_path: None,
            ..lora.clone()
        };
        let lora = serde_json::to_value(&lora).map_err(ModelError::json("adapter_config.json"))?;
        Ok(Self {
            schedule,
            optim: Optim::default(),
            weight_decay: 0.0,
            max_grad_norm: MAX_GRAD_NORM,
            batch_size: 1,
            grad_accum: 1,
            seq_len: 512,
            seed: 42,
            data: 0,
            model: 0,
            compute: None,
            lora,
        })
    }

    pub(super) fn adamw(&self) -> AdamWSettings {
        AdamWSettings {
            weight_decay: self.weight_decay.into(),
            max_grad_norm: (self.max_grad_norm != 0.0).then(|| self.max_grad_norm.into()),
            ..AdamWSettings::default()
        }
    }

    /// Says which settings differ from those of a saved run that did `steps` steps, and refuses
    /// them, but for the length of a run whose rate does not depend on it.
    pub(super) fn check_resumes(&self, saved: &Self, steps: usize) -> Result<(), String> {
        let total = self.schedule.total;
        if total < steps {
            return Err(format!(
                "has {steps} steps already, more than the {total} asked for"
            ));
        }
        let mut known = saved.clone();
        // Runs of earlier versions do not tell.
        if known.model == 0 {
            (known.model, known.compute) = (self.model, self.compute.clone());
        }
        if saved.schedule.decay == Decay::Constant {
            known.schedule.total = total;
        }
        let value = |settings| serde_json::to_value(settings).map_err(|error| error.to_string());
        let mut differing = Vec::new();
        differences("", &value(&known)?, &value(self)?, &mut differing);
        if differing.is_empty() {
            return Ok(());
        }
        let mut message = format!("was saved under other settings: {}", differing.join("; "));
        if known.schedule.total != total {
            message += "; a rate that falls over the steps goes on only to the same total";
        }
        if known.grad_accum != self.grad_accum {
            message += "; grad_accum counts the passes of a step on all devices";
        }
        Err(message)
    }
}

/// The fields that differ, each with both values.
fn differences(name: &str, saved: &Value, given: &Value, found: &mut Vec<String>) {
    if saved == given {
        return;
    }
    if let (Value::Object(saved), Value::Object(given)) = (saved, given) {
        let names: BTreeSet<&String> = saved.keys().chain(given.keys()).collect();
        for field in names {
            let value = |entries: &Map<String, Value>| entries.get(field).cloned();
            let (saved, given) = (value(saved), value(given));
            let path = match name {
                "" => field.clone(),
                name => format!("{name}.{field}"),
            };
            differences(
                &path,
                &saved.unwrap_or_default(),
                &given.unwrap_or_default(),
                found,
            );
        }
        return;
    }
    found.push(match name {
        // A fingerprint, which says nothing to people.
        "data" => "the training data differs".into(),
        "model" => "the model differs".into(),
        name => format!("{name} was {saved}, now {given}"),
    });
}
