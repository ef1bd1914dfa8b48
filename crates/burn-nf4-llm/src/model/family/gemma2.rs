//! Gemma 2 (arXiv 2408.00118).

use crate::error::ModelError;
use crate::json::fields::Fields;
use crate::model::config::defaults::{
    Defaults, attention_scale, attention_softcap, flag, nullable_positive, nullable_size,
};
use crate::model::config::{Biases, DecoderConfig, NormPlacement};
use crate::model::scale::EmbeddingScale;
use crate::model::{Activation, NormForm};

pub(super) const DEFAULTS: Defaults = Defaults {
    vocab_size: 256_000,
    hidden_size: 2304,
    intermediate_size: 9216,
    num_hidden_layers: 26,
    num_attention_heads: 8,
    num_key_value_heads: Some(4),
    head_dim: Some(256),
    max_position_embeddings: 8192,
    rms_norm_eps: 1e-6,
    rope_theta: 10_000.0,
    eos_token_id: Some(1),
    tie_word_embeddings: true,
    activation: ("hidden_activation", Activation::GeluTanh),
};

/// As Llama, with soft caps on scores and logits, a window in every second layer from the first on, and
/// the [norms and scales](with_norms_and_scales) of all Gemmas.
pub(super) fn read(fields: &Fields) -> Result<DecoderConfig, ModelError> {
    let gemma = DecoderConfig {
        attention_softcap: attention_softcap(fields, "attn_logit_softcapping", 50.0)?,
        logits_softcap: nullable_positive(fields, "final_logit_softcapping", Some(30.0))?,
        ..with_norms_and_scales(DEFAULTS.read(fields)?, fields)?
    };
    let window = nullable_size(fields, "sliding_window", Some(4096))?;
    gemma.with_windows_by_type(fields, window, |index| index.is_multiple_of(2))
}

/// What Gemma 2 and 3 share: sandwich norms whose weights are added to one, embeddings multiplied by the
/// square root of the hidden size, and scores divided by that of `query_pre_attn_scalar`.
pub(super) fn with_norms_and_scales(
    config: DecoderConfig,
    fields: &Fields,
) -> Result<DecoderConfig, ModelError> {
    if fields.nullable("use_bidirectional_attention")? == Some(true) {
        return Err(fields.unsupported("use_bidirectional_attention", true, "false"));
    }
    let scale = |scalar: f64| scalar.powf(-0.5);
    Ok(DecoderConfig {
        norm_placement: NormPlacement::Sandwich,
        norm_form: NormForm::OnePlusWeight,
        embedding_scale: Some(EmbeddingScale::Rounded((config.hidden_size as f64).sqrt())),
        attention_scale: Some(attention_scale(
            fields,
            "query_pre_attn_scalar",
            256.0,
            scale,
        )?),
        biases: Biases::of(flag(fields, "attention_bias")?, false),
        ..config
    })
}
