//! The product of a few rows with a packed weight, which is read once, as it is.
//!
//! Rows of the weight are decoded a piece at a time, four rows together, into a buffer that stays
//! in the first cache, and a tile of the product is accumulated from it. With up to [`FUSED_ROWS`]
//! rows of x even that buffer costs too much: AVX-512 then decodes into registers, where the rows
//! of the weight start at a multiple of [`HALF_CHUNK`].

use bytemuck::Zeroable;
use half::bf16;
use rayon::prelude::*;

use super::dequantize::{BATCH, Scales, Source, Task, round};
use super::{Simd, awake, dequantize};
use crate::format::{FloatElement, FloatType, PackedLayout};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

/// Weights decoded into registers at a time: the codes are a vector of 64 bytes.
const CHUNK: usize = 128;

/// What rows are a multiple of then: the last chunk of a row may be half of one.
const HALF_CHUNK: usize = CHUNK / 2;

/// Most rows of x for which weights are decoded into registers.
const FUSED_ROWS: usize = 4;

/// Rows of the weight in a tile.
const TILE: usize = 4;

/// Bytes of a row in the buffer of decoded weights; those of a tile fill a quarter of the first
/// cache.
const PIECE_BYTES: usize = 2048;

/// Weights that are worth handing to a thread that waits for them.
const AWAKE_TASK_ELEMS: usize = 1 << 16;

/// Sums written to the output in a task.
const TASK_SUMS: usize = 1 << 16;

/// `y = x Wᵀ + b`, of a packed weight W and few rows of x.
///
/// `words` is the device image of W, as [`dequantize`](super::dequantize()) takes it. What is
/// multiplied are x and the weights as they are when dequantized to `T`; sums are of f32, and y is
/// rounded once. Sums do not depend on the number of threads, but in their last bits on the
/// processor.
///
/// # Shapes
/// - `x`: `[m, k]`, row-major as all
/// - `words`: `layout.words()`, of a weight `[n, k]`; the header is not looked at
/// - `bias`: `[n]`
/// - `out`: `[m, n]`
///
/// # Panics
/// If `words` is shorter than `layout` asks for or if another length differs from its shape.
#[expect(clippy::too_many_arguments, reason = "three matrices and their shapes")]
pub fn matmul<T: FloatElement>(
    x: &[T],
    m: usize,
    words: &[u32],
    layout: &PackedLayout,
    n: usize,
    k: usize,
    bias: Option<&[T]>,
    out: &mut [T],
) {
    matmul_with(Simd::detect(), x, m, words, layout, n, k, bias, out);
}

/// [`matmul`] with given vector instructions.
///
/// # Panics
/// As [`matmul`], and if the processor does not have `simd`.
#[doc(hidden)]
#[expect(clippy::too_many_arguments, reason = "as matmul")]
pub fn matmul_with<T: FloatElement>(
    simd: Simd,
    x: &[T],
    m: usize,
    words: &[u32],
    layout: &PackedLayout,
    n: usize,
    k: usize,
    bias: Option<&[T]>,
    out: &mut [T],
) {
    simd.assert_available();
    dequantize::assert_words(words, layout);
    assert_len("x", x.len(), [m, k]);
    assert_len("weight", layout.elems(), [n, k]);
    if let Some(bias) = bias {
        assert_len("bias", bias.len(), [1, n]);
    }
    assert_len("out", out.len(), [m, n]);
    if out.is_empty() {
        return;
    }
    if k == 0 {
        return finish(&vec![0.0; n * m], m, bias, out);
    }
    // The dot products of bf16 take subnormal numbers for zero.
    let simd = match simd {
        Simd::Avx512Bf16 if T::FLOAT_TYPE != FloatType::BF16 || has_subnormal(x) => Simd::Avx512,
        simd => simd,
    };
    let decoder = Task {
        source: Source::new(words, layout),
        simd,
        stream: false,
    };
    let mut sums = vec![0.0; n * m];
    #[cfg(target_arch = "x86_64")]
    if simd == Simd::Avx512Bf16 {
        let product = Product::new(x, bytemuck::cast_slice(x), m, k, decoder);
        product.divide(0, &mut sums, avx512::rows_bf16);
        return finish(&sums, m, bias, out);
    }
    let factors: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
    let product = Product::new(x, &factors, m, k, decoder);
    let rows: Rows<T, f32> = match simd {
        Simd::Portable => portable::rows,
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => avx2::rows,
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 | Simd::Avx512Bf16 => avx512::rows,
        #[cfg(not(target_arch = "x86_64"))]
        Simd::Avx2 | Simd::Avx512 | Simd::Avx512Bf16 => unreachable!("not available"),
    };
    product.divide(0, &mut sums, rows);
    finish(&sums, m, bias, out);
}

fn assert_len(what: &str, len: usize, [rows, columns]: [usize; 2]) {
    assert!(
        rows.checked_mul(columns) == Some(len),
        "{what} of {len} elements, expected {rows} times {columns}"
    );
}

fn has_subnormal<T: FloatElement>(x: &[T]) -> bool {
    x.iter()
        .fold(false, |any, x| any | x.to_f32().is_subnormal())
}

/// Adds the bias to the sums, `[n, m]`, and rounds them to the output, `[m, n]`.
fn finish<T: FloatElement>(sums: &[f32], m: usize, bias: Option<&[T]>, out: &mut [T]) {
    let n = out.len() / m;
    out.par_chunks_mut(n)
        .with_min_len(TASK_SUMS.div_ceil(n))
        .enumerate()
        .for_each(|(row, out)| {
            let mut buffer = [0.0; 64];
            for (part, out) in out.chunks_mut(buffer.len()).enumerate() {
                let first = part * buffer.len();
                let buffer = &mut buffer[..out.len()];
                for (sum, sums) in buffer.iter_mut().zip(sums[first * m..].chunks_exact(m)) {
                    *sum = sums[row];
                }
                if let Some(bias) = bias {
                    for (sum, bias) in buffer.iter_mut().zip(&bias[first..]) {
                        *sum += bias.to_f32();
                    }
                }
                round(buffer, out);
            }
        });
}

/// A number that products are made of: bf16 for the dot products of bf16, else f32.
trait Factor: FloatElement {}
impl Factor for f32 {}
impl Factor for bf16 {}

/// A product to be made with one set of vector instructions; `E` is what it multiplies.
struct Product<'a, T, E> {
    /// As given, for the rows that need care.
    x: &'a [T],
    /// `[m, padded_k]`, zeros at the end of each row; if `fused`, each chunk is in the order in
    /// which the weights come out of a vector of codes.
    factors: Vec<E>,
    m: usize,
    k: usize,
    padded_k: usize,
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    fused: bool,
    decoder: Task<'a>,
}

impl<'a, T: FloatElement, E: Factor> Product<'a, T, E> {
    fn new(x: &'a [T], factors: &[E], m: usize, k: usize, decoder: Task<'a>) -> Self {
        let vectors = matches!(decoder.simd, Simd::Avx512 | Simd::Avx512Bf16);
        let fused = vectors
            && m <= FUSED_ROWS
            && k.is_multiple_of(HALF_CHUNK)
            && !decoder.source.has_bytes
            && decoder.source.run_log2 >= 6;
        // Elements of a lane of codes, from the low bits on: those of a half word, or of a word.
        let order: &[usize] = match E::FLOAT_TYPE {
            FloatType::BF16 => &[1, 0, 3, 2],
            _ => &[1, 0, 3, 2, 5, 4, 7, 6],
        };
        let padded_k = match fused {
            true => k.next_multiple_of(CHUNK),
            false => k.next_multiple_of(64 / size_of::<E>()),
        };
        let mut padded = vec![E::zeroed(); m * padded_k];
        for (to, from) in padded
            .chunks_exact_mut(padded_k)
            .zip(factors.chunks_exact(k))
        {
            if !fused {
                to[..k].copy_from_slice(from);
                continue;
            }
            for (to, from) in to.chunks_exact_mut(CHUNK).zip(from.chunks(CHUNK)) {
                let steps = to.chunks_exact_mut(CHUNK / order.len()).zip(order);
                for (to, &first) in steps {
                    let from = from[first..].iter().step_by(order.len());
                    to.iter_mut().zip(from).for_each(|(to, &from)| *to = from);
                }
            }
        }
        Self {
            x,
            factors: padded,
            m,
            k,
            padded_k,
            fused,
            decoder,
        }
    }

    /// Halves the rows of the weight until they are few, between rayon's threads.
    ///
    /// The processor must have the instructions that `multiply_rows` uses.
    fn divide(&self, first: usize, sums: &mut [f32], multiply_rows: Rows<T, E>) {
        let rows = sums.len() / self.m;
        let work = rows * self.k * self.m.div_ceil(FUSED_ROWS);
        let least = match awake::is_awake() {
            true => AWAKE_TASK_ELEMS,
            false => dequantize::task_elems(self.decoder.simd),
        };
        if rows <= TILE || work <= least {
            // SAFETY: `matmul_with` chose `multiply_rows` by the instructions that it checked.
            return unsafe { multiply_rows(self, first, sums) };
        }
        let middle = (rows / 2).next_multiple_of(TILE);
        let (left, right) = sums.split_at_mut(middle * self.m);
        rayon::join(
            || self.divide(first, left, multiply_rows),
            || self.divide(first + middle, right, multiply_rows),
        );
    }

    /// Makes the product with one row of the weight whose scales vector code is not made for.
    #[cold]
    fn unvectorized_row(&self, row: usize, sums: &mut [f32]) {
        let mut weights = [0.0f32; 64];
        sums.fill(0.0);
        for start in (0..self.k).step_by(weights.len()) {
            let weights = &mut weights[..(self.k - start).min(64)];
            self.decoder.decode::<f32, T>(row * self.k + start, weights);
            for (sum, x) in sums.iter_mut().zip(self.x.chunks_exact(self.k)) {
                let products = weights.iter().zip(&x[start..]).map(|(w, x)| w * x.to_f32());
                *sum += products.sum::<f32>();
            }
        }
    }

    /// The scale of each 64 weights of some rows, for blocks of at least 64 and rows that start at a
    /// multiple of it.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    fn scales<'s>(&'s self, first: usize, rows: usize, scales: &'s mut Vec<f32>) -> &'s [f32] {
        let source = &self.decoder.source;
        let log2 = source.run_log2 - 6;
        let (start, end) = (first * self.k / 64, (first + rows) * self.k / 64);
        if let (0, Scales::Flat(flat)) = (log2, &source.scales) {
            return bytemuck::cast_slice(&flat[start..end]);
        }
        scales.clear();
        #[cfg(target_arch = "x86_64")]
        if log2 == 0 {
            // SAFETY: only code with AVX-512 decodes into registers.
            unsafe { avx512::nested_scales(source, start..end, scales) };
            return scales;
        }
        let (mut block, blocks_end) = (start >> log2, ((end - 1) >> log2) + 1);
        while block < blocks_end {
            let blocks = (BATCH - block % BATCH).min(blocks_end - block);
            let (batch, _) = source.scales(block, blocks);
            for (block, &scale) in (block..).zip(&batch[..blocks]) {
                let (from, to) = (block << log2, (block + 1) << log2);
                scales.extend(std::iter::repeat_n(scale, to.min(end) - from.max(start)));
            }
            block += blocks;
        }
        scales
    }

    /// Whether vector code can take the scales of a row.
    fn has_plain_scales(&self, row: usize) -> bool {
        let source = &self.decoder.source;
        let (start, end) = (row * self.k, (row + 1) * self.k);
        let blocks = start >> source.run_log2..((end - 1) >> source.run_log2) + 1;
        let mut all = true;
        for first in blocks.clone().step_by(BATCH) {
            let count = (blocks.end - first).min(BATCH);
            let (batch, _) = source.scales(first, count);
            all &= are_plain(&batch[..count]);
        }
        all
    }
}

/// Makes the product with the rows of the weight from one on. Result: `[rows, m]`.
///
/// # Safety
/// The processor must have the instructions that it uses.
type Rows<T, E> = unsafe fn(&Product<T, E>, usize, &mut [f32]);

/// Whether all weights with these scales are rounded from finite numbers, and none is subnormal.
#[inline(always)]
fn are_plain(scales: &[f32]) -> bool {
    // The smallest level but zero is 2^-9.
    const SMALLEST: u32 = 10 << 23;
    let odd = |&scale: &f32| {
        let magnitude = scale.to_bits() & i32::MAX as u32;
        // What is too small wraps around to above all others.
        let above = magnitude.wrapping_sub(SMALLEST);
        u32::from((above >= f32::INFINITY.to_bits() - SMALLEST) & (magnitude != 0))
    };
    scales.iter().fold(0, |any, scale| any | odd(scale)) == 0
}

/// A tile of a product in terms of one set of vector instructions.
///
/// The methods are to be inlined into a function that has the set's target features.
trait Dot {
    type Element: Factor;
    type Vector: Copy;
    /// Partial sums of one element of the product.
    type Sums: Copy;

    /// Elements of a vector.
    const LANES: usize;
    /// Most rows of x in a tile, 1, 2 or 4; registers hold the sums.
    const X_ROWS: usize;

    /// # Safety
    /// The processor must have the instructions.
    unsafe fn zero() -> Self::Sums;

    /// # Safety
    /// The processor must have the instructions, and `from` [`LANES`](Self::LANES) elements.
    unsafe fn load(from: *const Self::Element) -> Self::Vector;

    /// # Safety
    /// The processor must have the instructions.
    unsafe fn add_product(sums: Self::Sums, w: Self::Vector, x: Self::Vector) -> Self::Sums;

    /// # Safety
    /// The processor must have the instructions.
    unsafe fn total(sums: Self::Sums) -> f32;
}

/// Makes the product with some rows of the weight, in tiles.
///
/// # Safety
/// The processor must have the instructions of `D`.
#[inline(always)]
unsafe fn tiles<T: FloatElement, D: Dot>(
    product: &Product<T, D::Element>,
    first: usize,
    sums: &mut [f32],
) {
    let Product { m, k, padded_k, .. } = *product;
    let piece = PIECE_BYTES / size_of::<D::Element>();
    let zero = D::Element::zeroed();
    let mut weights = vec![zero; TILE * piece];
    // SAFETY: as the caller vouches.
    let mut partial = vec![unsafe { D::zero() }; TILE * m];
    for (first, sums) in (first..).step_by(TILE).zip(sums.chunks_mut(TILE * m)) {
        let rows = sums.len() / m;
        // SAFETY: as the caller vouches.
        partial.fill(unsafe { D::zero() });
        for start in (0..k).step_by(piece) {
            let elems = (k - start).min(piece);
            let padded = elems.next_multiple_of(D::LANES);
            for (row, weights) in weights.chunks_exact_mut(piece).take(rows).enumerate() {
                let (weights, padding) = weights[..padded].split_at_mut(elems);
                let start = (first + row) * k + start;
                product.decoder.decode::<D::Element, T>(start, weights);
                padding.fill(zero);
            }
            for x_first in (0..m).step_by(D::X_ROWS) {
                let x = &product.factors[x_first * padded_k + start..];
                let partial = &mut partial[x_first..];
                let x_rows = (m - x_first).min(D::X_ROWS);
                // SAFETY: the caller vouches for the instructions; rows of the weights are `piece`
                // apart, those of x `padded_k`, and both have `padded` elements from here on.
                unsafe {
                    match (rows, x_rows) {
                        (TILE, 1) => tile::<D, TILE, 1>(&weights, x, padded_k, padded, partial, m),
                        (TILE, 2) => tile::<D, TILE, 2>(&weights, x, padded_k, padded, partial, m),
                        (TILE, 4) => tile::<D, TILE, 4>(&weights, x, padded_k, padded, partial, m),
                        _ => {
                            for row in 0..rows {
                                for i in 0..x_rows {
                                    let (weights, x) =
                                        (&weights[row * piece..], &x[i * padded_k..]);
                                    let partial = &mut partial[row * m + i..];
                                    tile::<D, 1, 1>(weights, x, padded_k, padded, partial, m);
                                }
                            }
                        }
                    }
                }
            }
        }
        for (sum, &partial) in sums.iter_mut().zip(&partial) {
            // SAFETY: as the caller vouches.
            *sum = unsafe { D::total(partial) };
        }
        if D::Element::FLOAT_TYPE == FloatType::BF16 {
            for (row, sums) in (first..).zip(sums.chunks_exact_mut(m)) {
                if !product.has_plain_scales(row) {
                    product.unvectorized_row(row, sums);
                }
            }
        }
    }
}

/// Adds the products of `len` elements of `R` rows of weights, a piece apart, with those of `X`
/// rows of x, `x_stride` apart, to the partial sums: `[R, X]`, rows `m` apart.
///
/// # Safety
/// The processor must have the instructions of `D`; `len` must be a multiple of its lanes.
#[inline(always)]
unsafe fn tile<D: Dot, const R: usize, const X: usize>(
    weights: &[D::Element],
    x: &[D::Element],
    x_stride: usize,
    len: usize,
    partial: &mut [D::Sums],
    m: usize,
) {
    let piece = PIECE_BYTES / size_of::<D::Element>();
    assert!(weights.len() >= (R - 1) * piece + len);
    assert!(x.len() >= (X - 1) * x_stride + len);
    let (weights, x) = (weights.as_ptr(), x.as_ptr());
    // SAFETY: the caller vouches for the instructions and for whole vectors; the lengths are
    // checked above.
    unsafe {
        let mut sums = [[D::zero(); X]; R];
        for (row, sums) in sums.iter_mut().enumerate() {
            sums.copy_from_slice(&partial[row * m..][..X]);
        }
        let mut at = 0;
        while at < len {
            let mut x_vectors = [D::load(x.add(at)); X];
            for (i, vector) in x_vectors.iter_mut().enumerate().skip(1) {
                *vector = D::load(x.add(i * x_stride + at));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let w = D::load(weights.add(row * piece + at));
                for (sum, &x) in sums.iter_mut().zip(&x_vectors) {
                    *sum = D::add_product(*sum, w, x);
                }
            }
            at += D::LANES;
        }
        for (row, sums) in sums.iter().enumerate() {
            partial[row * m..][..X].copy_from_slice(sums);
        }
    }
}
