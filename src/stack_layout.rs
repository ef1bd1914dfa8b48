//! Where the weights of experts lie in one tensor.

use crate::error::Nf4Error;
use crate::format::{PackedLayout, check_len, checked_elems};

/// Words at whose multiples images begin: what devices ask of the start of a view at most, 512 bytes.
const ALIGNMENT: usize = 128;

/// Where the weights `[n, k]` of experts lie in one tensor of u32 words.
///
/// Either the image of each follows that of the one before, with scales and tables of its own, or all are one
/// weight `[experts, n, k]`, whose scales run through. Images begin at multiples of 512 bytes, so that devices can
/// have views of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StackLayout {
    image: PackedLayout,
    experts: usize,
    n: usize,
    k: usize,
    is_whole: bool,
}

impl StackLayout {
    /// Of experts whose images of this layout follow each other.
    ///
    /// # Errors
    /// [`Nf4Error::Length`] if an image has not `n * k` elements, or rows of another length that matters to its
    /// scales, [`Nf4Error::ElementCount`] for no experts, or more elements than can be addressed.
    pub fn of_images(
        image: PackedLayout,
        experts: usize,
        [n, k]: [usize; 2],
    ) -> Result<Self, Nf4Error> {
        checked_elems("weight", &[experts, n, k])?;
        let layout = Self {
            image,
            experts,
            n,
            k,
            is_whole: false,
        };
        layout.check(n * k)?;
        Ok(layout)
    }

    /// Of experts that are one weight of this layout.
    ///
    /// # Errors
    /// [`Nf4Error::Length`] if it has not `experts * n * k` elements, or rows of another length that matters to
    /// its scales, [`Nf4Error::ElementCount`] if that is none, or more than can be addressed.
    pub fn of_whole(
        whole: PackedLayout,
        experts: usize,
        [n, k]: [usize; 2],
    ) -> Result<Self, Nf4Error> {
        let elems = checked_elems("weight", &[experts, n, k])?;
        let layout = Self {
            image: whole,
            experts,
            n,
            k,
            is_whole: true,
        };
        layout.check(elems)?;
        Ok(layout)
    }

    fn check(&self, elems: usize) -> Result<(), Nf4Error> {
        check_len("packed weight", elems, self.image.elems())?;
        self.image.check_columns(self.k)?;
        let others = self.image_stride().checked_mul(self.experts - 1);
        let words = others.and_then(|others| others.checked_add(self.image.words()));
        match words.and_then(|words| words.checked_mul(4)) {
            Some(bytes) if bytes <= isize::MAX as usize => Ok(()),
            _ => Err(Nf4Error::ElementCount {
                tensor: "packed weight".into(),
                shape: vec![self.experts, self.n, self.k],
            }),
        }
    }

    /// Layout of the image of one expert, or of the one image of all.
    pub const fn image(&self) -> &PackedLayout {
        &self.image
    }

    /// Number of experts.
    pub const fn experts(&self) -> usize {
        self.experts
    }

    /// `[out_features, in_features]` of each.
    pub const fn matrix_dims(&self) -> [usize; 2] {
        [self.n, self.k]
    }

    /// Whether all experts are one weight.
    pub const fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Words in all. Nothing follows the last image.
    pub const fn words(&self) -> usize {
        self.image_stride() * (self.experts - 1) + self.image.words()
    }

    /// Words from the image of an expert to that of the next: none where there is one image.
    pub const fn image_stride(&self) -> usize {
        match self.is_whole {
            true => 0,
            false => self.image.words().next_multiple_of(ALIGNMENT),
        }
    }

    /// Elements from the first of an expert to that of the next within an image.
    pub const fn elem_stride(&self) -> usize {
        match self.is_whole {
            true => self.n * self.k,
            false => 0,
        }
    }
}
