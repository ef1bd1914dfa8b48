//! The product with AVX2 and FMA.

use std::arch::x86_64::*;

use super::{Dot, Product, tiles};
use crate::format::FloatElement;

/// Makes the product with some rows of the weight.
///
/// # Safety
/// The processor must have AVX2, F16C and FMA.
#[target_feature(enable = "avx2,f16c,fma")]
pub(super) unsafe fn rows<T: FloatElement>(
    product: &Product<T, f32>,
    first: usize,
    sums: &mut [f32],
) {
    // SAFETY: this function has the features.
    unsafe { tiles::<T, Avx2>(product, first, sums) }
}

struct Avx2;

impl Dot for Avx2 {
    type Element = f32;
    type Vector = __m256;
    type Sums = __m256;
    const LANES: usize = 8;
    const X_ROWS: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        // SAFETY: the caller vouches for the features and for eight elements.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn add_product(sums: __m256, w: __m256, x: __m256) -> __m256 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm256_fmadd_ps(w, x, sums) }
    }

    #[inline(always)]
    unsafe fn total(sums: __m256) -> f32 {
        // SAFETY: the caller vouches for the features.
        let lanes: [f32; 8] = unsafe { std::mem::transmute(sums) };
        lanes.iter().sum()
    }
}
