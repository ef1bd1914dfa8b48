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
    /// Elements of a head that are rotated, from the first on.
    pub rotary_dim: usize,
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
    /// arXiv 2402.13753: a factor for each pair of channels, of one list up to the original positions and
    /// of another beyond.
    LongRope {
        short_factors: Vec<f64>,
        long_factors: Vec<f64>,
        attention_factor: f64,
        original_positions: f64,
        /// Whether keys are computed again when the sequence passes the original positions.
        recomputes_keys: bool,
    },
}

impl RopeConfig {
    /// A number for the angles that the positions of a sequence of this length have: two lengths with the
    /// same number have the same angles.
    pub fn regime(&self, sequence: usize) -> usize {
        match &self.scaling {
            RopeScaling::Dynamic { .. } => sequence.max(self.max_positions),
            RopeScaling::LongRope {
                original_positions, ..
            } => usize::from(sequence as f64 > *original_positions),
            _ => 0,
        }
    }

    /// Whether the keys in a cache are to be computed again when the [regime](Self::regime) of their
    /// sequence changes, as transformers does in Phi-3. In other families, and with dynamic scaling, it
    /// leaves them as they are.
    pub fn recomputes_keys(&self) -> bool {
        matches!(self.scaling, RopeScaling::LongRope { recomputes_keys, .. } if recomputes_keys)
    }

    /// With keys that are [computed again](Self::recomputes_keys), if it is LongRoPE.
    pub(crate) fn with_recomputed_keys(mut self) -> Self {
        if let RopeScaling::LongRope {
            recomputes_keys, ..
        } = &mut self.scaling
        {
            *recomputes_keys = true;
        }
        self
    }

    /// The angle of one position per pair of channels, for a sequence of this length.
    pub fn inverse_frequencies(&self, sequence: usize) -> Vec<f32> {
        let dim = self.rotary_dim;
        let powers = |theta: f64| {
            (0..dim)
                .step_by(2)
                .map(move |channel| (theta as f32).powf(channel as f32 / dim as f32))
        };
        let frequencies = |theta: f64| powers(theta).map(|power| 1.0 / power);
        match &self.scaling {
            RopeScaling::Default => frequencies(self.theta).collect(),
            &RopeScaling::Linear { factor } => frequencies(self.theta)
                .map(|frequency| frequency / factor as f32)
                .collect(),
            &RopeScaling::Dynamic { factor } => {
                let max = self.max_positions as f64;
                let stretch = factor * (sequence as f64).max(max) / max - (factor - 1.0);
                let exponent = dim as f64 / (dim as f64 - 2.0);
                frequencies(self.theta * stretch.powf(exponent)).collect()
            }
            &RopeScaling::Llama3 {
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
                frequencies(self.theta).map(scale).collect()
            }
            RopeScaling::Yarn { .. } => self.yarn_frequencies(),
            RopeScaling::LongRope {
                short_factors,
                long_factors,
                ..
            } => {
                let factors = match self.regime(sequence) {
                    0 => short_factors,
                    _ => long_factors,
                };
                let scaled = powers(self.theta).zip(factors);
                scaled
                    .map(|(power, &factor)| 1.0 / (factor as f32 * power))
                    .collect()
            }
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
        let dim = self.rotary_dim as f64;
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
        (0..self.rotary_dim / 2)
            .map(|pair| {
                let position = (self.theta as f32).powf(2.0 * pair as f32 / self.rotary_dim as f32);
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
            }
            | RopeScaling::LongRope {
                attention_factor, ..
            } => attention_factor,
            _ => 1.0,
        }
    }
}
