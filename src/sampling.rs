//! How a token is chosen from logits: the settings, and what the host and the kernel have in common.

use crate::error::Nf4Error;

/// How [`sample`](crate::op::sample) chooses a token, in the order in which transformers applies it: the
/// penalty, the temperature, top-k, top-p, min-p.
///
/// Tokens are ranked by their logit after the penalty, and by their id where that is equal: the smaller one
/// first. So exactly `top_k` tokens are left, where transformers keeps all that are as likely as the last.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleSettings {
    /// Divides the logits; 0 takes the likeliest token, whatever the next three say.
    pub temperature: f32,
    /// Only this many of the likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability, at least one; 1 for all.
    pub top_p: f32,
    /// Only tokens with this part of the probability of the likeliest one; 0 for all.
    pub min_p: f32,
    /// Divides the logits above zero, and multiplies those below, of all tokens that a text has; 1 for none.
    pub repetition_penalty: f32,
}

impl SampleSettings {
    /// The likeliest token.
    pub const fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
        }
    }

    /// Whether the likeliest token is taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0 || self.top_k == 1
    }

    /// Refuses numbers that make no sense.
    ///
    /// # Errors
    /// [`Nf4Error::Config`].
    pub fn check(&self) -> Result<(), Nf4Error> {
        let Self {
            temperature,
            top_k: _,
            top_p,
            min_p,
            repetition_penalty: penalty,
        } = *self;
        let (field, given, expected) = if !(temperature.is_finite() && temperature >= 0.0) {
            ("temperature", temperature, "a number of at least 0")
        } else if !(top_p > 0.0 && top_p <= 1.0) {
            ("top_p", top_p, "more than 0 and at most 1")
        } else if !(0.0..=1.0).contains(&min_p) {
            ("min_p", min_p, "at least 0 and at most 1")
        } else if !(penalty.is_finite() && penalty > 0.0 && penalty.recip().is_finite()) {
            let expected =
                "a number above 0, and so that neither it nor its reciprocal is infinite";
            ("repetition_penalty", penalty, expected)
        } else {
            return Ok(());
        };
        Err(Nf4Error::Config {
            field,
            expected,
            given: given.to_string(),
        })
    }

    /// The numbers to compute with.
    pub(crate) fn constants(&self) -> SampleConstants {
        let per_logit = std::f64::consts::LOG2_E / f64::from(self.temperature);
        let farthest = -f64::from(self.min_p).log2() * f64::from(DISTANCE_UNITS);
        SampleConstants {
            greedy: self.is_greedy(),
            penalty: self.repetition_penalty,
            inverse_penalty: self.repetition_penalty.recip(),
            per_logit: per_logit.min(f64::from(f32::MAX)) as f32,
            top_k: u32::try_from(self.top_k).unwrap_or(u32::MAX),
            // Of f32 the conversion is exact but for numbers below 2^-9. Zero stands for all.
            top_p: match self.top_p < 1.0 {
                true => ((f64::from(self.top_p) * 4_294_967_296.0) as u32).max(1),
                false => 0,
            },
            farthest: (farthest as u32).min(TOO_FAR - 1),
        }
    }
}

/// What the host and the kernel compute with, so that both do it with the same numbers.
///
/// The *distance* of a token is how many times less likely it is than the likeliest, as a logarithm to base 2
/// with 26 digits behind the point: `(largest logit - logit) * per_logit`, in f32, cut off. Its *weight* is
/// 2^31 times the likelihood that this says. Weights are computed and added up as integers: sums depend neither
/// on the order nor on the device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct SampleConstants {
    /// Whether the likeliest token is taken.
    pub greedy: bool,
    /// What logits below zero of tokens that a text has are multiplied by.
    pub penalty: f32,
    /// And those above.
    pub inverse_penalty: f32,
    /// Distance of a logit.
    pub per_logit: f32,
    /// Most tokens; 0 for all.
    pub top_k: u32,
    /// The probability to be reached, in units of 2^-32; 0 for all.
    pub top_p: u32,
    /// The largest distance that is drawn.
    pub farthest: u32,
}

/// Distance of a token that is half as likely as another.
pub(crate) const DISTANCE_UNITS: u32 = 1 << 26;

/// The distance from which on weights are taken for zero.
pub(crate) const TOO_FAR: u32 = 31 * DISTANCE_UNITS;

/// `(1 - 2^-f) / f = p0 - f (p1 - f (p2 - ..))` for `f` from 0 to 1 to within 2^-33, in units of 2^-32: the
/// polynomial of degree 6 through Chebyshev's nodes.
pub(crate) const POWER: [u32; 7] = [
    2_977_044_471,
    1_031_764_939,
    238_387_495,
    41_304_489,
    5_712_048,
    639_488,
    48_550,
];

/// Words at the head of the state of a row: its seed, low word first, and how many tokens were chosen.
pub(crate) const STATE_HEADER: usize = 3;

/// Most tokens of a vocabulary.
pub(crate) const MAX_VOCABULARY: usize = 1 << 24;

/// Words of the state of a row: the header, and with a history a bit for each token.
pub(crate) const fn state_words(history: Option<usize>) -> usize {
    match history {
        None => STATE_HEADER,
        Some(vocabulary) => STATE_HEADER + vocabulary.div_ceil(32),
    }
}
