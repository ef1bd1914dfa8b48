//! Float weights to 4 bit.

use std::path::Path;

use safetensors::Dtype;

use super::dequantize::check_decodes;
use super::model_config::ModelConfig;
use super::select::Selection;
use super::{Converted, Reporter, check_source, copy_other_files, start_writer};
use crate::checkpoint::elements::{
    cast, elements, float_type, le_bytes, stored_dtype, with_float_type,
};
use crate::checkpoint::{
    Checkpoint, CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, Progress, TensorInfo,
};
use crate::error::Nf4Error;
use crate::format::{FloatElement, FloatType, Nf4Tensor, QuantConfig};
use crate::host;

/// What to quantize, and how to store it.
///
/// The default is QLoRA's NF4 with double quantization, stored as bytes, of every linear layer but
/// the head.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizeOptions {
    /// The quantization.
    pub config: QuantConfig,
    /// Modules to keep in addition to those that are always kept (heads, embeddings, norms and
    /// routers), each with the meaning that transformers 5.24 gives to an entry of
    /// `llm_int8_skip_modules`: the end of a module's path, or a regular expression that matches
    /// from its beginning up to a dot or the end. So `model.layers.1` keeps layer 1 and not
    /// layer 10.
    ///
    /// They are written to `config.json` as they are given, where older versions read them in
    /// their own way: transformers 5.17 lets the expression end within a name, so that it expects
    /// layers 10 to 19 in float too and fails to load them (`model.layers.1\\.` means the same to
    /// both), and transformers 4 knows no expressions: it looks for the entry and a dot anywhere
    /// in the path.
    pub skip_modules: Vec<String>,
    /// Whether to quantize the experts of a mixture too: their matrices, or the N-D tensors into
    /// which they are fused. transformers 5.17 does not load those.
    pub experts: bool,
    /// Whether to quantize the output head too: `lm_head`, `embed_out`, and of classifiers `score`,
    /// `classifier` and `qa_outputs`. transformers keeps the head in float when it quantizes, but loads a
    /// quantized one: `llm_int8_skip_modules` is then a list without it, empty if nothing else is kept,
    /// and `tie_word_embeddings` false.
    ///
    /// A head that is the embedding has no weight of its own, and is quantized by
    /// [`embeddings`](Self::embeddings).
    pub head: bool,
    /// Whether to quantize the embeddings of tokens too (`embed_tokens`, `wte` and the like; those of
    /// positions are always kept). An output head that is tied to one is quantized with it: one packed
    /// weight for both.
    ///
    /// **Such a folder is for this crate alone.** bitsandbytes 0.50.2 does not save its `Embedding4bit`,
    /// and transformers 5.24 loads quantized weights into linear layers only: it refuses the folder, as
    /// the packed embedding has another shape (told to ignore that, it would begin with random values).
    pub embeddings: bool,
    /// The dtype under which codes are stored: U8, BF16, F16 or F32.
    pub storage: Dtype,
    /// The dtype to round all float weights to, before they are quantized; `None` keeps each as
    /// it is.
    pub dtype: Option<FloatType>,
    /// What transformers computes in (`bnb_4bit_compute_dtype`); `None` for the dtype of the
    /// weights.
    pub compute_dtype: Option<FloatType>,
    /// The most bytes of tensors in a file, but for a weight that is larger.
    pub max_shard_bytes: usize,
    /// Whether to write into a folder that is not empty.
    pub overwrite: bool,
}

impl Default for QuantizeOptions {
    fn default() -> Self {
        Self {
            config: QuantConfig::default(),
            skip_modules: Vec::new(),
            experts: false,
            head: false,
            embeddings: false,
            storage: Dtype::U8,
            dtype: None,
            compute_dtype: None,
            max_shard_bytes: DEFAULT_MAX_SHARD_BYTES,
            overwrite: false,
        }
    }
}

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
///   embeddings that are to be quantized, and for writing into the source
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
            given: format!("one in which `{key}` is quantized"),
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
    let mut converted = 0;
    let mut compute_dtype = options.compute_dtype;
    for &key in &parameters {
        let info = source.tensor_info(key)?;
        let bytes = source.tensor_bytes(key)?;
        match float_type(info.dtype) {
            Some(stored) if selection.is_quantized(key) => {
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
                writer.write_nf4(key, &weight, options.storage, false)?;
                converted += 1;
            }
            _ => write_dense(&mut writer, key, info, bytes, options.dtype)?,
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
            config.set_untied();
        }
        if let Some(dtype) = options.dtype {
            config.set_dtype(dtype);
        }
        config.write(&mut writer)?;
    }
    Ok(Converted {
        converted,
        kept: parameters.len() - converted,
        source_bytes: source.size_bytes(),
        written: writer.finish()?,
    })
}

/// Writes a tensor that is not quantized, rounded to `dtype` if it is of another float type.
pub(crate) fn write_dense(
    writer: &mut CheckpointWriter,
    key: &str,
    info: TensorInfo<'_>,
    bytes: &[u8],
    dtype: Option<FloatType>,
) -> Result<(), Nf4Error> {
    let other = |(stored, dtype): &(FloatType, FloatType)| stored != dtype;
    match float_type(info.dtype).zip(dtype).filter(other) {
        None => writer.write_tensor(key, info.dtype, info.shape, bytes),
        Some((stored, dtype)) => with_float_type!(stored, S => with_float_type!(dtype, T => {
            let rounded = cast::<S, T>(&elements::<S>(bytes), key)?;
            writer.write_tensor(key, stored_dtype(dtype), info.shape, &le_bytes(&rounded))
        })),
    }
}

pub(crate) fn quantize<T: FloatElement>(
    weight: &[T],
    shape: &[usize],
    config: QuantConfig,
    key: &str,
) -> Result<Nf4Tensor, Nf4Error> {
    let words = host::quantize(weight, shape, config).map_err(|error| error.with_key(key))?;
    let weight = Nf4Tensor::from_packed(&words, shape, config, T::FLOAT_TYPE)?;
    // Quantized scales are off by a little, which is too much for a value near the largest.
    check_decodes(&weight, key)?;
    Ok(weight)
}
