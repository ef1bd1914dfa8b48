//! Choosing the next token.

use std::cell::RefCell;
use std::rc::Rc;

use burn::tensor::{Device, Tensor};
use burn_nf4::Nf4Error;
use burn_nf4::op::{SampleSettings, SampleState, Sampled, sample};

use crate::error::ModelError;

/// How the next token is chosen: see [`SampleSettings`] for what is applied when.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only this many of the likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability.
    pub top_p: f32,
    /// Only tokens with this part of the probability of the likeliest one; 0 for all.
    pub min_p: f32,
    /// Divides the logits above zero, and multiplies those below, of all tokens of the prompt and the text so
    /// far; 1 for none.
    pub repetition_penalty: f32,
    /// Seed of the draws. A row has the seed that is larger by its place.
    pub seed: u64,
}

impl Sampling {
    /// The likeliest token each time.
    pub const fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }

    /// Refuses settings under which no token can be drawn as asked.
    ///
    /// # Errors
    /// Those of [`SampleSettings::check`], and [`ModelError::Setting`] for a choice among tokens that are
    /// drawn where none is.
    pub fn check(&self) -> Result<(), ModelError> {
        self.settings().check()?;
        let chooses = self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0;
        if self.temperature == 0.0 && chooses {
            let expected =
                "above 0 with top-k, top-p and min-p, which choose among tokens that are drawn";
            return Err(ModelError::setting("`temperature`", 0, expected));
        }
        Ok(())
    }

    /// The seed of a prompt's row.
    fn seed_of(&self, prompt: usize) -> u64 {
        self.seed.wrapping_add(prompt as u64)
    }

    fn settings(&self) -> SampleSettings {
        SampleSettings {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
        }
    }
}

/// Chooses tokens on the device, the same ones for the same seed, texts and logits.
#[derive(Debug)]
pub struct Sampler {
    choosing: Choosing,
    /// How many tokens of each row were chosen.
    chosen: Vec<i64>,
    sampling: Sampling,
}

/// What the device chooses by: a recorded step shares it with the sampler.
#[derive(Debug, Clone)]
pub(super) struct Choosing {
    settings: SampleSettings,
    state: Rc<RefCell<SampleState>>,
}

impl Sampler {
    /// A sampler for rows that have these texts so far, each with draws of its own, so that what a row says does
    /// not depend on the rows beside it: those of the prompt `first` and those after it.
    ///
    /// # Errors
    /// [`Nf4Error::IdRange`] for a token that the vocabulary has not, [`Nf4Error::ElementCount`] for no rows or
    /// no vocabulary.
    pub fn new<T: AsRef<[u32]>>(
        sampling: Sampling,
        first: usize,
        texts: &[T],
        vocabulary: usize,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let seeds = (first..first + texts.len()).map(|prompt| sampling.seed_of(prompt));
        let seeds: Vec<u64> = seeds.collect();
        let state = match sampling.repetition_penalty == 1.0 {
            true => SampleState::new(&seeds, device)?,
            false => SampleState::with_history(&seeds, texts, vocabulary, device)?,
        };
        Ok(Self {
            choosing: Choosing {
                settings: sampling.settings(),
                state: Rc::new(RefCell::new(state)),
            },
            chosen: vec![0; texts.len()],
            sampling,
        })
    }

    /// Has a row choose for another prompt, as that would be chosen for from its beginning on.
    ///
    /// # Errors
    /// [`Nf4Error::IdRange`] for a token that the vocabulary has not.
    pub fn begin_row(&mut self, row: usize, prompt: usize, text: &[u32]) -> Result<(), ModelError> {
        let seed = self.sampling.seed_of(prompt);
        let mut state = self.choosing.state.borrow_mut();
        state.begin_row(row, seed, text)?;
        self.chosen[row] = 0;
        Ok(())
    }

    /// One token for each row of `[batch, vocab_size]` logits. The device is read once.
    ///
    /// # Errors
    /// [`Nf4Error::NonFinite`] for logits that are NaN or infinite, or all minus infinity; those of [`sample`].
    pub fn next(&mut self, logits: Tensor<2>) -> Result<Vec<u32>, ModelError> {
        let [rows, _] = logits.dims();
        let Sampled { ids, numbers } = self.choosing.choose(logits.clone())?;
        let both = Tensor::cat(vec![ids, numbers], 0).to_data();
        let both: Vec<i64> = both.iter::<i64>().collect();
        let (chosen, numbers) = both.split_at(rows);
        self.accept(chosen, numbers, &logits)
    }

    /// What a recorded step chooses by.
    pub(super) fn choosing(&self) -> Choosing {
        self.choosing.clone()
    }

    /// The tokens that the device has chosen from logits, if it has chosen what comes next.
    pub(super) fn accept(
        &mut self,
        ids: &[i64],
        numbers: &[i64],
        logits: &Tensor<2>,
    ) -> Result<Vec<u32>, ModelError> {
        if let Some(row) = numbers.iter().position(|&number| number < 0) {
            return Err(not_finite(logits, row).into());
        }
        // As the device counts.
        let expected = self.chosen.iter().map(|chosen| chosen & 0x7fff_ffff);
        if !expected.eq(numbers.iter().copied()) {
            let expected = &self.chosen;
            let message =
                format!("it chose the tokens of numbers {numbers:?}, expected {expected:?}");
            return Err(ModelError::replay(&logits.device(), message));
        }
        self.chosen.iter_mut().for_each(|chosen| *chosen += 1);
        Ok(ids.iter().map(|&id| id as u32).collect())
    }
}

impl Choosing {
    /// Chooses a token for each row and carries the state on. Nothing is read.
    pub fn choose(&self, logits: Tensor<2>) -> Result<Sampled, Nf4Error> {
        sample(logits, &mut self.state.borrow_mut(), &self.settings)
    }

    /// The state, to go back to.
    pub fn snapshot(&self) -> SampleState {
        self.state.borrow().snapshot()
    }

    /// Goes back to a snapshot of the same state, in its place.
    pub fn restore(&self, snapshot: &SampleState) -> Result<(), Nf4Error> {
        self.state.borrow_mut().restore(snapshot)
    }
}

/// What is wrong with the logits of a row: which comes of damaged weights, or of a dtype that is too small for
/// them.
fn not_finite(logits: &Tensor<2>, row: usize) -> Nf4Error {
    let [_, vocabulary] = logits.dims();
    let data = logits.to_data();
    let values = data.iter::<f32>().enumerate();
    let mut values = values.skip(row * vocabulary).take(vocabulary);
    let first = values.find(|(_, value)| value.is_nan() || *value == f32::INFINITY);
    let (index, given) = first.unwrap_or((row * vocabulary, f32::NEG_INFINITY));
    Nf4Error::NonFinite {
        tensor: format!("logits of the model in {:?}", logits.dtype()),
        index,
        given,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(rows: usize) -> Sampler {
        let texts = vec![[1]; rows];
        Sampler::new(Sampling::greedy(), 0, &texts, 3, &Device::default()).unwrap()
    }

    fn logits() -> Tensor<2> {
        let values = [[1.0, 2.0, 0.5], [1.0, 0.0, f32::INFINITY]];
        Tensor::from_floats(values, &Device::default())
    }

    #[test]
    fn logits_that_are_not_finite_are_named() {
        let error = sampler(2).next(logits()).unwrap_err();
        let ModelError::Nf4(Nf4Error::NonFinite { index, given, .. }) = error else {
            panic!("{error:?}");
        };
        assert_eq!((index, given), (5, f32::INFINITY));
        let nothing = Tensor::full([1, 3], f32::NEG_INFINITY, &Device::default());
        let error = sampler(1).next(nothing).unwrap_err();
        assert!(error.to_string().contains("-inf"), "{error}");
    }

    /// Which a recorded step would make of an assignment that did not run in place.
    #[test]
    fn tokens_that_were_chosen_before_are_refused() {
        let mut sampler = sampler(2);
        assert_eq!(sampler.accept(&[1, 0], &[0, 0], &logits()).unwrap(), [1, 0]);
        let error = sampler.accept(&[1, 0], &[0, 0], &logits()).unwrap_err();
        assert!(matches!(error, ModelError::Replay { .. }), "{error:?}");
    }
}
