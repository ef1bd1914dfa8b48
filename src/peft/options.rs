//! The settings of PEFT 0.21 that are not supported, key by key.

use serde_json::{Map, Value};

use super::setting::InitLoraWeights;
use crate::error::Nf4Error;

/// Refused unless `null`: an empty object turns them on with their defaults.
///
/// - `alora_invocation_tokens`: the branch acts on a part of the tokens
/// - `arrow_config`: the branch is a mixture of other adapters
/// - `kasa_config`: another weight and a third factor
/// - `monteclora_config`: sampled factors
/// - `use_bdlora`: block-diagonal factors
const REFUSED_IF_SET: [&str; 5] = [
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
];

/// Refused unless false in Python's sense: `null`, `false`, empty.
///
/// - `ensure_weight_tying`: one factor or weight serves two modules
/// - `layer_replication`: the base model has other layers
/// - `lora_bias`: `B` has a bias
/// - `megatron_config`: parallel layers of another library
/// - `target_parameters`: branches on parameters that are no module's weight
/// - `trainable_token_indices`: single rows of an embedding are trained
/// - `use_qalora`: `A` acts on pooled inputs
const REFUSED_IF_TRUE: [&str; 7] = [
    "ensure_weight_tying",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
];

// Not refused, because the branch of a trained adapter is what it is without them: `eva_config`,
// `corda_config`, `lora_ga_config` and `loftq_config` (settings of an initialization, for which
// `check_init` decides), `velora_config` (a cheaper, inexact backward pass of the same function),
// `qalora_group_size`, `megatron_core`, `revision`, `auto_mapping`, `inference_mode`,
// `peft_version`, and keys that PEFT 0.21 does not know.

/// Refuses what changes the result and is not supported.
pub(super) fn check(settings: &Map<String, Value>) -> Result<(), Nf4Error> {
    let set = REFUSED_IF_SET.iter().filter_map(|key| {
        let value = settings.get(*key)?;
        (!value.is_null()).then_some((key, value))
    });
    let on = REFUSED_IF_TRUE.iter().filter_map(|key| {
        let value = settings.get(*key)?;
        is_true(value).then_some((key, value))
    });
    match set.chain(on).next() {
        None => Ok(()),
        Some((key, value)) => Err(Nf4Error::AdapterOption {
            key: key.to_string(),
            given: value.to_string(),
        }),
    }
}

/// Python's truth.
fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(entries) => !entries.is_empty(),
    }
}

/// Refuses initializations that take a part of the base weight into the branch: with them the
/// branch belongs to a base other than the one that is stored. PEFT's
/// `path_initial_model_for_weight_conversion` turns such an adapter into a plain one.
pub(super) fn check_init(init: &InitLoraWeights) -> Result<(), Nf4Error> {
    let InitLoraWeights::Named(name) = init else {
        return Ok(());
    };
    let lower = name.to_lowercase();
    let changes_base = ["pissa", "corda"]
        .iter()
        .any(|start| lower.starts_with(start))
        || ["olora", "loftq", "lora_ga"].contains(&lower.as_str());
    if changes_base {
        return Err(Nf4Error::AdapterOption {
            key: "init_lora_weights".into(),
            given: format!("\"{name}\""),
        });
    }
    Ok(())
}
