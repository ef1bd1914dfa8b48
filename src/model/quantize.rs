//! The linear layers of a model in 4 bit.

use super::check::check_model;
use super::layers::{LinearLayers, named};
use super::names::{ModelNames, other_floats};
use crate::checkpoint::convert::{SkipPattern, check_used, is_expert, is_kept_by_default};
use crate::error::Nf4Error;
use crate::format::QuantConfig;

/// Which linear layers to bring to 4 bit, and how. The default is QLoRA's NF4 with double quantization,
/// of all layers but heads, routers and experts: see [`heads`](Self::heads) and
/// [`experts`](Self::experts).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct QuantizeLayers {
    /// The quantization.
    pub config: QuantConfig,
    /// Layers to keep in floats, with the meaning that transformers 5.24 gives to an entry of
    /// `llm_int8_skip_modules`, see
    /// [`QuantizeOptions::skip_modules`](crate::checkpoint::QuantizeOptions::skip_modules). One that
    /// fits no module is an error.
    pub skip_modules: Vec<String>,
    /// Whether to quantize also what [`quantize_checkpoint`](crate::checkpoint::quantize_checkpoint)
    /// keeps because of its name. These are output layers that are called `lm_head`, `embed_out`,
    /// `score`, `classifier` or `qa_outputs`, and routers that are called `gate` or `router`. A head of
    /// another name is known by [`head_name`](LinearLayers::head_name), or is to be among
    /// [`skip_modules`](Self::skip_modules).
    ///
    /// A head that is [tied](LinearLayers::tied_head) to the embedding becomes one of its own: in 4 bit it
    /// is another weight, and the table stays as it is.
    pub heads: bool,
    /// Whether to quantize the experts of a mixture too, layers with `experts` in their path.
    /// transformers 5 has all experts of a layer in one tensor of floats and does not load a folder with
    /// packed ones, as it does not that of
    /// [`QuantizeOptions::experts`](crate::checkpoint::QuantizeOptions::experts).
    pub experts: bool,
}

pub(super) fn quantize<M: LinearLayers>(model: M, options: &QuantizeLayers) -> Result<M, Nf4Error> {
    check_model(&model)?;
    let patterns = SkipPattern::all(&options.skip_modules)?;
    let names = ModelNames::of(&model, &other_floats(&model));
    check_used(&patterns, &names.modules_of_parameters())?;
    let is_skipped = |name: &str| -> Result<bool, Nf4Error> {
        let matches = |pattern: &SkipPattern<'_>| pattern.matches(name);
        patterns
            .iter()
            .try_fold(false, |any, pattern| Ok(any || matches(pattern)?))
    };
    let head = model.head_name();
    let model = match model.tied_head() {
        Some(tied) if options.heads && !is_skipped(&tied.head)? => model.untie_head(),
        _ => model,
    };
    model.try_map_linears(|name, layer| {
        if is_skipped(name)? {
            return Ok(layer);
        }
        let is_head = head.as_deref() == Some(name);
        if !options.heads && (is_head || is_kept_by_default(name)) {
            return Ok(layer);
        }
        if !options.experts && is_expert(name) {
            return Ok(layer);
        }
        let quantized = layer.quantize(options.config);
        quantized.map_err(|error| named(error, name))
    })
}
