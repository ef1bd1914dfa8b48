//! The parameters of rotary embeddings in `config.json`.
//!
//! As transformers 5.24.0 resolves them (`convert_rope_params_to_dict` and
//! `standardize_rope_params` of `RotaryEmbeddingConfigMixin`). It reads what it does not understand
//! as the default with a warning; here that is an error.

use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::json::fields::{Fields, spelled};
use crate::model::rope::{RopeConfig, RopeScaling};

/// Keys that every type may have. transformers leaves the last two without effect where a type does
/// not use them: `finetuned` says how a model was made, and the linear and dynamic scalings go by
/// `max_position_embeddings` alone.
const COMMON_KEYS: [&str; 6] = [
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "finetuned",
    "original_max_position_embeddings",
];

const TYPES: &str = "default, linear, dynamic, llama3, yarn, longrope";

/// What a family's class says of its rotary embeddings, where `config.json` does not.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RopeDefaults {
    /// The base.
    pub theta: f64,
    /// Elements of a head that are rotated.
    pub rotary_dim: usize,
    /// Positions of the model.
    pub max_positions: usize,
    /// Positions before a scaling, where the class knows them.
    pub original_positions: Option<f64>,
}

impl RopeConfig {
    /// Reads the parameters of a model whose layers have one rotary embedding.
    pub(crate) fn read(config: &Fields, defaults: RopeDefaults) -> Result<Self, ModelError> {
        Self::from_parameters(config, &parameters(config)?, defaults)
    }

    /// Reads parameters; `config` is where a base, and the positions before a scaling, are looked for too.
    pub(crate) fn from_parameters(
        config: &Fields,
        parameters: &Fields,
        defaults: RopeDefaults,
    ) -> Result<Self, ModelError> {
        let name = type_name(parameters)?;
        for fields in [config, parameters] {
            if let Some(factor) = fields.nullable::<f64>("partial_rotary_factor")?
                && factor != 1.0
            {
                return Err(fields.unsupported("partial_rotary_factor", factor, "1"));
            }
        }
        if !TYPES.split(", ").any(|known| known == name) {
            return Err(parameters.unsupported("rope_type", name, TYPES));
        }
        Self::of_type(&name, config, parameters, defaults)
    }

    /// As [`from_parameters`](Self::from_parameters), of a type that the caller has chosen. A part of a
    /// head may be rotated, which is the caller's matter too.
    pub(crate) fn of_type(
        name: &str,
        config: &Fields,
        parameters: &Fields,
        defaults: RopeDefaults,
    ) -> Result<Self, ModelError> {
        let RopeDefaults {
            rotary_dim,
            max_positions,
            ..
        } = defaults;
        let keys: &[&str] = match name {
            "linear" | "dynamic" => &["factor"],
            "llama3" => &["factor", "low_freq_factor", "high_freq_factor"],
            "yarn" => &[
                "factor",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            ],
            "longrope" => &["factor", "attention_factor", "short_factor", "long_factor"],
            _ => &[],
        };
        check_keys(parameters, name, keys)?;
        let theta = theta(config, parameters, defaults.theta)?;
        let scaling = match name {
            "linear" => RopeScaling::Linear {
                factor: factor(parameters)?,
            },
            "dynamic" if rotary_dim == 2 => {
                return Err(config.unsupported("head_dim", 2, "4 or more with dynamic scaling"));
            }
            "dynamic" => RopeScaling::Dynamic {
                factor: factor(parameters)?,
            },
            "llama3" => llama3(parameters, original(config, parameters, defaults)?)?,
            "yarn" if theta == 1.0 => {
                return Err(parameters.unsupported("rope_theta", theta, "another with yarn"));
            }
            "yarn" => {
                let original = original(config, parameters, defaults)?;
                yarn(parameters, original, max_positions as f64)?
            }
            "longrope" => {
                let original = original(config, parameters, defaults)?;
                longrope(parameters, original, defaults)?
            }
            _ => RopeScaling::Default,
        };
        Ok(Self {
            scaling,
            theta,
            rotary_dim,
            max_positions,
        })
    }
}

/// The type, as it is spelled.
pub(crate) fn type_name(parameters: &Fields) -> Result<String, ModelError> {
    match parameters.value("rope_type") {
        Some(_) => parameters.required("rope_type"),
        None => Ok(parameters.get("type")?.unwrap_or("default".into())),
    }
}

/// `rope_scaling`, the older name, has precedence over `rope_parameters`, all of it; an empty object
/// counts as absent.
pub(crate) fn parameters(config: &Fields) -> Result<Fields, ModelError> {
    let mut found = None;
    for name in ["rope_scaling", "rope_parameters"] {
        let fields = config.object(name)?;
        // Both are read, so that nonsense in either is found.
        if found.is_none() {
            found = fields.filter(|fields| fields.names().next().is_some());
        }
    }
    let none = || config.of("rope_parameters", Map::new());
    let parameters = found.unwrap_or_else(none);
    let layer_types: Vec<&str> = parameters
        .names()
        .filter(|name| matches!(parameters.value(name), Some(Value::Object(_))))
        .collect();
    match layer_types.is_empty() {
        true => Ok(parameters),
        false => {
            let given = "given by layer type";
            Err(parameters.unsupported(&layer_types.join(", "), given, "one for all layers"))
        }
    }
}

/// Refuses keys that the type has no use for, but for those without a value.
fn check_keys(parameters: &Fields, name: &str, keys: &[&str]) -> Result<(), ModelError> {
    for key in parameters.names() {
        let unused = !COMMON_KEYS.contains(&key) && !keys.contains(&key);
        if let Some(value) = parameters
            .value(key)
            .filter(|value| unused && !value.is_null())
        {
            let keys = match keys {
                [] => "no key but rope_theta".into(),
                keys => format!("{}, rope_theta", keys.join(", ")),
            };
            let supported = format!("with rope_type {name}: {keys}");
            return Err(parameters.unsupported(key, spelled(value), supported));
        }
    }
    Ok(())
}

/// The base: of the parameters, else of the config around them.
fn theta(config: &Fields, parameters: &Fields, default: f64) -> Result<f64, ModelError> {
    let fields = match parameters.value("rope_theta") {
        Some(_) => parameters,
        None => config,
    };
    base(fields, "rope_theta", default)
}

/// A base.
pub(crate) fn base(fields: &Fields, name: &str, default: f64) -> Result<f64, ModelError> {
    match fields.get(name)?.unwrap_or(default) {
        theta if theta > 0.0 => Ok(theta),
        theta => Err(fields.unsupported(name, theta, "a positive number")),
    }
}

fn factor(parameters: &Fields) -> Result<f64, ModelError> {
    match parameters.required("factor")? {
        factor if factor >= 1.0 => Ok(factor),
        factor => Err(parameters.unsupported("factor", factor, "a number of at least 1")),
    }
}

/// The positions before the scaling. The config's own field has precedence, and its class.
fn original(
    config: &Fields,
    parameters: &Fields,
    defaults: RopeDefaults,
) -> Result<f64, ModelError> {
    const NAME: &str = "original_max_position_embeddings";
    let fields = match (config.value(NAME), defaults.original_positions) {
        (Some(_), _) => config,
        (None, Some(positions)) => return Ok(positions),
        (None, None) => parameters,
    };
    match fields.get(NAME)?.unwrap_or(defaults.max_positions as f64) {
        original if original > 0.0 => Ok(original),
        original => Err(fields.unsupported(NAME, original, "a positive number")),
    }
}

fn llama3(parameters: &Fields, original_positions: f64) -> Result<RopeScaling, ModelError> {
    let low_freq_factor = parameters.required("low_freq_factor")?;
    let high_freq_factor = parameters.required("high_freq_factor")?;
    if low_freq_factor <= 0.0 {
        let supported = "a positive number";
        return Err(parameters.unsupported("low_freq_factor", low_freq_factor, supported));
    }
    if high_freq_factor <= low_freq_factor {
        return Err(parameters.unsupported(
            "high_freq_factor",
            high_freq_factor,
            format!("more than low_freq_factor, which is {low_freq_factor}"),
        ));
    }
    Ok(RopeScaling::Llama3 {
        factor: factor(parameters)?,
        low_freq_factor,
        high_freq_factor,
        original_positions,
    })
}

/// The factor of cosines and sines, or what the other parameters make of it.
fn attention_factor(parameters: &Fields, inferred: f64) -> Result<f64, ModelError> {
    const NAME: &str = "attention_factor";
    match parameters.nullable(NAME)?.unwrap_or(inferred) {
        factor if factor >= 0.0 && (factor as f32).is_finite() => Ok(factor),
        factor => Err(parameters.unsupported(NAME, factor, "a number of f32 of at least 0")),
    }
}

fn yarn(
    parameters: &Fields,
    original_positions: f64,
    max_positions: f64,
) -> Result<RopeScaling, ModelError> {
    // `null` asks for the ratio; the key itself is required.
    let factor = match parameters.value("factor") {
        Some(Value::Null) => max_positions / original_positions,
        _ => factor(parameters)?,
    };
    let mscale = |scale: f64| match factor <= 1.0 {
        true => 1.0,
        false => 0.1 * scale * factor.ln() + 1.0,
    };
    // `null` and 0 are the same as absent.
    let nonzero = |name| {
        let value = parameters.nullable::<f64>(name)?;
        Ok::<_, ModelError>(value.filter(|&value| value != 0.0))
    };
    let inferred = match (nonzero("mscale")?, nonzero("mscale_all_dim")?) {
        (Some(one), Some(all)) => mscale(one) / mscale(all),
        _ => mscale(1.0),
    };
    let attention_factor = attention_factor(parameters, inferred)?;
    let beta_fast = nonzero("beta_fast")?.unwrap_or(32.0);
    let beta_slow = nonzero("beta_slow")?.unwrap_or(1.0);
    if beta_slow <= 0.0 || beta_fast < beta_slow {
        return Err(parameters.unsupported(
            "beta_slow",
            beta_slow,
            format!("a positive number of at most beta_fast, which is {beta_fast}"),
        ));
    }
    // `null` is false, not the default.
    let truncate = match parameters.value("truncate") {
        Some(Value::Null) => false,
        _ => parameters.get("truncate")?.unwrap_or(true),
    };
    Ok(RopeScaling::Yarn {
        factor,
        attention_factor,
        beta_fast,
        beta_slow,
        original_positions,
        truncate,
    })
}

fn longrope(
    parameters: &Fields,
    original_positions: f64,
    defaults: RopeDefaults,
) -> Result<RopeScaling, ModelError> {
    let pairs = defaults.rotary_dim / 2;
    let factors = |name| -> Result<Vec<f64>, ModelError> {
        let factors: Vec<f64> = parameters.required(name)?;
        match factors.len() == pairs && factors.iter().all(|&factor| factor > 0.0) {
            true => Ok(factors),
            false => {
                let given = parameters.value(name).map(spelled).unwrap_or_default();
                let supported = format!("{pairs} positive numbers");
                Err(parameters.unsupported(name, given, supported))
            }
        }
    };
    let factor = match parameters.value("factor") {
        None | Some(Value::Null) => defaults.max_positions as f64 / original_positions,
        Some(_) => factor(parameters)?,
    };
    let inferred = match factor <= 1.0 {
        true => 1.0,
        false => (1.0 + factor.ln() / original_positions.ln()).sqrt(),
    };
    let attention_factor = attention_factor(parameters, inferred)?;
    Ok(RopeScaling::LongRope {
        short_factors: factors("short_factor")?,
        long_factors: factors("long_factor")?,
        attention_factor,
        original_positions,
        recomputes_keys: false,
    })
}
