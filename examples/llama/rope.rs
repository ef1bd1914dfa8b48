//! Rotary position embeddings with the scaling variants of transformers.
//!
//! Formulas: `modeling_rope_utils.py` of transformers 5.17.0, in the same precisions: frequencies
//! and angles in f32, the tables cast to the type of the model at the end.

use std::f64::consts::PI;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
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
    head_dim: usize,
    max_positions: usize,
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
                let mscale = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
                let nonzero = |value: Option<f64>| value.filter(|&value| value != 0.0);
                let inferred = match (nonzero(parameters.mscale), nonzero(parameters.mscale_all_dim))
                {
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

    /// Positions that the model was made for.
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// Whether the angles of a position depend on the length of the sequence.
    fn is_dynamic(&self) -> bool {
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
                let position =
                    (self.theta as f32).powf(2.0 * pair as f32 / self.head_dim as f32);
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

/// Cosines and sines of the positions used so far, on the device.
///
/// The sine table carries the sign of the rotation, so that a rotation is
/// `x cos + swap_halves(x) sin`.
#[derive(Debug)]
pub struct RopeTables {
    config: RopeConfig,
    device: Device,
    dtype: DType,
    /// Length of the sequence that the tables are for; matters to the dynamic variant alone.
    sequence: usize,
    rows: usize,
    cos: Option<Tensor<2>>,
    sin: Option<Tensor<2>>,
}

/// The two tables at the positions of one forward pass: `[batch or 1, 1, length, head_dim]`.
#[derive(Debug, Clone)]
pub struct Rotation {
    cos: Tensor<4>,
    sin: Tensor<4>,
}

/// The tables grow by this many positions at a time.
const ROWS_STEP: usize = 1024;

impl RopeTables {
    pub fn new(config: RopeConfig, device: &Device, dtype: DType) -> Self {
        Self {
            config,
            device: device.clone(),
            dtype,
            sequence: 0,
            rows: 0,
            cos: None,
            sin: None,
        }
    }

    /// The rotation of positions `start..start + length`, each row of the batch shifted left by its
    /// padding.
    pub fn rotation(&mut self, start: usize, length: usize, padding: &[usize]) -> Rotation {
        let end = start + length;
        let (cos, sin) = self.tables(end);
        let head_dim = self.config.head_dim;
        if padding.iter().all(|&pad| pad == 0) {
            let rows = |table: Tensor<2>| {
                table
                    .slice([start..end, 0..head_dim])
                    .reshape([1, 1, length, head_dim])
            };
            return Rotation {
                cos: rows(cos),
                sin: rows(sin),
            };
        }
        let positions: Vec<i64> = padding
            .iter()
            .flat_map(|&pad| (start..end).map(move |index| index.saturating_sub(pad) as i64))
            .collect();
        let batch = padding.len();
        let positions = Tensor::<1, Int>::from_data(
            TensorData::new(positions, [batch * length]),
            &self.device,
        );
        let rows = |table: Tensor<2>| {
            table
                .select(0, positions.clone())
                .reshape([batch, 1, length, head_dim])
        };
        Rotation {
            cos: rows(cos),
            sin: rows(sin),
        }
    }

    /// Tables of at least `end` positions.
    fn tables(&mut self, end: usize) -> (Tensor<2>, Tensor<2>) {
        let stale = self.config.is_dynamic() && self.sequence != end.max(self.config.max_positions);
        if let (Some(cos), Some(sin)) = (&self.cos, &self.sin)
            && self.rows >= end
            && !stale
        {
            return (cos.clone(), sin.clone());
        }
        let rows = end.div_ceil(ROWS_STEP) * ROWS_STEP;
        self.sequence = end.max(self.config.max_positions);
        self.rows = rows;
        let frequencies = self.config.inverse_frequencies(self.sequence);
        let factor = self.config.attention_factor() as f32;
        let angles: Vec<f32> = (0..rows)
            .flat_map(|position| {
                frequencies
                    .iter()
                    .map(move |frequency| position as f32 * frequency)
            })
            .collect();
        let half = frequencies.len();
        let table = |value: fn(f32) -> f32, first_sign: f32| {
            let halves: Vec<f32> = angles
                .chunks(half)
                .flat_map(|row| {
                    let values = row.iter().map(move |&angle| value(angle) * factor);
                    values.clone().map(move |v| v * first_sign).chain(values)
                })
                .collect();
            Tensor::<2>::from_data(
                TensorData::new(halves, [rows, 2 * half]),
                (&self.device, DType::F32),
            )
            .cast(self.dtype)
        };
        let (cos, sin) = (table(f32::cos, 1.0), table(f32::sin, -1.0));
        self.cos = Some(cos.clone());
        self.sin = Some(sin.clone());
        (cos, sin)
    }
}

impl Rotation {
    /// Rotates queries or keys, `[batch, heads, length, head_dim]`.
    pub fn apply(&self, x: Tensor<4>) -> Tensor<4> {
        let [.., head_dim] = x.dims();
        let half = head_dim / 2;
        let swapped = Tensor::cat(
            vec![x.clone().narrow(3, half, half), x.clone().narrow(3, 0, half)],
            3,
        );
        x * self.cos.clone() + swapped * self.sin.clone()
    }
}
