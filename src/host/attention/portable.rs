//! Attention in plain Rust, for every processor.

use std::ops::Range;

use half::f16;

use super::backward::{self, KeyGrads};
use super::forward::{self, State};
use super::vector::Vector;
use super::{Backward, Block, Kernels, KeyBlock, Problem};
use crate::format::FloatElement;

const LANES: usize = 4;

/// The kernels.
pub(super) fn kernels<T: FloatElement>() -> Kernels<T> {
    Kernels {
        forward,
        query_grads,
        key_grads,
    }
}

/// As many lanes as most processors have vectors of.
#[derive(Clone, Copy)]
pub(in crate::host) struct Portable([f32; LANES]);

impl Vector for Portable {
    const LANES: usize = LANES;
    const ROWS: usize = 4;
    type Ints = [i32; LANES];

    #[inline(always)]
    unsafe fn splat(number: f32) -> Self {
        Self([number; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for the pointer.
        unsafe { Self(from.cast::<[f32; LANES]>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the caller vouches for the pointer.
        unsafe {
            let bits = from.cast::<[u16; LANES]>().read_unaligned();
            Self(bits.map(|bits| f16::from_bits(bits).to_f32()))
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller vouches for the pointer.
        unsafe {
            let bits = from.cast::<[u16; LANES]>().read_unaligned();
            Self(bits.map(|bits| f32::from_bits(u32::from(bits) << 16)))
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for the pointer.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn splat_int(number: i32) -> Self::Ints {
        [number; LANES]
    }

    #[inline(always)]
    unsafe fn load_ints(from: *const i32) -> Self::Ints {
        // SAFETY: the caller vouches for the pointer.
        unsafe { from.cast::<[i32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] - other.0[i]))
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * other.0[i]))
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] / other.0[i]))
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, other: Self) -> Self {
        Self(std::array::from_fn(|i| {
            self.0[i] * factor.0[i] + other.0[i]
        }))
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| {
            if self.0[i] > other.0[i] {
                self.0[i]
            } else {
                other.0[i]
            }
        }))
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| {
            if self.0[i] < other.0[i] {
                self.0[i]
            } else {
                other.0[i]
            }
        }))
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        self.0.iter().sum()
    }

    #[inline(always)]
    unsafe fn mask(self, first: Self::Ints, end: Self::Ints, at: Self::Ints) -> Self {
        Self(std::array::from_fn(|i| {
            let inside = first[i] <= at[i] && at[i] < end[i];
            if inside { self.0[i] } else { f32::NEG_INFINITY }
        }))
    }

    #[inline(always)]
    unsafe fn scale(self, n: Self) -> Self {
        Self(std::array::from_fn(|i| {
            // A NaN becomes zero here, and stays one as it is multiplied.
            let exponent = n.0[i] as i32 + 127;
            let bits = if exponent > 0 { exponent << 23 } else { 0 };
            self.0[i] * f32::from_bits(bits as u32)
        }))
    }

    #[inline(always)]
    unsafe fn round(self) -> Self {
        // There are no fractions of numbers as large as this.
        const LARGE: f32 = 1.5 * (1 << 23) as f32;
        Self(self.0.map(|x| x + LARGE - LARGE))
    }
}

/// As in [`Kernels`].
fn forward<T: FloatElement>(problem: &Problem<T>, block: Block, keys: Range<usize>) -> State {
    // SAFETY: portable code needs no features.
    unsafe { forward::block::<T, Portable>(problem, block, keys) }
}

/// As in [`Kernels`].
fn query_grads<T: FloatElement>(
    problem: &Backward<T>,
    block: Block,
    keys: Range<usize>,
) -> Vec<f32> {
    // SAFETY: portable code needs no features.
    unsafe { backward::query_grads::<T, Portable>(problem, block, keys) }
}

/// As in [`Kernels`].
fn key_grads<T: FloatElement>(problem: &Backward<T>, block: KeyBlock) -> KeyGrads {
    // SAFETY: portable code needs no features.
    unsafe { backward::key_grads::<T, Portable>(problem, block) }
}
