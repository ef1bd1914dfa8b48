//! Llama 1 to 3 (arXiv 2302.13971, 2307.09288, 2407.21783), and what is built like them: TinyLlama,
//! SmolLM2, Yi, and others.
//!
//! The files of the other families say how these differ from it.

use crate::error::ModelError;
use crate::json::fields::Fields;
use crate::model::Activation;
use crate::model::config::defaults::{Defaults, flag};
use crate::model::config::{Biases, DecoderConfig};

pub(super) const DEFAULTS: Defaults = Defaults {
    vocab_size: 32_000,
    hidden_size: 4096,
    intermediate_size: 11_008,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: None,
    head_dim: None,
    max_position_embeddings: 2048,
    rms_norm_eps: 1e-6,
    rope_theta: 10_000.0,
    eos_token_id: Some(2),
    tie_word_embeddings: false,
    activation: ("hidden_act", Activation::Silu),
};

/// Pre-norm, one rotary embedding, no window; biases where the config says so.
pub(super) fn read(fields: &Fields) -> Result<DecoderConfig, ModelError> {
    let llama = DecoderConfig {
        biases: Biases::of(flag(fields, "attention_bias")?, flag(fields, "mlp_bias")?),
        ..DEFAULTS.read(fields)?
    };
    llama.with_window(fields, None)
}
