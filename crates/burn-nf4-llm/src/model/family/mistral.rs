//! Mistral 7B (arXiv 2310.06825), and Mistral Nemo and Small, whose heads are not the hidden size over
//! their number.

use super::llama;
use crate::error::ModelError;
use crate::json::fields::Fields;
use crate::model::config::DecoderConfig;
use crate::model::config::defaults::{Defaults, nullable_size};

const DEFAULTS: Defaults = Defaults {
    intermediate_size: 14_336,
    num_key_value_heads: Some(8),
    max_position_embeddings: 4096 * 32,
    ..llama::DEFAULTS
};

/// As Llama, with a window in all layers, and without biases, whatever the config says.
pub(super) fn read(fields: &Fields) -> Result<DecoderConfig, ModelError> {
    let window = nullable_size(fields, "sliding_window", Some(4096))?;
    DEFAULTS.read(fields)?.with_window(fields, window)
}
