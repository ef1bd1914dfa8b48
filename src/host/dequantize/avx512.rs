//! Look-ups with AVX-512: the table of a block lies in one register, and one instruction takes 16
//! or 32 weights out of it (`vpermd`, `vpermw`).

use std::arch::x86_64::*;

use super::{GROUP, Source, Vector};
use crate::format::{FloatElement, FloatType};

/// Decodes a range whose start is a multiple of 8, rounded to `R`, past the caches if `STREAM`.
///
/// # Safety
/// The processor must have AVX-512 F, BW and VL; `out` must be aligned to 16 bytes if `STREAM`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn decode<T: FloatElement, R: FloatElement, const STREAM: bool>(
    source: &Source,
    start: usize,
    out: &mut [T],
) {
    // SAFETY: this function has the features. Eight elements are at least 16 bytes, so what holds
    // of the alignment of `out` holds for all groups.
    unsafe { super::decode::<T, R, Avx512<STREAM>>(source, start, out) };
    if STREAM {
        // Streaming stores are weakly ordered; other threads must see them before what follows.
        _mm_sfence();
    }
}

struct Avx512<const STREAM: bool>;

impl<const STREAM: bool> Vector for Avx512<STREAM> {
    /// 16 values of 32 bits, or twice 16 values of 16 bits.
    type Table<T: FloatElement> = __m512i;

    #[inline(always)]
    unsafe fn table<T: FloatElement, R: FloatElement>(codebook: &[f32; 16], scale: f32) -> __m512i {
        // SAFETY: the caller vouches for the features; 16 floats are 64 bytes, the size of the
        // load.
        unsafe {
            let codebook = _mm512_loadu_ps(codebook.as_ptr());
            let products = _mm512_mul_ps(codebook, _mm512_set1_ps(scale));
            match T::FLOAT_TYPE {
                FloatType::F32 => _mm512_castps_si512(round::<R>(products)),
                FloatType::F16 => {
                    let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(products);
                    _mm512_broadcast_i64x4(halves)
                }
                FloatType::BF16 => bf16_table(products),
            }
        }
    }

    #[inline(always)]
    unsafe fn look_up<T: FloatElement>(table: __m512i, codes: &[u32; 4], out: &mut [T; GROUP]) {
        let out: *mut __m512i = out.as_mut_ptr().cast();
        // SAFETY: the caller vouches for the features and for the alignment; the load reads the
        // four words, and 32 elements take one store of 64 bytes if they have 16 bits, two if 32.
        unsafe {
            let codes = _mm512_castsi128_si512(_mm_loadu_si128(codes.as_ptr().cast()));
            match T::FLOAT_TYPE {
                FloatType::F32 => {
                    let [first, second] = look_up_32(table, codes);
                    store::<STREAM>(out, first);
                    store::<STREAM>(out.add(1), second);
                }
                FloatType::F16 | FloatType::BF16 => {
                    store::<STREAM>(out, look_up_16(table, codes));
                }
            }
        }
    }
}

/// Finite values rounded to `R`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(in crate::host) fn round<R: FloatElement>(values: __m512) -> __m512 {
    match R::FLOAT_TYPE {
        FloatType::F32 => values,
        FloatType::F16 => _mm512_cvtph_ps(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values)),
        FloatType::BF16 => {
            let high_half = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            _mm512_castsi512_ps(_mm512_and_si512(round_to_bf16(values), high_half))
        }
    }
}

/// Finite values as bf16, in the high half of each result.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn round_to_bf16(values: __m512) -> __m512i {
    // To nearest, ties to even: add just less than a half, and the rest if the result would be
    // odd.
    let bits = _mm512_castps_si512(values);
    let odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x1_0000));
    let rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1))
}

/// Finite products as bf16, twice.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn bf16_table(products: __m512) -> __m512i {
    let high_halves = _mm512_set_epi16(
        31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, //
        31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1,
    );
    _mm512_permutexvar_epi16(high_halves, round_to_bf16(products))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn look_up_32(table: __m512i, codes: __m512i) -> [__m512i; 2] {
    // Each word to the eight elements that it holds. `vpermd` looks at the low four bits of an
    // index only, so that the codes need not be masked.
    let first = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    let second = _mm512_set_epi32(3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2);
    let shifts = _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4);
    [first, second].map(|spread| {
        let words = _mm512_permutexvar_epi32(spread, codes);
        _mm512_permutexvar_epi32(_mm512_srlv_epi32(words, shifts), table)
    })
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn look_up_16(table: __m512i, codes: __m512i) -> __m512i {
    // Each half word to the four elements that it holds. `vpermw` looks at the low five bits of
    // an index; the table is there twice, so that the fifth does not matter.
    let spread = _mm512_set_epi16(
        7, 7, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5, 4, 4, 4, 4, //
        3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0,
    );
    let shifts = _mm512_set1_epi64(0x0008_000c_0000_0004);
    let halves = _mm512_permutexvar_epi16(spread, codes);
    _mm512_permutexvar_epi16(_mm512_srlv_epi16(halves, shifts), table)
}

/// Writes 64 bytes, past the caches if `STREAM`.
///
/// # Safety
/// The 64 bytes at `to` must be writable, and `to` a multiple of 16 if `STREAM`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn store<const STREAM: bool>(to: *mut __m512i, values: __m512i) {
    // SAFETY: the caller vouches for 64 bytes at `to` and for their alignment.
    unsafe {
        if !STREAM {
            _mm512_storeu_si512(to, values);
        } else if to.addr().is_multiple_of(64) {
            _mm512_stream_si512(to, values);
        } else {
            let to: *mut __m128i = to.cast();
            _mm_stream_si128(to, _mm512_castsi512_si128(values));
            _mm_stream_si128(to.add(1), _mm512_extracti32x4_epi32::<1>(values));
            _mm_stream_si128(to.add(2), _mm512_extracti32x4_epi32::<2>(values));
            _mm_stream_si128(to.add(3), _mm512_extracti32x4_epi32::<3>(values));
        }
    }
}
