//! Numbers of 64 bits, which WGSL has not, and the random ones.

use cubecl::prelude::*;

/// A number of 64 bits.
#[derive(CubeType, Clone, Copy)]
pub struct Wide {
    pub low: u32,
    pub high: u32,
}

#[cube]
impl Wide {
    pub fn zero() -> Wide {
        Wide {
            low: 0u32,
            high: 0u32,
        }
    }

    pub fn add(&mut self, low: u32, high: u32) {
        self.low += low;
        self.high += high + select(self.low < low, 1u32, 0u32);
    }

    /// Whether this and so much more is as much as another.
    pub fn reaches(&self, low: u32, high: u32, other: &Wide) -> bool {
        let sum_low = self.low + low;
        let sum_high = self.high + high + select(sum_low < low, 1u32, 0u32);
        sum_high > other.high || (sum_high == other.high && sum_low >= other.low)
    }
}

/// The random number of a draw: the first two words that Philox4x32-10 (Salmon et al., "Parallel random
/// numbers: as easy as 1, 2, 3", SC 2011) gives for the number of the draw under the seed.
#[cube]
pub fn philox(state: &mut [u32], start: usize) -> Wide {
    let mut left = state[start];
    let mut right = state[start + 1];
    let mut a = state[start + 2];
    let mut b = 0u32;
    let mut c = 0u32;
    let mut d = 0u32;
    for _ in 0..10u32 {
        let first_high = a.mul_hi(0xd251_1f53u32);
        let first_low = a * 0xd251_1f53u32;
        let second_high = c.mul_hi(0xcd9e_8d57u32);
        let second_low = c * 0xcd9e_8d57u32;
        a = second_high ^ b ^ left;
        b = second_low;
        c = first_high ^ d ^ right;
        d = first_low;
        left += 0x9e37_79b9u32;
        right += 0xbb67_ae85u32;
    }
    Wide { low: a, high: b }
}
