//! The product in plain Rust, for every processor.

use super::{Dot, Product, tiles};
use crate::format::FloatElement;

/// Makes the product with some rows of the weight.
///
/// # Safety
/// None to keep; as its neighbours.
pub(super) unsafe fn rows<T: FloatElement>(
    product: &Product<T, f32>,
    first: usize,
    sums: &mut [f32],
) {
    // SAFETY: plain code needs no instructions.
    unsafe { tiles::<T, Portable>(product, first, sums) }
}

struct Portable;

impl Dot for Portable {
    type Element = f32;
    type Vector = [f32; 8];
    type Sums = [f32; 8];
    const LANES: usize = 8;
    const X_ROWS: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> [f32; 8] {
        [0.0; 8]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 8] {
        // SAFETY: the caller vouches for eight elements, and an array is aligned as its elements.
        unsafe { from.cast::<[f32; 8]>().read() }
    }

    #[inline(always)]
    unsafe fn add_product(sums: [f32; 8], w: [f32; 8], x: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| sums[i] + w[i] * x[i])
    }

    #[inline(always)]
    unsafe fn total(sums: [f32; 8]) -> f32 {
        sums.iter().sum()
    }
}
