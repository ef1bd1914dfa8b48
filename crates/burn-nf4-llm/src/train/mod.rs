//! A training run: its steps, and the folders it can be continued from.

mod backward;
mod batch;
pub mod data;
mod eval;
mod loss;
pub mod optimizer;
mod optimizer_file;
mod packing;
mod parallel;
mod phases;
mod records;
mod replay;
pub mod schedule;
mod settings;

pub use eval::Evaluation;
pub use parallel::Shards;
pub use phases::{Phase, PhaseHook};
pub use replay::Passes;
pub use settings::{MAX_GRAD_NORM, Optim, Settings, model_fingerprint};

use std::borrow::Cow;
use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use burn_nf4::model::LinearLayers;
use burn_nf4::op::{OffloadStack, StepReport, uses_cublaslt};
use burn_nf4::parallel::Rank;
use burn_nf4::peft::{ADAPTER_FILE, Adapter, CONFIG_FILE, LoraConfig};
use serde::{Deserialize, Serialize};

use crate::error::ModelError;
use crate::json::files::read_json;
use crate::model::Decoder;
use crate::model::RopeTables;
use crate::model::config::DecoderConfig;
use crate::train::backward::{Inputs, PassOptions, backward};
use crate::train::data::Batch;
use crate::train::optimizer::Optimizer;
use crate::train::replay::{Replays, SharedOptimizer};

/// So many steps in a row that are not finite end a run.
pub const MAX_SKIPPED: usize = 3;

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
    /// Where several devices train one model: this one.
    rank: Option<Arc<Rank>>,
    /// The packed weights, if each device holds a part of them.
    shards: Option<Shards>,
    /// Whether passes are recorded and replayed, on a device that has graphs, where batches of one size follow each
    /// other; those of packed rows are [filled](Batch::filled) to be so. Not with dropout, not where inputs of
    /// layers wait on the host, and not while somebody is told of phases.
    ///
    /// Whoever holds parameters of [`model`](Self::model) across a step has the next pass launched, and recorded
    /// anew.
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
            rank: None,
            shards: None,
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

    /// Has the run go on as one of several ranks, each with a trainer of its own on a thread of its own, with the same
    /// settings, and the trained values of rank 0; for all ranks. From now on [`step`](Self::step),
    /// [`evaluate`](Self::evaluate) and [`resume`](Self::resume) are for all ranks, which are given the same batches
    /// and files.
    ///
    /// Parameters and moments are the same on all ranks, of which one is to save.
    ///
    /// - `shards`: the packed weights, if this rank has a part of them only
    ///
    /// # Errors
    /// [`ModelError::Setting`] for shards without gradient checkpointing, which would put all weights together and
    /// keep them, and for those of another rank or model; for dropout, as Burn has one random generator for all
    /// devices; and unless all ranks have the same settings. [`ModelError::Nf4`] if another rank has failed.
    pub fn in_group(mut self, rank: Arc<Rank>, shards: Option<Shards>) -> Result<Self, ModelError> {
        if shards.is_some() && !self.checkpointing {
            let expected = "true where ranks keep parts of the weights: the gradients would need all of them at once";
            return Err(ModelError::setting(
                "gradient checkpointing",
                false,
                expected,
            ));
        }
        let layers = self.model.layers.len();
        if let Some(shards) = shards.as_ref().filter(|shards| !shards.fit(&rank, layers)) {
            let given = format!("{} bytes of another rank or model", shards.size_bytes());
            let expected = format!("those of rank {} and of {layers} layers", rank.index());
            return Err(ModelError::setting("shards", given, expected));
        }
        let dropout = self.lora.lora_dropout;
        if dropout > 0.0 && rank.size() > 1 {
            let expected = "0 on several devices: Burn has one random generator for all of them";
            return Err(ModelError::setting("lora_dropout", dropout, expected));
        }
        let settings =
            serde_json::to_string(&self.settings).map_err(ModelError::json("settings"))?;
        for (other, given) in rank.exchange(settings.clone())?.into_iter().enumerate() {
            if given != settings {
                let expected = format!("those of rank {}: {settings}", rank.index());
                return Err(ModelError::setting(
                    format!("settings of rank {other}"),
                    given,
                    expected,
                ));
            }
        }
        self.model = self.optimizer.borrow_mut().broadcast(&rank, self.model)?;
        self.replays = Replays::default();
        (self.rank, self.shards) = (Some(rank), shards);
        Ok(self)
    }

    /// This rank's number, and how many there are.
    fn place(&self) -> [usize; 2] {
        self.rank
            .as_ref()
            .map_or([0, 1], |rank| [rank.index(), rank.size()])
    }

    /// The learning rate of the next step.
    pub fn rate(&self) -> f64 {
        self.settings.schedule.rate(self.step)
    }

    /// One step of the optimizer, on the gradients of all batches. A step with a loss or gradients that are not
    /// finite is left out, which is said in what is returned.
    ///
    /// Of several ranks, which are given the same batches, each makes the passes of its own: the first rank those of
    /// the first batch, and so on in turns. Gradients and loss are summed once, so that a step is that of one
    /// device to rounding.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`] for the third such step in a row, [`ModelError::Setting`] if there is no batch, or if
    /// ranks are given other ones,
    /// [`ModelError::Nf4`] if another rank has failed or if inputs of layers are lost on the way to the host or back,
    /// with nothing changed, and those of [`Optimizer::step`].
    pub fn step(&mut self, batches: &[Batch]) -> Result<Step, ModelError> {
        let mut report = self.try_step(batches)?;
        if !self.has_read_right(report.is_applied())? {
            report = self.try_step(batches)?;
        }
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

    /// The passes over all batches and the step of the optimizer, which is left out if what they give is not finite.
    fn try_step(&mut self, batches: &[Batch]) -> Result<StepReport, ModelError> {
        let made = self.passes_and_step(batches);
        if made.is_err() {
            self.optimizer.borrow_mut().drop_gradients();
            self.replays.forget();
        }
        made
    }

    fn passes_and_step(&mut self, batches: &[Batch]) -> Result<StepReport, ModelError> {
        let targets: usize = batches.iter().map(Batch::targets).sum();
        if let Some(rank) = &self.rank {
            let given = (batches.len(), targets);
            if let Some(other) = rank
                .exchange(given)?
                .into_iter()
                .find(|&other| other != given)
            {
                let batches = |(count, targets)| format!("{count} with {targets} targets");
                let expected = format!("the same on all ranks: another has {}", batches(other));
                return Err(ModelError::setting("batches", batches(given), expected));
            }
        }
        let first = batches.first();
        let first = first.ok_or_else(|| ModelError::setting("batches", 0, "at least one"))?;
        let [rank, ranks] = self.place();
        let mut own: Vec<(usize, &Batch)> = batches.iter().enumerate().collect();
        own.retain(|(index, _)| index % ranks == rank);
        let mut loss = self.passes_of(&own, targets)?;
        // Where layers are gathered all ranks have to come to each.
        if self.shards.is_some() && own.len() < batches.len().div_ceil(ranks) {
            loss = loss + self.idle_pass(first)?;
        }
        let rate = self.rate();
        let mut optimizer = self.optimizer.borrow_mut();
        if let Some(rank) = &self.rank {
            loss = optimizer.all_reduce(rank, loss)?;
        }
        optimizer.step(rate, &mut self.model, loss)?;
        Ok(optimizer.report()?.expect("a step was made"))
    }

    /// Whether the replays of the last step, on all ranks, read what they should. One that was applied needs no look.
    fn has_read_right(&mut self, applied: bool) -> Result<bool, ModelError> {
        let is_right = self.replays.check(applied);
        match self.rank.as_ref().filter(|_| !applied) {
            Some(rank) => Ok(!rank.exchange(is_right)?.contains(&false)),
            None => Ok(is_right),
        }
    }

    /// Whether passes over batches of this size are replayed where they follow each other.
    pub fn can_replay(&self, batch: &Batch) -> bool {
        self.replays() && Replays::is_worth_it(batch.rows * batch.length)
    }

    /// Whether passes are replayed where batches of one size follow each other.
    fn replays(&self) -> bool {
        // A replay drops what was dropped in the pass that was recorded, and tells of no phases.
        let is_plain = self.lora.lora_dropout == 0.0 && self.on_phase.is_none();
        let stays_on_device = self.shards.is_none() && self.offload.is_none();
        is_plain && stays_on_device && self.capture && self.replays.can_replay(&self.model)
    }

    /// A batch, filled if that lets passes over it be replayed.
    fn to_replay<'a>(&self, batch: &'a Batch) -> Cow<'a, Batch> {
        if self.replays() {
            let filled = batch.filled();
            if Replays::is_worth_it(filled.rows * filled.length) {
                return filled;
            }
        }
        Cow::Borrowed(batch)
    }

    /// The losses of this rank's batches of a step, `[1]`, and their gradients to the optimizer.
    ///
    /// - `own`: with their numbers among all batches of the step
    fn passes_of(
        &mut self,
        own: &[(usize, &Batch)],
        targets: usize,
    ) -> Result<Tensor<1>, ModelError> {
        let device = self.model.device().without_autodiff();
        let mut loss = Tensor::zeros([1], (&device, DType::F32));
        let mut all = own.iter();
        let mut next = |trainer: &mut Self| {
            let &(index, batch) = all.next()?;
            let batch = trainer.to_replay(batch);
            let inputs = Inputs::new(&batch, targets, &trainer.model, &mut trainer.rope);
            Some((index, inputs))
        };
        let mut pass = next(self);
        self.record(pass.as_ref().map(|(_, inputs)| inputs))?;
        while let Some((index, inputs)) = pass {
            loss = loss + self.pass(index, inputs)?;
            pass = next(self);
        }
        Ok(loss)
    }

    /// Records the first pass of a step if it is due; for all ranks. One records at a time, and while it does no other
    /// uses its device: CUDA forbids much to all threads of a process then.
    fn record(&mut self, inputs: Option<&Inputs>) -> Result<(), ModelError> {
        let can_replay = self.replays();
        let inputs = inputs.filter(|inputs| can_replay && self.replays.is_due(inputs));
        let Some(rank) = self.rank.clone().filter(|_| self.shards.is_none()) else {
            if let Some(inputs) = inputs {
                self.record_pass(inputs);
            }
            return Ok(());
        };
        if !rank.exchange(inputs.is_some())?.contains(&true) {
            return Ok(());
        }
        sync(rank.device())?;
        rank.in_turn(|| {
            if let Some(inputs) = inputs {
                self.record_pass(inputs);
            }
            sync(rank.device())
        })?
    }

    fn record_pass(&mut self, inputs: &Inputs) {
        let (model, optimizer) = (&self.model, &self.optimizer);
        self.replays
            .record(model, optimizer, inputs, self.checkpointing);
    }

    /// The loss of a batch of a step, and its gradients to the optimizer.
    fn pass(&mut self, index: usize, inputs: Inputs) -> Result<Tensor<1>, ModelError> {
        if self.replays() {
            let loss = self.replays.replay(&self.optimizer, &inputs);
            if let Some(loss) = loss {
                return Ok(loss);
            }
        }
        let dropout = self.lora.lora_dropout > 0.0;
        let options = PassOptions {
            checkpointing: self.checkpointing,
            offload: self.offload.as_ref(),
            dropout_seed: dropout.then(|| self.dropout_seed(index)),
            on_phase: self.on_phase.as_ref(),
            shards: self.shards.as_ref(),
        };
        let mut optimizer = self.optimizer.borrow_mut();
        Ok(backward(&self.model, inputs, options, &mut optimizer)?.inner())
    }

    /// A pass that adds nothing: its loss and gradients are multiplied by zero.
    fn idle_pass(&mut self, batch: &Batch) -> Result<Tensor<1>, ModelError> {
        let mut inputs = Inputs::new(batch, 1, &self.model, &mut self.rope);
        inputs.factor = inputs.factor * 0.0;
        self.pass(0, inputs)
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

fn sync(device: &Device) -> Result<(), ModelError> {
    let synced = device.sync();
    synced.map_err(|error| ModelError::device(device, error))
}
