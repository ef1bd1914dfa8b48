//! Look-ups with AVX2: 16-bit values as two tables of bytes (`vpshufb`), 32-bit values as two
//! tables of eight (`vpermps`).

use std::arch::x86_64::*;

use super::{GROUP, Source, Vector};
use crate::format::{FloatElement, FloatType};

/// Decodes a range whose start is a multiple of 8, rounded to `R`, past the caches if `STREAM`.
///
/// # Safety
/// The processor must have AVX2, F16C and FMA; `out` must be aligned to 16 bytes if `STREAM`.
#[target_feature(enable = "avx2,f16c,fma")]
pub(super) unsafe fn decode<T: FloatElement, R: FloatElement, const STREAM: bool>(
    source: &Source,
    start: usize,
    out: &mut [T],
) {
    // SAFETY: this function has the features. Eight elements are at least 16 bytes, so what holds
    // of the alignment of `out` holds for all groups.
    unsafe { super::decode::<T, R, Avx2<STREAM>>(source, start, out) };
    if STREAM {
        // Streaming stores are weakly ordered; other threads must see them before what follows.
        _mm_sfence();
    }
}

struct Avx2<const STREAM: bool>;

impl<const STREAM: bool> Vector for Avx2<STREAM> {
    /// 32-bit values: of codes 0 to 7, and of 8 to 15. 16-bit values: sixteen low bytes, and
    /// sixteen high bytes, each in both 128-bit lanes.
    type Table<T: FloatElement> = [__m256i; 2];

    #[inline(always)]
    unsafe fn table<T: FloatElement, R: FloatElement>(
        codebook: &[f32; 16],
        scale: f32,
    ) -> [__m256i; 2] {
        // SAFETY: the caller vouches for the features; 16 floats are 64 bytes, the size of the
        // two loads.
        unsafe {
            let scale = _mm256_set1_ps(scale);
            let low = _mm256_mul_ps(_mm256_loadu_ps(codebook.as_ptr()), scale);
            let high = _mm256_mul_ps(_mm256_loadu_ps(codebook.as_ptr().add(8)), scale);
            match T::FLOAT_TYPE {
                FloatType::F32 => [low, high].map(|values| _mm256_castps_si256(round::<R>(values))),
                FloatType::F16 => byte_tables(
                    _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(low),
                    _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(high),
                ),
                FloatType::BF16 => byte_tables(to_bf16(low), to_bf16(high)),
            }
        }
    }

    #[inline(always)]
    unsafe fn look_up<T: FloatElement>(
        table: [__m256i; 2],
        codes: &[u32; 4],
        out: &mut [T; GROUP],
    ) {
        let out: *mut __m256i = out.as_mut_ptr().cast();
        // SAFETY: the caller vouches for the features and for the alignment; the load reads the
        // four words, and 32 elements take two stores of 32 bytes if they have 16 bits, four if
        // 32.
        unsafe {
            match T::FLOAT_TYPE {
                FloatType::F32 => {
                    for (i, &word) in codes.iter().enumerate() {
                        store::<STREAM>(out.add(i), look_up_32(table, word));
                    }
                }
                FloatType::F16 | FloatType::BF16 => {
                    let codes = _mm_loadu_si128(codes.as_ptr().cast());
                    let [first, second] = look_up_16(table, codes);
                    store::<STREAM>(out, first);
                    store::<STREAM>(out.add(1), second);
                }
            }
        }
    }
}

/// Finite values rounded to `R`.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn round<R: FloatElement>(values: __m256) -> __m256 {
    match R::FLOAT_TYPE {
        FloatType::F32 => values,
        FloatType::F16 => _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values)),
        FloatType::BF16 => {
            let widened = _mm256_cvtepu16_epi32(to_bf16(values));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(widened))
        }
    }
}

/// Finite values as bf16.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn to_bf16(values: __m256) -> __m128i {
    // To nearest, ties to even: add just less than a half, and the rest if the result would be
    // odd.
    let bits = _mm256_castps_si256(values);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff));
    let halves = _mm256_srli_epi32::<16>(_mm256_add_epi32(rounded, odd));
    _mm_packus_epi32(
        _mm256_castsi256_si128(halves),
        _mm256_extracti128_si256::<1>(halves),
    )
}

/// Splits 16 values into bytes.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn byte_tables(first: __m128i, second: __m128i) -> [__m256i; 2] {
    let low_byte = _mm_set1_epi16(0xff);
    let low = _mm_packus_epi16(
        _mm_and_si128(first, low_byte),
        _mm_and_si128(second, low_byte),
    );
    let high = _mm_packus_epi16(_mm_srli_epi16::<8>(first), _mm_srli_epi16::<8>(second));
    [low, high].map(|bytes| _mm256_broadcastsi128_si256(bytes))
}

#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn look_up_16(table: [__m256i; 2], codes: __m128i) -> [__m256i; 2] {
    // Words 0 and 2 to the first 128-bit lane, 1 and 3 to the second; one code a byte.
    let pairs = _mm256_cvtepu8_epi16(_mm_shuffle_epi32::<0b11_01_10_00>(codes));
    let codes = _mm256_or_si256(_mm256_srli_epi16::<4>(pairs), _mm256_slli_epi16::<8>(pairs));
    let codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
    let low = _mm256_shuffle_epi8(table[0], codes);
    let high = _mm256_shuffle_epi8(table[1], codes);
    [
        _mm256_unpacklo_epi8(low, high),
        _mm256_unpackhi_epi8(low, high),
    ]
}

#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn look_up_32(table: [__m256i; 2], word: u32) -> __m256i {
    // `vpermps` looks at the low three bits of an index; the fourth, moved to the sign, picks the
    // table.
    let shifts = _mm256_set_epi32(24, 28, 16, 20, 8, 12, 0, 4);
    let indices = _mm256_srlv_epi32(_mm256_set1_epi32(word.cast_signed()), shifts);
    let [low, high] =
        table.map(|table| _mm256_permutevar8x32_ps(_mm256_castsi256_ps(table), indices));
    let pick = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(indices));
    _mm256_castps_si256(_mm256_blendv_ps(low, high, pick))
}

/// Writes 32 bytes, past the caches if `STREAM`.
///
/// # Safety
/// The 32 bytes at `to` must be writable, and `to` a multiple of 16 if `STREAM`.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
unsafe fn store<const STREAM: bool>(to: *mut __m256i, values: __m256i) {
    // SAFETY: the caller vouches for 32 bytes at `to` and for their alignment.
    unsafe {
        if !STREAM {
            _mm256_storeu_si256(to, values);
        } else {
            let to: *mut __m128i = to.cast();
            _mm_stream_si128(to, _mm256_castsi256_si128(values));
            _mm_stream_si128(to.add(1), _mm256_extracti128_si256::<1>(values));
        }
    }
}
