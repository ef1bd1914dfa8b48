//! Granite 3, the dense models (<https://github.com/ibm-granite/granite-3.0-language-models>).

use super::llama;
use crate::error::ModelError;
use crate::json::fields::Fields;
use crate::model::config::defaults::{attention_scale, flag, positive};
use crate::model::config::{Biases, DecoderConfig};
use crate::model::scale::EmbeddingScale;

/// As Llama, with multipliers of embeddings, scores, and what attention and the MLP add, and a divisor of
/// the logits (after muP, arXiv 2203.03466).
pub(super) fn read(fields: &Fields) -> Result<DecoderConfig, ModelError> {
    let number = |name| positive(fields, name, 1.0);
    let granite = DecoderConfig {
        embedding_scale: Some(EmbeddingScale::Exact(number("embedding_multiplier")?)),
        attention_scale: Some(attention_scale(
            fields,
            "attention_multiplier",
            1.0,
            |scale| scale,
        )?),
        residual_multiplier: number("residual_multiplier")?,
        logits_scaling: number("logits_scaling")?,
        biases: Biases::of(flag(fields, "attention_bias")?, flag(fields, "mlp_bias")?),
        ..llama::DEFAULTS.read(fields)?
    };
    granite.with_window(fields, None)
}
