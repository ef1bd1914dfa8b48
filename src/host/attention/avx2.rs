//! Attention with AVX2 and FMA.

use std::arch::x86_64::*;
use std::ops::Range;

use super::backward::{self, KeyGrads};
use super::forward::{self, State};
use super::vector::Vector;
use super::{Backward, Block, Kernels, KeyBlock, Problem};
use crate::format::FloatElement;

/// The kernels, for a processor that has AVX2, F16C and FMA.
pub(super) fn kernels<T: FloatElement>() -> Kernels<T> {
    Kernels {
        forward,
        query_grads,
        key_grads,
    }
}

/// 8 lanes of AVX2.
#[derive(Clone, Copy)]
pub(in crate::host) struct Avx2(__m256);

impl Vector for Avx2 {
    const LANES: usize = 8;
    const ROWS: usize = 4;
    type Ints = __m256i;

    #[inline(always)]
    unsafe fn splat(number: f32) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm256_set1_ps(number)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm256_loadu_ps(from)) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm256_cvtph_ps(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)))
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn splat_int(number: i32) -> Self::Ints {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { _mm256_set1_epi32(number) }
    }

    #[inline(always)]
    unsafe fn load_ints(from: *const i32) -> Self::Ints {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm256_add_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm256_sub_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm256_mul_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm256_div_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, other: Self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm256_fmadd_ps(self.0, factor.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm256_max_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe { Self(_mm256_min_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe {
            let lanes: [f32; 8] = std::mem::transmute(self.0);
            let [a, b] = [
                [lanes[0], lanes[1], lanes[2], lanes[3]],
                [lanes[4], lanes[5], lanes[6], lanes[7]],
            ];
            (a[0] + b[0]) + (a[1] + b[1]) + ((a[2] + b[2]) + (a[3] + b[3]))
        }
    }

    #[inline(always)]
    unsafe fn mask(self, first: Self::Ints, end: Self::Ints, at: Self::Ints) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe {
            let before = _mm256_cmpgt_epi32(first, at);
            let inside = _mm256_andnot_si256(before, _mm256_cmpgt_epi32(end, at));
            let hidden = _mm256_set1_ps(f32::NEG_INFINITY);
            Self(_mm256_blendv_ps(
                hidden,
                self.0,
                _mm256_castsi256_ps(inside),
            ))
        }
    }

    #[inline(always)]
    unsafe fn scale(self, n: Self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.0), _mm256_set1_epi32(127));
            let normal = _mm256_cmpgt_epi32(exponent, _mm256_setzero_si256());
            let bits = _mm256_and_si256(_mm256_slli_epi32::<23>(exponent), normal);
            Self(_mm256_mul_ps(self.0, _mm256_castsi256_ps(bits)))
        }
    }

    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: the caller vouches for the features and pointers.
        unsafe {
            Self(_mm256_round_ps::<
                { _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC },
            >(self.0))
        }
    }
}

/// As in [`Kernels`].
///
/// # Safety
/// The processor must have AVX2, F16C and FMA.
#[target_feature(enable = "avx2,f16c,fma")]
unsafe fn forward<T: FloatElement>(
    problem: &Problem<T>,
    block: Block,
    keys: Range<usize>,
) -> State {
    // SAFETY: this function has the features.
    unsafe { forward::block::<T, Avx2>(problem, block, keys) }
}

/// As in [`Kernels`].
///
/// # Safety
/// The processor must have AVX2, F16C and FMA.
#[target_feature(enable = "avx2,f16c,fma")]
unsafe fn query_grads<T: FloatElement>(
    problem: &Backward<T>,
    block: Block,
    keys: Range<usize>,
) -> Vec<f32> {
    // SAFETY: this function has the features.
    unsafe { backward::query_grads::<T, Avx2>(problem, block, keys) }
}

/// As in [`Kernels`].
///
/// # Safety
/// The processor must have AVX2, F16C and FMA.
#[target_feature(enable = "avx2,f16c,fma")]
unsafe fn key_grads<T: FloatElement>(problem: &Backward<T>, block: KeyBlock) -> KeyGrads {
    // SAFETY: this function has the features.
    unsafe { backward::key_grads::<T, Avx2>(problem, block) }
}
