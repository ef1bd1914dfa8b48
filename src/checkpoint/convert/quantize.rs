//! Weights to 4 bit or 8 bit.

use std::borrow::Cow;
use std::path::Path;

use super::decode::check_decodes;
use super::dense::write_dense;
use super::dequantize::{decode_upright, write_decoded};
use super::entry::Quantized;
use super::expert_stacks;
use super::fused::FusedScales;
use super::model_config::ModelConfig;
use super::options::QuantizeOptions;
use super::select::Selection;
use super::{ClaimFile, Converted, Reporter, check_source, copy_other_files, start_writer};
use crate::checkpoint::elements::{cast, elements, expect_float, with_float_type};
use crate::checkpoint::orientation::Orientation;
use crate::checkpoint::stored_form::StoredForm;
use crate::checkpoint::values::Values;
use crate::checkpoint::{Checkpoint, CheckpointWriter, Progress};
use crate::error::Nf4Error;
use crate::format::{
    BlockTensor, FloatElement, FloatType, PackedImage, PackedLayout, QuantConfig, QuantType,
    TensorScale,
};
use crate::host;

/// Quantizes the linear layers of a checkpoint into a new folder that transformers loads: NF4 and FP4 with
/// bitsandbytes; NVFP4, MXFP4 and FP8 by rows with compressed-tensors; FP8 in tiles as DeepSeek's models have it;
/// the experts of gpt-oss to MXFP4 in the form of that model.
///
/// Quantized are matrices named `….weight`, but for embeddings and heads (`lm_head` and the like) unless
/// [`QuantizeOptions`] ask for them, routers, and what the options name. `config.json` gets a `quantization_config` that says
/// so, unless no weight is left, and the other files of the folder are copied. Of types that bitsandbytes does not
/// have it gets the dtype that the weights had too, if it names none: nothing else in the folder tells of it. One
/// tensor is in memory at a time.
///
/// The weights of the source may be quantized, in another type: they are decoded to the dtype that they had and
/// quantized again, and those that the new folder does not quantize become floats. What that costs is in
/// [`Converted::losses`], beside what was lost before. Scales of activations stay behind. A weight whose rows
/// are not made of whole blocks of the type stays as it is: [`Converted::ragged`]. In NVFP4 the layers that
/// vLLM fuses (`q_proj`, `k_proj` and `v_proj`; `gate_proj` and `up_proj`) share the scale of the tensor.
///
/// ```no_run
/// use burn_nf4::checkpoint::{Checkpoint, QuantizeOptions, quantize_checkpoint};
///
/// let source = Checkpoint::open("SmolLM2-135M")?;
/// let options = QuantizeOptions::default();
/// quantize_checkpoint(&source, "SmolLM2-135M-nf4", &options, |progress| {
///     println!("{} of {}", progress.parameters_done, progress.parameters_total);
/// })?;
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// # Errors
/// - [`Nf4Error::BlockSize`] and [`Nf4Error::Scales`] for a `config` that the type has not, [`Nf4Error::Dtype`] for a
///   `storage` other than U8 with a type that bitsandbytes does not have
/// - [`Nf4Error::NonFinite`] for a weight with a NaN or an infinity, or with values so near to the
///   largest of its dtype that they decode to infinity, [`Nf4Error::Dtype`] for one of another
///   type than f16, bf16 and f32, each with its key
/// - the first of [`Checkpoint::faults`], as for a source that another method quantized
/// - [`Nf4Error::Config`] for a source with weights that are of the type already, for models that store their
///   linear weights the other way round (GPT-2's `Conv1D`), for a source without the head or the
///   embeddings that are to be quantized, for an entry of `skip_modules` that fits no module, and for
///   writing into the source
/// - [`Nf4Error::Pattern`] for an entry of `skip_modules` that is no regular expression
/// - [`Nf4Error::ModelConfig`] for a malformed `config.json`
/// - [`Nf4Error::FolderNotEmpty`], [`Nf4Error::Io`]
pub fn quantize_checkpoint(
    source: &Checkpoint,
    folder: impl AsRef<Path>,
    options: &QuantizeOptions,
    progress: impl FnMut(Progress<'_>),
) -> Result<Converted, Nf4Error> {
    check_source(source)?;
    let mut model_config = ModelConfig::read(source)?;
    if let Some(config) = &model_config {
        config.check_layout()?;
    }
    let (parameters, dropped) = (source.parameters(), source.activation_scales());
    let tied = model_config.as_ref().and_then(ModelConfig::ties_embeddings);
    let model_type = model_config.as_ref().and_then(ModelConfig::model_type);
    let selection = match expert_stacks::are_wanted(model_type, &parameters, options) {
        true => expert_stacks::select(source, &parameters, options)?,
        false => Selection::new(source, &parameters, options, tied)?,
    };
    check_types(source, &selection, options)?;

    let mut writer = start_writer(
        source,
        folder.as_ref(),
        options.max_shard_bytes,
        options.overwrite,
    )?;
    let mut reporter = Reporter::new(source, parameters.len(), progress);
    let mut result = Converted {
        dropped: dropped.into_iter().map(String::from).collect(),
        source_bytes: source.size_bytes(),
        ..Converted::default()
    };
    let mut scales = FusedScales::default();
    let mut weight_dtype = None;
    for &key in &parameters {
        let name = match selection.is_quantized(key) {
            true => Some(key),
            false => {
                keep(&mut writer, source, key, options.dtype, &mut result)?;
                selection.head_of(key)
            }
        };
        if let Some(name) = name {
            let scale = match options.config.quant_type {
                QuantType::Nvfp4 => {
                    scales.of(source, name, selection.quantized(), options.dtype)?
                }
                _ => None,
            };
            let written = match selection.has_expert_stacks() {
                true => AsWritten::expert_stack(),
                false => AsWritten::of(name, scale, options)?,
            };
            let names = [key, name];
            let dtype = write_quantized(&mut writer, source, names, written, options, &mut result)?;
            weight_dtype.get_or_insert(dtype);
        }
        reporter.done(key);
    }

    copy_other_files(&mut writer, source, ClaimFile::Replaced)?;
    if let Some(config) = &mut model_config {
        // What is claimed must be there. With a weight comes its dtype.
        match weight_dtype {
            Some(dtype) => {
                config.set_quantized(&Quantized {
                    config: options.config,
                    storage: options.storage,
                    compute_dtype: options.compute_dtype.unwrap_or(dtype),
                    skip_entry: selection.skip_entry(),
                    ignore: selection.ignore(),
                    embeddings: options.embeddings,
                    expert_stacks: selection.has_expert_stacks(),
                });
                // bitsandbytes stores it with each weight.
                if !options.config.quant_type.is_bitsandbytes() && config.dtype().is_none() {
                    config.set_dtype(dtype);
                }
            }
            None if !config.claims().is_empty() => config.set_dense(),
            None => {}
        }
        // transformers would put the embedding into a head that it takes for tied.
        if selection.quantizes_head() && tied != Some(false) {
            config.set_tied(false);
        }
        if let Some(dtype) = options.dtype {
            config.set_dtype(dtype);
        }
        config.write(&mut writer)?;
    }
    result.ragged = selection.into_ragged();
    result.written = writer.finish()?;
    Ok(result)
}

/// Refuses settings that the type has not, and weights that are of the type already.
fn check_types(
    source: &Checkpoint,
    selection: &Selection,
    options: &QuantizeOptions,
) -> Result<(), Nf4Error> {
    let quant_type = options.config.quant_type;
    options.config.check("config")?;
    StoredForm::new("storage", quant_type, options.storage, false)?;
    for key in selection.quantized() {
        if source.is_quantized(key) && source.weight_form(key)?.config.quant_type == quant_type {
            return Err(Nf4Error::Config {
                field: "source",
                expected: "float weights, or weights of another type than the one to quantize to",
                given: format!("quantized already (`{key}` is {})", quant_type.name()),
            });
        }
    }
    Ok(())
}

/// Writes a parameter that is not quantized.
fn keep(
    writer: &mut CheckpointWriter,
    source: &Checkpoint,
    key: &str,
    dtype: Option<FloatType>,
    result: &mut Converted,
) -> Result<(), Nf4Error> {
    result.kept += 1;
    if source.is_quantized(key) {
        result.decoded.push(key.into());
        return write_decoded(writer, source, key, dtype);
    }
    let info = source.tensor_info(key)?;
    write_dense(writer, key, info, source.tensor_bytes(key)?, dtype)
}

/// How a weight is written.
#[derive(Clone, Copy)]
struct AsWritten {
    /// The scale of an NVFP4 tensor that is not its own.
    scale: Option<TensorScale>,
    form: StoredForm,
    orientation: Orientation,
}

impl AsWritten {
    fn of(
        name: &str,
        scale: Option<TensorScale>,
        options: &QuantizeOptions,
    ) -> Result<Self, Nf4Error> {
        Ok(Self {
            scale,
            form: StoredForm::new(name, options.config.quant_type, options.storage, false)?,
            orientation: Orientation::AsStored,
        })
    }

    /// As gpt-oss has its experts.
    fn expert_stack() -> Self {
        Self {
            scale: None,
            form: StoredForm::Blocks,
            orientation: Orientation::TransposedStack,
        }
    }
}

/// Quantizes the parameter `key` under a name, and returns the dtype that it had.
fn write_quantized(
    writer: &mut CheckpointWriter,
    source: &Checkpoint,
    [key, name]: [&str; 2],
    written: AsWritten,
    options: &QuantizeOptions,
    result: &mut Converted,
) -> Result<FloatType, Nf4Error> {
    let weight = if source.is_quantized(key) {
        let (weight, orientation) = source.load_image(key)?;
        count_type(&mut result.requantized, weight.layout().config().quant_type);
        with_float_type!(weight.dtype(), T => {
            let (values, shape) = decode_upright::<T>(weight, orientation, key)?;
            quantize_as(values.into(), shape, written, options, key)?
        })
    } else {
        let info = source.tensor_info(key)?;
        let bytes = source.tensor_bytes(key)?;
        with_float_type!(expect_float(info.dtype, key)?, T => {
            quantize_as(elements::<T>(bytes), info.shape.to_vec(), written, options, key)?
        })
    };
    let dtype = weight.dtype();
    writer.write_parts(name, weight.parts(), written.form)?;
    result.converted += 1;
    if let Ok(original) = Values::open(source, key)? {
        let loss = original.compare(&Values::of_image(weight, written.orientation, name)?);
        result.losses.insert(name.into(), loss);
    }
    Ok(dtype)
}

fn count_type(counts: &mut Vec<(QuantType, usize)>, quant_type: QuantType) {
    match counts.iter_mut().find(|(of, _)| *of == quant_type) {
        Some((_, count)) => *count += 1,
        None => counts.push((quant_type, 1)),
    }
}

/// Quantizes the values of a parameter, which are rounded to the dtype of the options first.
fn quantize_as<S: FloatElement>(
    values: Cow<'_, [S]>,
    mut shape: Vec<usize>,
    written: AsWritten,
    options: &QuantizeOptions,
    key: &str,
) -> Result<PackedImage, Nf4Error> {
    let values = written.orientation.turn(key, values, &mut shape)?;
    let (config, scale) = (options.config, written.scale);
    match options.dtype.filter(|&dtype| dtype != S::FLOAT_TYPE) {
        None => quantize(&values, &shape, config, scale, key),
        Some(dtype) => with_float_type!(dtype, T => {
            quantize(&cast::<S, T>(&values, key)?, &shape, config, scale, key)
        }),
    }
}

/// Quantizes a weight, to the image that can be decoded again. `scale` is the scale of an NVFP4 tensor, if it is
/// not its own largest magnitude that decides on it.
///
/// # Errors
/// Those of [`host::quantize`], with `key`, and [`Nf4Error::NonFinite`] for a value that decodes to an
/// infinity.
pub(crate) fn quantize<T: FloatElement>(
    weight: &[T],
    shape: &[usize],
    config: QuantConfig,
    scale: Option<TensorScale>,
    key: &str,
) -> Result<PackedImage, Nf4Error> {
    let quantized = match (config.quant_type, scale) {
        (QuantType::Nvfp4, Some(scale)) => BlockTensor::quantize_nvfp4(weight, shape, scale)
            .map(|tensor| PackedImage::of(&tensor.parts())),
        _ => host::quantize(weight, shape, config).and_then(|words| {
            let layout = PackedLayout::for_shape(shape, config)?;
            Ok(PackedImage::new(words, layout, shape, T::FLOAT_TYPE))
        }),
    };
    let weight = quantized.map_err(|error| error.with_key(key))?;
    weight.parts().check()?;
    // Quantized scales are off by a little, which is too much for a value near the largest.
    check_decodes(&weight, key)?;
    Ok(weight)
}
