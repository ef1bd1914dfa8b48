//! Attention with AVX-512.

use std::arch::x86_64::*;
use std::ops::Range;

use super::backward::{self, KeyGrads};
use super::forward::{self, State};
use super::vector::Vector;
use super::{Backward, Block, Kernels, KeyBlock, Problem};
use crate::format::FloatElement;

/// The kernels, for a processor that has AVX-512 F, BW and VL.
pub(super) fn kernels<T: FloatElement>() -> Kernels<T> {
    Kernels {
        forward,
        query_grads,
        key_grads,
    }
}

/// 16 lanes of AVX-512.
#[derive(Clone, Copy)]
pub(in crate::host) struct Avx512(__m512);

impl Vector for Avx512 {
    const LANES: usize = 16;
    const ROWS: usize = 8;
    type Ints = __m512i;

    #[inline(always)]
    unsafe fn splat(number: f32) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm512_set1_ps(number)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm512_loadu_ps(from)) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn splat_int(number: i32) -> Self::Ints {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { _mm512_set1_epi32(number) }
    }

    #[inline(always)]
    unsafe fn load_ints(from: *const i32) -> Self::Ints {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm512_add_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm512_sub_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm512_mul_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm512_div_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, other: Self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm512_fmadd_ps(self.0, factor.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm512_max_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm512_min_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { _mm512_reduce_add_ps(self.0) }
    }

    #[inline(always)]
    unsafe fn mask(self, first: Self::Ints, end: Self::Ints, at: Self::Ints) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe {
            let reached = _mm512_cmple_epi32_mask(first, at);
            let inside = _mm512_mask_cmplt_epi32_mask(reached, at, end);
            Self(_mm512_mask_blend_ps(
                inside,
                _mm512_set1_ps(f32::NEG_INFINITY),
                self.0,
            ))
        }
    }

    #[inline(always)]
    unsafe fn scale(self, n: Self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm512_scalef_ps(self.0, n.0)) }
    }

    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm512_roundscale_ps::<_MM_FROUND_TO_NEAREST_INT>(self.0)) }
    }
}

/// As in [`Kernels`].
///
/// # Safety
/// The processor must have AVX-512 F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn forward<T: FloatElement>(
    problem: &Problem<T>,
    block: Block,
    keys: Range<usize>,
) -> State {
    // SAFETY: this function has the features.
    unsafe { forward::block::<T, Avx512>(problem, block, keys) }
}

/// As in [`Kernels`].
///
/// # Safety
/// The processor must have AVX-512 F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn query_grads<T: FloatElement>(
    problem: &Backward<T>,
    block: Block,
    keys: Range<usize>,
) -> Vec<f32> {
    // SAFETY: this function has the features.
    unsafe { backward::query_grads::<T, Avx512>(problem, block, keys) }
}

/// As in [`Kernels`].
///
/// # Safety
/// The processor must have AVX-512 F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn key_grads<T: FloatElement>(problem: &Backward<T>, block: KeyBlock) -> KeyGrads {
    // SAFETY: this function has the features.
    unsafe { backward::key_grads::<T, Avx512>(problem, block) }
}
