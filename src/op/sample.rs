//! The choice of tokens from logits, where the logits are.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{DType, Device, Int, Shape, Tensor, TensorData};

use super::tensor::check_device;
use crate::error::Nf4Error;
use crate::format::{FloatType, check_shape};
use crate::sampling::{MAX_VOCABULARY, STATE_HEADER, SampleSettings, state_words};

#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;

/// What to choose from, and how.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleSpec {
    /// Rows.
    pub rows: usize,
    /// Logits of a row.
    pub vocabulary: usize,
    /// Whether the state has a history.
    pub history: bool,
    /// How to choose.
    pub settings: SampleSettings,
    /// Type of the logits.
    pub dtype: FloatType,
    /// Type of the results.
    pub int: DType,
}

impl SampleSpec {
    /// Shape of the state.
    pub fn state_shape(&self) -> Shape {
        let history = self.history.then_some(self.vocabulary);
        Shape::from([self.rows, state_words(history)])
    }
}

/// The choice of tokens by a backend: by one kernel on CubeCL, on the host by Flex.
#[backend_extension(
    Autodiff,
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Fusion: cfg(feature = "fusion"),
)]
pub trait SampleBackend: Backend {
    /// Tokens, how many of each row were chosen before, and the state after it, in its place if nobody else
    /// needs it.
    ///
    /// # Shapes
    /// - `logits`: `[rows, vocabulary]`, of `spec.dtype`
    /// - `state`: [`SampleSpec::state_shape`], u32
    /// - returns `[rows]` and `[rows]`, of `spec.int`, and the state
    #[fusion(meta = |_logits: &TensorSpec, _state: &TensorSpec, spec: &SampleSpec| {
        let of_rows = TensorSpec::new(Shape::from([spec.rows]), spec.int);
        (of_rows.clone(), of_rows, TensorSpec::new(spec.state_shape(), DType::U32))
    })]
    fn sample(
        logits: FloatTensor<Self>,
        state: IntTensor<Self>,
        spec: SampleSpec,
    ) -> (IntTensor<Self>, IntTensor<Self>, IntTensor<Self>);
}

/// What the choice of tokens goes by besides the logits: of each row a seed, how many tokens were chosen, and
/// for a penalty which tokens its text has. It lies on the device, where [`sample`] carries it on.
#[derive(Debug, Clone)]
pub struct SampleState {
    /// `[rows, words]`, u32.
    words: Tensor<2, Int>,
    /// Tokens of the vocabulary, if there is a history.
    history: Option<usize>,
}

impl SampleState {
    /// For rows with these seeds, without the history that a penalty needs.
    ///
    /// # Errors
    /// [`Nf4Error::ElementCount`] for no rows.
    pub fn new(seeds: &[u64], device: &Device) -> Result<Self, Nf4Error> {
        Self::from_words(seeds, None, |_, _| Ok(()), device)
    }

    /// For rows with these seeds and, so far, these texts, one for each row.
    ///
    /// # Errors
    /// [`Nf4Error::Length`] unless there is a text for each row, [`Nf4Error::IdRange`] for a token that the
    /// vocabulary has not, [`Nf4Error::ElementCount`] for no rows, and no tokens or more than 2^24.
    pub fn with_history<T: AsRef<[u32]>>(
        seeds: &[u64],
        texts: &[T],
        vocabulary: usize,
        device: &Device,
    ) -> Result<Self, Nf4Error> {
        if texts.len() != seeds.len() {
            return Err(Nf4Error::Length {
                tensor: "texts".into(),
                expected: seeds.len(),
                given: texts.len(),
            });
        }
        let fill = |row: usize, words: &mut [u32]| {
            for (index, &id) in texts[row].as_ref().iter().enumerate() {
                if id as usize >= vocabulary {
                    return Err(Nf4Error::IdRange {
                        tensor: format!("text of row {row}"),
                        index,
                        given: id.into(),
                        rows: vocabulary,
                    });
                }
                words[id as usize / 32] |= 1 << (id % 32);
            }
            Ok(())
        };
        Self::from_words(seeds, Some(vocabulary), fill, device)
    }

    fn from_words(
        seeds: &[u64],
        history: Option<usize>,
        fill: impl Fn(usize, &mut [u32]) -> Result<(), Nf4Error>,
        device: &Device,
    ) -> Result<Self, Nf4Error> {
        let (rows, words) = (seeds.len(), state_words(history));
        let fits = history.is_none_or(|vocabulary| (1..=MAX_VOCABULARY).contains(&vocabulary));
        if rows == 0 || !fits {
            return Err(Nf4Error::ElementCount {
                tensor: "state".into(),
                shape: vec![rows, history.unwrap_or(1)],
            });
        }
        let mut data = vec![0; rows * words];
        for (row, (words, seed)) in data.chunks_mut(words).zip(seeds).enumerate() {
            let (header, history) = words.split_at_mut(STATE_HEADER);
            header[0] = *seed as u32;
            header[1] = (seed >> 32) as u32;
            fill(row, history)?;
        }
        let data = TensorData::new(data, [rows, words]);
        Ok(Self {
            words: Tensor::from_data(data, (device, DType::U32)),
            history,
        })
    }

    /// Gives a row another seed and, where there is a history, another text, as at the beginning. What is held
    /// is overwritten in its place, for the graphs that were recorded with it.
    ///
    /// # Errors
    /// [`Nf4Error::RowRange`] if there is no such row, [`Nf4Error::IdRange`] for a token that the vocabulary
    /// has not.
    pub fn begin_row(&mut self, row: usize, seed: u64, text: &[u32]) -> Result<(), Nf4Error> {
        let [rows, words] = self.words.dims();
        if row >= rows {
            return Err(Nf4Error::RowRange {
                start: row,
                end: row + 1,
                rows,
            });
        }
        let device = self.words.device();
        let of_row = match self.history {
            None => Self::new(&[seed], &device)?,
            Some(vocabulary) => Self::with_history(&[seed], &[text], vocabulary, &device)?,
        };
        self.words
            .inplace(|held| held.slice_assign([row..row + 1, 0..words], of_row.words));
        Ok(())
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.words.dims()[0]
    }

    /// The same in memory of its own, so that [`restore`](Self::restore) can go back to it.
    pub fn snapshot(&self) -> Self {
        Self {
            words: self.words.clone() + 0,
            history: self.history,
        }
    }

    /// Goes back to a snapshot. What is held is overwritten in its place, for the graphs that were recorded
    /// with it.
    ///
    /// # Errors
    /// [`Nf4Error::Shape`] if it is one of other rows.
    pub fn restore(&mut self, snapshot: &Self) -> Result<(), Nf4Error> {
        let [rows, words] = self.words.dims();
        check_shape("snapshot", &[rows, words], &snapshot.words.dims())?;
        let theirs = snapshot.words.clone();
        self.words
            .inplace(|held| held.slice_assign([0..rows, 0..words], theirs));
        Ok(())
    }
}

/// What [`sample`] has chosen.
#[derive(Debug, Clone)]
pub struct Sampled {
    /// `[rows]`: the tokens; 0 where there is none.
    pub ids: Tensor<1, Int>,
    /// `[rows]`: how many tokens of the row were chosen before, modulo 2^31, or -1 if there is no token: if a
    /// logit is NaN or infinite, or all are minus infinity. Whoever reads the tokens is to look at it.
    pub numbers: Tensor<1, Int>,
}

/// Chooses a token for each row of logits, on the device, and carries the state on.
///
/// Computed in f32 and integers, so that all devices choose the same for the same logits. What is drawn depends
/// on the seed of the row and on how many tokens were chosen before, not on other rows: the random numbers are
/// those of Philox4x32-10. Top-p is exact but for the rounding of the weights, which are whole parts of 2^-31
/// of the largest one; tokens less likely than that are never drawn. No gradient flows through.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use burn_nf4::op::{SampleSettings, SampleState, sample};
///
/// let device = Device::default();
/// let logits = Tensor::<2>::from_floats([[0.5, 3.0, 2.0, -1.0]], &device);
/// let settings = SampleSettings {
///     temperature: 0.8,
///     top_k: 2,
///     ..SampleSettings::greedy()
/// };
/// let mut state = SampleState::new(&[42], &device)?;
/// for number in 0..5 {
///     let sampled = sample(logits.clone(), &mut state, &settings)?;
///     let id = sampled.ids.into_scalar::<i64>();
///     assert!([1, 2].contains(&id));
///     assert_eq!(sampled.numbers.into_scalar::<i64>(), number);
/// }
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// # Shapes
/// - `logits`: `[rows, vocabulary]`, f16, bf16 or f32
///
/// # Errors
/// [`Nf4Error::Config`] for settings that make no sense, and a penalty without a history,
/// [`Nf4Error::Shape`] for a state of other rows or another vocabulary, [`Nf4Error::ElementCount`] for no
/// logits or more than 2^24 of a row, [`Nf4Error::Dtype`] and [`Nf4Error::Device`].
pub fn sample(
    logits: Tensor<2>,
    state: &mut SampleState,
    settings: &SampleSettings,
) -> Result<Sampled, Nf4Error> {
    let spec = check(&logits, state, settings)?;
    let mut results = None;
    let logits = logits.into_dispatch();
    state.words.inplace(|words| {
        let words = words.into_dispatch();
        let (ids, numbers, words) = <Dispatch as SampleBackend>::sample(logits, words, spec);
        results = Some([ids, numbers].map(Tensor::<1, Int>::from_dispatch));
        Tensor::from_dispatch(words)
    });
    let [ids, numbers] = results.expect("the closure was called");
    Ok(Sampled { ids, numbers })
}

fn check(
    logits: &Tensor<2>,
    state: &SampleState,
    settings: &SampleSettings,
) -> Result<SampleSpec, Nf4Error> {
    settings.check()?;
    let [rows, vocabulary] = logits.dims();
    let dtype = FloatType::from_dtype(logits.dtype(), "logits")?;
    check_device("state", &state.words.device(), &logits.device())?;
    if rows == 0 || !(1..=MAX_VOCABULARY).contains(&vocabulary) {
        return Err(Nf4Error::ElementCount {
            tensor: "logits".into(),
            shape: vec![rows, vocabulary],
        });
    }
    let expected = [rows, vocabulary];
    check_shape(
        "state",
        &expected,
        &[state.rows(), state.history.unwrap_or(vocabulary)],
    )?;
    if settings.repetition_penalty != 1.0 && state.history.is_none() {
        return Err(Nf4Error::Config {
            field: "repetition_penalty",
            expected: "1 with a state that has no history",
            given: settings.repetition_penalty.to_string(),
        });
    }
    Ok(SampleSpec {
        rows,
        vocabulary,
        history: state.history.is_some(),
        settings: *settings,
        dtype,
        int: logits.device().settings().int_dtype.into(),
    })
}
