//! Many tensors in one buffer.

use std::ops::Range;

use crate::error::Nf4Error;

/// Elements of a tile. Every tensor of a flat buffer begins at a tile, so that a view of it begins at a multiple
/// of 512 bytes in 16 bit and in 32, and a tile has elements of one tensor only.
pub const TILE_ELEMS: usize = 256;

/// Tensors that are added to a flat buffer at once, at most: those of a layer with seven branches, and a few.
pub const MAX_PARTS: usize = 16;

/// Where each of many tensors lies in a flat buffer: one after the other, each at the next tile. What is between
/// them is zero.
///
/// ```
/// use burn_nf4::op::FlatLayout;
///
/// let layout = FlatLayout::new([300, 5])?;
/// assert_eq!(layout.range(1), 512..517);
/// assert_eq!(layout.elems(), 768);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlatLayout {
    lens: Vec<usize>,
    starts: Vec<usize>,
    elems: usize,
}

impl FlatLayout {
    /// The layout of tensors of so many elements.
    ///
    /// # Errors
    /// [`Nf4Error::ElementCount`] if there is no tensor, one without elements, or more than 2^31 tiles.
    pub fn new(lens: impl IntoIterator<Item = usize>) -> Result<Self, Nf4Error> {
        let lens: Vec<usize> = lens.into_iter().collect();
        let wrong = || Nf4Error::ElementCount {
            tensor: "flat buffer".into(),
            shape: lens.clone(),
        };
        let mut starts = Vec::with_capacity(lens.len());
        let mut elems = 0usize;
        for &len in &lens {
            starts.push(elems);
            let padded = len.checked_next_multiple_of(TILE_ELEMS);
            let padded = padded.filter(|&padded| padded > 0);
            elems = padded
                .and_then(|padded| elems.checked_add(padded))
                .filter(|&elems| elems / TILE_ELEMS <= 1 << 31)
                .ok_or_else(wrong)?;
        }
        if lens.is_empty() {
            return Err(wrong());
        }
        Ok(Self {
            lens,
            starts,
            elems,
        })
    }

    /// Number of tensors.
    pub fn tensors(&self) -> usize {
        self.lens.len()
    }

    /// Elements of the whole buffer.
    pub fn elems(&self) -> usize {
        self.elems
    }

    /// Tiles of the whole buffer.
    pub fn tiles(&self) -> usize {
        self.elems / TILE_ELEMS
    }

    /// Where a tensor lies, in elements.
    ///
    /// # Panics
    /// If there are not so many tensors.
    pub fn range(&self, tensor: usize) -> Range<usize> {
        let start = self.starts[tensor];
        start..start + self.lens[tensor]
    }

    /// The tiles of some tensors, three words each: the tile, its tensor, and how many of its elements are the
    /// tensor's.
    pub(crate) fn tiles_of(&self, tensors: &[usize]) -> Vec<u32> {
        let mut tiles = Vec::new();
        for &tensor in tensors {
            let range = self.range(tensor);
            for at in range.clone().step_by(TILE_ELEMS) {
                let valid = TILE_ELEMS.min(range.end - at);
                tiles.extend([at / TILE_ELEMS, tensor, valid].map(|word| word as u32));
            }
        }
        tiles
    }
}

/// What a step of AdamW multiplies by, in f32: the same for all tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct AdamWScalars {
    /// `1 - rate * weight_decay`.
    pub decay: f32,
    /// `beta1`.
    pub keep_first: f32,
    /// `1 - beta1`.
    pub first: f32,
    /// `beta2`.
    pub keep_second: f32,
    /// `1 - beta2`.
    pub second: f32,
    /// Added to the root.
    pub eps: f32,
    /// The largest norm of all gradients.
    pub max_norm: f32,
}

#[cfg(feature = "flex")]
impl AdamWScalars {
    /// The factor that brings gradients of a norm to the largest one, as PyTorch's `clip_grad_norm_` has it.
    pub fn clip(&self, norm: f32) -> f32 {
        (self.max_norm / (norm + CLIP_EPS)).min(1.0)
    }
}

/// Which library's order of operations a step has. They differ in roundings, and in weight decay: PyTorch's comes
/// before the update, that of bitsandbytes after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum AdamWForm {
    /// `torch.optim.AdamW`.
    Torch,
    /// `bitsandbytes.optim.AdamW8bit`.
    Bnb,
}

/// What `clip_grad_norm_` adds to the norm.
#[cfg(any(feature = "flex", feature = "cube"))]
pub(crate) const CLIP_EPS: f32 = 1e-6;
