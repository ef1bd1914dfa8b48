//! The command `bench`: how fast a model of a known size is, with random weights.

mod chart;
mod measure;
mod memory;
mod peer;
mod report;
mod size;
mod train;

use std::fs::File;
use std::path::PathBuf;

use burn::tensor::{DType, Device, Tensor};
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::op::{DenseProvider, MatmulOptions, matmul, set_dense_provider};
use burn_nf4_llm::ModelError;
use burn_nf4_llm::model::{Decoder, DecoderConfig, random};
use clap::{Args, ValueEnum};

use crate::args::{FloatArg, QuantArg};
use crate::device::{DeviceName, sync};
use crate::model_args::{at_least, check_rows};
use crate::output::end_at_once;
use measure::Floor;
use memory::Need;
use peer::{Job, Library, Peer};
use report::{BenchReport, DecodeRow, PeerReport, PrefillRow, TrainRow, Weights};
use size::SizeArgs;
use train::{Kept, Method, Recipe, TrainShape};

/// Time decoding, prompts and training steps with random weights: needs no checkpoint.
#[derive(Args, Debug)]
pub struct BenchArgs {
    #[command(flatten)]
    size: SizeArgs,
    /// Rows that are decoded together. May be given several times. By default 1, 4, 16 and 64, on
    /// a CPU 1 and 4.
    #[arg(long, value_name = "ROWS")]
    batch: Vec<usize>,
    /// Tokens that the cache holds when decoding begins: each row has a prompt of this length. May be given
    /// several times, and is measured with each --batch. By default 128, 2048 and 8192, on a CPU 128 and 2048.
    #[arg(long, value_name = "TOKENS")]
    context: Vec<usize>,
    /// Tokens generated for each row after the first.
    #[arg(long, default_value_t = 64)]
    tokens: usize,
    /// Time the pass over a prompt of so many tokens; may be given several times. By default 512, 2048
    /// and 8192, on a CPU 512, unless decoding or training is asked for alone.
    #[arg(long, value_name = "TOKENS")]
    prefill: Vec<usize>,
    /// Time steps of QLoRA, AdamW on all linear layers but the head, of so many rows of so many tokens,
    /// such as 4x2048; may be given several times. Layers are computed twice (gradient checkpointing), but not
    /// with :keep behind the tokens; with :offload the inputs of layers wait in the memory of the host.
    #[arg(long, value_name = "ROWSxTOKENS[:keep|:offload]")]
    train: Vec<TrainShape>,
    /// Steps of training that are timed; the median of their times is told.
    #[arg(long, value_name = "STEPS", default_value_t = 3)]
    train_steps: usize,
    /// Train on several devices of --device by their numbers, such as 0,1, each of which has a batch of --train.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NUMBERS",
        requires = "train",
        conflicts_with = "peer"
    )]
    devices: Vec<usize>,
    /// Keep on each of --devices a part of the layers' packed weights only, as FSDP2 does.
    #[arg(long, requires = "devices")]
    shard: bool,
    /// Train without computing each layer twice: more memory, less time. As :keep behind each --train.
    #[arg(long)]
    keep_all: bool,
    /// What the linear layers are packed in, by us: peers have nf4.
    #[arg(long = "to", alias = "quant-type", value_enum, default_value = "nf4")]
    quant_type: QuantArg,
    /// Put a low-rank branch of this rank on every linear layer but the head [default: none; in training 16].
    #[arg(long)]
    rank: Option<usize>,
    /// Have the head in 4 bit too, also one that is tied to the embeddings, which stay as they are.
    #[arg(long)]
    quantize_head: bool,
    /// Who computes products of many rows: for a comparison.
    #[arg(long, value_enum, default_value_t = ProviderName::Auto)]
    provider: ProviderName,
    /// Launch each step anew, of decoding and of training, also where the device could replay a recorded one.
    #[arg(long)]
    eager: bool,
    /// Write all that was measured as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the steps of decoding as an SVG.
    #[arg(long, value_name = "FILE.svg")]
    chart: Option<PathBuf>,
    /// Measure transformers with bitsandbytes too, by this Python, which must have both, and for training peft;
    /// in training also Unsloth, where it is there.
    #[arg(long, value_name = "PYTHON")]
    peer: Option<String>,
    /// Where to run.
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    device: DeviceName,
    /// The type to compute in: f32 on the CPU, elsewhere the model's own, bfloat16 of each --size.
    #[arg(long, value_enum)]
    dtype: Option<FloatArg>,
}

/// See `burn_nf4::op::DenseProvider`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum ProviderName {
    /// cuBLASLt where it is there, else Burn.
    Auto,
    /// cuBLASLt (feature `cublaslt`).
    Cublaslt,
    /// Burn's own kernels.
    Burn,
}

/// What is to be measured.
struct Plan {
    /// Batches and contexts.
    decode: Vec<[usize; 2]>,
    prefill: Vec<usize>,
    train: Vec<TrainShape>,
}

/// What all measurements have in common.
struct Setting<'a> {
    config: &'a DecoderConfig,
    quant: QuantConfig,
    dtype: FloatType,
    device: &'a Device,
}

impl BenchArgs {
    pub fn run(&self) -> Result<(), ModelError> {
        self.check()?;
        let size = self.size.read()?;
        let config = &size.config;
        self.device.use_this_thread();
        let device = &self.device.open()?;
        let dtype = self.device.dtype(self.dtype, config.dtype, device)?;
        let plan = self.plan();
        let quant = QuantConfig::of(self.quant_type.into());
        let setting = Setting {
            config,
            quant,
            dtype,
            device,
        };
        self.check_memory(&setting, &plan)?;
        let peer = self.peer.as_deref();
        let peer = peer.map(|python| Peer::find(python, self.device));
        let peer = peer.transpose()?;
        set_dense_provider(match self.provider {
            ProviderName::Auto => DenseProvider::Auto,
            ProviderName::Cublaslt => DenseProvider::CublasLt,
            ProviderName::Burn => DenseProvider::Burn,
        });
        // What cannot be had is an error before anything is made.
        let one = Tensor::<2>::ones([1, 8], (device, DType::from(dtype)));
        matmul(one.clone(), one, None, MatmulOptions::TRANSPOSE_RHS)?;
        let mut report = BenchReport {
            date: report::date(),
            burn_nf4: env!("CARGO_PKG_VERSION"),
            size: size.name.clone(),
            device: self.device.name(),
            device_name: self.device.own_name(device),
            dtype: dtype.name(),
            quant_type: quant.quant_type.name(),
            rank: self.rank,
            quantized_head: self.quantize_head,
            weights: None,
            copy: None,
            first_token: None,
            decode: Vec::new(),
            prefill: Vec::new(),
            train: Vec::new(),
            left_out: Vec::new(),
            peer: None,
            unsloth: None,
        };
        report.write(self.json.as_deref())?;
        report.print_head()?;
        self.warn_of_length(config, &plan);
        self.inference(&setting, &plan, &mut report)?;
        self.training(&setting, &plan, &mut report)?;
        if let Some(peer) = peer {
            device.memory_cleanup();
            let job = Job {
                config: &size.json,
                dtype,
                quantize_head: self.quantize_head,
                decode: plan.decode,
                tokens: self.tokens,
                prefill: &plan.prefill,
                train: &plan.train,
                recipe: Recipe::new(self.rank),
            };
            self.beside(&peer, &job, &mut report)?;
        }
        match &self.chart {
            Some(path) => chart::draw(&report, path),
            None => Ok(()),
        }
    }

    /// The peers, one after the other: what one does, or that it fails, changes nothing of the others.
    fn beside(
        &self,
        peer: &Peer<'_>,
        job: &Job<'_>,
        report: &mut BenchReport,
    ) -> Result<(), ModelError> {
        let mut failure = None;
        report.peer = match peer.measure(Library::Transformers, job) {
            Ok(measured) => Some(measured),
            Err(error) => {
                failure = Some(error);
                None
            }
        };
        if !job.train.is_empty() {
            let measured = peer.measure(Library::Unsloth, job);
            let failed = |error| PeerReport::failed(Library::Unsloth, &error);
            report.unsloth = Some(measured.unwrap_or_else(failed));
        }
        report.compare();
        report.write(self.json.as_deref())?;
        report.print_peers()?;
        failure.map_or(Ok(()), Err)
    }

    /// Refuses what cannot be measured, before anything is.
    fn check(&self) -> Result<(), ModelError> {
        at_least(1, "--tokens", self.tokens)?;
        for rows in &self.batch {
            check_rows("--batch", *rows)?;
        }
        for (name, lengths) in [("--context", &self.context), ("--prefill", &self.prefill)] {
            for tokens in lengths {
                at_least(1, name, *tokens)?;
            }
        }
        at_least(1, "--rank", self.rank.unwrap_or(1))?;
        at_least(1, "--train-steps", self.train_steps)?;
        if self.quantize_head && !self.devices.is_empty() {
            let expected = "left out where --devices are given";
            return Err(ModelError::setting("--quantize-head", true, expected));
        }
        let keeps_all = |shape: &&TrainShape| self.keep_all || shape.kept == Kept::All;
        if let Some(shape) = self.train.iter().find(keeps_all).filter(|_| self.shard) {
            let expected = "layers that are computed twice, where --shard is given";
            return Err(ModelError::setting("--train", shape, expected));
        }
        let offloads = |shape: &&TrainShape| shape.kept == Kept::OffloadedInputs;
        if let Some(shape) = self.train.iter().find(offloads) {
            let TrainShape { rows, tokens, .. } = shape;
            let argument = format!("--train {rows}x{tokens}:offload");
            if self.keep_all {
                let expected = "no --keep-all beside it";
                return Err(ModelError::setting("--train", argument, expected));
            }
            self.device.check_offload(&argument)?;
        }
        if let Some(path) = &self.chart {
            if self.plan().decode.is_empty() {
                let expected = "left out, or decoding that is measured";
                return Err(ModelError::setting("--chart", path.display(), expected));
            }
            if path.extension().is_none_or(|extension| extension != "svg") {
                let expected = "a file that ends with .svg";
                return Err(ModelError::setting("--chart", path.display(), expected));
            }
        }
        // Not after minutes of measurements.
        for path in [&self.json, &self.chart].into_iter().flatten() {
            File::create(path).map_err(ModelError::io(path))?;
        }
        Ok(())
    }

    fn plan(&self) -> Plan {
        let is_cpu = matches!(self.device, DeviceName::Cpu | DeviceName::CubeclCpu);
        let or = |given: &[usize], on_cpu: &[usize], on_gpu: &[usize]| match given {
            [] if is_cpu => on_cpu.to_vec(),
            [] => on_gpu.to_vec(),
            given => given.to_vec(),
        };
        let decoding = !(self.batch.is_empty() && self.context.is_empty());
        let others = !(self.prefill.is_empty() && self.train.is_empty());
        let (mut decode, mut prefill) = (Vec::new(), self.prefill.clone());
        if decoding || !others {
            let batches = or(&self.batch, &[1, 4], &[1, 4, 16, 64]);
            for context in or(&self.context, &[128, 2048], &[128, 2048, 8192]) {
                decode.extend(batches.iter().map(|&batch| [batch, context]));
            }
        }
        if !(decoding || others) {
            prefill = or(&[], &[512], &[512, 2048, 8192]);
        }
        let train = self.train.iter().map(|&shape| TrainShape {
            kept: match self.keep_all {
                true => Kept::All,
                false => shape.kept,
            },
            ..shape
        });
        Plan {
            decode,
            prefill,
            train: train.collect(),
        }
    }

    fn warn_of_length(&self, config: &DecoderConfig, plan: &Plan) {
        let texts = plan.decode.iter();
        let texts =
            texts.map(|&[_, context]| context.saturating_add(self.tokens).saturating_add(1));
        let longest = texts
            .chain(plan.prefill.iter().copied())
            .chain(plan.train.iter().map(|shape| shape.tokens))
            .max();
        if let Some(warning) = config.warn_of_length("the longest text", longest.unwrap_or(0)) {
            eprintln!("{warning}");
        }
    }

    /// Decoding and prompts.
    fn inference(
        &self,
        setting: &Setting<'_>,
        plan: &Plan,
        report: &mut BenchReport,
    ) -> Result<(), ModelError> {
        if plan.decode.is_empty() && plan.prefill.is_empty() {
            return Ok(());
        }
        let &Setting {
            config,
            dtype,
            device,
            ..
        } = setting;
        let model = self.model(setting, self.rank, device)?;
        let model = model.with_exact_tables().stack_experts()?;
        sync(device)?;
        report.first_token = Some(measure::first_token(&model, config)?);
        let copy = measure::copy(self.device, device)?;
        report.copy = Some(copy.clone());
        let floor = Floor::new(&model, config, dtype, copy);
        let (packed_bytes, float_bytes) = model.size_bytes();
        report.weights = Some(Weights {
            packed_bytes,
            float_bytes,
            read_bytes: floor.weight_bytes,
        });
        report.write(self.json.as_deref())?;
        report.print_model()?;
        if !plan.decode.is_empty() {
            DecodeRow::print_head()?;
        }
        for &[batch, context] in &plan.decode {
            let of = [batch, context, self.tokens];
            if !self.fits(Need::decoding(config, dtype, of), device, report)? {
                continue;
            }
            let row = measure::decode(&model, config, &floor, of, self.eager)?;
            report.decode.push(row);
            report.write(self.json.as_deref())?;
            report.decode[report.decode.len() - 1].print()?;
        }
        if !plan.prefill.is_empty() {
            PrefillRow::print_head()?;
        }
        for &tokens in &plan.prefill {
            if !self.fits(Need::prompt(config, dtype, tokens), device, report)? {
                continue;
            }
            let row = measure::prefill(&model, config, tokens)?;
            report.prefill.push(row);
            report.write(self.json.as_deref())?;
            report.prefill[report.prefill.len() - 1].print()?;
        }
        Ok(())
    }

    /// Refuses what was asked for and cannot fit, before any of it is made. Of the sizes that are measured
    /// where none are asked for, those that do not fit are left out.
    fn check_memory(&self, setting: &Setting<'_>, plan: &Plan) -> Result<(), ModelError> {
        let &Setting {
            config,
            dtype,
            device,
            ..
        } = setting;
        let mut needs = Vec::new();
        if !self.shard {
            needs.push(Need::weights(config, setting.quant, dtype, device));
        }
        if !(self.batch.is_empty() && self.context.is_empty()) {
            let of = |&[batch, context]: &[usize; 2]| [batch, context, self.tokens];
            let all = plan.decode.iter().map(of);
            needs.extend(all.map(|of| Need::decoding(config, dtype, of)));
        }
        let prompts = self.prefill.iter();
        needs.extend(prompts.map(|&tokens| Need::prompt(config, dtype, tokens)));
        let Recipe { rank, .. } = Recipe::new(self.rank);
        let steps = plan.train.iter();
        needs.extend(steps.map(|&shape| Need::training(config, dtype, shape, rank)));
        let mut misfits = needs
            .into_iter()
            .filter_map(|need| need.does_not_fit(self.device, device));
        misfits.next().map_or(Ok(()), |misfit| Err(misfit.error()))
    }

    /// Whether there is room for a measurement now, beside the weights; if not, it is left out.
    fn fits(
        &self,
        need: Need,
        device: &Device,
        report: &mut BenchReport,
    ) -> Result<bool, ModelError> {
        let Some(misfit) = need.does_not_fit(self.device, device) else {
            return Ok(true);
        };
        let left_out = misfit.left_out();
        let printed = left_out.print();
        report.left_out.push(left_out);
        report.write(self.json.as_deref())?;
        printed.map(|()| false)
    }

    fn training(
        &self,
        setting: &Setting<'_>,
        plan: &Plan,
        report: &mut BenchReport,
    ) -> Result<(), ModelError> {
        if plan.train.is_empty() {
            return Ok(());
        }
        let &Setting {
            config,
            dtype,
            device,
            ..
        } = setting;
        let recipe = Recipe::new(self.rank);
        let method = Method {
            eager: self.eager,
            steps: self.train_steps,
            shard: self.shard,
            quant: setting.quant,
        };
        let devices = self.devices.iter();
        let devices = devices.map(|&index| self.device.open_at(index));
        let devices: Vec<Device> = devices.collect::<Result<_, _>>()?;
        let model = match devices.is_empty() {
            true => Some(self.model(setting, None, &device.clone().autodiff())?),
            false => None,
        };
        TrainRow::print_head()?;
        for &shape in &plan.train {
            let row = match &model {
                None => {
                    let devices = devices.clone();
                    match train::train_on(devices, config, dtype, recipe, shape, method) {
                        Ok(row) => row,
                        Err(error) => end_at_once(&error),
                    }
                }
                Some(model) => {
                    // What is reserved is of this shape then.
                    sync(device)?;
                    device.memory_cleanup();
                    let need = Need::training(config, dtype, shape, recipe.rank);
                    if !self.fits(need, device, report)? {
                        continue;
                    }
                    train::train(model.clone(), config, recipe, shape, method, device)?
                }
            };
            report.train.push(row);
            report.write(self.json.as_deref())?;
            report.train[report.train.len() - 1].print()?;
        }
        Ok(())
    }

    /// A model of random weights.
    fn model(
        &self,
        setting: &Setting<'_>,
        rank: Option<usize>,
        device: &Device,
    ) -> Result<Decoder, ModelError> {
        let model = random(setting.config, setting.quant, setting.dtype, rank, device)?;
        match self.quantize_head {
            true => Ok(model.quantize_head(setting.quant)?),
            false => Ok(model),
        }
    }
}
