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
        let starts = padding.iter().any(|&pad| pad > 0).then(|| {
            let starts: Vec<i32> = padding.iter().map(|&pad| pad as i32).collect();
            Tensor::<1, Int>::from_data(TensorData::new(starts, [padding.len()]), device)
        });
        let mut ranges: Vec<(Option<usize>, KeyRanges)> = Vec::new();
        for window in windows {
            if ranges.iter().any(|(known, _)| *known == window) {
                continue;
            }
            let mask = AttentionMask {
                starts: starts.clone(),
                ..AttentionMask::causal().with_window(window)
            };
            let of_window = KeyRanges::new(&mask, length, start + length, device);
            ranges.push((window, of_window.expect("a window is not zero")));
        }
        Self { rotations, ranges }
    }

    /// The rotation by one of the model's rotary embeddings.
    pub(super) fn rotation(&self, rope: usize) -> &Rotation {
        &self.rotations[rope]
    }

    /// The keys that each query of a layer with this window sees.
    pub(super) fn ranges(&self, window: Option<usize>) -> &KeyRanges {
        let mut ranges = self.ranges.iter();
        let found = ranges.find(|(known, _)| *known == window);
        &found.expect("the pass is of this model").1
    }
}
