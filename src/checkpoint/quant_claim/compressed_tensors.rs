//! The description that compressed-tensors writes; fields as in its version 0.20.

use serde_json::Value;

use super::{
    GroupWeights, QuantClaim, QuantGroup, QuantMethod, integers, strings, weights_of_tile,
};
use crate::format::QuantType;

/// Schemes that a group may name instead of describing its weights.
const PRESETS: [(&str, QuantType); 7] = [
    ("NVFP4", QuantType::Nvfp4),
    ("NVFP4A16", QuantType::Nvfp4),
    ("MXFP4", QuantType::Mxfp4),
    ("MXFP4A16", QuantType::Mxfp4),
    ("FP8", QuantType::Fp8Channel),
    ("FP8_DYNAMIC", QuantType::Fp8Channel),
    ("FP8_BLOCK", QuantType::Fp8Block),
];

/// How it stores weights of a type.
fn formats(quant_type: QuantType) -> &'static [&'static str] {
    match quant_type {
        QuantType::Nvfp4 => &["nvfp4-pack-quantized"],
        QuantType::Mxfp4 => &["mxfp4-pack-quantized"],
        _ => &["float-quantized", "naive-quantized"],
    }
}

pub(super) fn claim(part: String, value: &Value) -> QuantClaim {
    let mut tile = None;
    let mut groups = match value.get("config_groups") {
        Some(Value::Object(groups)) => {
            let format = value.get("format").and_then(Value::as_str);
            tile = groups.values().find_map(tile_of);
            let groups = groups.iter();
            groups.map(|(name, it)| group(name, it, format)).collect()
        }
        _ => vec![unreadable("config_groups", "no groups")],
    };
    let sparsity = value.get("sparsity_config").and_then(|it| it.get("format"));
    if let Some(format) = sparsity.and_then(Value::as_str).filter(|it| *it != "dense") {
        groups.push(unreadable(
            "sparsity_config",
            &format!("weights in {format}"),
        ));
    }
    let transforms = value.get("transform_config");
    let transforms = transforms.and_then(|it| it.get("config_groups")?.as_object());
    if transforms.is_some_and(|groups| !groups.is_empty()) {
        groups.push(unreadable(
            "transform_config",
            "transforms of weights or inputs",
        ));
    }
    QuantClaim {
        ignore: strings(value.get("ignore")),
        quantizes_cache: value.get("kv_cache_scheme").is_some_and(Value::is_object),
        tile,
        ..QuantClaim::new(part, QuantMethod::CompressedTensors, groups)
    }
}

/// Rows and columns of a tile of a group's weights.
fn tile_of(group: &Value) -> Option<Vec<u64>> {
    integers(group.get("weights")?.get("block_structure")?)
}

fn unreadable(name: &str, what: &str) -> QuantGroup {
    QuantGroup {
        name: name.into(),
        targets: Vec::new(),
        weights: GroupWeights::Other(what.into()),
    }
}

fn group(name: &str, value: &Value, of_all: Option<&str>) -> QuantGroup {
    let (targets, weights, format) = match value {
        Value::Array(_) => (strings(Some(value)), preset(name), of_all),
        _ => {
            let format = value.get("format").and_then(Value::as_str).or(of_all);
            let weights = value.get("weights").unwrap_or(&Value::Null);
            (strings(value.get("targets")), of_weights(weights), format)
        }
    };
    let weights = match (weights, format) {
        (GroupWeights::Quantized(quant_type), Some(format))
            if format != "mixed-precision" && !formats(quant_type).contains(&format) =>
        {
            GroupWeights::Other(format!("{} weights stored as {format}", quant_type.name()))
        }
        (weights, _) => weights,
    };
    QuantGroup {
        name: name.into(),
        targets,
        weights,
    }
}

fn preset(name: &str) -> GroupWeights {
    let is_it = |(preset, _): &&(&str, QuantType)| preset.eq_ignore_ascii_case(name);
    match PRESETS.iter().find(is_it) {
        Some((_, quant_type)) => GroupWeights::Quantized(*quant_type),
        None => GroupWeights::Other(format!("the scheme {name}")),
    }
}

/// The `weights` of a group.
pub(super) fn of_weights(value: &Value) -> GroupWeights {
    if value.is_null() {
        return GroupWeights::Float;
    }
    let bits = value.get("num_bits").and_then(Value::as_u64).unwrap_or(8);
    let kind = value.get("type").and_then(Value::as_str).unwrap_or("int");
    let size = value.get("group_size").and_then(Value::as_i64);
    let strategy = value.get("strategy").and_then(Value::as_str);
    let strategy = strategy.unwrap_or(match size {
        None => "tensor",
        Some(size) if size > 0 => "group",
        Some(_) => "channel",
    });
    let is_symmetric = value.get("symmetric").and_then(Value::as_bool) != Some(false);
    match (bits, kind, strategy, size) {
        _ if !is_symmetric => {
            GroupWeights::Other(format!("weights of {bits} bit with zero points"))
        }
        (4, "float", "group" | "tensor_group", Some(16)) => {
            GroupWeights::Quantized(QuantType::Nvfp4)
        }
        (4, "float", "group", Some(32)) => GroupWeights::Quantized(QuantType::Mxfp4),
        (8, "float", "tensor" | "channel", _) => GroupWeights::Quantized(QuantType::Fp8Channel),
        (8, "float", "block", _) => match value.get("block_structure").and_then(integers) {
            Some(tile) => weights_of_tile(&tile),
            None => GroupWeights::Other("FP8 in tiles of no size".into()),
        },
        _ => GroupWeights::Other(match size {
            Some(size) if size > 0 => {
                format!("{kind} weights of {bits} bit by {strategy} of {size}")
            }
            _ => format!("{kind} weights of {bits} bit by {strategy}"),
        }),
    }
}
