//! SmolLM3 (<https://huggingface.co/blog/smollm3>).

use super::llama;
use crate::error::ModelError;
use crate::json::fields::Fields;
use crate::model::config::defaults::{Defaults, flag, size, used_window};
use crate::model::config::{Biases, DecoderConfig};

const DEFAULTS: Defaults = Defaults {
    vocab_size: 128_256,
    hidden_size: 2048,
    num_hidden_layers: 36,
    num_attention_heads: 16,
    num_key_value_heads: Some(4),
    max_position_embeddings: 32_768,
    rope_theta: 2_000_000.0,
    eos_token_id: Some(128_001),
    tie_word_embeddings: true,
    ..llama::DEFAULTS
};

/// As Llama, with layers that have no rotary embedding (arXiv 2501.18795): every fourth, unless the config
/// lists them.
pub(super) fn read(fields: &Fields) -> Result<DecoderConfig, ModelError> {
    let mut smol = DecoderConfig {
        biases: Biases::of(flag(fields, "attention_bias")?, flag(fields, "mlp_bias")?),
        ..DEFAULTS.read(fields)?
    };
    let layers = smol.layers.len();
    // One for a layer with a rotary embedding, zero for one without, despite the name.
    let with_rope = match fields.nullable::<Vec<usize>>("no_rope_layers")? {
        Some(with_rope) if with_rope.len() >= layers => with_rope,
        Some(with_rope) => {
            let supported = format!("a number for each of {layers} layers");
            return Err(fields.unsupported("no_rope_layers", with_rope.len(), supported));
        }
        None => {
            let interval = size(fields, "no_rope_layer_interval", 4)?;
            let has_rope = |index: usize| usize::from(!(index + 1).is_multiple_of(interval));
            (0..layers).map(has_rope).collect()
        }
    };
    for (layer, with_rope) in smol.layers.iter_mut().zip(&with_rope) {
        layer.rope = layer.rope.filter(|_| *with_rope != 0);
    }
    let window = used_window(fields, None)?;
    smol.with_windows_by_type(fields, window, |index| {
        window.is_some() && with_rope[index] == 0
    })
}
