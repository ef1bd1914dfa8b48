//! The product of a few rows with a large matrix of floats, such as a head with the table of embeddings, which
//! is read once, in the type that it has.

use rayon::prelude::*;

use super::Simd;
#[cfg(target_arch = "x86_64")]
use super::attention::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::attention::avx512::Avx512;
use super::attention::portable::Portable;
use super::attention::vector::Vector;
use crate::format::{FloatElement, FloatType};

/// Rows of the matrix, and most rows of x, in a tile.
const TILE: usize = 4;

/// Multiplications of a task.
const TASK_PRODUCTS: usize = 1 << 17;

/// `y = x Wᵀ`, of f32 with a matrix W that may be of fewer bits.
///
/// What is multiplied are x and the exact values of W; sums are of f32. They do not depend on the number of
/// threads, but in their last bits on the processor.
///
/// ```
/// use burn_nf4::host;
/// use half::bf16;
///
/// let table = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0].map(bf16::from_f32);
/// let mut y = [0.0; 2];
/// host::float_matmul(&[1.0, 0.5, 2.0], 1, &table, 2, 3, &mut y);
/// assert_eq!(y, [8.0, 18.5]);
/// ```
///
/// # Shapes
/// - `x`: `[m, k]`, row-major as all
/// - `table`: `[n, k]`
/// - `out`: `[m, n]`
///
/// # Panics
/// If a length differs from its shape.
pub fn float_matmul<T: FloatElement>(
    x: &[f32],
    m: usize,
    table: &[T],
    n: usize,
    k: usize,
    out: &mut [f32],
) {
    float_matmul_with(Simd::detect(), x, m, table, n, k, out);
}

/// [`float_matmul`] with given vector instructions.
///
/// # Panics
/// As [`float_matmul`], and if the processor does not have `simd`.
#[doc(hidden)]
pub fn float_matmul_with<T: FloatElement>(
    simd: Simd,
    x: &[f32],
    m: usize,
    table: &[T],
    n: usize,
    k: usize,
    out: &mut [f32],
) {
    simd.assert_available();
    for (what, len, [rows, columns]) in [
        ("x", x.len(), [m, k]),
        ("table", table.len(), [n, k]),
        ("out", out.len(), [m, n]),
    ] {
        assert!(
            rows.checked_mul(columns) == Some(len),
            "{what} of {len} elements, expected {rows} times {columns}"
        );
    }
    if out.is_empty() || k == 0 {
        return out.fill(0.0);
    }
    let rows: Rows<T> = match simd {
        Simd::Portable => portable_rows,
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => avx2_rows,
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 | Simd::Avx512Bf16 => avx512_rows,
        #[cfg(not(target_arch = "x86_64"))]
        Simd::Avx2 | Simd::Avx512 | Simd::Avx512Bf16 => unreachable!("not available"),
    };
    let product = Product { x, m, table, k };
    let task = (TASK_PRODUCTS / (k * m)).next_multiple_of(TILE).max(TILE);
    let multiply = |sums: &mut [f32]| {
        let tasks = sums.par_chunks_mut(task * m).enumerate();
        // SAFETY: `rows` was chosen by the instructions that were checked.
        tasks.for_each(|(i, sums)| unsafe { rows(&product, i * task, sums) });
    };
    if m == 1 {
        return multiply(out);
    }
    let mut sums = vec![0.0; n * m];
    multiply(&mut sums);
    out.par_chunks_mut(n).enumerate().for_each(|(row, out)| {
        let sums = sums[row..].iter().step_by(m);
        out.iter_mut().zip(sums).for_each(|(to, &sum)| *to = sum);
    });
}

struct Product<'a, T> {
    x: &'a [f32],
    m: usize,
    table: &'a [T],
    k: usize,
}

/// Makes the product with the rows of the matrix from one on. Result: `[rows, m]`.
///
/// # Safety
/// The processor must have the instructions that it uses.
type Rows<T> = unsafe fn(&Product<T>, usize, &mut [f32]);

unsafe fn portable_rows<T: FloatElement>(product: &Product<T>, first: usize, sums: &mut [f32]) {
    // SAFETY: plain code needs no instructions.
    unsafe { rows::<T, Portable>(product, first, sums) }
}

/// # Safety
/// The processor must have AVX2, F16C and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c,fma")]
unsafe fn avx2_rows<T: FloatElement>(product: &Product<T>, first: usize, sums: &mut [f32]) {
    // SAFETY: this function has the features.
    unsafe { rows::<T, Avx2>(product, first, sums) }
}

/// # Safety
/// The processor must have AVX-512 F, BW and VL.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn avx512_rows<T: FloatElement>(product: &Product<T>, first: usize, sums: &mut [f32]) {
    // SAFETY: this function has the features.
    unsafe { rows::<T, Avx512>(product, first, sums) }
}

/// # Safety
/// The processor must have the instructions of `V`.
#[inline(always)]
unsafe fn rows<T: FloatElement, V: Vector>(product: &Product<T>, first: usize, sums: &mut [f32]) {
    let Product { x, m, table, k } = *product;
    for (i, sums) in sums.chunks_mut(TILE * m).enumerate() {
        let table = &table[(first + i * TILE) * k..];
        let rows = sums.len() / m;
        for x_first in (0..m).step_by(TILE) {
            let x = &x[x_first * k..];
            let sums = &mut sums[x_first..];
            // SAFETY: as the caller vouches.
            unsafe {
                match (rows, (m - x_first).min(TILE)) {
                    (TILE, 1) => tile::<T, V, TILE, 1>(table, x, k, sums, m),
                    (TILE, 2) => tile::<T, V, TILE, 2>(table, x, k, sums, m),
                    (TILE, TILE) => tile::<T, V, TILE, TILE>(table, x, k, sums, m),
                    (rows, x_rows) => {
                        for row in 0..rows {
                            for i in 0..x_rows {
                                let (table, x) = (&table[row * k..], &x[i * k..]);
                                tile::<T, V, 1, 1>(table, x, k, &mut sums[row * m + i..], m);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The products of `R` rows of the matrix with `X` rows of x: `[R, X]`, rows `m` apart.
///
/// # Safety
/// The processor must have the instructions of `V`.
#[inline(always)]
unsafe fn tile<T: FloatElement, V: Vector, const R: usize, const X: usize>(
    table: &[T],
    x: &[f32],
    k: usize,
    sums: &mut [f32],
    m: usize,
) {
    let (table, x) = (&table[..R * k], &x[..X * k]);
    let whole = k - k % V::LANES;
    // SAFETY: the caller vouches for the instructions; rows are `k` apart, and each has `whole` elements.
    unsafe {
        let mut partial = [[V::splat(0.0); X]; R];
        for at in (0..whole).step_by(V::LANES) {
            let mut factors = [V::splat(0.0); X];
            for (i, factor) in factors.iter_mut().enumerate() {
                *factor = V::load(x.as_ptr().add(i * k + at));
            }
            for (row, partial) in partial.iter_mut().enumerate() {
                let weights = load::<T, V>(table.as_ptr().add(row * k + at));
                for (sum, &factor) in partial.iter_mut().zip(&factors) {
                    *sum = weights.mul_add(factor, *sum);
                }
            }
        }
        for (row, partial) in partial.iter().enumerate() {
            for (i, partial) in partial.iter().enumerate() {
                let weights = table[row * k + whole..(row + 1) * k].iter();
                let rest = weights.zip(&x[i * k + whole..(i + 1) * k]);
                let rest: f32 = rest.map(|(w, x)| w.to_f32() * x).sum();
                sums[row * m + i] = partial.sum() + rest;
            }
        }
    }
}

/// # Safety
/// The processor must have the instructions of `V`, and `from` as many elements as it has lanes.
#[inline(always)]
pub(super) unsafe fn load<T: FloatElement, V: Vector>(from: *const T) -> V {
    // SAFETY: the caller vouches for it, and the type is what it says.
    unsafe {
        match T::FLOAT_TYPE {
            FloatType::F16 => V::load_f16(from.cast()),
            FloatType::BF16 => V::load_bf16(from.cast()),
            FloatType::F32 => V::load(from.cast()),
        }
    }
}
