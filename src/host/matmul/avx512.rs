//! The product with AVX-512, and with its dot products of bf16.
//!
//! With few rows of x, a vector of codes is decoded into registers: each nibble of its lanes, once
//! shifted to the low bits, is an index to the tables of the vector's two halves, which lie in one
//! look-up (`vpermt2d`, `vpermw`). What comes out is in another order than the weights' own; x has
//! been put in the same.

use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use super::{CHUNK, Dot, Product, TILE, tiles};
use crate::format::FloatElement;
use crate::host::dequantize::{Scales, Source, round_512};

/// Makes the product with some rows of the weight.
///
/// # Safety
/// The processor must have AVX-512 F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn rows<T: FloatElement>(
    product: &Product<T, f32>,
    first: usize,
    sums: &mut [f32],
) {
    // SAFETY: this function has the features; `fused` says what `fused` asks for.
    unsafe {
        match (product.fused, product.m) {
            (true, 1) => fused::<T, Single, 1, 4>(product, first, sums),
            (true, 2) => fused::<T, Single, 2, 2>(product, first, sums),
            (true, 3) => fused::<T, Single, 3, 1>(product, first, sums),
            (true, 4) => fused::<T, Single, 4, 1>(product, first, sums),
            _ => tiles::<T, Single>(product, first, sums),
        }
    }
}

/// [`rows`] with dot products of bf16.
///
/// # Safety
/// The processor must have AVX-512 F, BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn rows_bf16<T: FloatElement>(
    product: &Product<T, bf16>,
    first: usize,
    sums: &mut [f32],
) {
    // SAFETY: as in `rows`.
    unsafe {
        match (product.fused, product.m) {
            (true, 1) => fused::<T, Brain, 1, 4>(product, first, sums),
            (true, 2) => fused::<T, Brain, 2, 2>(product, first, sums),
            (true, 3) => fused::<T, Brain, 3, 1>(product, first, sums),
            (true, 4) => fused::<T, Brain, 4, 1>(product, first, sums),
            _ => tiles::<T, Brain>(product, first, sums),
        }
    }
}

/// Decoding of a vector of codes.
trait Chunk: Dot<Sums = __m512> {
    type Tables: Copy;

    /// The tables of two blocks with plain scales, of values rounded to `R`.
    ///
    /// # Safety
    /// The processor must have the instructions, and `scales` two elements.
    unsafe fn tables<R: FloatElement>(codebook: __m512, scales: *const f32) -> Self::Tables;

    /// The weights that the low five bits of each lane stand for; higher bits do not matter.
    ///
    /// # Safety
    /// The processor must have the instructions.
    unsafe fn look_up(tables: Self::Tables, indices: __m512i) -> Self::Vector;
}

/// The even and the odd nibbles of a vector of codes, a byte each, with the table to look into in
/// bit 4, that of the second block in the upper half: so two operations serve the look-ups of all
/// nibbles, where masking each would take one each.
///
/// # Safety
/// The processor must have AVX-512 F and BW.
#[inline(always)]
unsafe fn nibbles(codes: __m512i) -> [__m512i; 2] {
    // SAFETY: the caller vouches for the features.
    unsafe {
        let low = _mm512_set1_epi8(15);
        let halves = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi8(16));
        let odd = _mm512_srli_epi16::<4>(codes);
        [codes, odd].map(|codes| _mm512_ternarylogic_epi32::<AND_OR>(codes, low, halves))
    }
}

/// Makes the product with some rows of the weight, decoded into registers: [`TILE`] rows together,
/// which share what is loaded of x, each with `PARTS` sums, so that additions need not wait for
/// each other.
///
/// # Safety
/// The processor must have the instructions of `D`, and the product be `fused` and have `M` rows
/// of x.
#[inline(always)]
unsafe fn fused<T: FloatElement, D: Chunk, const M: usize, const PARTS: usize>(
    product: &Product<T, D::Element>,
    first: usize,
    sums: &mut [f32],
) {
    assert!(product.fused && product.m == M && product.factors.len() == M * product.k);
    let mut buffers: [Vec<f32>; TILE] = Default::default();
    let sums = sums.as_chunks_mut::<M>().0;
    for (first, sums) in (first..).step_by(TILE).zip(sums.chunks_mut(TILE)) {
        let (mut scales, mut plain) = ([&[][..]; TILE], [false; TILE]);
        for (i, buffer) in buffers.iter_mut().take(sums.len()).enumerate() {
            (scales[i], plain[i]) = product.scales(first + i, buffer);
        }
        // SAFETY: as the caller vouches; the scales are those of the rows.
        unsafe {
            if plain == [true; TILE] {
                let sums = sums.first_chunk_mut().expect("each row was looked at");
                of_rows::<T, D, M, PARTS, TILE>(product, first, &scales, sums);
                continue;
            }
            for (i, (row, sums)) in (first..).zip(sums).enumerate() {
                if plain[i] {
                    let (scales, sums) = (scales[i..].first_chunk(), std::array::from_mut(sums));
                    let scales = scales.expect("a row's scales");
                    of_rows::<T, D, M, PARTS, 1>(product, row, scales, sums);
                } else {
                    product.careful(row, sums);
                }
            }
        }
    }
}

/// Makes the product with `R` rows of the weight. Each sum is the same whatever `R` is.
///
/// # Safety
/// As [`fused`], and `scales` must be plain.
#[inline(always)]
unsafe fn of_rows<T: FloatElement, D: Chunk, const M: usize, const PARTS: usize, const R: usize>(
    product: &Product<T, D::Element>,
    first: usize,
    scales: &[&[f32]; R],
    sums: &mut [[f32; M]; R],
) {
    let (source, k) = (&product.decoder.source, product.k);
    let codes = &source.codes[first * k / 8..][..R * k / 8];
    assert!(scales.iter().all(|scales| scales.len() == k / 64));
    let scales = scales.each_ref().map(|scales| scales.as_ptr());
    let (codes, x) = (codes.as_ptr(), product.factors.as_ptr());
    // SAFETY: the caller vouches for the instructions; a row has a chunk of codes, 64 bytes, for
    // each 128 elements of k, as has each row of x of factors, and two scales.
    unsafe {
        let codebook = _mm512_loadu_ps(source.codebook.as_ptr());
        let mut partial = [[[D::zero(); PARTS]; M]; R];
        for chunk in 0..k / CHUNK {
            let mut chunk_codes = [[_mm512_setzero_si512(); 2]; R];
            let mut tables = [D::tables::<T>(codebook, scales[0].add(2 * chunk)); R];
            for row in 0..R {
                let codes = codes.add(row * (k / 8) + chunk * (CHUNK / 8));
                chunk_codes[row] = nibbles(_mm512_loadu_si512(codes.cast()));
                // Rows are too short for the processor to see by itself what comes next. Past the
                // end of the weight this does nothing.
                _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(R * (k / 8)).cast());
                if row > 0 {
                    tables[row] = D::tables::<T>(codebook, scales[row].add(2 * chunk));
                }
            }
            for step in 0..CHUNK / D::LANES {
                let mut x_vectors = [D::load(x.add(chunk * CHUNK + step * D::LANES)); M];
                for (i, vector) in x_vectors.iter_mut().enumerate().skip(1) {
                    *vector = D::load(x.add(i * k + chunk * CHUNK + step * D::LANES));
                }
                for row in 0..R {
                    // Of lanes of 16 bits too the low bits are right, and no others matter.
                    let bits = _mm512_set1_epi32(8 * (step / 2) as i32);
                    let indices = _mm512_srlv_epi32(chunk_codes[row][step % 2], bits);
                    let w = D::look_up(tables[row], indices);
                    for i in 0..M {
                        let partial = &mut partial[row][i][step % PARTS];
                        *partial = D::add_product(*partial, w, x_vectors[i]);
                    }
                }
            }
        }
        for row in 0..R {
            for i in 0..M {
                let parts = partial[row][i];
                let all = parts[1..]
                    .iter()
                    .fold(parts[0], |a, &b| _mm512_add_ps(a, b));
                sums[row][i] = D::total(all);
            }
        }
    }
}

/// Decodes the nested scales of some blocks, from a multiple of 16 to another.
///
/// # Safety
/// The processor must have AVX-512 F, BW and VL.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn nested_scales(source: &Source, blocks: Range<usize>, scales: &mut Vec<f32>) {
    let Scales::Nested {
        codes,
        map,
        absmax,
        offset,
        block_size_log2,
    } = source.scales
    else {
        unreachable!("flat scales need no decoding");
    };
    scales.resize(blocks.len(), 0.0);
    let codes = codes[blocks.start / 4..blocks.end / 4].as_chunks::<4>().0;
    let scales = scales.as_chunks_mut::<16>().0;
    for (i, (codes, scales)) in codes.iter().zip(scales).enumerate() {
        // A nested block holds at least 32.
        let absmax = f32::from_bits(absmax[(blocks.start + 16 * i) >> block_size_log2]);
        // SAFETY: four words have 16 codes, each less than the length of the map; 16 scales are
        // written.
        unsafe {
            let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            let values = _mm512_i32gather_ps::<4>(codes, map.as_ptr().cast());
            let products = _mm512_mul_ps(values, _mm512_set1_ps(absmax));
            let sums = _mm512_add_ps(products, _mm512_set1_ps(offset));
            _mm512_storeu_ps(scales.as_mut_ptr(), sums);
        }
    }
}

/// Products of f32.
struct Single;

impl Dot for Single {
    type Element = f32;
    type Vector = __m512;
    type Sums = __m512;
    const LANES: usize = 16;
    const X_ROWS: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: the caller vouches for the features and for 16 elements.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn add_product(sums: __m512, w: __m512, x: __m512) -> __m512 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm512_fmadd_ps(w, x, sums) }
    }

    #[inline(always)]
    unsafe fn total(sums: __m512) -> f32 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm512_reduce_add_ps(sums) }
    }
}

impl Chunk for Single {
    type Tables = [__m512; 2];

    #[inline(always)]
    unsafe fn tables<R: FloatElement>(codebook: __m512, scales: *const f32) -> [__m512; 2] {
        // SAFETY: the caller vouches for the features.
        unsafe {
            let (first, second) = (*scales, *scales.add(1));
            [
                round_512::<R>(_mm512_mul_ps(codebook, _mm512_set1_ps(first))),
                round_512::<R>(_mm512_mul_ps(codebook, _mm512_set1_ps(second))),
            ]
        }
    }

    #[inline(always)]
    unsafe fn look_up(tables: [__m512; 2], indices: __m512i) -> __m512 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm512_permutex2var_ps(tables[0], indices, tables[1]) }
    }
}

/// `a & b | c` as a table of truth.
const AND_OR: i32 = 0b1110_1010;

/// Products of bf16, two to a sum.
struct Brain;

impl Dot for Brain {
    type Element = bf16;
    type Vector = __m512bh;
    type Sums = __m512;
    const LANES: usize = 32;
    const X_ROWS: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const bf16) -> __m512bh {
        // SAFETY: the caller vouches for the features and for 32 elements; the types differ in
        // name only.
        unsafe { std::mem::transmute(_mm512_loadu_si512(from.cast())) }
    }

    #[inline(always)]
    unsafe fn add_product(sums: __m512, w: __m512bh, x: __m512bh) -> __m512 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm512_dpbf16_ps(sums, w, x) }
    }

    #[inline(always)]
    unsafe fn total(sums: __m512) -> f32 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm512_reduce_add_ps(sums) }
    }
}

impl Chunk for Brain {
    type Tables = __m512i;

    #[inline(always)]
    unsafe fn tables<R: FloatElement>(codebook: __m512, scales: *const f32) -> __m512i {
        // SAFETY: the caller vouches for the features; the types differ in name only.
        unsafe {
            let (first, second) = (*scales, *scales.add(1));
            let first = _mm512_mul_ps(codebook, _mm512_set1_ps(first));
            let second = _mm512_mul_ps(codebook, _mm512_set1_ps(second));
            std::mem::transmute(_mm512_cvtne2ps_pbh(second, first))
        }
    }

    #[inline(always)]
    unsafe fn look_up(tables: __m512i, indices: __m512i) -> __m512bh {
        // SAFETY: the caller vouches for the features; the types differ in name only.
        unsafe { std::mem::transmute(_mm512_permutexvar_epi16(indices, tables)) }
    }
}
