//! The product with AVX-512, and with its dot products of bf16.
//!
//! With few rows of x, a vector of codes is decoded into registers: each nibble of its lanes, once
//! shifted to the low bits, is an index to the tables of the vector's two halves, which lie in one
//! look-up (`vpermt2d`, `vpermw`). What comes out is in another order than the weights' own; x has
//! been put in the same.

use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use super::{CHUNK, Dot, Product, TILE, are_plain, tiles};
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
            (true, 1) => fused::<T, F32Dot, 1, 4>(product, first, sums),
            (true, 2) => fused::<T, F32Dot, 2, 2>(product, first, sums),
            (true, 3) => fused::<T, F32Dot, 3, 1>(product, first, sums),
            (true, 4) => fused::<T, F32Dot, 4, 1>(product, first, sums),
            _ => tiles::<T, F32Dot>(product, first, sums),
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
            (true, 1) => fused::<T, Bf16Dot, 1, 4>(product, first, sums),
            (true, 2) => fused::<T, Bf16Dot, 2, 2>(product, first, sums),
            (true, 3) => fused::<T, Bf16Dot, 3, 1>(product, first, sums),
            (true, 4) => fused::<T, Bf16Dot, 4, 1>(product, first, sums),
            _ => tiles::<T, Bf16Dot>(product, first, sums),
        }
    }
}

/// How many times the rows multiplied together codes are asked for ahead of their use.
const ROWS_AHEAD: usize = 4;

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
    assert!(product.fused && product.m == M && product.factors.len() == M * product.padded_k);
    let scales_each = product.k / 64;
    let mut buffer = Vec::new();
    let sums = sums.as_chunks_mut::<M>().0;
    for (first, sums) in (first..).step_by(TILE).zip(sums.chunks_mut(TILE)) {
        let all = product.scales(first, sums.len(), &mut buffer);
        let of_row = |row: usize| &all[row * scales_each..][..scales_each];
        // SAFETY: as the caller vouches; the scales are those of the rows.
        unsafe {
            if let Some(sums) = sums.first_chunk_mut()
                && are_plain(all)
            {
                let scales = std::array::from_fn(of_row);
                multiply_rows::<T, D, M, PARTS, TILE>(product, first, &scales, sums);
                continue;
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let scales = of_row(i);
                if are_plain(scales) {
                    let sums = std::array::from_mut(sums);
                    multiply_rows::<T, D, M, PARTS, 1>(product, first + i, &[scales], sums);
                } else {
                    product.unvectorized_row(first + i, sums);
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
unsafe fn multiply_rows<
    T: FloatElement,
    D: Chunk,
    const M: usize,
    const PARTS: usize,
    const R: usize,
>(
    product: &Product<T, D::Element>,
    first: usize,
    scales: &[&[f32]; R],
    sums: &mut [[f32; M]; R],
) {
    let (source, k) = (&product.decoder.source, product.k);
    let codes = &source.codes[first * k / 8..][..R * k / 8];
    assert!(scales.iter().all(|scales| scales.len() == k / 64));
    let operands = Operands {
        // SAFETY: the caller vouches for the instructions; a codebook has 16 levels.
        codebook: unsafe { _mm512_loadu_ps(source.codebook.as_ptr()) },
        codes: codes.as_ptr(),
        words: k / 8,
        scales: scales.each_ref().map(|scales| scales.as_ptr()),
        x: product.factors.as_ptr(),
        x_stride: product.padded_k,
    };
    // SAFETY: the caller vouches for the instructions; a row has a chunk of codes, 64 bytes, for
    // each 128 elements of k, and two scales, and half of that for what is left; each row of x of
    // factors has a chunk for either.
    unsafe {
        let mut partial = [[[D::zero(); PARTS]; M]; R];
        for chunk in 0..k / CHUNK {
            operands.add_chunk::<T, D, M, PARTS, true>(chunk, &mut partial);
        }
        if !k.is_multiple_of(CHUNK) {
            operands.add_chunk::<T, D, M, PARTS, false>(k / CHUNK, &mut partial);
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

/// What `R` rows of a weight are multiplied from.
struct Operands<E, const R: usize> {
    codebook: __m512,
    codes: *const u32,
    /// Words of codes of a row.
    words: usize,
    scales: [*const f32; R],
    x: *const E,
    x_stride: usize,
}

impl<E, const R: usize> Operands<E, R> {
    /// Adds the products with a chunk of the rows, whole or only the first half of one.
    ///
    /// # Safety
    /// The processor must have the instructions of `D`; rows must have the chunk or its half, rows
    /// of `x` the chunk.
    #[inline(always)]
    unsafe fn add_chunk<
        T: FloatElement,
        D: Chunk<Element = E>,
        const M: usize,
        const PARTS: usize,
        const WHOLE: bool,
    >(
        &self,
        chunk: usize,
        partial: &mut [[[__m512; PARTS]; M]; R],
    ) {
        // SAFETY: as the caller vouches.
        unsafe {
            let mut chunk_codes = [[_mm512_setzero_si512(); 2]; R];
            let mut tables = [self.tables::<T, D, WHOLE>(0, chunk); R];
            for row in 0..R {
                let codes = self.codes.add(row * self.words + chunk * (CHUNK / 8));
                // Where x has its padding any code will do.
                chunk_codes[row] = nibbles(match WHOLE {
                    true => _mm512_loadu_si512(codes.cast()),
                    false => _mm512_maskz_loadu_epi32(0xff, codes.cast()),
                });
                // Rows are too short for the processor to see by itself what comes next. To the
                // second cache, which waits for more lines at a time than the first. Past the end
                // of the weight this does nothing.
                let ahead = codes.wrapping_add(ROWS_AHEAD * R * self.words);
                _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
                if row > 0 {
                    tables[row] = self.tables::<T, D, WHOLE>(row, chunk);
                }
            }
            let x = self.x.add(chunk * CHUNK);
            for step in 0..CHUNK / D::LANES {
                let mut x_vectors = [D::load(x.add(step * D::LANES)); M];
                for (i, vector) in x_vectors.iter_mut().enumerate().skip(1) {
                    *vector = D::load(x.add(i * self.x_stride + step * D::LANES));
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
    }

    /// The tables of a row's chunk.
    ///
    /// # Safety
    /// As [`add_chunk`](Self::add_chunk).
    #[inline(always)]
    unsafe fn tables<T: FloatElement, D: Chunk, const WHOLE: bool>(
        &self,
        row: usize,
        chunk: usize,
    ) -> D::Tables {
        // SAFETY: as the caller vouches.
        unsafe {
            let scales = self.scales[row].add(2 * chunk);
            match WHOLE {
                true => D::tables::<T>(self.codebook, scales),
                false => D::tables::<T>(self.codebook, [*scales; 2].as_ptr()),
            }
        }
    }
}

/// Decodes the nested scales of some blocks.
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
    let codes: &[u8] = &bytemuck::cast_slice(codes)[blocks.clone()];
    let firsts = blocks.step_by(16);
    for ((first, codes), scales) in firsts.zip(codes.chunks(16)).zip(scales.chunks_mut(16)) {
        let last = first + codes.len() - 1;
        let [below, above] = [first, last].map(|block| {
            let absmax = absmax[block >> block_size_log2];
            _mm512_set1_ps(f32::from_bits(absmax))
        });
        // Sixteen blocks lie in two nested blocks, of at least 32, at most.
        let next = ((first >> block_size_log2) + 1) << block_size_log2;
        let of_next = ((u32::from(u16::MAX) << (next - first).min(16)) & 0xffff) as u16;
        let absmax = _mm512_mask_blend_ps(of_next, below, above);
        let there = (u32::from(u16::MAX) >> (16 - codes.len())) as u16;
        // SAFETY: as many codes are read and scales written as there are; a code is less than the
        // length of the map.
        unsafe {
            let codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, codes.as_ptr().cast()));
            let values = _mm512_i32gather_ps::<4>(codes, map.as_ptr().cast());
            let sums = _mm512_add_ps(_mm512_mul_ps(values, absmax), _mm512_set1_ps(offset));
            _mm512_mask_storeu_ps(scales.as_mut_ptr(), there, sums);
        }
    }
}

/// Products of f32.
struct F32Dot;

impl Dot for F32Dot {
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

impl Chunk for F32Dot {
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
struct Bf16Dot;

impl Dot for Bf16Dot {
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

impl Chunk for Bf16Dot {
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
