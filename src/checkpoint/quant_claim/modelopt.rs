//! The description that ModelOpt writes, in `config.json` and in a file of its own.

use serde_json::Value;

use super::compressed_tensors::of_weights;
use super::{GroupWeights, LINEAR, QuantClaim, QuantGroup, QuantMethod, strings};
use crate::checkpoint::names::QUANT_CONFIG_FILE;
use crate::format::QuantType;

/// The algorithm of a model whose layers have their own.
const MIXED: &str = "MIXED_PRECISION";

pub(super) fn claim(part: String, value: &Value) -> QuantClaim {
    let algorithm = value.get("quant_algo").and_then(Value::as_str);
    let groups = match (value.get("config_groups"), algorithm) {
        (Some(Value::Object(groups)), _) => {
            let groups = groups.iter();
            groups
                .map(|(name, group)| QuantGroup {
                    name: name.clone(),
                    targets: strings(group.get("targets")),
                    weights: match algorithm.filter(|it| *it != MIXED).map(of_algorithm) {
                        Some(other @ GroupWeights::Other(_)) => other,
                        _ => of_weights(group.get("weights").unwrap_or(&Value::Null)),
                    },
                })
                .collect()
        }
        _ => of_model(value),
    };
    let lists = ["ignore", "exclude_modules"];
    QuantClaim {
        ignore: lists
            .iter()
            .flat_map(|key| strings(value.get(*key)))
            .collect(),
        quantizes_cache: ["kv_cache_scheme", "kv_cache_quant_algo"]
            .iter()
            .any(|key| value.get(*key).is_some_and(|value| !value.is_null())),
        ..QuantClaim::new(part, QuantMethod::ModelOpt, groups)
    }
}

/// The content of `hf_quant_config.json`.
pub(super) fn own_file(value: &Value) -> Option<QuantClaim> {
    Some(claim(QUANT_CONFIG_FILE.into(), value.get("quantization")?))
}

/// Groups of one algorithm, or of one layer each.
fn of_model(value: &Value) -> Vec<QuantGroup> {
    let algorithm = |value: &Value| match value.get("quant_algo") {
        Some(Value::String(name)) => of_algorithm(name),
        Some(Value::Null) => GroupWeights::Float,
        _ => GroupWeights::Other("no algorithm".into()),
    };
    match value.get("quantized_layers") {
        Some(Value::Object(layers)) => layers
            .iter()
            .map(|(layer, value)| QuantGroup {
                name: layer.clone(),
                targets: vec![layer.clone()],
                weights: algorithm(value),
            })
            .collect(),
        _ => vec![QuantGroup {
            name: "quant_algo".into(),
            targets: vec![LINEAR.into()],
            weights: algorithm(value),
        }],
    }
}

fn of_algorithm(name: &str) -> GroupWeights {
    match name {
        "NVFP4" | "W4A16_NVFP4" => GroupWeights::Quantized(QuantType::Nvfp4),
        "FP8" | "FP8_PER_CHANNEL_PER_TOKEN" => GroupWeights::Quantized(QuantType::Fp8Channel),
        other => GroupWeights::Other(format!("weights in {other}")),
    }
}
