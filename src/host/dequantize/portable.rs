//! Look-ups in plain Rust, for every processor.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{GROUP, Vector};
use crate::format::{FloatElement, FloatType};

/// Where each of a word's eight weights is: the high nibble of a byte comes first.
const SHIFTS: [u32; 8] = [4, 0, 12, 8, 20, 16, 28, 24];

pub(super) struct Portable;

impl Vector for Portable {
    type Table<T: FloatElement> = [T; 16];

    #[inline(always)]
    unsafe fn table<T: FloatElement, R: FloatElement>(codebook: &[f32; 16], scale: f32) -> [T; 16] {
        table::<T, R>(codebook, scale)
    }

    #[inline(always)]
    unsafe fn look_up<T: FloatElement>(table: [T; 16], codes: &[u32; 4], out: &mut [T; GROUP]) {
        for (word, out) in codes.iter().zip(out.as_chunks_mut::<8>().0) {
            *out = SHIFTS.map(|shift| table[(word >> shift & 15) as usize]);
        }
    }
}

/// The decoded value of each code in a block, rounded to `R`; the scale may be any.
#[inline(always)]
pub(super) fn table<T: FloatElement, R: FloatElement>(codebook: &[f32; 16], scale: f32) -> [T; 16] {
    let rounded = rounded_table::<R>(codebook, scale);
    match bytemuck::try_cast(rounded) {
        Ok(same) if T::FLOAT_TYPE == R::FLOAT_TYPE => same,
        _ => rounded.map(|value| T::from_f32(value.to_f32())),
    }
}

#[inline(always)]
fn rounded_table<T: FloatElement>(codebook: &[f32; 16], scale: f32) -> [T; 16] {
    let products = codebook.map(|value| value * scale);
    let mut table = [T::zeroed(); 16];
    round(&products, &mut table);
    table
}

/// Rounds values to `T`; they may be any.
#[inline(always)]
pub(in crate::host) fn round<T: FloatElement>(values: &[f32], out: &mut [T]) {
    assert_eq!(values.len(), out.len());
    match T::FLOAT_TYPE {
        FloatType::BF16 => {
            let out: &mut [u16] = bytemuck::cast_slice_mut(out);
            for (bits, &value) in out.iter_mut().zip(values) {
                *bits = to_bf16(value);
            }
        }
        // By the slice, for which `half` uses vector instructions where there are any.
        FloatType::F16 => {
            bytemuck::cast_slice_mut::<T, f16>(out).convert_from_f32_slice(values);
        }
        FloatType::F32 => bytemuck::cast_slice_mut(out).copy_from_slice(values),
    }
}

/// `bf16::from_f32` without its branches, of which one is mispredicted half the time.
fn to_bf16(value: f32) -> u16 {
    // To nearest, ties to even: add just less than a half, and the rest if the result would be
    // odd. A NaN is cut off, and kept one by its quiet bit.
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let nan = bits | 0x40_0000;
    ((if value.is_nan() { nan } else { rounded }) >> 16) as u16
}

/// Decodes weights `first..first + out.len()` of a word, and no more than it holds.
#[inline(always)]
pub(super) fn look_up<T: Copy>(table: &[T; 16], word: u32, first: usize, out: &mut [T]) {
    for (value, shift) in out.iter_mut().zip(&SHIFTS[first..]) {
        *value = table[(word >> shift & 15) as usize];
    }
}
