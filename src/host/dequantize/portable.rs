//! Look-ups in plain Rust, for every processor.

use super::{GROUP, Vector};
use crate::format::FloatElement;

/// Where each of a word's eight weights is: the high nibble of a byte comes first.
const SHIFTS: [u32; 8] = [4, 0, 12, 8, 20, 16, 28, 24];

pub(super) struct Portable;

impl Vector for Portable {
    type Table<T: FloatElement> = [T; 16];

    #[inline(always)]
    unsafe fn table<T: FloatElement>(codebook: &[f32; 16], scale: f32) -> [T; 16] {
        table(codebook, scale)
    }

    #[inline(always)]
    unsafe fn look_up<T: FloatElement>(table: [T; 16], codes: &[u32; 4], out: &mut [T; GROUP]) {
        if size_of::<T>() != 2 {
            for (word, out) in codes.iter().zip(out.as_chunks_mut::<8>().0) {
                *out = SHIFTS.map(|shift| table[(word >> shift & 15) as usize]);
            }
            return;
        }
        // Four 16-bit values at a time: left to itself the compiler inserts them one by one into
        // vector registers, which takes twice as long.
        let table: &[u16] = bytemuck::cast_slice(&table);
        let out: &mut [[u16; 4]] = bytemuck::cast_slice_mut(out);
        let at = |nibbles: u32, shift: u32| u64::from(table[(nibbles >> shift & 15) as usize]);
        for (word, out) in codes.iter().zip(out.as_chunks_mut::<2>().0) {
            for (half, out) in [word & 0xffff, word >> 16].into_iter().zip(out) {
                let four = at(half, 4) | at(half, 0) << 16 | at(half, 12) << 32 | at(half, 8) << 48;
                *out = bytemuck::cast(four.to_le());
            }
        }
    }
}

/// The decoded value of each code in a block; the scale may be any.
#[inline(always)]
pub(super) fn table<T: FloatElement>(codebook: &[f32; 16], scale: f32) -> [T; 16] {
    codebook.map(|value| T::from_f32(value * scale))
}

/// Decodes weights `first..first + out.len()` of a word, and no more than it holds.
#[inline(always)]
pub(super) fn look_up<T: Copy>(table: &[T; 16], word: u32, first: usize, out: &mut [T]) {
    for (value, shift) in out.iter_mut().zip(&SHIFTS[first..]) {
        *value = table[(word >> shift & 15) as usize];
    }
}
