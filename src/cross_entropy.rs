//! What a cross-entropy is made of besides logits and targets.

use crate::error::Nf4Error;

/// How the cross-entropy of a row is computed from its logits `x` and its target `t`.
///
/// With `l = c tanh(s x / c)`, `lse = log Σ exp(l)` and `V` logits it is
/// `(1 - ε) (lse - l[t]) + ε (lse - Σ l / V) + z lse²`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CrossEntropyOptions {
    /// The target of rows that are left out: their loss and gradients are zeros, whatever their logits.
    pub ignore_index: i32,
    /// `ε`: how much of the target is spread over all tokens (arXiv 1512.00567), as PyTorch does.
    pub label_smoothing: f64,
    /// `z`: what the square of the log of the sum costs (arXiv 2204.02311).
    pub z_loss: f64,
    /// `c`, if logits are capped, as in Gemma 2.
    pub soft_cap: Option<f64>,
    /// `s`, with which logits are multiplied first.
    pub logit_scale: f64,
}

impl Default for CrossEntropyOptions {
    /// The plain cross-entropy, with PyTorch's `ignore_index` of -100.
    fn default() -> Self {
        Self {
            ignore_index: -100,
            label_smoothing: 0.0,
            z_loss: 0.0,
            soft_cap: None,
            logit_scale: 1.0,
        }
    }
}

impl CrossEntropyOptions {
    /// # Errors
    /// [`Nf4Error::Config`] for a setting that makes no sense in f32.
    pub(crate) fn check(&self) -> Result<(), Nf4Error> {
        let is_finite = |x: f64| (x as f32).is_finite();
        let cap = self.soft_cap.unwrap_or(1.0);
        for (field, expected, given, fits) in [
            (
                "label_smoothing",
                "0 to 1",
                self.label_smoothing,
                (0.0..=1.0).contains(&self.label_smoothing),
            ),
            (
                "z_loss",
                "zero or a positive number",
                self.z_loss,
                self.z_loss >= 0.0 && is_finite(self.z_loss),
            ),
            (
                "soft_cap",
                "a positive number",
                cap,
                cap > 0.0 && (cap as f32).is_normal(),
            ),
            (
                "logit_scale",
                "a finite number",
                self.logit_scale,
                is_finite(self.logit_scale),
            ),
        ] {
            if !fits {
                return Err(Nf4Error::Config {
                    field,
                    expected,
                    given: given.to_string(),
                });
            }
        }
        Ok(())
    }
}
