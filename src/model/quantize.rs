//! The linear layers of a model in 4 bit.

use super::layers::{LinearLayers, named};
use super::names::check_handed_out;
use crate::checkpoint::convert::{SkipPattern, is_kept_by_default};
use crate::error::Nf4Error;
use crate::format::QuantConfig;

/// Which linear layers to bring to 4 bit, and how. The default is QLoRA's NF4 with double quantization,
/// of all but heads and routers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct QuantizeLayers {
    /// The quantization.
    pub config: QuantConfig,
    /// Layers to keep in floats, with the meaning that transformers 5.24 gives to an entry of
    /// `llm_int8_skip_modules`, see
    /// [`QuantizeOptions::skip_modules`](crate::checkpoint::QuantizeOptions::skip_modules).
    pub skip_modules: Vec<String>,
    /// Whether to quantize also what [`quantize_checkpoint`](crate::checkpoint::quantize_checkpoint)
    /// keeps because of its name: output layers such as `lm_head`, and routers.
    pub heads: bool,
}

pub(super) fn quantize<M: LinearLayers>(model: M, options: &QuantizeLayers) -> Result<M, Nf4Error> {
    check_handed_out(&model)?;
    let patterns = options.skip_modules.iter();
    let patterns = patterns
        .map(|pattern| SkipPattern::new(pattern))
        .collect::<Result<Vec<_>, _>>()?;
    model.try_map_linears(|name, layer| {
        for pattern in &patterns {
            if pattern.matches(name)? {
                return Ok(layer);
            }
        }
        if !options.heads && is_kept_by_default(name) {
            return Ok(layer);
        }
        let quantized = layer.quantize(options.config);
        quantized.map_err(|error| named(error, name))
    })
}
