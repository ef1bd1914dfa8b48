//! Codes with AVX-512: each weight falls into one of 32 equal buckets, none of which holds more
//! than one threshold, so that one comparison is left to do.

use std::arch::x86_64::*;

use super::{
    FP4_CODE_BY_LEVEL, FP4_THRESHOLDS, NF4_THRESHOLDS, Task, finite_bits, scale_and_inverse,
    zero_word,
};
use crate::format::{FloatElement, FloatType, QuantType};

/// Buckets of width 1/15 between -16/15 and 16/15. Thresholds are at least 0.08 apart, and
/// normalised weights at most an ulp beyond -1 and 1.
const BUCKETS: usize = 32;
const BUCKETS_PER_UNIT: f32 = 15.0;

/// Adding this rounds to a whole number, which is then in the low bits: 16 for a weight of 0.
const ROUNDER: f32 = 12_582_912.0 + 16.0;

/// The bucket of a value. Monotone, which is all that matters.
const fn bucket(value: f32) -> usize {
    // The product is exact in f64, so this is the fused multiply-add of the vector code: one
    // rounding, to f32.
    let exact = value as f64 * BUCKETS_PER_UNIT as f64 + ROUNDER as f64;
    (exact as f32).to_bits() as usize % BUCKETS
}

/// The threshold in each bucket, infinity if there is none, and the number of thresholds in the
/// buckets before.
const fn tables(thresholds: &[f32]) -> ([f32; BUCKETS], [u32; BUCKETS]) {
    let mut in_bucket = [f32::INFINITY; BUCKETS];
    let mut before = [0; BUCKETS];
    let mut i = 0;
    while i < thresholds.len() {
        let own = bucket(thresholds[i]);
        assert!(
            in_bucket[own] == f32::INFINITY,
            "two thresholds in a bucket"
        );
        in_bucket[own] = thresholds[i];
        let mut later = own + 1;
        while later < BUCKETS {
            before[later] += 1;
            later += 1;
        }
        i += 1;
    }
    (in_bucket, before)
}

const NF4: ([f32; BUCKETS], [u32; BUCKETS]) = tables(&NF4_THRESHOLDS);
const FP4: ([f32; BUCKETS], [u32; BUCKETS]) = tables(&FP4_THRESHOLDS);

/// Quantizes whole blocks. Returns whether all weights are finite.
///
/// # Safety
/// The processor must have AVX-512 F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn encode_type<T: FloatElement, const IS_FP4: bool>(
    task: &Task,
    weight: &[T],
    codes: &mut [u32],
    scales: &mut [f32],
) -> bool {
    let (in_bucket, before) = if IS_FP4 { &FP4 } else { &NF4 };
    // SAFETY: each load reads 16 of an array's 32 entries of 4 bytes.
    let tables = unsafe {
        Tables {
            in_bucket: [0, 16].map(|i| _mm512_loadu_ps(in_bucket.as_ptr().add(i))),
            before: [0, 16].map(|i| _mm512_loadu_si512(before.as_ptr().add(i).cast())),
        }
    };
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
        let inverse = _mm512_set1_ps(inverse);
        let groups = block.as_chunks::<32>().0;
        for (group, word) in groups.iter().zip(words.as_chunks_mut::<4>().0) {
            let [first, second] = [&group[..16], &group[16..]].map(|part| {
                let part = part.first_chunk().expect("16 of 32");
                tables.levels::<IS_FP4>(_mm512_mul_ps(load(part), inverse))
            });
            let mut codes = _mm256_set_m128i(second, first);
            if IS_FP4 {
                codes = _mm256_shuffle_epi8(fp4_codes(), codes);
            }
            // 16 times the even byte plus the odd one.
            let pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
            // SAFETY: four words are 16 bytes, the size of the store.
            unsafe { _mm_storeu_si128(word.as_mut_ptr().cast(), _mm256_cvtepi16_epi8(pairs)) };
        }
    }
    finite
}

/// The code of each level, and of each level with a sign.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn fp4_codes() -> __m256i {
    let codes = i64::from_le_bytes(FP4_CODE_BY_LEVEL);
    _mm256_broadcastsi128_si256(_mm_set_epi64x(codes | 0x0808_0808_0808_0808, codes))
}

struct Tables {
    in_bucket: [__m512; 2],
    before: [__m512i; 2],
}

impl Tables {
    /// The level of each value in a byte: thresholds below it, or with FP4 thresholds below its
    /// magnitude and 8 for a sign.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn levels<const IS_FP4: bool>(&self, values: __m512) -> __m128i {
        let keys = if IS_FP4 {
            _mm512_abs_ps(values)
        } else {
            values
        };
        let buckets = _mm512_castps_si512(_mm512_fmadd_ps(
            keys,
            _mm512_set1_ps(BUCKETS_PER_UNIT),
            _mm512_set1_ps(ROUNDER),
        ));
        let thresholds = _mm512_permutex2var_ps(self.in_bucket[0], buckets, self.in_bucket[1]);
        let before = _mm512_permutex2var_epi32(self.before[0], buckets, self.before[1]);
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(keys, thresholds);
        let one = _mm512_set1_epi32(1);
        let mut levels = _mm512_mask_add_epi32(before, above, before, one);
        if IS_FP4 {
            let negative = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(values, _mm512_setzero_ps());
            levels = _mm512_mask_or_epi32(levels, negative, levels, _mm512_set1_epi32(8));
        }
        _mm512_cvtepi32_epi8(levels)
    }
}

/// Widens 16 elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn load<T: FloatElement>(from: &[T; 16]) -> __m512 {
    // SAFETY: the loads read 16 elements of the size that `FLOAT_TYPE` tells.
    unsafe {
        match T::FLOAT_TYPE {
            FloatType::F32 => _mm512_loadu_ps(from.as_ptr().cast()),
            FloatType::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())),
            FloatType::BF16 => {
                let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
            }
        }
    }
}

/// The largest magnitude's bits; floats are ordered as their bits are, NaN after infinity.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn magnitude<T: FloatElement>(block: &[T]) -> u32 {
    let mut max = _mm512_setzero_si512();
    for part in block.as_chunks().0 {
        let magnitude = _mm512_abs_ps(load(part));
        max = _mm512_max_epu32(max, _mm512_castps_si512(magnitude));
    }
    _mm512_reduce_max_epu32(max)
}
