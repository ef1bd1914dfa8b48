//! Codes with AVX2: bisection of the thresholds, those of the next comparison taken out of a
//! register by the code so far.

use std::arch::x86_64::*;

use super::{
    FP4_CODE_BY_LEVEL, FP4_THRESHOLDS, NF4_THRESHOLDS, Task, finite_bits, scale_and_inverse,
    zero_word,
};
use crate::format::{FloatElement, FloatType, QuantType};

/// The thresholds of one comparison by the level so far, repeated to fill a register: with `n`
/// comparisons after it, every `2^(n + 1)`th threshold, beginning at `2^n - 1`.
const fn step(thresholds: &[f32], after: u32) -> [f32; 8] {
    let mut table = [0.0; 8];
    let entries = (thresholds.len() + 1) >> (after + 1);
    let mut i = 0;
    while i < 8 {
        table[i] = thresholds[(i % entries) << (after + 1) | ((1 << after) - 1)];
        i += 1;
    }
    table
}

/// Quantizes whole blocks. Returns whether all weights are finite.
///
/// # Safety
/// The processor must have AVX2, F16C and FMA.
#[target_feature(enable = "avx2,f16c,fma")]
pub(super) fn encode<T: FloatElement>(
    task: &Task,
    weight: &[T],
    codes: &mut [u32],
    scales: &mut [f32],
) -> bool {
    match task.quant_type {
        QuantType::Nf4 => encode_type::<T, false>(task, weight, codes, scales),
        QuantType::Fp4 => encode_type::<T, true>(task, weight, codes, scales),
        _ => unreachable!("other types are not quantized here"),
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn encode_type<T: FloatElement, const IS_FP4: bool>(
    task: &Task,
    weight: &[T],
    codes: &mut [u32],
    scales: &mut [f32],
) -> bool {
    let block_elems = task.block_size.elems();
    let mut finite = true;
    for ((block, words), scale) in weight
        .chunks_exact(block_elems)
        .zip(codes.chunks_exact_mut(block_elems / 8))
        .zip(scales)
    {
        let magnitude = magnitude(block);
        finite &= finite_bits(magnitude);
        let (absmax, inverse) = scale_and_inverse(magnitude);
        *scale = absmax;
        if absmax == 0.0 {
            words.fill(zero_word(task.quant_type));
            continue;
        }
        let inverse = _mm256_set1_ps(inverse);
        let groups = block.as_chunks::<32>().0;
        for (group, word) in groups.iter().zip(words.as_chunks_mut::<4>().0) {
            let [a, b, c, d] = [0, 8, 16, 24].map(|i| {
                let part = group[i..].first_chunk().expect("8 of 32");
                levels::<IS_FP4>(_mm256_mul_ps(load(part), inverse))
            });
            // Packing works within 128-bit lanes: a b c d, low halves, then high halves.
            let bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
            let order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
            let mut codes = _mm256_permutevar8x32_epi32(bytes, order);
            if IS_FP4 {
                codes = _mm256_shuffle_epi8(fp4_codes(), codes);
            }
            // 16 times the even byte plus the odd one.
            let pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
            let packed = _mm_packus_epi16(
                _mm256_castsi256_si128(pairs),
                _mm256_extracti128_si256::<1>(pairs),
            );
            // SAFETY: four words are 16 bytes, the size of the store.
            unsafe { _mm_storeu_si128(word.as_mut_ptr().cast(), packed) };
        }
    }
    finite
}

/// The code of each level, and of each level with a sign.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn fp4_codes() -> __m256i {
    let codes = i64::from_le_bytes(FP4_CODE_BY_LEVEL);
    _mm256_broadcastsi128_si256(_mm_set_epi64x(codes | 0x0808_0808_0808_0808, codes))
}

/// The level of each value: thresholds below it, or with FP4 thresholds below its magnitude and 8
/// for a sign.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn levels<const IS_FP4: bool>(values: __m256) -> __m256i {
    const NF4_STEPS: [[f32; 8]; 4] = [
        step(&NF4_THRESHOLDS, 3),
        step(&NF4_THRESHOLDS, 2),
        step(&NF4_THRESHOLDS, 1),
        step(&NF4_THRESHOLDS, 0),
    ];
    const FP4_STEPS: [[f32; 8]; 3] = [
        step(&FP4_THRESHOLDS, 2),
        step(&FP4_THRESHOLDS, 1),
        step(&FP4_THRESHOLDS, 0),
    ];
    let (keys, steps): (_, &[[f32; 8]]) = if IS_FP4 {
        (_mm256_andnot_ps(_mm256_set1_ps(-0.0), values), &FP4_STEPS)
    } else {
        (values, &NF4_STEPS)
    };
    let mut levels = _mm256_setzero_si256();
    for step in steps {
        // SAFETY: 8 floats are 32 bytes, the size of the load.
        let step = unsafe { _mm256_loadu_ps(step.as_ptr()) };
        let thresholds = _mm256_permutevar8x32_ps(step, levels);
        let above = _mm256_cmp_ps::<_CMP_GT_OQ>(keys, thresholds);
        // Twice the level, plus one if above: a true comparison is -1.
        levels = _mm256_sub_epi32(_mm256_add_epi32(levels, levels), _mm256_castps_si256(above));
    }
    if IS_FP4 {
        let negative = _mm256_cmp_ps::<_CMP_LT_OQ>(values, _mm256_setzero_ps());
        let sign = _mm256_and_ps(negative, _mm256_castsi256_ps(_mm256_set1_epi32(8)));
        levels = _mm256_or_si256(levels, _mm256_castps_si256(sign));
    }
    levels
}

/// Widens 8 elements.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn load<T: FloatElement>(from: &[T; 8]) -> __m256 {
    // SAFETY: the loads read 8 elements of the size that `FLOAT_TYPE` tells.
    unsafe {
        match T::FLOAT_TYPE {
            FloatType::F32 => _mm256_loadu_ps(from.as_ptr().cast()),
            FloatType::F16 => _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast())),
            FloatType::BF16 => {
                let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves))
            }
        }
    }
}

/// The largest magnitude's bits; floats are ordered as their bits are, NaN after infinity.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn magnitude<T: FloatElement>(block: &[T]) -> u32 {
    let mut max = _mm256_setzero_si256();
    for part in block.as_chunks().0 {
        let magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0), load(part));
        max = _mm256_max_epu32(max, _mm256_castps_si256(magnitude));
    }
    let max = _mm_max_epu32(
        _mm256_castsi256_si128(max),
        _mm256_extracti128_si256::<1>(max),
    );
    let max = _mm_max_epu32(max, _mm_shuffle_epi32::<0b01_00_11_10>(max));
    let max = _mm_max_epu32(max, _mm_shuffle_epi32::<0b00_00_00_01>(max));
    _mm_cvtsi128_si32(max).cast_unsigned()
}
