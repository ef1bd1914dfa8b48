//! Choosing the next token.

use burn::tensor::{DType, Int, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::error::ModelError;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only this many of the likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability.
    pub top_p: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Sampling {
    /// The likeliest token each time.
    pub const fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
        }
    }

    /// Refuses settings under which no token can be drawn as asked.
    pub fn check(&self) -> Result<(), ModelError> {
        let Self {
            temperature,
            top_k,
            top_p,
            ..
        } = *self;
        let (name, given, expected) = if !temperature.is_finite() || temperature < 0.0 {
            ("the temperature", temperature, "a number of at least 0")
        } else if !(top_p > 0.0 && top_p <= 1.0) {
            ("top-p", top_p, "more than 0 and at most 1")
        } else if temperature == 0.0 && (top_k > 0 || top_p < 1.0) {
            let expected = "above 0 with top-k and top-p, which choose among tokens that are drawn";
            ("the temperature", temperature, expected)
        } else {
            return Ok(());
        };
        Err(ModelError::setting(name, given, expected))
    }

    fn is_greedy(&self) -> bool {
        self.temperature == 0.0 || self.top_k == 1
    }
}

/// Draws tokens, the same ones for the same seed and logits.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    /// One generator a row, so that a row's text does not depend on the rows beside it.
    rngs: Vec<StdRng>,
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    /// A sampler for so many rows, each with draws of its own.
    pub fn new(sampling: Sampling, rows: usize) -> Self {
        let rng = |row| StdRng::seed_from_u64(sampling.seed.wrapping_add(row as u64));
        Self {
            sampling,
            rngs: (0..rows).map(rng).collect(),
            candidates: Vec::new(),
        }
    }

    /// Has a row draw as that of the prompt `prompt` does from its beginning on.
    pub fn begin_row(&mut self, row: usize, prompt: usize) {
        let seed = self.sampling.seed.wrapping_add(prompt as u64);
        self.rngs[row] = StdRng::seed_from_u64(seed);
    }

    /// Whether each token is the likeliest.
    pub fn is_greedy(&self) -> bool {
        self.sampling.is_greedy()
    }

    /// One token for each row of `[batch, vocab_size]` logits, on the device as `[batch, 1]` and on
    /// the host. The device is read once.
    pub fn next(&mut self, logits: Tensor<2>) -> (Tensor<2, Int>, Vec<u32>) {
        if self.sampling.is_greedy() {
            let tokens = logits.argmax(1);
            let host = tokens.to_data().iter::<i64>().map(|id| id as u32).collect();
            return (tokens, host);
        }
        let device = logits.device();
        let [rows, vocabulary] = logits.dims();
        let data = logits.cast(DType::F32).into_data();
        let values = data.as_slice::<f32>().expect("the logits are cast to f32");
        let tokens: Vec<u32> = values
            .chunks(vocabulary)
            .enumerate()
            .map(|(row, logits)| self.draw(row, logits))
            .collect();
        let ids: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
        let ids = Tensor::<1, Int>::from_data(ids.as_slice(), &device).reshape([rows, 1]);
        (ids, tokens)
    }

    /// Temperature, then top-k, then top-p, as transformers applies them.
    fn draw(&mut self, row: usize, logits: &[f32]) -> u32 {
        let Sampling {
            temperature,
            top_k,
            top_p,
            ..
        } = self.sampling;
        let candidates = &mut self.candidates;
        candidates.clear();
        // Less the largest first, so that a tiny temperature makes no infinity of it.
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        candidates.extend(
            logits
                .iter()
                .zip(0..)
                .map(|(&logit, id)| ((logit - max) / temperature, id)),
        );
        // Equal logits are ordered by id, so that the draw does not depend on the sort.
        let likelier = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, likelier);
            candidates.truncate(top_k);
        }
        for candidate in candidates.iter_mut() {
            candidate.0 = candidate.0.exp();
        }
        let mut total: f32 = candidates.iter().map(|candidate| candidate.0).sum();
        if top_p < 1.0 {
            candidates.sort_unstable_by(likelier);
            let mut sum = 0.0;
            let kept = candidates
                .iter()
                .take_while(|candidate| {
                    let before = sum;
                    sum += candidate.0;
                    before < top_p * total
                })
                .count()
                .max(1);
            candidates.truncate(kept);
            total = candidates.iter().map(|candidate| candidate.0).sum();
        }
        let mut left = self.rngs[row].random::<f32>() * total;
        for &(weight, id) in candidates.iter() {
            left -= weight;
            if left < 0.0 {
                return id;
            }
        }
        // Rounding can leave a rest: the last candidate it is.
        candidates.last().map_or(0, |&(_, id)| id)
    }
}
