//! gpt-oss (arXiv 2508.10925).

use serde_json::{Map, json};

use super::qwen3_moe::experts;
use crate::error::ModelError;
use crate::json::fields::Fields;
use crate::model::config::defaults::{Defaults, nullable_size};
use crate::model::config::rope_fields::{RopeDefaults, parameters};
use crate::model::config::{Biases, DecoderConfig, MixtureConfig, MixtureForm};
use crate::model::rope::RopeConfig;
use crate::model::{Activation, NormForm};

const DEFAULTS: Defaults = Defaults {
    vocab_size: 201_088,
    hidden_size: 2880,
    intermediate_size: 2880,
    num_hidden_layers: 36,
    num_attention_heads: 64,
    num_key_value_heads: Some(8),
    head_dim: Some(64),
    max_position_embeddings: 131_072,
    rms_norm_eps: 1e-5,
    rope_theta: 150_000.0,
    eos_token_id: None,
    tie_word_embeddings: false,
    activation: ("hidden_act", Activation::Silu),
};

/// As Llama, with biases, a sink of each head, a window in every second layer from the first on, and experts
/// with a clamped SwiGLU in all layers.
pub(super) fn read(fields: &Fields) -> Result<DecoderConfig, ModelError> {
    let oss =
        DEFAULTS.read_with_ropes(fields, |fields, defaults| Ok(vec![rope(fields, defaults)?]))?;
    if oss.activation != Activation::Silu {
        let given: String = fields.required("hidden_act")?;
        return Err(fields.unsupported("hidden_act", given, "silu"));
    }
    for (name, number) in [
        ("swiglu_limit", Activation::LIMIT),
        ("swiglu_alpha", Activation::ALPHA),
    ] {
        let given = fields.get::<f64>(name)?;
        if let Some(given) = given.filter(|&given| given as f32 != number) {
            return Err(fields.unsupported(name, given, number.to_string()));
        }
    }
    let has_biases = fields.get("attention_bias")?.unwrap_or(true);
    let window = nullable_size(fields, "sliding_window", Some(128))?;
    let mut oss = DecoderConfig {
        norm_form: NormForm::WeightThenCast,
        activation: Activation::ClampedSwiGlu,
        biases: Biases {
            router: true,
            ..Biases::of(has_biases, true)
        },
        attention_sinks: true,
        ..oss
    }
    .with_windows_by_type(fields, window, |index| index.is_multiple_of(2))?;
    let Some((experts, experts_per_token)) = experts(fields, 128, 4)? else {
        return Err(fields.unsupported("num_local_experts", 0, "a number of at least 1"));
    };
    for layer in &mut oss.layers {
        layer.mixture = Some(MixtureConfig {
            experts,
            experts_per_token,
            intermediate_size: oss.intermediate_size,
            // The softmax over the logits of chosen experts is this.
            normalises_weights: true,
            form: MixtureForm::GptOss,
        });
    }
    Ok(oss)
}

/// YaRN, unless the config says otherwise.
fn rope(fields: &Fields, defaults: RopeDefaults) -> Result<RopeConfig, ModelError> {
    let given = parameters(fields)?;
    if given.names().next().is_some() {
        return RopeConfig::from_parameters(fields, &given, defaults);
    }
    let yarn = [
        ("rope_type", json!("yarn")),
        ("factor", json!(32.0)),
        ("beta_fast", json!(32.0)),
        ("beta_slow", json!(1.0)),
        ("truncate", json!(false)),
        ("original_max_position_embeddings", json!(4096)),
    ];
    let entries: Map<_, _> = yarn
        .map(|(name, value)| (name.to_string(), value))
        .into_iter()
        .collect();
    RopeConfig::from_parameters(fields, &fields.of("rope_parameters", entries), defaults)
}
