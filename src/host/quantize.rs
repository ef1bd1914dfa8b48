//! Quantizing to a packed weight.
//!
//! A code is a count of thresholds below the normalised weight; the vector code searches for it
//! instead, which ends at the same comparison.

use rayon::prelude::*;

use super::{Simd, TASK_ALIGN_ELEMS};
use crate::error::Nf4Error;
use crate::format::{
    BlockSize, BlockTensor, DYNAMIC_MAP, FP4_CODE_BY_LEVEL, FP4_THRESHOLDS, FloatElement,
    NF4_THRESHOLDS, PackedLayout, QuantConfig, QuantType, SumF32x2, check_finite, check_len,
    normalizer,
};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

/// Quantizing this many elements takes two or three times as long as handing work to another
/// thread (10 to 20 us); fewer are not divided.
const TASK_ELEMS: usize = 1 << 17;

/// The same for the scales of double quantization, of which each takes longer, and for their sum.
const TASK_SCALES: usize = 1 << 13;
const TASK_SUMMANDS: usize = 1 << 15;

/// Quantizes a row-major weight to its device image.
///
/// The result is [`BlockTensor::quantize`](crate::format::BlockTensor::quantize) and
/// [`to_packed`](crate::format::BlockTensor::to_packed) to the bit.
///
/// # Shapes
/// - `weight`: as many elements as the product of `shape`
/// - result: [`PackedLayout::words`] of `PackedLayout::new(weight.len(), config)`
///
/// # Errors
/// [`Nf4Error::ElementCount`] for an impossible shape, [`Nf4Error::Length`] if `weight` does not
/// fill it, [`Nf4Error::NonFinite`] at the first NaN or infinite weight.
pub fn quantize<T: FloatElement>(
    weight: &[T],
    shape: &[usize],
    config: QuantConfig,
) -> Result<Vec<u32>, Nf4Error> {
    quantize_with(Simd::detect(), weight, shape, config)
}

/// [`quantize`] with given vector instructions.
///
/// # Errors
/// As [`quantize`].
///
/// # Panics
/// If the processor does not have `simd`.
#[doc(hidden)]
pub fn quantize_with<T: FloatElement>(
    simd: Simd,
    weight: &[T],
    shape: &[usize],
    config: QuantConfig,
) -> Result<Vec<u32>, Nf4Error> {
    simd.assert_available();
    let layout = PackedLayout::for_shape(shape, config)?;
    let elems = layout.elems();
    check_len("weight", elems, weight.len())?;
    if !config.quant_type.is_bitsandbytes() {
        return Ok(BlockTensor::quantize(weight, shape, config)?.to_packed());
    }

    let mut words = vec![0u32; layout.words()];
    let (codes, rest) = words.split_at_mut(layout.scales_start());
    let (scale_words, rest) = rest.split_at_mut(layout.codebook_start() - layout.scales_start());
    let codes = &mut codes[..elems.div_ceil(8)];
    let task = Task {
        quant_type: config.quant_type,
        block_size: config.block_size,
        simd,
    };
    let tables = layout.tables();
    rest[..tables.len()].copy_from_slice(&tables);
    let after_codebook = layout.codebook_start();
    rest[layout.header_start() - after_codebook..]
        .copy_from_slice(&layout.header(shape, T::FLOAT_TYPE));

    let finite = match config.nested_block_size {
        None => {
            let scales = bytemuck::cast_slice_mut(&mut scale_words[..layout.blocks()]);
            task.divide(weight, codes, scales)
        }
        Some(block_size) => {
            let mut scales = vec![0f32; layout.blocks()];
            let finite = task.divide(weight, codes, &mut scales);
            let absmax = &mut rest[layout.nested_scales_start() - after_codebook..];
            let absmax = &mut absmax[..block_size.blocks(layout.blocks())];
            let offset = nested(&scales, block_size, scale_words, absmax);
            rest[layout.nested_offset_start() - after_codebook] = offset.to_bits();
            finite
        }
    };
    if !finite {
        check_finite("weight", weight.iter().map(|w| w.to_f32()))?;
    }
    Ok(words)
}

/// How to quantize any part of one weight.
struct Task {
    quant_type: QuantType,
    block_size: BlockSize,
    /// Checked to be available.
    simd: Simd,
}

impl Task {
    /// Halves the weight until it is small, between rayon's threads. Returns whether all weights
    /// are finite; if not, codes and scales are arbitrary.
    fn divide<T: FloatElement>(&self, weight: &[T], codes: &mut [u32], scales: &mut [f32]) -> bool {
        if weight.len() <= TASK_ELEMS {
            return self.encode(weight, codes, scales);
        }
        let middle = (weight.len() / 2).next_multiple_of(TASK_ALIGN_ELEMS);
        let weight = weight.split_at(middle);
        let codes = codes.split_at_mut(middle / 8);
        let scales = scales.split_at_mut(middle / self.block_size.elems());
        let (left, right) = rayon::join(
            || self.divide(weight.0, codes.0, scales.0),
            || self.divide(weight.1, codes.1, scales.1),
        );
        left && right
    }

    /// Quantizes whole blocks, the last one possibly partial, on this thread.
    fn encode<T: FloatElement>(&self, weight: &[T], codes: &mut [u32], scales: &mut [f32]) -> bool {
        let whole = weight.len() / self.block_size.elems();
        let whole_elems = whole * self.block_size.elems();
        let (weight, last_weight) = weight.split_at(whole_elems);
        let (codes, last_codes) = codes.split_at_mut(whole_elems / 8);
        let (scales, last_scale) = scales.split_at_mut(whole);
        let mut finite = match self.simd {
            Simd::Portable => portable::encode(self, weight, codes, scales),
            // SAFETY: `quantize_with` checked that the processor has the features.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => unsafe { avx2::encode(self, weight, codes, scales) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 | Simd::Avx512Bf16 => unsafe {
                avx512::encode(self, weight, codes, scales)
            },
            #[cfg(not(target_arch = "x86_64"))]
            Simd::Avx2 | Simd::Avx512 | Simd::Avx512Bf16 => {
                unreachable!("checked by quantize_with")
            }
        };
        if !last_weight.is_empty() {
            finite &= portable::encode(self, last_weight, last_codes, last_scale);
        }
        finite
    }
}

/// The magnitude of a block as its largest magnitude's bits, and whether that is finite.
fn finite_bits(magnitude: u32) -> bool {
    magnitude < f32::INFINITY.to_bits()
}

/// The scale and the factor of a block with this largest magnitude.
#[inline(always)]
fn scale_and_inverse(magnitude: u32) -> (f32, f32) {
    normalizer(std::iter::once(f32::from_bits(magnitude)))
}

/// The word with the code of zero in each of its eight places.
fn zero_word(quant_type: QuantType) -> u32 {
    u32::from(quant_type.zero_code()) * 0x1111_1111
}

/// Quantizes the scales themselves and returns the offset taken off them.
///
/// As [`NestedAbsmax::quantize`](crate::format::NestedAbsmax::quantize), in parallel.
fn nested(scales: &[f32], block_size: BlockSize, codes: &mut [u32], absmax: &mut [u32]) -> f32 {
    let offset = mean(scales);
    // Four codes a word; a nested block holds a multiple of four.
    scales
        .par_chunks(block_size.elems())
        .zip(codes.par_chunks_mut(block_size.elems() / 4))
        .zip(absmax)
        .with_min_len(TASK_SCALES / block_size.elems())
        .for_each(|((block, words), absmax)| {
            let (scale, inverse) = normalizer(block.iter().map(|scale| scale - offset));
            *absmax = scale.to_bits();
            if inverse.is_infinite() {
                return; // all scales equal the offset; any code decodes to it, 0 is stored
            }
            for (four, word) in block.chunks(4).zip(words) {
                let codes = four.iter().rev().fold(0, |codes, scale| {
                    codes << 8 | u32::from(nested_code((scale - offset) * inverse))
                });
                *word = codes;
            }
        });
    offset
}

/// [`SumF32x2::mean`], in parallel.
fn mean(values: &[f32]) -> f32 {
    let partial: Vec<SumF32x2> = values
        .par_chunks(SumF32x2::CHUNK)
        .with_min_len(TASK_SUMMANDS / SumF32x2::CHUNK)
        .map(|chunk| SumF32x2::of(chunk.iter().map(|&high| SumF32x2 { high, low: 0.0 })))
        .collect();
    SumF32x2::of(partial.into_iter()).mean_of(values)
}

/// The value half-way between each entry of the dynamic map and the next.
const NESTED_THRESHOLDS: [f32; 255] = {
    let mut thresholds = [0.0; 255];
    let mut i = 0;
    while i < 255 {
        thresholds[i] = (DYNAMIC_MAP[i] + DYNAMIC_MAP[i + 1]) * 0.5;
        i += 1;
    }
    thresholds
};

/// [`nested_code`](crate::format::nested_code), by bisection.
#[inline]
fn nested_code(normalized: f32) -> u8 {
    let mut code = 0;
    let mut step = 128;
    while step > 0 {
        // `code + step` thresholds lie below if the last of them does. No branch: it would be
        // mispredicted half the time.
        code += step * usize::from(normalized > NESTED_THRESHOLDS[code + step - 1]);
        step /= 2;
    }
    code as u8
}
