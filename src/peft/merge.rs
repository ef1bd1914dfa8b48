//! An adapter put into the weights of its base model, in a new folder.

mod branch;
mod loss;
mod plan;
mod target;
mod weight;

use std::collections::BTreeMap;
use std::path::Path;

use super::adapter::Adapter;
use super::base::BaseNames;
use super::keys::is_saved_unasked;
use crate::checkpoint::convert::{
    ClaimFile, ModelConfig, Reporter, check_source, copy_other_files, start_writer, write_dense,
};
use crate::checkpoint::elements::{elements, float_type, with_float_type};
use crate::checkpoint::{Checkpoint, CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, Progress, Written};
use crate::error::Nf4Error;
use crate::format::{FloatElement, FloatType, check_finite};
use branch::Branch;
use loss::Sums;
use plan::{Change, Output, Plan};
use target::Target;
use weight::BaseWeight;

pub use loss::MergeLoss;

/// How to write the folder of a merge.
#[derive(Debug, Clone, PartialEq)]
pub struct MergeOptions {
    /// The most bytes of tensors in a file, but for a weight that is larger.
    pub max_shard_bytes: usize,
    /// Whether to write into a folder that is not empty.
    pub overwrite: bool,
    /// Whether to merge an adapter that lacks branches or weights that its settings ask for: what it
    /// lacks stays as it is in the base model.
    pub allow_missing: bool,
}

impl Default for MergeOptions {
    fn default() -> Self {
        Self {
            max_shard_bytes: DEFAULT_MAX_SHARD_BYTES,
            overwrite: false,
            allow_missing: false,
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
/// Where the head is the embedding and the adapter changes one of the two, the result has a weight
/// for each, and `config.json` says so (`tie_word_embeddings` is `false`). The two are one where
/// `….model.embed_tokens` is stored and `….lm_head` is not, or where two weights are stored with the same
/// bits, unless `tie_word_embeddings` is `false`.
///
/// Into a model of text and images (Gemma 3, LLaVA, Mistral 3) an adapter of the whole or of the text part
/// alone is merged, whichever names of the parts the two have.
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
/// - [`Nf4Error::AdapterLacks`], naming all that the settings of the adapter ask for and it does not
///   have, unless [`allow_missing`](MergeOptions::allow_missing) is set
/// - [`Nf4Error::Shape`] for a weight that the adapter does not fit,
///   [`Nf4Error::ResizedEmbeddings`] where the vocabularies differ
/// - [`Nf4Error::NonFinite`] for a weight, merged or not, that is NaN, infinite or too large for
///   its dtype
/// - [`Nf4Error::Config`] for an adapter with two different weights for two that the base model
///   ties, for one that changes an embedding (or a head) where nothing tells whether the model has
///   a head (or an embedding) that is the same, and for writing into the base model's folder
/// - the first of [`Checkpoint::faults`], as for a base model that another method quantized
/// - those of [`SafetensorsFile::load_quantized`](crate::checkpoint::SafetensorsFile::load_quantized),
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
/// A weight in NVFP4 keeps the scale of the tensor that it has in the base model, as layers that vLLM fuses
/// (`q_proj`, `k_proj` and `v_proj`; `gate_proj` and `up_proj`) share one. Where the merged weight is too large
/// for it, it gets a scale of its own: vLLM takes one for all of such layers and decodes the others wrongly.
/// [`merge_16bit`], and [`quantize_checkpoint`](crate::checkpoint::quantize_checkpoint) after it, gives them
/// one scale again.
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

fn merge(
    base: &Checkpoint,
    adapter: &Adapter,
    folder: &Path,
    target: Target,
    options: &MergeOptions,
    progress: impl FnMut(Progress<'_>),
) -> Result<Merged, Nf4Error> {
    check_source(base)?;
    let mut model_config = ModelConfig::read(base)?;
    let mut names = BaseNames::of(base, model_config.as_ref())?;
    let adapter = &adapter.for_base(names.parameters());
    adapter.check_fits(&names)?;
    names.find_tie(base, adapter, model_config.as_ref())?;
    if !options.allow_missing {
        adapter.check_complete(names.modules(), names.parameters())?;
    }
    let Plan { outputs, unties } = Plan::of(adapter, &names, model_config.as_ref())?;

    let mut writer = start_writer(base, folder, options.max_shard_bytes, options.overwrite)?;
    let mut reporter = Reporter::new(base, outputs.len(), progress);
    let mut modules = BTreeMap::new();
    let mut total = Sums::default();
    let (mut replaced, mut kept) = (0, 0);
    for output in &outputs {
        match &output.change {
            change if change.is_none() => {
                keep(&mut writer, base, output, target)?;
                kept += 1;
            }
            change => match write_changed(&mut writer, base, adapter, output, target)? {
                None => replaced += 1,
                Some(sums) => {
                    total.add(&sums);
                    modules.extend(
                        change
                            .branch
                            .map(|branch| (branch.path.into(), sums.loss())),
                    );
                }
            },
        }
        reporter.done(&output.key);
    }

    let claim = match target {
        Target::AsBase => {
            for key in base.activation_scales() {
                let (info, bytes) = (base.tensor_info(key)?, base.tensor_bytes(key)?);
                writer.write_tensor(key, info.dtype, info.shape, bytes)?;
            }
            ClaimFile::Kept
        }
        Target::Float(_) => ClaimFile::Replaced,
    };
    copy_other_files(&mut writer, base, claim)?;
    if let Some(config) = &mut model_config {
        if unties {
            config.set_tied(false);
        }
        if let Target::Float(dtype) = target {
            config.set_dense();
            if let Some(dtype) = dtype {
                config.set_dtype(dtype);
            }
        }
        config.write(&mut writer)?;
    }
    Ok(Merged {
        kept,
        modules,
        loss: total.loss(),
        replaced,
        written: writer.finish()?,
    })
}

/// Writes a parameter that the adapter changes, in the form that the base model has it in. With a
/// branch it returns what that did.
fn write_changed(
    writer: &mut CheckpointWriter,
    base: &Checkpoint,
    adapter: &Adapter,
    output: &Output<'_>,
    target: Target,
) -> Result<Option<Sums>, Nf4Error> {
    let Output {
        key,
        source,
        change: Change { replace, branch },
    } = output;
    let mut weight = BaseWeight::read(base, source)?;
    if let Some(tensor) = replace {
        check_vocabulary(key, weight.shape.first(), tensor.shape().first())?;
        tensor.check_shape(&weight.shape, key)?;
        weight.values = tensor.to_f32();
    }
    let Some(adapted) = branch else {
        weight.write(writer, key, target, None)?;
        return Ok(None);
    };
    let [d_output, d_input] = adapted.module.dims();
    let rows = if adapted.transposed {
        d_input
    } else {
        d_output
    };
    check_vocabulary(key, weight.shape.first(), Some(&rows))?;
    let branch = Branch {
        module: adapted.module,
        scale: adapter.scale(adapted.path)? as f32,
        transposed: adapted.transposed,
    };
    let mut sums = branch.add_to(&mut weight, key)?;
    weight.write(writer, key, target, Some(&mut sums))?;
    Ok(Some(sums))
}

/// Whether the rows of an embedding or a head are as many as the base model has.
fn check_vocabulary(
    key: &str,
    expected: Option<&usize>,
    given: Option<&usize>,
) -> Result<(), Nf4Error> {
    let module = key.rsplit_once('.').map_or(key, |(module, _)| module);
    match (expected, given) {
        (Some(&expected), Some(&given)) if is_saved_unasked(module) && expected != given => {
            Err(Nf4Error::ResizedEmbeddings {
                tensor: key.into(),
                expected,
                given,
            })
        }
        _ => Ok(()),
    }
}

/// A parameter that the adapter does not touch.
fn keep(
    writer: &mut CheckpointWriter,
    base: &Checkpoint,
    output: &Output<'_>,
    target: Target,
) -> Result<(), Nf4Error> {
    let Output { key, source, .. } = output;
    if base.is_quantized(source) {
        return match target {
            Target::AsBase if key == source => writer.copy(base, key),
            _ => BaseWeight::read(base, source)?.write(writer, key, target, None),
        };
    }
    let (info, bytes) = (base.tensor_info(source)?, base.tensor_bytes(source)?);
    if let Some(dtype) = float_type(info.dtype) {
        with_float_type!(dtype, T => {
            check_finite(key, elements::<T>(bytes).iter().map(|value| value.to_f32()))?;
        });
    }
    let dtype = match target {
        Target::Float(dtype) => dtype,
        Target::AsBase => None,
    };
    write_dense(writer, key, info, bytes, dtype)
}
