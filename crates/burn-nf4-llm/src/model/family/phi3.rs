//! Phi-3, and the models of Phi-3.5 and Phi-4 that are built like it (arXiv 2404.14219).

use super::llama;
use crate::error::ModelError;
use crate::json::fields::Fields;
use crate::model::config::DecoderConfig;
use crate::model::config::defaults::{Defaults, nullable_size, size};
use crate::model::config::rope_fields::{RopeDefaults, parameters, type_name};
use crate::model::rope::RopeConfig;

const DEFAULTS: Defaults = Defaults {
    vocab_size: 32_064,
    hidden_size: 3072,
    intermediate_size: 8192,
    max_position_embeddings: 4096,
    rms_norm_eps: 1e-5,
    eos_token_id: Some(32_000),
    ..llama::DEFAULTS
};

/// As Llama, with one matrix for queries, keys and values and one for gate and up, a window in all layers
/// or in none, and rotary embeddings of its own.
pub(super) fn read(fields: &Fields) -> Result<DecoderConfig, ModelError> {
    let window = nullable_size(fields, "sliding_window", None)?;
    let phi = DecoderConfig {
        fused_projections: true,
        residual_dropout: fields.get("resid_pdrop")?.unwrap_or(0.0),
        ..DEFAULTS.read_with_ropes(fields, ropes)?
    };
    phi.with_window(fields, window)
}

/// Over the part of a head that `partial_rotary_factor` says; default, or LongRoPE, which older files call
/// `su` or `yarn`.
fn ropes(fields: &Fields, defaults: RopeDefaults) -> Result<Vec<RopeConfig>, ModelError> {
    let parameters = parameters(fields)?;
    let of_parameters = parameters.get("partial_rotary_factor")?;
    let of_config = fields.get("partial_rotary_factor")?;
    let factor: f64 = of_parameters.or(of_config).unwrap_or(1.0);
    let rotary_dim = (defaults.rotary_dim as f64 * factor) as usize;
    if !rotary_dim.is_multiple_of(2) || !(1..=defaults.rotary_dim).contains(&rotary_dim) {
        let supported = format!(
            "a part of {} elements that is even and not zero",
            defaults.rotary_dim
        );
        return Err(parameters.unsupported("partial_rotary_factor", factor, supported));
    }
    let name = match type_name(&parameters)?.as_str() {
        "default" => "default",
        "longrope" | "su" | "yarn" => "longrope",
        other => return Err(parameters.unsupported("rope_type", other, "default, longrope")),
    };
    let original = size(fields, "original_max_position_embeddings", 4096)?;
    let defaults = RopeDefaults {
        rotary_dim,
        original_positions: Some(original as f64),
        ..defaults
    };
    let rope = RopeConfig::of_type(name, fields, &parameters, defaults)?;
    Ok(vec![rope.with_recomputed_keys()])
}
