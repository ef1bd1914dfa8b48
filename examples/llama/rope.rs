//! Rotary position embeddings with the scaling variants of transformers.
//!
//! Formulas: `modeling_rope_utils.py` of transformers 5.17.0, in the same precisions: scalars in f64,
//! frequencies in f32.

use std::f64::consts::PI;

use serde::Deserialize;

use crate::config::unsupported;
use crate::error::ModelError;

/// `rope_parameters` of `config.json`, or `rope_scaling` of older ones.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct RopeParameters {
    rope_type: Option<String>,
    /// The older name of `rope_type`.
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    attention_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
}

/// How positions turn into angles.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    scaling: RopeScaling,
    theta: f64,
    pub head_dim: usize,
    /// Positions that the model was made for.
    pub max_positions: usize,
}

#[derive(Debug, Clone, PartialEq)]
enum RopeScaling {
    Default,
    Linear {
        factor: f64,
    },
    /// The base grows with the sequence once it is longer than `max_positions`.
    Dynamic {
        factor: f64,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_positions: f64,
    },
    /// arXiv 2309.00071.
    Yarn {
        factor: f64,
        attention_factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        original_positions: f64,
        truncate: bool,
    },
}

impl RopeConfig {
    /// Reads the parameters, falling back on `theta` and `original` of the config around them.
    pub fn new(
        parameters: RopeParameters,
        theta: Option<f64>,
        max_positions: usize,
        original: Option<usize>,
        head_dim: usize,
    ) -> Result<Self, ModelError> {
        let name = parameters
            .rope_type
            .or(parameters.old_type)
            .unwrap_or_else(|| "default".into());
        if let Some(factor) = parameters.partial_rotary_factor.filter(|&f| f != 1.0) {
            return Err(unsupported("partial_rotary_factor", factor, "1"));
        }
        let required = |field, value: Option<f64>| {
            value.ok_or_else(|| unsupported(field, "missing", "a number"))
        };
        // The config's own field has precedence, as in transformers.
        let original_positions = original
            .map(|positions| positions as f64)
            .or(parameters.original_max_position_embeddings)
            .unwrap_or(max_positions as f64);
        let scaling = match name.as_str() {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear {
                factor: required("rope_parameters.factor", parameters.factor)?,
            },
            "dynamic" => RopeScaling::Dynamic {
                factor: required("rope_parameters.factor", parameters.factor)?,
            },
            "llama3" => RopeScaling::Llama3 {
                factor: required("rope_parameters.factor", parameters.factor)?,
                low_freq_factor: required(
                    "rope_parameters.low_freq_factor",
                    parameters.low_freq_factor,
                )?,
                high_freq_factor: required(
                    "rope_parameters.high_freq_factor",
                    parameters.high_freq_factor,
                )?,
                original_positions,
            },
            "yarn" => {
                let factor = parameters
                    .factor
                    .unwrap_or(max_positions as f64 / original_positions);
                let mscale = |scale: f64| {
                    if factor <= 1.0 {
                        1.0
                    } else {
                        0.1 * scale * factor.ln() + 1.0
                    }
                };
                let nonzero = |value: Option<f64>| value.filter(|&value| value != 0.0);
                let inferred = match (
                    nonzero(parameters.mscale),
                    nonzero(parameters.mscale_all_dim),
                ) {
                    (Some(one), Some(all)) => mscale(one) / mscale(all),
                    _ => mscale(1.0),
                };
                RopeScaling::Yarn {
                    factor,
                    attention_factor: parameters.attention_factor.unwrap_or(inferred),
                    beta_fast: nonzero(parameters.beta_fast).unwrap_or(32.0),
                    beta_slow: nonzero(parameters.beta_slow).unwrap_or(1.0),
                    original_positions,
                    truncate: parameters.truncate.unwrap_or(true),
                }
            }
            _ => {
                return Err(unsupported(
                    "rope_type",
                    name,
                    "default, linear, dynamic, llama3, yarn",
                ));
            }
        };
        Ok(Self {
            scaling,
            theta: parameters.rope_theta.or(theta).unwrap_or(10_000.0),
            head_dim,
            max_positions,
        })
    }

    /// Whether the angles of a position depend on the length of the sequence.
    pub fn is_dynamic(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. })
    }

    /// The angle of one position per pair of channels, for a sequence of this length.
    pub fn inverse_frequencies(&self, sequence: usize) -> Vec<f32> {
        let dim = self.head_dim;
        let frequencies = |theta: f64| -> Vec<f32> {
            (0..dim)
                .step_by(2)
                .map(|channel| 1.0 / (theta as f32).powf(channel as f32 / dim as f32))
                .collect()
        };
        match self.scaling {
            RopeScaling::Default => frequencies(self.theta),
            RopeScaling::Linear { factor } => frequencies(self.theta)
                .into_iter()
                .map(|frequency| frequency / factor as f32)
                .collect(),
            RopeScaling::Dynamic { factor } => {
                let max = self.max_positions as f64;
                let stretch = factor * (sequence as f64).max(max) / max - (factor - 1.0);
                let exponent = dim as f64 / (dim as f64 - 2.0);
                frequencies(self.theta * stretch.powf(exponent))
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_positions,
            } => {
                let long = original_positions / low_freq_factor;
                let short = original_positions / high_freq_factor;
                let scale = |frequency: f32| {
                    let wavelength = 2.0 * PI as f32 / frequency;
                    if wavelength > long as f32 {
                        frequency / factor as f32
                    } else if wavelength < short as f32 {
                        frequency
                    } else {
                        let smooth = (original_positions as f32 / wavelength
                            - low_freq_factor as f32)
                            / (high_freq_factor - low_freq_factor) as f32;
                        (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
                    }
                };
                frequencies(self.theta).into_iter().map(scale).collect()
            }
            RopeScaling::Yarn { .. } => self.yarn_frequencies(),
        }
    }

    fn yarn_frequencies(&self) -> Vec<f32> {
        let RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            original_positions,
            truncate,
            ..
        } = self.scaling
        else {
            return Vec::new();
        };
        let dim = self.head_dim as f64;
        // The channel that turns this many times within the original positions.
        let channel = |turns: f64| {
            dim * (original_positions / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (channel(beta_fast), channel(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        (0..self.head_dim / 2)
            .map(|pair| {
                let position = (self.theta as f32).powf(2.0 * pair as f32 / self.head_dim as f32);
                let ramp = ((pair as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                let keep = 1.0 - ramp;
                1.0 / (factor as f32 * position) * (1.0 - keep) + 1.0 / position * keep
            })
            .collect()
    }

    /// The factor on both tables.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            } => attention_factor,
            _ => 1.0,
        }
    }
}
