//! Counting thresholds in plain Rust, eight weights at a time so that the compiler can vectorise.

use super::{
    FP4_CODE_BY_LEVEL, FP4_THRESHOLDS, NF4_THRESHOLDS, Task, finite_bits, scale_and_inverse,
    zero_word,
};
use crate::format::{BlockSize, FloatElement, QuantType};

/// The largest block size.
const MAX_BLOCK_ELEMS: usize = BlockSize::ALL[BlockSize::ALL.len() - 1].elems();

/// Quantizes blocks, the last one possibly partial. Returns whether all weights are finite.
pub(super) fn encode<T: FloatElement>(
    task: &Task,
    weight: &[T],
    codes: &mut [u32],
    scales: &mut [f32],
) -> bool {
    let block_elems = task.block_size.elems();
    let mut buffer = [0.0f32; MAX_BLOCK_ELEMS];
    let mut finite = true;
    for ((block, words), scale) in weight
        .chunks(block_elems)
        .zip(codes.chunks_mut(block_elems / 8))
        .zip(scales)
    {
        let values = &mut buffer[..block.len().next_multiple_of(8)];
        values.fill(0.0);
        for (value, weight) in values.iter_mut().zip(block) {
            *value = weight.to_f32();
        }
        // Magnitudes of floats are ordered as their bits are, NaN after infinity.
        let magnitude = values
            .iter()
            .fold(0, |max: u32, value| max.max(value.to_bits() & 0x7fff_ffff));
        finite &= finite_bits(magnitude);
        let (absmax, inverse) = scale_and_inverse(magnitude);
        *scale = absmax;
        if absmax == 0.0 {
            words.fill(zero_word(task.quant_type));
        } else {
            for (eight, word) in values.as_chunks::<8>().0.iter().zip(&mut *words) {
                *word = code_word(task.quant_type, eight.map(|value| value * inverse));
            }
        }
        clear_after(block.len(), words);
    }
    finite
}

/// Clears what follows the last byte; a padding nibble in it holds the code of zero.
fn clear_after(elems: usize, words: &mut [u32]) {
    let bytes = elems.div_ceil(2) % 4;
    if bytes > 0 {
        words[elems / 8] &= (1 << (8 * bytes)) - 1;
    }
}

/// The codes of eight normalised weights.
#[inline(always)]
fn code_word(quant_type: QuantType, normalized: [f32; 8]) -> u32 {
    let codes = match quant_type {
        QuantType::Nf4 => levels(&NF4_THRESHOLDS, normalized),
        QuantType::Fp4 => {
            let mut codes = levels(&FP4_THRESHOLDS, normalized.map(f32::abs));
            for (code, value) in codes.iter_mut().zip(normalized) {
                let sign = if value < 0.0 { 8 } else { 0 };
                *code = u32::from(FP4_CODE_BY_LEVEL[(*code & 7) as usize]) + sign;
            }
            codes
        }
        _ => unreachable!("other types are not quantized here"),
    };
    let shifts = [4, 0, 12, 8, 20, 16, 28, 24];
    codes
        .iter()
        .zip(shifts)
        .fold(0, |word, (code, shift)| word | code << shift)
}

/// How many thresholds each value exceeds.
#[inline(always)]
fn levels(thresholds: &[f32], values: [f32; 8]) -> [u32; 8] {
    let mut levels = [0; 8];
    for &threshold in thresholds {
        for (level, value) in levels.iter_mut().zip(values) {
            *level += u32::from(value > threshold);
        }
    }
    levels
}
