//! Qwen3-MoE, the mixtures of experts of Qwen3 (arXiv 2505.09388).

use super::{qwen2, qwen3};
use crate::error::ModelError;
use crate::json::fields::Fields;
use crate::model::config::defaults::{Defaults, flag, size, used_window};
use crate::model::config::{DecoderConfig, MixtureConfig, MixtureForm};

const DEFAULTS: Defaults = Defaults {
    hidden_size: 2048,
    intermediate_size: 6144,
    num_hidden_layers: 24,
    num_key_value_heads: Some(4),
    ..qwen2::DEFAULTS
};

/// As Qwen3, with experts in place of the MLP in every layer, or in every few, but for those that the
/// config lists, and with a window in all layers or in none.
pub(super) fn read(fields: &Fields) -> Result<DecoderConfig, ModelError> {
    let qwen = qwen3::with_norms(DEFAULTS.read(fields)?, fields)?;
    let mut qwen = qwen.with_window(fields, used_window(fields, Some(4096))?)?;

    let mixture = mixture(fields)?;
    let step = size(fields, "decoder_sparse_step", 1)?;
    let dense: Vec<usize> = fields.nullable("mlp_only_layers")?.unwrap_or_default();
    for (index, layer) in qwen.layers.iter_mut().enumerate() {
        let has_experts = (index + 1).is_multiple_of(step) && !dense.contains(&index);
        layer.mixture = mixture.filter(|_| has_experts);
    }
    Ok(qwen)
}

/// None for a model without experts.
fn mixture(fields: &Fields) -> Result<Option<MixtureConfig>, ModelError> {
    let Some((experts, experts_per_token)) = experts(fields, 128, 8)? else {
        return Ok(None);
    };
    Ok(Some(MixtureConfig {
        experts,
        experts_per_token,
        intermediate_size: size(fields, "moe_intermediate_size", 768)?,
        normalises_weights: flag(fields, "norm_topk_prob")?,
        form: MixtureForm::Qwen3Moe,
    }))
}

/// How many experts there are, and how many a token is sent to. None for a model without experts.
pub(super) fn experts(
    fields: &Fields,
    default: usize,
    default_per_token: usize,
) -> Result<Option<(usize, usize)>, ModelError> {
    // transformers 5 writes the first, and reads both as one.
    let [local, global] = ["num_local_experts", "num_experts"].map(|name| fields.get(name));
    let experts = match (local?, global?) {
        (Some(local), Some(global)) if local != global => {
            let supported = format!("num_experts, which is {global}");
            return Err(fields.unsupported("num_local_experts", local, supported));
        }
        (local, global) => local.or(global).unwrap_or(default),
    };
    if experts == 0 {
        return Ok(None);
    }
    let name = match fields.value("num_local_experts") {
        Some(_) => "num_local_experts",
        None => "num_experts",
    };
    let experts = size(fields, name, experts)?;
    let experts_per_token = size(fields, "num_experts_per_tok", default_per_token)?;
    if experts_per_token > experts {
        let supported = format!("at most {name}, which is {experts}");
        return Err(fields.unsupported("num_experts_per_tok", experts_per_token, supported));
    }
    Ok(Some((experts, experts_per_token)))
}
