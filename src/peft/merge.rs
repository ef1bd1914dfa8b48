//! An adapter put into the weights of its base model, in a new folder.

mod branch;
mod loss;
mod weight;

use std::collections::BTreeMap;
use std::path::Path;

use super::adapter::{Adapter, LoraModule};
use super::tensor::{DenseTensor, check_finite, widen};
use crate::checkpoint::convert::{
    CONFIG_FILE, ModelConfig, Reporter, check_source, copy_other_files, source_folder,
    start_writer, write_dense,
};
use crate::checkpoint::elements::{elements, float_type, with_float_type};
use crate::checkpoint::{Checkpoint, CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, Progress, Written};
use crate::error::Nf4Error;
use crate::format::FloatType;
use branch::Branch;
use loss::Sums;
use weight::BaseWeight;

pub use loss::MergeLoss;

/// How to write the folder of a merge.
#[derive(Debug, Clone, PartialEq)]
pub struct MergeOptions {
    /// The most bytes of tensors in a file, but for a weight that is larger.
    pub max_shard_bytes: usize,
    /// Whether to write into a folder that is not empty.
    pub overwrite: bool,
}

impl Default for MergeOptions {
    fn default() -> Self {
        Self {
            max_shard_bytes: DEFAULT_MAX_SHARD_BYTES,
            overwrite: false,
        }
    }
}

/// What a merge did.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// The adapted modules by path, each with what storing its weight cost.
    pub modules: BTreeMap<String, MergeLoss>,
    /// The same over all of them.
    pub loss: MergeLoss,
    /// Parameters that the adapter replaced as a whole.
    pub replaced: usize,
    /// Parameters that stayed what they were, but perhaps for their dtype.
    pub kept: usize,
    /// The new files.
    pub written: Written,
}

/// Merges an adapter into a folder of float weights: `dequantize(W) + s · B A` for each adapted
/// weight, summed in f32 and rounded once.
///
/// With DoRA it is `m / ‖W + s B A‖ · (W + s B A)`, row by row. `dtype` is that of all float
/// weights of the result; `None` gives each the one that it has in the base model, before it was
/// quantized. All other weights are decoded and rounded to `dtype`; those that the adapter holds
/// as a whole take the place of the base model's. `config.json` loses its `quantization_config`.
/// One tensor is in memory at a time.
///
/// ```no_run
/// use burn_nf4::checkpoint::Checkpoint;
/// use burn_nf4::format::FloatType;
/// use burn_nf4::peft::{Adapter, MergeOptions, merge_16bit};
///
/// let base = Checkpoint::open("tiny-llama-bnb-4bit")?;
/// let adapter = Adapter::open("tiny-llama-lora")?;
/// let (dtype, options) = (Some(FloatType::BF16), MergeOptions::default());
/// merge_16bit(&base, &adapter, "tiny-llama-merged", dtype, &options, |_| {})?;
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// # Errors
/// - [`Nf4Error::BaseLacks`], naming all parameters that the adapter changes and the base model
///   does not have
/// - [`Nf4Error::Shape`] for a weight that the adapter does not fit
/// - [`Nf4Error::NonFinite`] for a weight, merged or not, that is NaN, infinite or too large for
///   its dtype
/// - [`Nf4Error::Config`] for an adapter that changes one of two tied weights, and for writing
///   into the base model's folder
/// - the first of [`Checkpoint::faults`], as for a base model that another method quantized
/// - those of [`SafetensorsFile::load_nf4`](crate::checkpoint::SafetensorsFile::load_nf4),
///   [`Nf4Error::ModelConfig`], [`Nf4Error::FolderNotEmpty`], [`Nf4Error::Io`]
pub fn merge_16bit(
    base: &Checkpoint,
    adapter: &Adapter,
    folder: impl AsRef<Path>,
    dtype: Option<FloatType>,
    options: &MergeOptions,
    progress: impl FnMut(Progress<'_>),
) -> Result<Merged, Nf4Error> {
    merge(
        base,
        adapter,
        folder.as_ref(),
        Target::Float(dtype),
        options,
        progress,
    )
}

/// Merges an adapter into a folder of the same form as the base model: an adapted weight that was
/// quantized is quantized again, with its own settings, and everything else keeps its dtype.
///
/// This is lossy: the result says by how much, module by module. See [`merge_16bit`] for what is
/// computed, and for errors.
pub fn merge_4bit(
    base: &Checkpoint,
    adapter: &Adapter,
    folder: impl AsRef<Path>,
    options: &MergeOptions,
    progress: impl FnMut(Progress<'_>),
) -> Result<Merged, Nf4Error> {
    merge(
        base,
        adapter,
        folder.as_ref(),
        Target::AsBase,
        options,
        progress,
    )
}

/// The form of the result.
#[derive(Debug, Clone, Copy)]
enum Target {
    Float(Option<FloatType>),
    AsBase,
}

/// What an adapter does to a parameter of the base model.
enum Change<'a> {
    Branch(&'a str, &'a LoraModule),
    Replace(&'a DenseTensor),
}

fn merge(
    base: &Checkpoint,
    adapter: &Adapter,
    folder: &Path,
    target: Target,
    options: &MergeOptions,
    progress: impl FnMut(Progress<'_>),
) -> Result<Merged, Nf4Error> {
    check_source(base)?;
    let parameters = base.parameters();
    let changes = changes(adapter, &parameters)?;
    let mut model_config = ModelConfig::read(base)?;
    if let Some(config) = &model_config {
        check_tied(config, &changes)?;
    }
    let mut writer = start_writer(base, folder, options.max_shard_bytes, options.overwrite)?;
    let mut reporter = Reporter::new(base, parameters.len(), progress);
    let mut modules = BTreeMap::new();
    let mut total = Sums::default();
    let mut replaced = 0;
    for &key in &parameters {
        match changes.get(key) {
            Some(Change::Branch(path, module)) => {
                let mut weight = BaseWeight::read(base, key)?;
                let branch = Branch {
                    module,
                    scale: adapter.scale(path)? as f32,
                    fan_in_fan_out: adapter.config().fan_in_fan_out,
                };
                let mut sums = branch.add_to(&mut weight, key)?;
                weight.write(&mut writer, key, target, Some(&mut sums))?;
                total.add(&sums);
                modules.insert(path.to_string(), sums.loss());
            }
            Some(Change::Replace(tensor)) => {
                replace(&mut writer, base, key, tensor, target)?;
                replaced += 1;
            }
            None => keep(&mut writer, base, key, target)?,
        }
        reporter.done(key);
    }

    copy_other_files(&mut writer, base)?;
    match (target, &mut model_config, source_folder(base)) {
        (Target::Float(dtype), Some(config), _) => {
            config.set_dense();
            if let Some(dtype) = dtype {
                config.set_dtype(dtype);
            }
            writer.write_file(CONFIG_FILE, config.to_json().as_bytes())?;
        }
        (Target::AsBase, Some(config), Some(source)) => config.copy(&mut writer, source)?,
        _ => {}
    }
    Ok(Merged {
        kept: parameters.len() - modules.len() - replaced,
        modules,
        loss: total.loss(),
        replaced,
        written: writer.finish()?,
    })
}

/// What the adapter does to each parameter, if the base model has all that it changes.
fn changes<'a>(
    adapter: &'a Adapter,
    parameters: &[&str],
) -> Result<BTreeMap<String, Change<'a>>, Nf4Error> {
    let mut changes = BTreeMap::new();
    for (path, module) in adapter.modules() {
        changes.insert(format!("{path}.weight"), Change::Branch(path, module));
        if let Some(bias) = &module.bias {
            changes.insert(format!("{path}.bias"), Change::Replace(bias));
        }
    }
    for (parameter, tensor) in adapter.full_tensors() {
        changes.insert(parameter.into(), Change::Replace(tensor));
    }
    let lacks = |key: &&String| parameters.binary_search(&key.as_str()).is_err();
    let missing: Vec<String> = changes.keys().filter(lacks).cloned().collect();
    if missing.is_empty() {
        Ok(changes)
    } else {
        Err(Nf4Error::BaseLacks { missing })
    }
}

/// A base model whose head is its embedding would, once loaded, have both changed or neither.
fn check_tied(
    config: &ModelConfig,
    changes: &BTreeMap<String, Change<'_>>,
) -> Result<(), Nf4Error> {
    let is_tied = |key: &&String| {
        ["embed_tokens.weight", "lm_head.weight"]
            .iter()
            .any(|name| key.rsplit('.').take(2).eq(name.rsplit('.')))
    };
    match changes.keys().find(is_tied) {
        Some(key) if config.ties_embeddings() => Err(Nf4Error::Config {
            field: "tie_word_embeddings",
            expected: "false for an adapter that changes one of the two weights",
            given: format!("true, and the adapter changes `{key}`"),
        }),
        _ => Ok(()),
    }
}

/// A tensor of the adapter in the place of the base model's, in the form that this would have.
fn replace(
    writer: &mut CheckpointWriter,
    base: &Checkpoint,
    key: &str,
    tensor: &DenseTensor,
    target: Target,
) -> Result<(), Nf4Error> {
    let mut weight = BaseWeight::read(base, key)?;
    tensor.check_shape(&weight.shape, key)?;
    weight.values = tensor.to_f32();
    weight.write(writer, key, target, None)
}

/// A parameter that the adapter does not touch.
fn keep(
    writer: &mut CheckpointWriter,
    base: &Checkpoint,
    key: &str,
    target: Target,
) -> Result<(), Nf4Error> {
    let is_quantized = base.is_quantized(key);
    match target {
        Target::Float(_) if is_quantized => {
            return BaseWeight::read(base, key)?.write(writer, key, target, None);
        }
        Target::AsBase if is_quantized => return writer.copy(base, key),
        _ => {}
    }
    let (info, bytes) = (base.tensor_info(key)?, base.tensor_bytes(key)?);
    if let Some(dtype) = float_type(info.dtype) {
        with_float_type!(dtype, T => check_finite(&widen(&elements::<T>(bytes)), key)?);
    }
    let dtype = match target {
        Target::Float(dtype) => dtype,
        Target::AsBase => None,
    };
    write_dense(writer, key, info, bytes, dtype)
}
