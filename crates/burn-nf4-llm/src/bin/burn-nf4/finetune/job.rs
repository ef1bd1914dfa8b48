//! A run of `finetune`, on one device or on each of several.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use burn_nf4::model::LinearLayers;
use burn_nf4::parallel::Rank;
use burn_nf4::peft::LoraConfig;
use burn_nf4_llm::error::ModelError;
use burn_nf4_llm::model::Decoder;
use burn_nf4_llm::train::data::Batch;
use burn_nf4_llm::train::{Settings, Shards, Trainer, remove_run};

use super::FinetuneArgs;
use super::data::{Data, describe};
use super::memory::MemoryReport;
use crate::device::sync;
use crate::model_args::Prepared;
use crate::progress::{mebibytes, peak_memory_bytes, seconds};
use crate::watch::{EvalReport, Run, StepReport, Watch, losses};

/// The log of a run, a line of JSON a step.
const LOG_FILE: &str = "log.jsonl";
/// The losses of a run.
const PLOT_FILE: &str = "loss.svg";

/// What is in the folder of a run while it goes on.
pub const LOCK_FILE: &str = ".lock";

/// The output folder, which no other run may have at the same time.
pub struct Held {
    file: File,
    path: PathBuf,
}

impl Held {
    /// Makes the folder, and takes it.
    ///
    /// # Errors
    /// [`ModelError::Setting`] if another run has it, [`ModelError::Io`].
    pub fn new(output: &Path) -> Result<Self, ModelError> {
        fs::create_dir_all(output).map_err(ModelError::io(output))?;
        let path = output.join(LOCK_FILE);
        let file = File::create(&path).map_err(ModelError::io(&path))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { file, path }),
            Err(TryLockError::WouldBlock) => Err(ModelError::setting(
                "--output",
                format!("{}, in which another run is under way", output.display()),
                "a folder of its own",
            )),
            Err(TryLockError::Error(error)) => Err(ModelError::io(&path)(error)),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Whatever becomes of it, the lock ends with the process.
        let _ = fs::remove_file(&self.path);
        let _ = self.file.unlock();
    }
}

/// A run, as each of its devices knows it.
pub struct Job {
    pub args: FinetuneArgs,
    pub prepared: Prepared,
    pub lora: LoraConfig,
    pub settings: Settings,
    pub data: Data,
    pub checkpoint: Option<PathBuf>,
    pub total: usize,
    pub per_epoch: usize,
}

impl Job {
    /// The whole run on one device, which is one of several or alone. The first one tells people of it, and saves.
    pub fn run(&self, rank: Option<Arc<Rank>>) -> Result<(), ModelError> {
        let args = &self.args;
        let leads = rank.as_ref().is_none_or(|rank| rank.index() == 0);
        let (model, shards) = self.load(rank.as_ref(), leads)?;
        let device = model.device();
        let report = (args.memory_report && leads).then(|| MemoryReport::new(&device));
        if let Some(report) = &report {
            report.ask("model");
        }
        let with_lora = || -> Result<Decoder, ModelError> {
            device.seed(args.seed);
            let model = model.with_lora(&self.lora, &device)?;
            // Where operations are queued the numbers are drawn now.
            sync(&device)?;
            Ok(model)
        };
        let model = match &rank {
            Some(rank) => rank.in_turn(with_lora)?,
            None => with_lora(),
        }?;
        let mut trainer = Trainer::new(
            model,
            &self.prepared.config,
            self.lora.clone(),
            self.settings.clone(),
            args.gradient_checkpointing,
        )?;
        if args.offload {
            trainer.offload_inputs()?;
        }
        if let Some(rank) = &rank {
            trainer = trainer.in_group(rank.clone(), shards)?;
        }
        if let Some(folder) = &self.checkpoint {
            if leads {
                eprintln!("going on from {}", folder.display());
            }
            trainer = trainer.resume(folder)?;
        }
        // While one rank records no other may use its device, as the report does.
        trainer.capture = !args.memory_report;
        if let Some(report) = &report {
            report.ask("adapter");
            trainer.on_phase = Some(report.hook());
        }
        if leads {
            self.begin()?;
        }
        self.train(&mut trainer, rank.as_deref())?;
        if !leads {
            return Ok(());
        }
        if let Some(warning) = trainer.warn_of_offload() {
            eprintln!("{warning}");
        }
        trainer.save_adapter(&args.output)?;
        println!("saved the adapter in {}", args.output.display());
        if let Some(report) = report {
            println!("{}", report.lines());
        } else if let Some(peak) = peak_memory_bytes() {
            println!("peak memory of the process: {}", mebibytes(peak));
        }
        Ok(())
    }

    fn load(
        &self,
        rank: Option<&Arc<Rank>>,
        leads: bool,
    ) -> Result<(Decoder, Option<Shards>), ModelError> {
        let Some(rank) = rank else {
            return Ok((
                self.prepared.load_on(&self.prepared.device, None, leads)?,
                None,
            ));
        };
        let device = rank.device().clone().autodiff();
        if !self.args.shard {
            return Ok((self.prepared.load_on(&device, None, leads)?, None));
        }
        let model = self.prepared.load_on(&device, Some(rank), leads)?;
        let (model, shards) = Shards::of(model, rank)?;
        if shards.is_empty() {
            return Err(ModelError::setting(
                "--shard",
                "given for a model whose layers have no packed weights",
                "a model in 4 bit",
            ));
        }
        // The parts as they were loaded.
        sync(&device)?;
        device.clone().without_autodiff().memory_cleanup();
        if leads {
            eprintln!(
                "of the layers' packed weights each device keeps {}",
                mebibytes(shards.size_bytes() as u64)
            );
        }
        Ok((model, Some(shards)))
    }

    fn begin(&self) -> Result<(), ModelError> {
        if self.args.overwrite {
            remove_run(&self.args.output)?;
        }
        let of_eval = match &self.data.eval {
            Some(eval) => format!("; to evaluate with: {}", describe(eval)),
            None => String::new(),
        };
        let on = match self.args.device_count() {
            1 => String::new(),
            count => format!(" on {count} devices"),
        };
        eprintln!(
            "{}{of_eval}; {} steps, {} an epoch{on}",
            describe(&self.data.train),
            self.total,
            self.per_epoch
        );
        Ok(())
    }

    fn train(&self, trainer: &mut Trainer, rank: Option<&Rank>) -> Result<(), ModelError> {
        if rank.is_some_and(|rank| rank.index() > 0) {
            return self.steps(trainer, rank, None);
        }
        let output = &self.args.output;
        let log = self.args.log.clone();
        let log = log.unwrap_or_else(|| output.join(LOG_FILE));
        fs::create_dir_all(output).map_err(ModelError::io(output))?;
        let start = Instant::now();
        let first = trainer.step;
        let mut watch = Watch::open(Run {
            log: &log,
            tui: !self.args.no_tui,
            start: first,
            total: self.total,
        })?;
        let trained = self.steps(trainer, rank, Some(&mut watch));
        // The TUI is closed before anything else is printed.
        watch.close();
        // A run that failed has losses to be looked at too.
        let plot = output.join(PLOT_FILE);
        let drawn = losses(&log).and_then(|losses| losses.draw(&plot));
        trained?;
        match drawn {
            Ok(true) => println!("drew the losses in {}", plot.display()),
            Ok(false) => {}
            // It must not cost the adapter.
            Err(error) => eprintln!("warning: the losses could not be drawn: {error}"),
        }
        println!(
            "{} steps in {}",
            trainer.step - first,
            seconds(start.elapsed())
        );
        Ok(())
    }

    /// All steps; of several devices on each, of which the one with a view tells people and saves.
    fn steps(
        &self,
        trainer: &mut Trainer,
        rank: Option<&Rank>,
        mut watch: Option<&mut Watch>,
    ) -> Result<(), ModelError> {
        let args = &self.args;
        let eval_every = self.data.eval_every(self.per_epoch);
        let mut stopped = false;
        while trainer.step < self.total {
            // Whoever asks the first one asks all.
            let asked = watch.as_ref().is_some_and(|watch| watch.should_stop());
            stopped = match rank {
                Some(rank) => rank.exchange(asked)?.contains(&true),
                None => asked,
            };
            if stopped {
                break;
            }
            let batches =
                self.data
                    .train
                    .step(trainer.step, args.batch_size, args.passes(), args.seed);
            let learning_rate = trainer.rate();
            let begun = Instant::now();
            let done = trainer.step(&batches)?;
            let tokens: usize = batches.iter().map(Batch::tokens).sum();
            if let Some(watch) = &mut watch {
                watch.step(&StepReport {
                    step: trainer.step,
                    loss: done.loss,
                    grad_norm: done.grad_norm,
                    learning_rate,
                    tokens_per_second: tokens as f64 / begun.elapsed().as_secs_f64().max(1e-9),
                })?;
                if done.skipped {
                    watch.warn(format!(
                        "step {} was left out: its loss is {}, the norm of its gradients {}",
                        done.number, done.loss, done.grad_norm
                    ));
                }
            }
            if let Some(eval) = &self.data.eval
                && (trainer.step == self.total || trainer.step.is_multiple_of(eval_every))
            {
                let evaluation = trainer.evaluate(eval.batches(args.batch_size))?;
                if let Some(watch) = &mut watch {
                    watch.evaluation(&EvalReport {
                        step: trainer.step,
                        eval_loss: evaluation.loss,
                        eval_perplexity: evaluation.perplexity(),
                        eval_targets: evaluation.targets,
                    })?;
                }
            }
            let saves = args.save_every;
            if saves.is_some_and(|every| trainer.step.is_multiple_of(every)) {
                self.save_checkpoint(trainer, rank, watch.as_deref_mut())?;
            }
        }
        if stopped {
            self.save_checkpoint(trainer, rank, watch)?;
        }
        if let Some(rank) = rank {
            // What was trained is saved only if no rank has failed.
            rank.exchange(())?;
        }
        Ok(())
    }

    /// Saves a checkpoint, on the first rank, unless another has failed.
    fn save_checkpoint(
        &self,
        trainer: &mut Trainer,
        rank: Option<&Rank>,
        watch: Option<&mut Watch>,
    ) -> Result<(), ModelError> {
        if let Some(rank) = rank {
            rank.exchange(())?;
        }
        if let Some(watch) = watch {
            watch.saved(&trainer.save_checkpoint(&self.args.output)?);
        }
        Ok(())
    }
}
