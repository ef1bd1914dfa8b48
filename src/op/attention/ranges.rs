//! Which keys each query sees.

use burn::tensor::{DType, Device, Int, Shape, Tensor, TensorData};

use crate::error::Nf4Error;
use crate::format::check_shape;

/// What decides which keys a query sees. All of it together: a key is seen if nothing hides it.
///
/// The queries of a row are the last of its tokens: with `n` keys and `t` queries, query `i` stands at
/// the position of key `n - t + i`.
///
/// A key or value that is hidden has weight zero, and zero times NaN is NaN: as in other implementations
/// without a tensor of scores, keys and values are skipped only where a whole tile of them is hidden, by
/// `starts` and `lengths` too. Those of padding may be any finite numbers, but no NaN and no infinity.
#[derive(Debug, Clone, Default)]
pub struct AttentionMask {
    /// Whether a query sees no key after its own position.
    pub causal: bool,
    /// At most how many keys a query sees, the one at its own position the last of them: a sliding window
    /// as transformers has it. Only with `causal`.
    pub window: Option<usize>,
    /// `[batch]`: the first key that is no padding, where rows are padded on the left. Numbers below zero
    /// count as zero, those above the number of keys as that.
    pub starts: Option<Tensor<1, Int>>,
    /// `[batch]`: how many keys a row has, where that differs or is known on the device only, as with a
    /// cache that is longer than what it holds. All that there are if none; numbers below zero count as
    /// zero, those above the number of keys as that. Not with `sequence_ends`.
    ///
    /// The queries are the last of so many tokens, also where there are as many queries as keys: rows that
    /// are padded on the right want no lengths, `causal` alone hides their padding from all other tokens.
    pub lengths: Option<Tensor<1, Int>>,
    /// For each row the ends of the sequences packed into it, the last one the number of tokens: a query
    /// sees no key of another sequence. Only for as many queries as keys, and without `lengths`.
    pub sequence_ends: Option<Vec<Vec<usize>>>,
}

impl AttentionMask {
    /// No key after a query's own position.
    pub fn causal() -> Self {
        Self {
            causal: true,
            ..Self::default()
        }
    }

    /// With a sliding window, if there is one.
    pub fn with_window(mut self, window: Option<usize>) -> Self {
        self.window = window;
        self
    }
}

/// For each query the keys that it sees, neighbours all of them: worked out once, for all layers of a
/// pass.
#[derive(Debug, Clone)]
pub struct KeyRanges {
    /// `[batch or 1, queries, 2]`, i32: the first, and the one past the last. Neither decreases along the
    /// queries of a row.
    ranges: Tensor<3, Int>,
    keys: usize,
}

impl KeyRanges {
    /// Works out what queries see.
    ///
    /// ```
    /// use burn::tensor::Device;
    /// use burn_nf4::op::{AttentionMask, KeyRanges};
    ///
    /// // A prompt of 5 tokens after 3 that a cache holds.
    /// let ranges = KeyRanges::new(&AttentionMask::causal(), 5, 8, &Device::default())?;
    /// assert_eq!([ranges.queries(), ranges.keys()], [5, 8]);
    /// # Ok::<(), burn_nf4::Nf4Error>(())
    /// ```
    ///
    /// # Errors
    /// - [`Nf4Error::Config`] for a window of zero or without `causal`, sequences together with lengths, with
    ///   other than as many queries as keys, or whose ends do not increase up to the number of tokens
    /// - [`Nf4Error::Shape`] for tensors that are not of one batch
    /// - [`Nf4Error::ElementCount`] for more queries or keys than an i32 counts
    pub fn new(
        mask: &AttentionMask,
        queries: usize,
        keys: usize,
        device: &Device,
    ) -> Result<Self, Nf4Error> {
        check(mask, queries, keys)?;
        let device = device.clone().without_autodiff();
        let ranges = match (&mask.starts, &mask.lengths) {
            (None, None) => on_host(mask, queries, keys, &device),
            _ => on_device(mask, queries, keys, &device),
        };
        Ok(Self { ranges, keys })
    }

    /// The same ranges in a buffer of their own.
    pub fn copied(&self) -> Self {
        Self {
            ranges: self.ranges.clone() + 0,
            keys: self.keys,
        }
    }

    /// Writes other ranges of the same sizes into the buffer of these, where nobody else holds it: what a recorded
    /// pass reads.
    ///
    /// # Errors
    /// [`Nf4Error::Shape`] if they are of other sizes.
    pub fn write(&mut self, other: Self) -> Result<(), Nf4Error> {
        let shape = self.ranges.dims();
        check_shape("ranges", &shape, &other.ranges.dims())?;
        check_shape("keys", &[self.keys], &[other.keys])?;
        let all = shape.map(|dim| 0..dim);
        self.ranges
            .inplace(|held| held.slice_assign(all, other.ranges));
        Ok(())
    }

    /// Queries of a row.
    pub fn queries(&self) -> usize {
        self.ranges.dims()[1]
    }

    /// Keys of a row.
    pub fn keys(&self) -> usize {
        self.keys
    }

    /// Rows of the batch, or one for all.
    pub fn rows(&self) -> usize {
        self.ranges.dims()[0]
    }

    /// The first key of each query and the one past the last, `[batch or 1, queries, 2]`, i32, both from
    /// zero to the number of keys. Of a query that sees nothing the first may be past the last.
    pub fn tensor(&self) -> &Tensor<3, Int> {
        &self.ranges
    }
}

fn check(mask: &AttentionMask, queries: usize, keys: usize) -> Result<(), Nf4Error> {
    let config = |field, expected, given: String| {
        Err(Nf4Error::Config {
            field,
            expected,
            given,
        })
    };
    if queries.max(keys) > i32::MAX as usize {
        return Err(Nf4Error::ElementCount {
            tensor: "key ranges".into(),
            shape: vec![queries, keys],
        });
    }
    match mask.window {
        Some(0) => return config("window", "at least one key", "0".into()),
        Some(window) if !mask.causal => {
            return config("window", "none without `causal`", window.to_string());
        }
        _ => {}
    }
    if let (Some(rows), Some(_)) = (&mask.sequence_ends, &mask.lengths) {
        let given = format!("those of {} rows", rows.len());
        return config("sequence_ends", "none with `lengths`", given);
    }
    let batches = [&mask.starts, &mask.lengths].map(|numbers| numbers.as_ref().map(Tensor::dims));
    let of_ends = mask.sequence_ends.as_ref().map(Vec::len);
    let [starts, lengths] = batches.map(|dims| dims.map(|[batch]| batch));
    let expected = starts.or(lengths).or(of_ends);
    for (tensor, batch) in [("lengths", lengths), ("sequence_ends", of_ends)] {
        if let (Some(expected), Some(given)) = (expected, batch) {
            check_shape(tensor, &[expected], &[given])?;
        }
    }
    let Some(rows) = &mask.sequence_ends else {
        return Ok(());
    };
    if queries != keys {
        let expected = "none, but for as many queries as keys";
        return config("sequence_ends", expected, format!("{queries} and {keys}"));
    }
    for ends in rows {
        let increase = ends.windows(2).all(|pair| pair[0] < pair[1]);
        let starts = ends.first().is_none_or(|&first| first > 0);
        if !increase || !starts || ends.last().copied().unwrap_or(0) != keys {
            let expected = "ends that increase up to the number of tokens";
            return config("sequence_ends", expected, format!("{ends:?} of {keys}"));
        }
    }
    Ok(())
}

/// Start and end of the sequence of each token of a row.
fn sequences(ends: &[usize]) -> impl Iterator<Item = [usize; 2]> {
    let starts = std::iter::once(0).chain(ends.iter().copied());
    starts
        .zip(ends)
        .flat_map(|(start, &end)| std::iter::repeat_n([start, end], end - start))
}

fn on_host(mask: &AttentionMask, queries: usize, keys: usize, device: &Device) -> Tensor<3, Int> {
    let row = |bounds: &mut dyn Iterator<Item = [usize; 2]>, all: &mut Vec<i32>| {
        for (query, [first, end]) in (0..queries).zip(bounds) {
            // The position, and one more: below zero where there are fewer keys than queries.
            let next = (keys + query + 1).saturating_sub(queries);
            let end = if mask.causal { end.min(next) } else { end };
            let of_window = mask.window.map_or(0, |window| next.saturating_sub(window));
            all.extend([first.max(of_window) as i32, end as i32]);
        }
    };
    let mut all = Vec::new();
    let rows = match &mask.sequence_ends {
        None => {
            row(&mut std::iter::repeat([0, keys]), &mut all);
            1
        }
        Some(rows) => {
            for ends in rows {
                row(&mut sequences(ends), &mut all);
            }
            rows.len()
        }
    };
    Tensor::from_data(
        TensorData::new(all, [rows, queries, 2]),
        (device, DType::I32),
    )
}

/// Numbers of keys as i32, those outside of `0..=keys` replaced by the nearest there.
fn within(numbers: Tensor<1, Int>, keys: usize) -> Tensor<1, Int> {
    let all = keys as i64;
    match numbers.dtype() {
        // Before the cast: an i32 may be too small for them.
        DType::I64 | DType::U64 | DType::U32 => numbers.clamp(0, all).cast(DType::I32),
        // After it: they may be too small for the number of keys.
        _ => numbers.cast(DType::I32).clamp(0, all),
    }
}

/// Reads nothing from the device, and for one query writes nothing to it: steps of decoding are recorded
/// with this.
fn on_device(mask: &AttentionMask, queries: usize, keys: usize, device: &Device) -> Tensor<3, Int> {
    let given = [&mask.starts, &mask.lengths].into_iter().flatten();
    let [batch] = given.map(Tensor::dims).next().unwrap_or([1]);
    let shape = [batch, queries];
    let options = (device, DType::I32);
    if shape.contains(&0) {
        return Tensor::zeros([batch, queries, 2], options);
    }
    let column = |numbers: &Tensor<1, Int>| {
        let numbers = within(numbers.clone(), keys).to_device(device);
        numbers.reshape([batch, 1]).expand(shape)
    };
    let lengths = match &mask.lengths {
        Some(lengths) => column(lengths),
        None => Tensor::full(Shape::from(shape), keys as i64, options),
    };
    // One past the position of each query, which is before the first key where there are more queries.
    let next = match queries {
        1 => lengths.clone(),
        _ => {
            let from_last = Tensor::<1, Int>::arange(1 - queries as i64..1, options);
            let from_last = from_last.reshape([1, queries]).expand(shape);
            (lengths.clone() + from_last).clamp_min(0)
        }
    };
    // A window of all keys hides none, however large a number it is.
    let of_window = mask.window.filter(|&window| window < keys);
    let of_window = of_window.map(|window| (next.clone() - window as i64).clamp_min(0));
    let of_starts = mask.starts.as_ref().map(column);
    let mut first = match (of_window, of_starts) {
        (Some(of_window), Some(of_starts)) => of_window.max_pair(of_starts),
        (Some(first), None) | (None, Some(first)) => first,
        (None, None) => Tensor::zeros(Shape::from(shape), options),
    };
    let mut end = if mask.causal { next } else { lengths };
    if let Some(rows) = &mask.sequence_ends {
        let bounds: Vec<i32> = rows
            .iter()
            .flat_map(|ends| sequences(ends))
            .flatten()
            .map(|bound| bound as i32)
            .collect();
        let data = TensorData::new(bounds, [batch, queries, 2]);
        let bounds = Tensor::<3, Int>::from_data(data, options);
        let [of_first, of_end] =
            [0, 1].map(|side| bounds.clone().narrow(2, side, 1).squeeze_dim(2));
        first = first.max_pair(of_first);
        end = end.min_pair(of_end);
    }
    Tensor::stack(vec![first, end], 2)
}
