//! The learning rate over a run.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// None.
    Constant,
    /// To zero along a line.
    Linear,
    /// To zero along half a cosine.
    Cosine,
}

/// A learning rate for every step, as transformers' schedulers of the same names give it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// The largest rate.
    pub peak: f64,
    /// How the rate falls after the warm-up.
    pub decay: Decay,
    /// Steps in which the rate rises from zero.
    pub warmup: usize,
    /// Steps of the whole run.
    pub total: usize,
}

impl Schedule {
    /// The rate of a step, counted from 0.
    pub fn rate(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.peak * step as f64 / self.warmup as f64;
        }
        let span = self.total.saturating_sub(self.warmup).max(1);
        let progress = (step - self.warmup) as f64 / span as f64;
        self.peak
            * match self.decay {
                Decay::Constant => 1.0,
                Decay::Linear => (1.0 - progress).max(0.0),
                Decay::Cosine => (0.5 * (1.0 + (PI * progress).cos())).max(0.0),
            }
    }
}
