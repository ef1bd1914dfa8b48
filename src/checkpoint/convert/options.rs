//! What a caller can ask of a conversion.

use safetensors::Dtype;

use crate::checkpoint::DEFAULT_MAX_SHARD_BYTES;
use crate::format::{FloatType, QuantConfig};

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
    /// layer 10. One that fits no module is an error.
    ///
    /// They are written to `config.json` as they are given, where older versions read them in
    /// their own way: transformers 5.17 lets the expression end within a name, so that it expects
    /// layers 10 to 19 in float too and fails to load them (`model.layers.1\\.` means the same to
    /// both), and transformers 4 knows no expressions: it looks for the entry and a dot anywhere
    /// in the path.
    pub skip_modules: Vec<String>,
    /// Whether to quantize the experts of a mixture too: their matrices, or the N-D tensors into
    /// which they are fused. transformers 5.17 does not load those.
    ///
    /// Of gpt-oss in MXFP4 it does: `model_type` says so, and the stacks of experts, `[experts, k, rows]`,
    /// are written transposed as `…_blocks` and `…_scales`. All other weights stay floats, as this form has
    /// experts alone; an entry of [`skip_modules`](Self::skip_modules) keeps both stacks of a layer.
    pub experts: bool,
    /// Whether to quantize the output head too: `lm_head`, `embed_out`, and of classifiers `score`,
    /// `classifier` and `qa_outputs`. transformers keeps the head in float when it quantizes, but loads a
    /// quantized one: `llm_int8_skip_modules` is then a list without it, empty if nothing else is kept,
    /// and `tie_word_embeddings` false.
    ///
    /// A head that is the embedding `model.embed_tokens` becomes a weight of its own, `lm_head.weight`, and
    /// the table stays as it is, as transformers knows no packed embeddings. With
    /// [`embeddings`](Self::embeddings) it is quantized with the embedding, as one weight.
    pub head: bool,
    /// Whether to quantize the embeddings of tokens too (`embed_tokens`, `wte` and the like; those of
    /// positions are always kept). An output head that is tied to one is quantized with it: one packed
    /// weight for both.
    ///
    /// **Such a folder is for this crate alone.** bitsandbytes 0.50.2 does not save its `Embedding4bit`,
    /// and transformers 5.24 loads quantized weights into linear layers only: it refuses the folder, as
    /// the packed embedding has another shape (told to ignore that, it would begin with random values).
    /// In NVFP4 and MXFP4 transformers 5.24 loads it if it is told to decode
    /// (`CompressedTensorsConfig(dequantize=True)`); otherwise it fails, as it does with what compressed-tensors
    /// 0.20 writes of embeddings itself.
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

/// What to write when a checkpoint is dequantized.
#[derive(Debug, Clone, PartialEq)]
pub struct DequantizeOptions {
    /// The dtype of all float weights of the result; `None` gives each the dtype that it had
    /// before it was quantized.
    pub dtype: Option<FloatType>,
    /// The most bytes of tensors in a file, but for a weight that is larger.
    pub max_shard_bytes: usize,
    /// Whether to write into a folder that is not empty.
    pub overwrite: bool,
}

impl Default for DequantizeOptions {
    fn default() -> Self {
        Self {
            dtype: None,
            max_shard_bytes: DEFAULT_MAX_SHARD_BYTES,
            overwrite: false,
        }
    }
}
