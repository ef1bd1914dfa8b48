//! Qwen3, the dense models (arXiv 2505.09388).

use super::qwen2;
use crate::error::ModelError;
use crate::json::fields::Fields;
use crate::model::config::defaults::{Defaults, flag};
use crate::model::config::{Biases, DecoderConfig, QkNorm};

const DEFAULTS: Defaults = Defaults {
    head_dim: Some(128),
    ..qwen2::DEFAULTS
};

/// As Qwen2, with norms of each head of queries and keys in place of the biases.
pub(super) fn read(fields: &Fields) -> Result<DecoderConfig, ModelError> {
    let qwen = with_norms(DEFAULTS.read(fields)?, fields)?;
    qwen2::with_upper_windows(qwen, fields)
}

/// What all models of Qwen3 have: norms of each head of queries and keys, and biases only where the config
/// says so.
pub(super) fn with_norms(
    config: DecoderConfig,
    fields: &Fields,
) -> Result<DecoderConfig, ModelError> {
    Ok(DecoderConfig {
        qk_norm: Some(QkNorm::Head),
        biases: Biases::of(flag(fields, "attention_bias")?, false),
        ..config
    })
}
