//! What the layers of one forward pass share.

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_nf4::op::{AttentionMask, KeyRanges};

use crate::model::rotation::Rotation;

/// The rotations of the positions of one forward pass, and which keys each query sees.
#[derive(Debug, Clone)]
pub struct Pass {
    /// One for each rotary embedding of the model.
    rotations: Vec<Rotation>,
    /// One for each window that layers of the model have.
    ranges: Vec<(Option<usize>, KeyRanges)>,
    /// `[batch]`: where the cache gets the keys and values of each row, if the device alone knows.
    position: Option<Tensor<1, Int>>,
}

/// The sizes of a [`Pass`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PassSizes {
    /// Of the tables of each rotary embedding.
    rotations: Vec<[usize; 3]>,
    /// Of the ranges of each window, and their keys.
    ranges: Vec<(Option<usize>, [usize; 3], usize)>,
}

impl Pass {
    /// Of `length` queries after `start` earlier positions: causal, within the windows that layers have,
    /// and without the padding at the start of each row.
    ///
    /// # Panics
    /// For a window of zero, which no config has.
    pub fn new(
        rotations: Vec<Rotation>,
        windows: impl IntoIterator<Item = Option<usize>>,
        start: usize,
        length: usize,
        padding: &[usize],
        device: &Device,
    ) -> Self {
        let mask = AttentionMask {
            starts: row_starts(padding, device),
            ..AttentionMask::causal()
        };
        Self {
            rotations,
            ranges: ranges_of(windows, &mask, length, start + length, device),
            position: None,
        }
    }

    /// Of rows of `length` tokens, in which several texts end at `ends`: causal within each of them.
    ///
    /// # Panics
    /// For ends that do not increase up to `length`.
    pub(crate) fn packed(
        rotations: Vec<Rotation>,
        windows: impl IntoIterator<Item = Option<usize>>,
        ends: &[Vec<usize>],
        length: usize,
        device: &Device,
    ) -> Self {
        let mask = AttentionMask {
            sequence_ends: Some(ends.to_vec()),
            ..AttentionMask::causal()
        };
        Self {
            rotations,
            ranges: ranges_of(windows, &mask, length, length, device),
            position: None,
        }
    }

    /// Of one query a row, each at a position of its own, which the device alone may know.
    ///
    /// - `position`: `[batch]`, the positions of each row that the cache holds before
    /// - `capacity`: positions that the cache has room for
    ///
    /// # Panics
    /// For a window of zero, which no config has.
    pub(crate) fn at(
        position: Tensor<1, Int>,
        rotations: Vec<Rotation>,
        windows: impl IntoIterator<Item = Option<usize>>,
        capacity: usize,
    ) -> Self {
        let device = position.device();
        let mask = AttentionMask {
            lengths: Some(position.clone() + 1),
            ..AttentionMask::causal()
        };
        Self {
            rotations,
            ranges: ranges_of(windows, &mask, 1, capacity, &device),
            position: Some(position),
        }
    }

    /// The same in buffers of its own.
    pub(crate) fn copied(&self) -> Self {
        let ranges = self.ranges.iter();
        Self {
            rotations: self.rotations.iter().map(Rotation::copied).collect(),
            ranges: ranges
                .map(|(window, ranges)| (*window, ranges.copied()))
                .collect(),
            position: self.position.clone().map(|position| position + 0),
        }
    }

    /// Its sizes: [`write`](Self::write) takes a pass of the same ones.
    pub(crate) fn sizes(&self) -> PassSizes {
        let ranges = self.ranges.iter();
        PassSizes {
            rotations: self.rotations.iter().map(Rotation::dims).collect(),
            ranges: ranges
                .map(|(window, ranges)| (*window, ranges.tensor().dims(), ranges.keys()))
                .collect(),
        }
    }

    /// Writes another pass of the same sizes into the buffers of this one, where nobody else holds them.
    ///
    /// # Panics
    /// If the sizes differ.
    pub(crate) fn write(&mut self, other: Self) {
        for (held, rotation) in self.rotations.iter_mut().zip(other.rotations) {
            held.write(rotation);
        }
        for ((_, held), (_, ranges)) in self.ranges.iter_mut().zip(other.ranges) {
            held.write(ranges).expect("the same sizes");
        }
    }

    /// `[batch]`: where the cache gets the keys and values of each row, if that is not at its end.
    pub(super) fn position(&self) -> Option<&Tensor<1, Int>> {
        self.position.as_ref()
    }

    /// The rotation by one of the model's rotary embeddings.
    pub(super) fn rotation(&self, rope: usize) -> &Rotation {
        &self.rotations[rope]
    }

    /// Those of each window.
    pub(crate) fn ranges_of_windows(&self) -> impl Iterator<Item = &KeyRanges> {
        self.ranges.iter().map(|(_, ranges)| ranges)
    }

    /// The keys that each query of a layer with this window sees.
    pub(super) fn ranges(&self, window: Option<usize>) -> &KeyRanges {
        let mut ranges = self.ranges.iter();
        let found = ranges.find(|(known, _)| *known == window);
        &found.expect("the pass is of this model").1
    }
}

/// The first token of each row, `[batch]`, if any row is padded.
fn row_starts(padding: &[usize], device: &Device) -> Option<Tensor<1, Int>> {
    padding.iter().any(|&pad| pad > 0).then(|| {
        let starts: Vec<i32> = padding.iter().map(|&pad| pad as i32).collect();
        Tensor::from_data(TensorData::new(starts, [padding.len()]), device)
    })
}

/// What queries see under each of the windows.
fn ranges_of(
    windows: impl IntoIterator<Item = Option<usize>>,
    mask: &AttentionMask,
    queries: usize,
    keys: usize,
    device: &Device,
) -> Vec<(Option<usize>, KeyRanges)> {
    let mut ranges: Vec<(Option<usize>, KeyRanges)> = Vec::new();
    for window in windows {
        if ranges.iter().any(|(known, _)| *known == window) {
            continue;
        }
        let mask = mask.clone().with_window(window);
        let of_window = KeyRanges::new(&mask, queries, keys, device);
        ranges.push((window, of_window.expect("windows and ends are in order")));
    }
    ranges
}
