//! Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115).

use super::llama;
use crate::error::ModelError;
use crate::json::fields::Fields;
use crate::model::config::defaults::{Defaults, used_window};
use crate::model::config::{Biases, DecoderConfig};

pub(super) const DEFAULTS: Defaults = Defaults {
    vocab_size: 151_936,
    intermediate_size: 22_016,
    num_key_value_heads: Some(32),
    max_position_embeddings: 32_768,
    eos_token_id: None,
    ..llama::DEFAULTS
};

/// As Llama, with biases on queries, keys and values alone, and windows in the upper layers.
pub(super) fn read(fields: &Fields) -> Result<DecoderConfig, ModelError> {
    let qwen = DecoderConfig {
        biases: Biases {
            qkv: true,
            ..Biases::default()
        },
        ..DEFAULTS.read(fields)?
    };
    with_upper_windows(qwen, fields)
}

/// Windows, if `use_sliding_window` says so, from the layer `max_window_layers` on or where `layer_types`
/// has them.
pub(super) fn with_upper_windows(
    config: DecoderConfig,
    fields: &Fields,
) -> Result<DecoderConfig, ModelError> {
    let window = used_window(fields, Some(4096))?;
    let first: usize = fields.get("max_window_layers")?.unwrap_or(28);
    config.with_windows_by_type(fields, window, |index| window.is_some() && index >= first)
}
