//! Float weights to 4 bit.

use std::path::Path;

use super::decode::check_decodes;
use super::dense::write_dense;
use super::model_config::ModelConfig;
use super::options::QuantizeOptions;
use super::select::Selection;
use super::{Converted, Reporter, check_source, copy_other_files, start_writer};
use crate::checkpoint::elements::{cast, elements, expect_float, with_float_type};
use crate::checkpoint::{Checkpoint, Progress};
use crate::error::Nf4Error;
use crate::format::{FloatElement, PackedImage, PackedLayout, QuantConfig};
use crate::host;

/// Quantizes the linear layers of a checkpoint into a new folder that transformers loads with
/// bitsandbytes.
///
/// Quantized are matrices named `….weight`, but for embeddings and heads (`lm_head` and the like) unless
/// [`QuantizeOptions`] ask for them, routers, and what the options name. `config.json` gets a `quantization_config` that says
/// so, unless no weight is left, and the other files of the folder are copied. One tensor is in memory at a time.
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
/// - [`Nf4Error::NonFinite`] for a weight with a NaN or an infinity, or with values so near to the
///   largest of its dtype that they decode to infinity, [`Nf4Error::Dtype`] for one of another
///   type than f16, bf16 and f32, each with its key
/// - the first of [`Checkpoint::faults`], as for a source that another method quantized
/// - [`Nf4Error::Config`] for a source that is quantized already, for models that store their
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
    if let Some(key) = source.quantized_weights().first() {
        return Err(Nf4Error::Config {
            field: "source",
            expected: "a checkpoint of float weights",
            given: format!("quantized already (`{key}`)"),
        });
    }
    check_source(source)?;
    let mut model_config = ModelConfig::read(source)?;
    if let Some(config) = &model_config {
        config.check_layout()?;
    }
    let parameters = source.parameters();
    let tied = model_config.as_ref().and_then(ModelConfig::ties_embeddings);
    let selection = Selection::new(source, &parameters, options, tied)?;

    let mut writer = start_writer(
        source,
        folder.as_ref(),
        options.max_shard_bytes,
        options.overwrite,
    )?;
    let mut reporter = Reporter::new(source, parameters.len(), progress);
    let (mut converted, mut kept) = (0, 0);
    let mut compute_dtype = options.compute_dtype;
    for &key in &parameters {
        let info = source.tensor_info(key)?;
        let bytes = source.tensor_bytes(key)?;
        let packed = match selection.is_quantized(key) {
            true => Some(key),
            false => {
                write_dense(&mut writer, key, info, bytes, options.dtype)?;
                kept += 1;
                selection.head_of(key)
            }
        };
        if let Some(name) = packed {
            let stored = expect_float(info.dtype, key)?;
            let weight = match options.dtype.filter(|&dtype| dtype != stored) {
                None => with_float_type!(stored, T => {
                    quantize(&elements::<T>(bytes), info.shape, options.config, key)?
                }),
                Some(dtype) => with_float_type!(stored, S => with_float_type!(dtype, T => {
                    let rounded = cast::<S, T>(&elements::<S>(bytes), key)?;
                    quantize(&rounded, info.shape, options.config, key)?
                })),
            };
            compute_dtype.get_or_insert(weight.dtype());
            writer.write_parts(name, weight.parts(), options.storage, false)?;
            converted += 1;
        }
        reporter.done(key);
    }

    copy_other_files(&mut writer, source)?;
    if let Some(config) = &mut model_config {
        // What is claimed must be there. With a weight comes its dtype.
        if let Some(compute_dtype) = compute_dtype.filter(|_| converted > 0) {
            config.set_quantized(options, compute_dtype, selection.skip_entry());
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
    Ok(Converted {
        converted,
        kept,
        source_bytes: source.size_bytes(),
        written: writer.finish()?,
    })
}

/// Quantizes a weight, to the image that can be decoded again.
///
/// # Errors
/// Those of [`host::quantize`], with `key`, and [`Nf4Error::NonFinite`] for a value that decodes to an
/// infinity.
pub(crate) fn quantize<T: FloatElement>(
    weight: &[T],
    shape: &[usize],
    config: QuantConfig,
    key: &str,
) -> Result<PackedImage, Nf4Error> {
    let words = host::quantize(weight, shape, config).map_err(|error| error.with_key(key))?;
    let layout = PackedLayout::new(weight.len(), config);
    let weight = PackedImage::new(words, layout, shape, T::FLOAT_TYPE);
    weight.parts().check()?;
    // Quantized scales are off by a little, which is too much for a value near the largest.
    check_decodes(&weight, key)?;
    Ok(weight)
}
