//! Random numbers that are the same each time, and what to run them through. Shared by the tests of
//! the CPU implementation, each of which uses a part of it.
#![allow(dead_code)]

use burn_nf4::format::FloatElement;
use burn_nf4::host::Simd;

/// A reproducible stream of 64-bit numbers (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From -1 to 1.
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn units<T: FloatElement>(&mut self, len: usize) -> Vec<T> {
        (0..len).map(|_| T::from_f32(self.unit())).collect()
    }
}

/// The vector instructions that this processor has.
pub fn available() -> impl Iterator<Item = Simd> {
    Simd::ALL.into_iter().filter(|simd| simd.is_available())
}
