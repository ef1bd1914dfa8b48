//! A training run: its steps, and the folders it can be continued from.

mod backward;
mod batch;
pub mod data;
mod eval;
mod loss;
pub mod optimizer;
mod optimizer_file;
mod packing;
mod phases;
mod records;
mod replay;
pub mod schedule;

pub use eval::Evaluation;
pub use phases::{Phase, PhaseHook};
pub use replay::Passes;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use burn::tensor::{DType, Tensor};
use burn_nf4::model::LinearLayers;
use burn_nf4::op::{AdamWMoments, AdamWSettings, OffloadStack, uses_cublaslt};
use burn_nf4::peft::{ADAPTER_FILE, Adapter, CONFIG_FILE, LoraConfig};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::json::files::read_json;
use crate::model::Decoder;
use crate::model::RopeTables;
use crate::model::config::DecoderConfig;
use crate::train::backward::{Inputs, PassOptions, backward};
use crate::train::data::Batch;
use crate::train::optimizer::Optimizer;
use crate::train::replay::{Replays, SharedOptimizer};
use crate::train::schedule::{Decay, Schedule};

/// The largest norm of gradients where none is asked for: that of transformers' trainer.
pub const MAX_GRAD_NORM: f32 = 1.0;

/// So many steps in a row that are not finite end a run.
pub const MAX_SKIPPED: usize = 3;

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
    /// Batches whose gradients make a step.
    pub grad_accum: usize,
    /// Most tokens of a row.
    pub seq_len: usize,
    /// Seed of the order of texts.
    pub seed: u64,
    /// Of the data, see `Dataset::fingerprint`.
    pub data: u64,
    /// `adapter_config.json`.
    pub lora: Value,
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
            lora,
        })
    }

    fn adamw(&self) -> AdamWSettings {
        AdamWSettings {
            weight_decay: self.weight_decay.into(),
            max_grad_norm: (self.max_grad_norm != 0.0).then(|| self.max_grad_norm.into()),
            ..AdamWSettings::default()
        }
    }

    /// Says which settings differ from those of a saved run that did `steps` steps, and refuses
    /// them, but for the length of a run whose rate does not depend on it.
    fn check_resumes(&self, saved: &Self, steps: usize) -> Result<(), String> {
        let total = self.schedule.total;
        if total < steps {
            return Err(format!(
                "has {steps} steps already, more than the {total} asked for"
            ));
        }
        let mut known = saved.clone();
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
        name => format!("{name} was {saved}, now {given}"),
    });
}

/// A run under way.
pub struct Trainer {
    /// What is trained. The values of its trained parameters are the optimizer's: a step puts them in anew. What
    /// else is changed in it does not reach passes that are recorded already, see [`capture`](Self::capture).
    pub model: Decoder,
    optimizer: SharedOptimizer,
    replays: Replays,
    rope: RopeTables,
    lora: LoraConfig,
    /// The adapter that the run went on from, with all that is not trained.
    adapter: Option<Adapter>,
    settings: Settings,
    checkpointing: bool,
    offload: Option<RefCell<OffloadStack<3>>>,
    /// Whether passes are recorded and replayed, on a device that has graphs, where batches of one size follow each
    /// other. Not with dropout, not where inputs of layers wait on the host, and not while somebody is told of phases.
    pub capture: bool,
    /// Is told of the phases of a step.
    pub on_phase: Option<PhaseHook>,
    /// Steps done, those that were left out included.
    pub step: usize,
    /// Steps left out, one after the other, up to now.
    skipped: usize,
}

/// What became of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Its number, counted from one.
    pub number: usize,
    /// The mean loss of the targets before the step.
    pub loss: f32,
    /// The norm of all gradients together, before they were scaled down to the largest.
    pub grad_norm: f32,
    /// Whether the step was left out because the loss or the norm is not finite. Parameters and moments are then
    /// as they were.
    pub skipped: bool,
}

/// What a checkpoint says of the run.
#[derive(Serialize, Deserialize)]
struct State {
    step: usize,
    #[serde(default)]
    skipped: usize,
    settings: Settings,
}

const STATE_FILE: &str = "trainer_state.json";
const CHECKPOINT_PREFIX: &str = "checkpoint-";
/// Of one that is being written.
const PART_PREFIX: &str = "part-";

impl Trainer {
    /// A run from the start, of a model with its branches on.
    ///
    /// # Errors
    /// Those of [`Optimizer::new`].
    pub fn new(
        model: Decoder,
        config: &DecoderConfig,
        lora: LoraConfig,
        settings: Settings,
        checkpointing: bool,
    ) -> Result<Self, ModelError> {
        let (optimizer, model) = optimizer_of(model, &settings)?;
        Ok(Self {
            rope: model.rope_tables(config),
            model,
            optimizer: Rc::new(RefCell::new(optimizer)),
            replays: Replays::default(),
            lora,
            adapter: None,
            settings,
            checkpointing,
            offload: None,
            capture: true,
            on_phase: None,
            step: 0,
            skipped: 0,
        })
    }

    /// Has the inputs of layers wait in the memory of the host between the pass forward and the pass backward, with
    /// the copies behind what the device computes. All else is computed twice, as with checkpointing, and to the
    /// same bits; passes are launched, as a graph cannot hold what is on the host.
    ///
    /// # Errors
    /// [`Nf4Error::HostDevice`](burn_nf4::Nf4Error::HostDevice) on a CPU.
    pub fn offload_inputs(&mut self) -> Result<(), ModelError> {
        self.offload = Some(RefCell::new(OffloadStack::new(&self.model.device())?));
        self.checkpointing = true;
        self.replays = Replays::default();
        Ok(())
    }

    /// What is to be told of the copies to the host up to now, if that is anything.
    pub fn warn_of_offload(&self) -> Option<String> {
        let pageable = self.offload.as_ref()?.borrow().pageable_copies();
        (pageable > 0).then(|| {
            format!(
                "warning: {pageable} inputs of layers went to memory of the host that is not pinned, as the \
                 system gave no more of it: steps are slower"
            )
        })
    }

    /// The learning rate of the next step.
    pub fn rate(&self) -> f64 {
        self.settings.schedule.rate(self.step)
    }

    /// One step of the optimizer, on the gradients of all batches. A step with a loss or gradients that are not
    /// finite is left out, which is said in what is returned.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`] for the third such step in a row, [`ModelError::Setting`] if there is no batch,
    /// [`ModelError::Replay`] if a recorded pass read what it should not, whose step is left out,
    /// [`Nf4Error::HostCopy`](burn_nf4::Nf4Error::HostCopy) if inputs of layers are lost on the way to the host or
    /// back, with nothing changed, and those of [`Optimizer::step`].
    pub fn step(&mut self, batches: &[Batch]) -> Result<Step, ModelError> {
        let loss = self.loss(batches).inspect_err(|_| {
            self.optimizer.borrow_mut().drop_gradients();
        })?;
        let rate = self.rate();
        let report = {
            let mut optimizer = self.optimizer.borrow_mut();
            if let Err(error) = optimizer.step(rate, &mut self.model, loss) {
                optimizer.drop_gradients();
                return Err(error);
            }
            optimizer.report().expect("a step was made")
        };
        self.replays
            .check(report.is_applied(), &self.model.device())?;
        if let Some(on_phase) = &self.on_phase {
            on_phase(Phase::Step);
        }
        self.step += 1;
        let step = Step {
            number: self.step,
            loss: report.loss,
            grad_norm: report.grad_norm,
            skipped: !report.is_applied(),
        };
        self.skipped = if step.skipped { self.skipped + 1 } else { 0 };
        if self.skipped >= MAX_SKIPPED {
            return Err(ModelError::NotFinite {
                step: step.number,
                loss: step.loss,
                grad_norm: step.grad_norm,
                skipped: self.skipped,
            });
        }
        Ok(step)
    }

    /// The loss of a step, and the gradients of all its batches to the optimizer.
    fn loss(&mut self, batches: &[Batch]) -> Result<Tensor<1>, ModelError> {
        let targets = batches.iter().map(Batch::targets).sum();
        let mut loss = None;
        for (index, batch) in batches.iter().enumerate() {
            let part = self.pass(batch, targets, index)?;
            loss = Some(match loss {
                Some(sum) => sum + part,
                None => part,
            });
        }
        loss.ok_or_else(|| ModelError::setting("batches", 0, "at least one"))
    }

    /// The loss of a batch of a step, and its gradients to the optimizer.
    fn pass(
        &mut self,
        batch: &Batch,
        targets: usize,
        index: usize,
    ) -> Result<Tensor<1>, ModelError> {
        let inputs = Inputs::new(batch, targets, &self.model, &mut self.rope);
        let dropout = self.lora.lora_dropout > 0.0;
        // A replay drops what was dropped in the pass that was recorded, and tells of no phases.
        let may_replay = !dropout && self.on_phase.is_none() && self.offload.is_none();
        if may_replay && self.capture {
            let (model, optimizer) = (&self.model, &self.optimizer);
            let checkpointing = self.checkpointing;
            let replays = &mut self.replays;
            let loss = replays.run(model, optimizer, &inputs, checkpointing, index == 0);
            if let Some(loss) = loss {
                return Ok(loss);
            }
        }
        let options = PassOptions {
            checkpointing: self.checkpointing,
            offload: self.offload.as_ref(),
            dropout_seed: dropout.then(|| self.dropout_seed(index)),
            on_phase: self.on_phase.as_ref(),
        };
        let mut optimizer = self.optimizer.borrow_mut();
        Ok(backward(&self.model, inputs, options, &mut optimizer)?.inner())
    }

    /// How passes over batches of the last size are made.
    pub fn passes(&self) -> Passes {
        self.replays.passes()
    }

    /// Apart for every batch of the run, with room for one seed a layer.
    fn dropout_seed(&self, batch: usize) -> u64 {
        let count = self.step * self.settings.grad_accum + batch;
        self.settings.seed ^ (count as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// Saves the adapter in PEFT's form.
    pub fn save_adapter(&self, folder: &Path) -> Result<(), ModelError> {
        let model = self.optimizer.borrow().to_save(self.model.clone());
        let adapter = match &self.adapter {
            Some(adapter) => model.extract_into(adapter.clone())?,
            None => model.extract_adapter(&self.lora)?,
        };
        adapter.save(folder)?;
        Ok(())
    }

    /// Saves all that the run needs to go on, in `checkpoint-N` of the folder.
    pub fn save_checkpoint(&mut self, output: &Path) -> Result<PathBuf, ModelError> {
        let folder = output.join(format!("{CHECKPOINT_PREFIX}{}", self.step));
        // Under another name until it is whole, so that an interrupted write is not taken up.
        let part = output.join(format!("{PART_PREFIX}{}", self.step));
        for stale in [&part, &folder] {
            if stale.exists() {
                fs::remove_dir_all(stale).map_err(ModelError::io(stale))?;
            }
        }
        self.save_adapter(&part)?;
        self.optimizer.borrow_mut().save(&part, self.step)?;
        let state = State {
            step: self.step,
            skipped: self.skipped,
            settings: self.settings.clone(),
        };
        let path = part.join(STATE_FILE);
        let text = serde_json::to_vec_pretty(&state).map_err(ModelError::json(&path))?;
        fs::write(&path, text).map_err(ModelError::io(&path))?;
        fs::rename(&part, &folder).map_err(ModelError::io(&folder))?;
        Ok(folder)
    }

    /// Goes on where a checkpoint was saved.
    pub fn resume(mut self, folder: &Path) -> Result<Self, ModelError> {
        let state: State = read_json(&folder.join(STATE_FILE))?;
        self.settings
            .check_resumes(&state.settings, state.step)
            .map_err(|message| resume_error(folder, message))?;
        let device = self.model.device();
        let adapter = Adapter::open(folder)?;
        let base = self.model.without_branches()?;
        let model = base.apply_adapter(&adapter, &device)?;
        self.adapter = Some(adapter);
        let settings = &self.settings;
        let (mut optimizer, model) = optimizer_of(model, settings)?;
        self.model = optimizer.load(folder, state.step, model)?;
        self.optimizer = Rc::new(RefCell::new(optimizer));
        self.replays = Replays::default();
        self.step = state.step;
        self.skipped = state.skipped;
        Ok(self)
    }
}

/// The optimizer of a model, and the model with its parameters there.
fn optimizer_of(model: Decoder, settings: &Settings) -> Result<(Optimizer, Decoder), ModelError> {
    let in_bf16 = model.dtype() == DType::BF16 && uses_cublaslt(&model.device())?;
    let of_branches = in_bf16.then_some(DType::BF16);
    Optimizer::new(model, settings.adamw(), settings.optim.into(), of_branches)
}

/// The checkpoint of a folder that was saved last.
pub fn latest_checkpoint(output: &Path) -> Result<Option<PathBuf>, ModelError> {
    let checkpoints = checkpoints(output, CHECKPOINT_PREFIX)?;
    let latest = checkpoints.into_iter().max_by_key(|&(step, _)| step);
    Ok(latest.map(|(_, path)| path))
}

/// Removes what a run has left in a folder: its checkpoints and its adapter. All else stays.
///
/// # Errors
/// [`ModelError::Io`].
pub fn remove_run(output: &Path) -> Result<(), ModelError> {
    for prefix in [CHECKPOINT_PREFIX, PART_PREFIX] {
        for (_, path) in checkpoints(output, prefix)? {
            fs::remove_dir_all(&path).map_err(ModelError::io(&path))?;
        }
    }
    for name in [ADAPTER_FILE, CONFIG_FILE] {
        let path = output.join(name);
        if path.exists() {
            fs::remove_file(&path).map_err(ModelError::io(&path))?;
        }
    }
    Ok(())
}

/// The folders of a run whose names are a prefix and a step.
fn checkpoints(output: &Path, prefix: &str) -> Result<Vec<(usize, PathBuf)>, ModelError> {
    if !output.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(output).map_err(ModelError::io(output))? {
        let entry = entry.map_err(ModelError::io(output))?;
        let name = entry.file_name();
        let name = name.to_str().and_then(|name| name.strip_prefix(prefix));
        if let Some(step) = name.and_then(|step| step.parse().ok()) {
            found.push((step, entry.path()));
        }
    }
    Ok(found)
}

fn resume_error(path: &Path, message: impl ToString) -> ModelError {
    ModelError::Resume {
        path: path.into(),
        message: message.to_string(),
    }
}
