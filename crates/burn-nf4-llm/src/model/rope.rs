//! Rotary position embeddings with the scaling variants of transformers.
//!
//! Formulas: `modeling_rope_utils.py` of transformers 5.24.0, in the same precisions: scalars in f64,
//! frequencies in f32. `rope_fields` reads the parameters.

use std::f64::consts::PI;

/// How positions turn into angles.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    pub(crate) scaling: RopeScaling,
    pub(crate) theta: f64,
    /// Elements of a head.
    pub head_dim: usize,
    /// Positions that the model was made for.
    pub max_positions: usize,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum RopeScaling {
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
