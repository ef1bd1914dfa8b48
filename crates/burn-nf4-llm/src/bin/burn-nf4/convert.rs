//! The commands `inspect`, `quantize`, `dequantize` and `verify`.

use std::path::PathBuf;
use std::process::ExitCode;

use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{
    Checkpoint, DequantizeOptions, QuantizeOptions, dequantize_checkpoint, is_expert,
    quantize_checkpoint, verify,
};
use burn_nf4::format::{BlockSize, QuantConfig, QuantType};
use burn_nf4_llm::ModelError;
use clap::Args;

use crate::args::{FloatArg, QuantArg, StorageArg, parse_bytes};
use crate::converted::summary;
use crate::inspect::{Inspection, fault_lines, faults};
use crate::output::{is_closed_pipe, show};
use crate::progress::Bar;
use crate::verify::{Limits, Verdict};

#[derive(Args, Debug)]
pub struct InspectArgs {
    /// Folder or .safetensors file
    path: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl InspectArgs {
    pub fn run(&self) -> Result<(), ModelError> {
        let inspection = Inspection::of(&Checkpoint::open(&self.path)?)?;
        show(match self.json {
            true => to_json(&inspection),
            false => inspection.table(),
        })
    }
}

#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// The one that errors are relative to
    a: PathBuf,
    /// The other one
    b: PathBuf,
    /// Largest difference of two values to allow [default: 0]
    #[arg(long)]
    tolerance: Option<f64>,
    /// Largest root mean square of the differences to allow, relative to that of A's values
    /// [default: 0, or any if there is a --tolerance]
    #[arg(long)]
    rms_tolerance: Option<f64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl VerifyArgs {
    /// 1 if the checkpoints differ.
    pub fn run(&self) -> Result<ExitCode, ModelError> {
        let (a, b) = (Checkpoint::open(&self.a)?, Checkpoint::open(&self.b)?);
        for (checkpoint, which) in [(&a, "A"), (&b, "B")] {
            // Only told: tensors can be compared whatever they stand for.
            for line in fault_lines(&faults(checkpoint)).lines() {
                eprintln!("{which}: {line}");
            }
        }
        let bar = Bar::new("verify");
        let report = verify(&a, &b, |progress| bar.show(progress))?;
        drop(bar);
        let limits = Limits::new(self.tolerance, self.rms_tolerance);
        let within = limits.hold(&report);
        let shown = show(match self.json {
            true => to_json(&Verdict { within, report }),
            false => limits.text(&report),
        });
        // The code says it to one who has read enough too.
        shown.or_else(|error| match is_closed_pipe(&error) {
            true => Ok(()),
            false => Err(error),
        })?;
        Ok(match within {
            true => ExitCode::SUCCESS,
            false => ExitCode::from(1),
        })
    }
}

#[derive(Args, Debug)]
pub struct DequantizeArgs {
    #[command(flatten)]
    paths: Paths,
    /// Type of all float weights of the result [default: the type each had]
    #[arg(long)]
    dtype: Option<FloatArg>,
}

impl DequantizeArgs {
    pub fn run(&self) -> Result<(), ModelError> {
        let options = DequantizeOptions {
            dtype: self.dtype.map(Into::into),
            max_shard_bytes: self.paths.max_shard_size,
            overwrite: self.paths.overwrite,
        };
        let source = Checkpoint::open(&self.paths.source)?;
        let bar = Bar::new("dequantize");
        let folder = &self.paths.folder;
        let converted = dequantize_checkpoint(&source, folder, &options, |now| bar.show(now))?;
        drop(bar);
        show(summary("dequantized", &converted, folder))
    }
}

#[derive(Args, Debug)]
pub struct QuantizeArgs {
    #[command(flatten)]
    paths: Paths,
    #[command(flatten)]
    settings: Quantization,
}

impl QuantizeArgs {
    pub fn run(self) -> Result<(), ModelError> {
        show(quantize(&self.paths, self.settings)?)
    }
}

#[derive(Args, Debug)]
pub struct Paths {
    /// Folder or .safetensors file to read
    pub source: PathBuf,
    /// Folder to write
    pub folder: PathBuf,
    /// Most bytes of tensors in a file, such as 5GB
    #[arg(long, value_parser = parse_bytes, default_value = "50GB")]
    pub max_shard_size: usize,
    /// Write into a folder that is not empty
    #[arg(long)]
    pub overwrite: bool,
}

#[derive(Args, Debug)]
pub struct Quantization {
    /// Type to quantize to. The weights of the source may be quantized already, in another type
    #[arg(long = "to", alias = "quant-type", default_value = "nf4")]
    quant_type: QuantArg,
    /// Weights per scale of nf4 and fp4 [default: 64]
    #[arg(long)]
    block_size: Option<u64>,
    /// Keep the scales of nf4 and fp4 in f32
    #[arg(long)]
    no_double_quant: bool,
    /// Module to keep, as in llm_int8_skip_modules of transformers 5.24: the beginning of a path
    /// up to a dot (model.layers.1 is not model.layers.10), also as a regular expression, or its
    /// end; may be repeated
    #[arg(long, value_name = "MODULE")]
    skip: Vec<String>,
    /// Quantize the experts of a mixture too, which must be stored one by one (transformers 5.17 does not
    /// load those in nf4 and fp4; in nvfp4 and mxfp4 it does, and not those that stay in floats). With --to
    /// mxfp4 the stacks of gpt-oss alone, as openai publishes them
    #[arg(long)]
    experts: bool,
    /// Quantize the output head too. One that is tied to the embeddings becomes a weight of its own, and
    /// the embeddings stay as they are
    #[arg(long = "quantize-head", alias = "head")]
    head: bool,
    /// Quantize the embeddings of tokens too, and a head that is tied to them. For QuantEmbedding of the
    /// library alone: neither generate, chat and finetune nor transformers load those
    #[arg(long)]
    embeddings: bool,
    /// Type under which the codes of nf4 and fp4 are stored [default: uint8]
    #[arg(long)]
    storage: Option<StorageArg>,
    /// Type to round float weights to first [default: as stored]
    #[arg(long)]
    dtype: Option<FloatArg>,
    /// Type that transformers computes nf4 and fp4 in [default: that of the weights]
    #[arg(long)]
    compute_dtype: Option<FloatArg>,
}

impl Quantization {
    /// The quantization, if all that is set belongs to the type.
    fn config(&self) -> Result<QuantConfig, Nf4Error> {
        let quant_type = QuantType::from(self.quant_type);
        if quant_type.is_bitsandbytes() {
            let block_size = self.block_size.unwrap_or(BlockSize::B64.elems() as u64);
            return Ok(QuantConfig {
                quant_type,
                block_size: BlockSize::new(block_size, "--block-size")?,
                nested_block_size: (!self.no_double_quant).then_some(BlockSize::B256),
            });
        }
        let set = [
            ("--block-size", self.block_size.is_some()),
            ("--no-double-quant", self.no_double_quant),
            ("--storage", self.storage.is_some()),
            ("--compute-dtype", self.compute_dtype.is_some()),
        ];
        match set.into_iter().find(|(_, is_set)| *is_set) {
            None => Ok(QuantConfig::of(quant_type)),
            Some((field, _)) => Err(Nf4Error::Config {
                field,
                expected: "left out, or --to nf4 or fp4",
                given: format!("set for --to {}, which has one form", quant_type.name()),
            }),
        }
    }
}

fn quantize(paths: &Paths, settings: Quantization) -> Result<String, Nf4Error> {
    let options = QuantizeOptions {
        config: settings.config()?,
        skip_modules: settings.skip,
        experts: settings.experts,
        head: settings.head,
        embeddings: settings.embeddings,
        storage: settings.storage.unwrap_or(StorageArg::Uint8).into(),
        dtype: settings.dtype.map(Into::into),
        compute_dtype: settings.compute_dtype.map(Into::into),
        max_shard_bytes: paths.max_shard_size,
        overwrite: paths.overwrite,
    };
    let source = Checkpoint::open(&paths.source)?;
    if options.experts
        && options.config.quant_type.is_bitsandbytes()
        && let Some(stack) = stacked_experts(&source)
    {
        return Err(Nf4Error::Config {
            field: "--experts",
            expected: "left out, or a checkpoint with a tensor for each expert: packed stacks are not \
                       loaded",
            given: format!("for a checkpoint that has the experts of a layer in one, `{stack}`"),
        });
    }
    let bar = Bar::new("quantize");
    let converted = quantize_checkpoint(&source, &paths.folder, &options, |now| bar.show(now))?;
    let mut text = summary("quantized", &converted, &paths.folder);
    let keeps_experts = !options.experts && source.parameters().into_iter().any(is_expert);
    if keeps_experts && !options.config.quant_type.is_bitsandbytes() {
        text += "note: the experts stay in floats, and transformers 5.24 does not load a mixture with such experts in \
                 this format; --experts packs them\n";
    }
    Ok(text)
}

/// A tensor that has all experts of a layer in it, as transformers 5 holds them.
pub fn stacked_experts(checkpoint: &Checkpoint) -> Option<&str> {
    checkpoint.parameters().into_iter().find(|key| {
        [".experts.gate_up_proj", ".experts.down_proj"]
            .iter()
            .any(|end| key.ends_with(end))
    })
}

pub fn to_json(value: &impl serde::Serialize) -> String {
    // Plain data with string keys always has a JSON text.
    serde_json::to_string_pretty(value).unwrap_or_default() + "\n"
}
