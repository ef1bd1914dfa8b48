//! The command `finetune`.

mod data;
mod job;
pub mod memory;
pub mod plot;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use burn::tensor::Device;
use burn_nf4::checkpoint::is_expert;
use burn_nf4::model::LinearLayers;
use burn_nf4::parallel;
use burn_nf4::peft::{LoraConfig, TargetModules};
use burn_nf4_llm::error::ModelError;
use burn_nf4_llm::model::{Decoder, DecoderConfig, HEAD};
use burn_nf4_llm::train::data::Dataset;
use burn_nf4_llm::train::schedule::{Decay, Schedule};
use burn_nf4_llm::train::{MAX_GRAD_NORM, Optim, Settings, latest_checkpoint};
use clap::Args;

use crate::model_args::{ModelArgs, Prepared, at_least, check_rows};
use crate::output::end_at_once;
use data::DataArgs;
use job::{Held, Job, LOCK_FILE};

/// Train a LoRA adapter beside the frozen 4-bit weights (QLoRA).
#[derive(Args, Clone, Debug)]
pub struct FinetuneArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub data: DataArgs,
    /// Where to save the adapter and the checkpoints.
    #[arg(long)]
    pub output: PathBuf,
    /// Rank of the adapter.
    #[arg(long, default_value_t = 8)]
    pub r: usize,
    /// Numerator of the adapter's factor.
    #[arg(long, default_value_t = 16.0)]
    pub alpha: f64,
    /// Probability of dropping an input of the adapter. Not with several --devices.
    #[arg(long, default_value_t = 0.0)]
    pub dropout: f64,
    /// Use the factor alpha / sqrt(r) instead of alpha / r.
    #[arg(long)]
    pub rslora: bool,
    /// Train a magnitude for each output beside the adapter (DoRA). Not with --shard.
    #[arg(long)]
    pub dora: bool,
    /// The layers to adapt, by the end of their path, or `all-linear`
    /// [default: all linear layers of attention and MLPs, but no experts and routers of a mixture]
    #[arg(long, value_delimiter = ',')]
    pub target_modules: Vec<String>,
    /// Modules to train as a whole beside the adapter, such as `lm_head,embed_tokens`; they must not be in
    /// 4 bit, and a head that is tied to the embeddings becomes one of its own
    #[arg(long, value_delimiter = ',')]
    pub modules_to_save: Vec<String>,
    /// Peak learning rate.
    #[arg(long, default_value_t = 2e-4)]
    pub lr: f64,
    /// How the learning rate falls.
    #[arg(long, value_enum, default_value_t = Decay::Constant)]
    pub schedule: Decay,
    /// Steps in which the learning rate rises from zero.
    #[arg(long, default_value_t = 0)]
    pub warmup: usize,
    /// The optimizer.
    #[arg(long, value_enum, default_value_t = Optim::AdamwTorch)]
    pub optim: Optim,
    #[arg(long, default_value_t = 0.0)]
    pub weight_decay: f64,
    /// The largest norm of all gradients together, to which larger ones are scaled down; 0 for none.
    #[arg(long, default_value_t = MAX_GRAD_NORM.into())]
    pub max_grad_norm: f64,
    /// Rows in one pass, on each device: examples, or rows of packed ones.
    #[arg(long, default_value_t = 1)]
    pub batch_size: usize,
    /// Passes in one step, on each device.
    #[arg(long, default_value_t = 1)]
    pub grad_accum: usize,
    /// Train on several devices of --device by their numbers, such as 0,1: each has its part of the batches. CUDA
    /// needs NCCL for it. On a CPU all numbers are the same device: for trying it out
    #[arg(long, value_delimiter = ',', value_name = "NUMBERS")]
    pub devices: Vec<usize>,
    /// Keep on each of --devices a part of the layers' packed weights only, as FSDP2 does: for models that one
    /// cannot hold. Needs --gradient-checkpointing or --offload
    #[arg(long, requires = "devices")]
    pub shard: bool,
    /// Passes over the data, unless --steps is given.
    #[arg(long, default_value_t = 1)]
    pub epochs: usize,
    /// Steps of the optimizer.
    #[arg(long)]
    pub steps: Option<usize>,
    /// Keep only the input of each layer and compute the rest twice: less memory, a third more
    /// time.
    #[arg(long)]
    pub gradient_checkpointing: bool,
    /// As --gradient-checkpointing, with the inputs of layers in the memory of the host until they are needed
    /// again: less memory of the device. Not on a CPU.
    #[arg(long)]
    pub offload: bool,
    /// Save a checkpoint every so many steps.
    #[arg(long)]
    pub save_every: Option<usize>,
    /// Go on from the last checkpoint in the output folder.
    #[arg(long)]
    pub resume: bool,
    /// Replace the run in the output folder: its adapter and its checkpoints are removed.
    #[arg(long, conflicts_with = "resume")]
    pub overwrite: bool,
    /// Where to write a line of JSON for every step and evaluation [default: log.jsonl in --output]
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Print how much memory is in use in each phase of a step. Asking waits for the device: steps are slower
    #[arg(long)]
    pub memory_report: bool,
    /// Print lines even in a terminal, where Ctrl-C ends the program. In the TUI `q` asks whether to stop, which saves a
    /// checkpoint.
    #[arg(long)]
    pub no_tui: bool,
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
}

impl FinetuneArgs {
    /// Refuses what cannot be served, before a model is loaded.
    fn check(&self) -> Result<(), ModelError> {
        check_rows("--batch-size", self.batch_size)?;
        check_rows("--grad-accum", self.grad_accum)?;
        if self.offload {
            self.model.device.check_offload("--offload")?;
        }
        self.data.check()?;
        at_least(1, "--epochs", self.epochs)?;
        at_least(1, "--steps", self.steps.unwrap_or(1))?;
        at_least(1, "--save-every", self.save_every.unwrap_or(1))?;
        for (name, given, may_be_0) in [
            ("--lr", self.lr, false),
            ("--alpha", self.alpha, false),
            ("--weight-decay", self.weight_decay, true),
            ("--max-grad-norm", self.max_grad_norm, true),
        ] {
            let in_f32 = given as f32;
            let is_positive = in_f32 > 0.0 && in_f32.is_finite();
            if !(is_positive || may_be_0 && given == 0.0) {
                let expected = match may_be_0 {
                    true => "0 or a positive number in the range of f32",
                    false => "a positive number in the range of f32",
                };
                return Err(ModelError::setting(name, format!("{given:?}"), expected));
            }
        }
        self.lora(self.targets(None)).check()?;
        self.check_output()
    }

    /// Refuses to write over another run, or to leave its checkpoints beside those of this one.
    fn check_output(&self) -> Result<(), ModelError> {
        if self.resume || self.overwrite {
            return Ok(());
        }
        if let Some(log) = self.log.as_ref().filter(|log| log.exists()) {
            return Err(ModelError::setting(
                "--log",
                format!("{}, which exists", log.display()),
                "a new file, --resume to go on with it, or --overwrite to replace it",
            ));
        }
        if !self.output.exists() {
            return Ok(());
        }
        let entries = fs::read_dir(&self.output).map_err(ModelError::io(&self.output))?;
        // What a run that was killed leaves of itself is no run.
        let mut entries = entries.filter(|entry| {
            let name = entry.as_ref().map(|entry| entry.file_name());
            name.map_or(true, |name| name != LOCK_FILE)
        });
        match entries.next() {
            None => Ok(()),
            Some(_) => Err(ModelError::setting(
                "--output",
                format!("{}, which is not empty", self.output.display()),
                "an empty folder, --resume to go on with the run in it, or --overwrite to replace it",
            )),
        }
    }

    /// The checkpoint to go on from, if there is to be one.
    fn checkpoint(&self) -> Result<Option<PathBuf>, ModelError> {
        if !self.resume {
            return Ok(None);
        }
        match latest_checkpoint(&self.output)? {
            Some(folder) => Ok(Some(folder)),
            None => Err(ModelError::Resume {
                path: self.output.clone(),
                message: "holds no checkpoint".into(),
            }),
        }
    }

    pub fn run(&self) -> Result<(), ModelError> {
        self.check()?;
        let devices = self.devices()?;
        let checkpoint = self.checkpoint()?;
        let mut prepared = self.model.prepare(true)?;
        check_dropout(&prepared.config)?;
        let lora = self.check_lora(&prepared)?;
        let data = self
            .data
            .read(&mut prepared.text, &prepared.config, self.seed)?;
        let per_epoch = data.train.steps_per_epoch(self.rows_of_step());
        let total = self.steps;
        let total = total.unwrap_or(self.epochs.saturating_mul(per_epoch));
        if self.warmup > total {
            eprintln!(
                "warning: --warmup is {}, of {total} steps: the learning rate does not reach --lr",
                self.warmup
            );
        }
        let settings = Settings {
            model: prepared.fingerprint()?,
            compute: Some(prepared.computes_in()),
            ..self.settings(&lora, &data.train, total)?
        };
        let _held = Held::new(&self.output)?;
        let job = Job {
            args: self.clone(),
            prepared,
            lora,
            settings,
            data,
            checkpoint,
            total,
            per_epoch,
        };
        if devices.is_empty() {
            return job.run(None);
        }
        match parallel::run(devices, move |rank| job.run(Some(Arc::new(rank)))) {
            Ok(_) => Ok(()),
            Err(error) => end_at_once(&error),
        }
    }

    /// The devices of --devices; none without it.
    fn devices(&self) -> Result<Vec<Device>, ModelError> {
        let all = self.devices.iter();
        let devices = all.map(|&index| self.model.device.open_at(index));
        let devices: Vec<Device> = devices.collect::<Result<_, _>>()?;
        if self.dropout > 0.0 && devices.len() > 1 {
            let expected = "0 with --devices: Burn has one random generator for all of them";
            return Err(ModelError::setting("--dropout", self.dropout, expected));
        }
        if self.shard && !(self.gradient_checkpointing || self.offload) {
            return Err(ModelError::setting(
                "--shard",
                "given without --gradient-checkpointing and --offload",
                "one of these beside it: else the gradients would need the weights of all layers at once",
            ));
        }
        if self.shard && self.dora {
            return Err(ModelError::setting(
                "--shard",
                "given with --dora",
                "one of them: the magnitudes of DoRA begin as norms of whole weights",
            ));
        }
        Ok(devices)
    }

    /// How many devices there are to train on.
    fn device_count(&self) -> usize {
        self.devices.len().max(1)
    }

    /// Passes of a step, on all devices.
    fn passes(&self) -> usize {
        self.grad_accum * self.device_count()
    }

    fn rows_of_step(&self) -> usize {
        self.batch_size * self.passes()
    }

    /// The settings of the adapter, which some layers of the model have to fit.
    fn check_lora(&self, prepared: &Prepared) -> Result<LoraConfig, ModelError> {
        // Of the sizes of the model, without its weights.
        let sizes = prepared.config.init(&prepared.device);
        let lora = self.lora(self.targets(Some(&sizes)));
        check_targets(&lora, &sizes)?;
        self.check_rank(&sizes)?;
        if let Some(warning) = self.warn_of_experts(&lora, &sizes)? {
            eprintln!("{warning}");
        }
        Ok(lora)
    }

    /// Refuses a rank that no product of two matrices has in this model.
    fn check_rank(&self, model: &Decoder) -> Result<(), ModelError> {
        let layers = model.linears();
        let ranks = layers.iter().map(|(_, layer)| {
            let [d_output, d_input] = layer.dims();
            d_output.min(d_input)
        });
        let most = ranks.max().unwrap_or(usize::MAX);
        if self.r > most {
            let expected = format!("at most {most}, the largest rank of a layer of the model");
            return Err(ModelError::setting("--r", self.r, expected));
        }
        Ok(())
    }

    /// A warning, if PEFT will refuse the adapter: it has the experts of a layer in one parameter.
    fn warn_of_experts(
        &self,
        lora: &LoraConfig,
        model: &Decoder,
    ) -> Result<Option<String>, ModelError> {
        let setting = match (self.dropout > 0.0, self.dora) {
            (true, _) => "--dropout",
            (false, true) => "--dora",
            _ => return Ok(None),
        };
        let matcher = lora.matcher()?;
        for (name, _) in model.linears() {
            if is_expert(&name) && matcher.is_target(&name)? {
                return Ok(Some(format!(
                    "warning: PEFT 0.21 does not load an adapter on experts, such as `{name}`, with \
                     {setting}"
                )));
            }
        }
        Ok(None)
    }

    /// The layers to adapt; those that are the default only where the model is known.
    fn targets(&self, model: Option<&Decoder>) -> TargetModules {
        match (self.target_modules.as_slice(), model) {
            ([all], _) if all == "all-linear" => TargetModules::AllLinear,
            ([], Some(model)) => TargetModules::list(model.default_target_modules()),
            ([], None) => TargetModules::AllLinear,
            (names, _) => TargetModules::list(names.iter().cloned()),
        }
    }

    fn lora(&self, targets: TargetModules) -> LoraConfig {
        LoraConfig {
            r: self.r,
            lora_alpha: self.alpha,
            lora_dropout: self.dropout,
            use_rslora: self.rslora,
            use_dora: self.dora,
            modules_to_save: (!self.modules_to_save.is_empty())
                .then(|| self.modules_to_save.clone()),
            task_type: Some("CAUSAL_LM".into()),
            base_model_name_or_path: Some(self.model.model.clone()),
            ..LoraConfig::new(targets)
        }
    }

    fn settings(
        &self,
        lora: &LoraConfig,
        data: &Dataset,
        total: usize,
    ) -> Result<Settings, ModelError> {
        let schedule = Schedule {
            peak: self.lr,
            decay: self.schedule,
            warmup: self.warmup,
            total,
        };
        Ok(Settings {
            optim: self.optim,
            weight_decay: self.weight_decay as f32,
            max_grad_norm: self.max_grad_norm as f32,
            batch_size: self.batch_size,
            grad_accum: self.passes(),
            seq_len: self.data.seq_len,
            seed: self.seed,
            data: data.fingerprint(),
            ..Settings::new(schedule, lora)?
        })
    }
}

/// Refuses dropout that transformers would apply in training.
fn check_dropout(config: &DecoderConfig) -> Result<(), ModelError> {
    for (field, dropout) in [
        ("attention_dropout", config.attention_dropout),
        ("resid_pdrop", config.residual_dropout),
    ] {
        if dropout != 0.0 {
            return Err(ModelError::Unsupported {
                path: "config.json".into(),
                field: field.into(),
                given: dropout.to_string(),
                supported: "0 in training".into(),
            });
        }
    }
    Ok(())
}

/// Refuses a target that no layer has. Training itself only needs a layer that some target
/// selects.
fn check_targets(lora: &LoraConfig, model: &Decoder) -> Result<(), ModelError> {
    let TargetModules::List(names) = &lora.target_modules else {
        return Ok(());
    };
    let paths: Vec<String> = model
        .linears()
        .into_iter()
        .map(|(path, _)| path)
        // A tied head can be a target too.
        .chain([HEAD.into()])
        .collect();
    for name in names {
        let has_it = |path: &String| path == name || path.ends_with(&format!(".{name}"));
        if !paths.iter().any(has_it) {
            return Err(ModelError::setting(
                "--target-modules",
                format!("`{name}`, which no layer of the model is named"),
                "ends of the paths of layers",
            ));
        }
    }
    Ok(())
}
