//! Products of matrices of f32 with many rows, in tiles that stay in registers.
//!
//! The rows of the left matrix are laid side by side in panels, so that a vector holds as many rows, and factors of
//! the right matrix are read where they lie. Each task has some columns of the result. A packed weight is decoded a
//! piece at a time, into a buffer of the task that stays in the second cache, and is never held as a whole. So BLIS
//! divides a product (Van Zee and van de Geijn, 2015).

use std::cell::Cell;

use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::attention::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::attention::avx512::Avx512;
use super::attention::portable::Portable;
use super::attention::vector::Vector;
use super::dequantize::{Source, Task};
use super::{Simd, dequantize};
use crate::format::PackedLayout;

/// Vectors of rows in a tile.
const VECTORS: usize = 2;

/// Most rows of a tile.
const MAX_ROWS: usize = VECTORS * 16;

/// Most columns of a tile.
const MAX_COLUMNS: usize = 12;

/// Most terms that are summed in registers: those of a piece of the right matrix.
const PIECE_TERMS: usize = 768;

/// Columns of a task: a multiple of those of all tiles, and of a quarter of a block.
const TASK_COLUMNS: usize = 96;

/// Elements between the rows of decoded weights, so that they do not all fall into one set of a cache.
const PADDING: usize = 16;

/// Most bytes of panels that are held at once, unless a piece has more.
const PANEL_BYTES: usize = 4 << 20;

/// Multiplications that are worth handing to another thread.
const TASK_PRODUCTS: usize = 1 << 20;

/// A matrix in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strided<'a> {
    pub values: &'a [f32],
    /// Elements from one row to the next.
    pub row: usize,
    /// Elements from one column to the next.
    pub column: usize,
}

impl<'a> Strided<'a> {
    /// A matrix `[rows, columns]` row by row, or its transpose.
    pub fn new(values: &'a [f32], columns: usize, transposed: bool) -> Self {
        let (row, column) = match transposed {
            false => (columns, 1),
            true => (1, columns),
        };
        Self {
            values,
            row,
            column,
        }
    }

    fn assert_shape(&self, what: &str, [rows, columns]: [usize; 2]) {
        let end = (rows - 1) * self.row + (columns - 1) * self.column;
        assert!(
            end < self.values.len(),
            "{what} of {} elements, expected [{rows}, {columns}]",
            self.values.len()
        );
    }
}

/// A matrix of a packed weight.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PackedMatrix<'a> {
    /// The device image.
    pub words: &'a [u32],
    pub layout: &'a PackedLayout,
    /// Where it begins in the weight.
    pub start: usize,
    /// Columns, as it is stored.
    pub columns: usize,
    /// Whether what is multiplied is its transpose.
    pub transposed: bool,
}

/// The right matrix of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Right<'a> {
    Dense(Strided<'a>),
    Packed(PackedMatrix<'a>),
}

/// The sizes of a product and its factor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gemm {
    /// Rows of the result, its columns, and terms of each sum. None is zero.
    pub sizes: [usize; 3],
    /// The factor.
    pub scale: f32,
}

/// `s A B`.
///
/// Sums do not depend on the number of threads, but in their last bits on the processor.
///
/// # Shapes
/// - `left`: `[m, k]`; `right`: `[k, n]`
/// - returns `[m, n]`, row-major
///
/// # Panics
/// If a matrix is smaller than that, and if the processor does not have `simd`.
pub(crate) fn gemm(simd: Simd, left: Strided, right: Right, gemm: Gemm) -> Vec<f32> {
    let [m, n, _] = gemm.sizes;
    let elems = m.checked_mul(n).expect("as many elements as fit memory");
    let mut out = Vec::with_capacity(elems);
    // SAFETY: there is room for the elements, and all are written.
    unsafe {
        multiplied(simd, left, right, gemm, out.as_mut_ptr(), false);
        out.set_len(elems);
    }
    out
}

/// `out += s A B`, otherwise as [`gemm`].
///
/// # Panics
/// As [`gemm`], and if `out` is not `[m, n]`.
pub(crate) fn gemm_add(simd: Simd, left: Strided, right: Right, gemm: Gemm, out: &mut [f32]) {
    let [m, n, _] = gemm.sizes;
    assert_eq!(m.checked_mul(n), Some(out.len()), "elements of the result");
    // SAFETY: they are as many.
    unsafe { multiplied(simd, left, right, gemm, out.as_mut_ptr(), true) }
}

/// Writes the product to `out`, all of it, or adds it to what is there.
///
/// # Safety
/// `out` must be valid for writing `[m, n]`, and to `add` for reading too; nobody else may use it meanwhile.
unsafe fn multiplied(
    simd: Simd,
    left: Strided,
    right: Right,
    gemm: Gemm,
    out: *mut f32,
    add: bool,
) {
    simd.assert_available();
    let [m, n, k] = gemm.sizes;
    left.assert_shape("the left matrix", [m, k]);
    let kernel = match simd {
        Simd::Portable => Kernel::new::<Portable>(portable_block),
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => Kernel::new::<Avx2>(avx2_block),
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 | Simd::Avx512Bf16 => Kernel::new::<Avx512>(avx512_block),
        #[cfg(not(target_arch = "x86_64"))]
        Simd::Avx2 | Simd::Avx512 | Simd::Avx512Bf16 => unreachable!("not available"),
    };
    let factors = match right {
        Right::Dense(matrix) => {
            matrix.assert_shape("the right matrix", [k, n]);
            Factors::Dense(matrix)
        }
        Right::Packed(matrix) => {
            dequantize::assert_words(matrix.words, matrix.layout);
            let end = (k * n).checked_add(matrix.start);
            assert!(
                end.is_some_and(|end| end <= matrix.layout.elems()),
                "a weight of {}, expected [{k}, {n}] from {} on",
                matrix.layout.elems(),
                matrix.start
            );
            let decoder = Task {
                source: Source::new(matrix.words, matrix.layout),
                simd,
                stream: false,
            };
            Factors::Packed(matrix, decoder)
        }
    };
    let whole_panels = m.next_multiple_of(kernel.rows);
    let pieces = (PANEL_BYTES / (4 * whole_panels * PIECE_TERMS)).max(1);
    let product = Product {
        gemm,
        factors,
        kernel,
        out: Out(out),
        add,
    };
    let piece = k.div_ceil(k.div_ceil(PIECE_TERMS)).next_multiple_of(64);
    let mut panels = PANELS.take();
    for first in (0..k).step_by(pieces * piece) {
        let terms = [first, (k - first).min(pieces * piece)];
        lay_out(&mut panels, left, m, terms, kernel.rows);
        product.multiply(&panels, terms, piece);
    }
    PANELS.set(panels);
}

/// The code of a set of vector instructions.
#[derive(Clone, Copy)]
struct Kernel {
    /// Rows of a panel.
    rows: usize,
    /// # Safety
    /// The processor must have the instructions.
    block: unsafe fn(&Block),
}

impl Kernel {
    fn new<V: Vector>(block: unsafe fn(&Block)) -> Self {
        let rows = VECTORS * V::LANES;
        Self { rows, block }
    }
}

thread_local! {
    /// The memory of panels, which the next product of the thread uses again.
    static PANELS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Lays terms of the left matrix out in panels: `[panels, terms, rows of a panel]`, zeros for the rows that there
/// are not.
fn lay_out(
    panels: &mut Vec<f32>,
    left: Strided,
    m: usize,
    [first, terms]: [usize; 2],
    rows: usize,
) {
    panels.resize(m.next_multiple_of(rows) * terms, 0.0);
    let tasks = panels.par_chunks_mut(rows * terms).enumerate();
    let tasks = tasks.with_min_len((TASK_PRODUCTS >> 4).div_ceil(rows * terms));
    tasks.for_each(|(index, panel)| {
        let there = (m - index * rows).min(rows);
        let values = &left.values[index * rows * left.row + first * left.column..];
        if there < rows {
            panel.fill(0.0);
        }
        if left.row == 1 {
            for (term, to) in panel.chunks_exact_mut(rows).enumerate() {
                to[..there].copy_from_slice(&values[term * left.column..][..there]);
            }
            return;
        }
        let mut row = 0;
        // Squares are transposed in registers.
        if left.column == 1 {
            while row + SQUARE <= there {
                let from: [&[f32]; SQUARE] =
                    std::array::from_fn(|i| &values[(row + i) * left.row..][..terms]);
                transpose(from, &mut panel[row..], rows);
                row += SQUARE;
            }
        }
        for row in row..there {
            let values = values[row * left.row..].iter().step_by(left.column);
            let places = panel[row..].iter_mut().step_by(rows);
            places.zip(values).for_each(|(to, &from)| *to = from);
        }
    });
}

/// Rows and terms that are transposed together.
const SQUARE: usize = 4;

/// Writes terms of some rows next to each other, `stride` from one term to the next.
fn transpose(from: [&[f32]; SQUARE], to: &mut [f32], stride: usize) {
    let squares = from.map(|row| row.as_chunks::<SQUARE>());
    let count = squares[0].0.len();
    for at in 0..count {
        let square = squares.map(|(chunks, _)| chunks[at]);
        for term in 0..SQUARE {
            let to = &mut to[(at * SQUARE + term) * stride..][..SQUARE];
            to.copy_from_slice(&square.map(|row| row[term]));
        }
    }
    for term in 0..squares[0].1.len() {
        let to = &mut to[(count * SQUARE + term) * stride..][..SQUARE];
        to.copy_from_slice(&squares.map(|(_, rest)| rest[term]));
    }
}

enum Factors<'a> {
    Dense(Strided<'a>),
    Packed(PackedMatrix<'a>, Task<'a>),
}

/// The result, of which each task writes columns and rows of its own.
#[derive(Clone, Copy)]
struct Out(*mut f32);

impl Out {
    fn at(self, index: usize) -> *mut f32 {
        self.0.wrapping_add(index)
    }
}

// SAFETY: tasks write places of their own, see `Product::multiply`.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

struct Product<'a> {
    gemm: Gemm,
    factors: Factors<'a>,
    kernel: Kernel,
    out: Out,
    add: bool,
}

/// Some panels and terms of a product with some columns.
struct Block<'a> {
    /// `[panels, stride / rows of a panel, rows of a panel]`.
    panels: &'a [f32],
    /// Elements from one panel to the next.
    stride: usize,
    terms: usize,
    /// The right matrix, `[terms, columns]`.
    factors: Strided<'a>,
    columns: usize,
    /// The element of the result in the first row and column.
    out: *mut f32,
    /// Rows of the result.
    rows: usize,
    /// Columns of the whole result.
    n: usize,
    scale: f32,
    add: bool,
}

impl Product<'_> {
    /// The part of the product that the panels have the terms of.
    fn multiply(&self, panels: &[f32], [first, terms]: [usize; 2], piece: usize) {
        let [m, n, _] = self.gemm.sizes;
        let panel = self.kernel.rows * terms;
        let count = panels.len() / panel;
        let threads = rayon::current_num_threads();
        let columns = match n >= 4 * TASK_COLUMNS * threads {
            true => 2 * TASK_COLUMNS,
            false => TASK_COLUMNS,
        };
        let of_columns = n.div_ceil(columns);
        // A weight is decoded once for each group of rows: only if there are too few tasks otherwise.
        let groups = (2 * threads).div_ceil(of_columns).min(count);
        let group = count.div_ceil(groups);
        let groups = count.div_ceil(group);
        let tasks = 0..of_columns * groups;
        let work = |buffer: &mut Vec<f32>, task: usize| {
            let column = task / groups * columns;
            let row = task % groups * group * self.kernel.rows;
            let panels = &panels[task % groups * group * panel..];
            let panels = &panels[..panels.len().min(group * panel)];
            for start in (0..terms).step_by(piece) {
                let count = piece.min(terms - start);
                let columns = columns.min(n - column);
                let block = Block {
                    panels: &panels[start * self.kernel.rows..],
                    stride: panel,
                    terms: count,
                    factors: self
                        .factors
                        .at([first + start, count], [column, columns], buffer),
                    columns,
                    out: self.out.at(row * n + column),
                    rows: (m - row).min(group * self.kernel.rows),
                    n,
                    scale: self.gemm.scale,
                    add: self.add || first + start > 0,
                };
                // SAFETY: `gemm` chose the kernel by the instructions that it checked, the shapes too; no other
                // task has these rows and columns.
                unsafe { (self.kernel.block)(&block) };
            }
        };
        let least = TASK_PRODUCTS.div_ceil((m * n * terms).div_ceil(tasks.len()));
        let tasks = tasks.into_par_iter().with_min_len(least);
        tasks.for_each_init(Vec::new, work);
    }
}

impl Factors<'_> {
    /// Some terms of some columns, decoded into the buffer if they are packed.
    fn at<'b>(
        &'b self,
        [term, terms]: [usize; 2],
        [column, columns]: [usize; 2],
        buffer: &'b mut Vec<f32>,
    ) -> Strided<'b> {
        let (matrix, decoder) = match self {
            Self::Dense(matrix) => {
                let values = &matrix.values[term * matrix.row + column * matrix.column..];
                return Strided { values, ..*matrix };
            }
            Self::Packed(matrix, decoder) => (matrix, decoder),
        };
        // Rows as they are stored.
        let ([row, rows], [first, count]) = match matrix.transposed {
            false => ([term, terms], [column, columns]),
            true => ([column, columns], [term, terms]),
        };
        let stride = count + PADDING;
        buffer.resize(rows * stride, 0.0);
        for (index, to) in buffer.chunks_exact_mut(stride).enumerate() {
            let start = matrix.start + (row + index) * matrix.columns + first;
            decoder.decode::<f32, f32>(start, &mut to[..count]);
        }
        Strided::new(buffer, stride, matrix.transposed)
    }
}

unsafe fn portable_block(block: &Block) {
    // SAFETY: plain code needs no instructions; the shapes are those of the block.
    unsafe { multiply::<Portable, 4>(block) }
}

/// # Safety
/// The processor must have AVX2, F16C and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c,fma")]
unsafe fn avx2_block(block: &Block) {
    // SAFETY: this function has the features; the shapes are those of the block.
    unsafe { multiply::<Avx2, 6>(block) }
}

/// # Safety
/// The processor must have AVX-512 F, BW and VL.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn avx512_block(block: &Block) {
    // SAFETY: this function has the features; the shapes are those of the block.
    unsafe { multiply::<Avx512, MAX_COLUMNS>(block) }
}

/// Makes a block in tiles of `C` columns, the rest in tiles of fewer.
///
/// # Safety
/// The processor must have the instructions of `V`, and the block must be as it says.
#[inline(always)]
unsafe fn multiply<V: Vector, const C: usize>(block: &Block) {
    let rows = VECTORS * V::LANES;
    let mut sums = [0.0f32; MAX_ROWS * MAX_COLUMNS];
    for first in (0..block.rows).step_by(rows) {
        let there = (block.rows - first).min(rows);
        // SAFETY: as the caller vouches; the panel is of `first`.
        unsafe {
            let panel = block.panels.as_ptr().add(first / rows * block.stride);
            let mut column = 0;
            while column < block.columns {
                let left = block.columns - column;
                let done = match left {
                    _ if left >= C => tile::<V, C>(block, panel, column, &mut sums),
                    4.. => tile::<V, 4>(block, panel, column, &mut sums),
                    _ => tile::<V, 1>(block, panel, column, &mut sums),
                };
                let out = block.out.add(first * block.n + column);
                match done {
                    _ if done == C => write::<C>(block, &sums, rows, there, out),
                    4 => write::<4>(block, &sums, rows, there, out),
                    _ => write::<1>(block, &sums, rows, there, out),
                }
                column += done;
            }
        }
    }
}

/// The sums of a panel with `C` columns, `[C, rows of a panel]`. Returns `C`.
///
/// # Safety
/// As [`multiply`], and the columns must be there.
#[inline(always)]
unsafe fn tile<V: Vector, const C: usize>(
    block: &Block,
    panel: *const f32,
    column: usize,
    out: &mut [f32],
) -> usize {
    let Strided {
        values,
        row,
        column: next,
    } = block.factors;
    let out = &mut out[..C * VECTORS * V::LANES];
    // SAFETY: as the caller vouches.
    unsafe {
        let mut sums = [[V::splat(0.0); VECTORS]; C];
        let (mut panel, mut factors) = (panel, values.as_ptr().add(column * next));
        for _ in 0..block.terms {
            let x = [V::load(panel), V::load(panel.add(V::LANES))];
            for (column, sums) in sums.iter_mut().enumerate() {
                let factor = V::splat(*factors.add(column * next));
                for (sum, &x) in sums.iter_mut().zip(&x) {
                    *sum = factor.mul_add(x, *sum);
                }
            }
            panel = panel.add(VECTORS * V::LANES);
            factors = factors.wrapping_add(row);
        }
        for (sum, to) in sums
            .as_flattened()
            .iter()
            .zip(out.chunks_exact_mut(V::LANES))
        {
            sum.store(to.as_mut_ptr());
        }
    }
    C
}

/// Writes the sums of some rows, or adds them.
///
/// # Safety
/// The result must have these rows and `C` columns from `out` on, and nobody else may use them meanwhile.
#[inline(always)]
unsafe fn write<const C: usize>(
    block: &Block,
    sums: &[f32],
    of_panel: usize,
    rows: usize,
    out: *mut f32,
) {
    for row in 0..rows {
        let sums: [f32; C] =
            std::array::from_fn(|column| sums[column * of_panel + row] * block.scale);
        // SAFETY: as the caller vouches.
        unsafe {
            let out = out.add(row * block.n).cast::<[f32; C]>();
            let sums = match block.add {
                true => {
                    let there = out.read();
                    std::array::from_fn(|column| there[column] + sums[column])
                }
                false => sums,
            };
            out.write(sums);
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::format::QuantConfig;
    use crate::host;

    /// Numbers from -1 to 1.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(next).collect()
    }

    /// `out + s A B` in f64.
    fn expected(left: Strided, right: Strided, gemm: Gemm, out: &[f32]) -> Vec<f64> {
        let [_, n, k] = gemm.sizes;
        let at = |matrix: Strided, row, column| {
            f64::from(matrix.values[row * matrix.row + column * matrix.column])
        };
        let element = |(index, &out): (usize, &f32)| {
            let (row, column) = (index / n, index % n);
            let terms = (0..k).map(|term| at(left, row, term) * at(right, term, column));
            f64::from(out) + f64::from(gemm.scale) * terms.sum::<f64>()
        };
        out.iter().enumerate().map(element).collect()
    }

    fn assert_close(given: &[f32], expected: &[f64], k: usize) {
        assert_eq!(given.len(), expected.len());
        // Rounding of sums of as many products of numbers up to one; a term is a thousand times as much.
        let tolerance = 1e-7 * (k as f64).max(10.0);
        for (index, (&given, expected)) in given.iter().zip(expected).enumerate() {
            let difference = (f64::from(given) - expected).abs();
            assert!(difference < tolerance, "{index}: {given} {expected}");
        }
    }

    /// Rows that fill no panel, columns that fill no tile, terms of several pieces.
    #[rstest]
    fn all_instructions_multiply_dense_matrices(
        #[values(Simd::Portable, Simd::Avx2, Simd::Avx512)] simd: Simd,
        #[values([1, 1, 1], [33, 21, 16], [70, 205, 64], [5, 16, 1700], [200, 3, 769])]
        sizes: [usize; 3],
        #[values(false, true)] left_transposed: bool,
        #[values(false, true)] right_transposed: bool,
        #[values(false, true)] add: bool,
    ) {
        if !simd.is_available() {
            return;
        }
        let [m, n, k] = sizes;
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        let left = Strided::new(&a, if left_transposed { m } else { k }, left_transposed);
        let right = Strided::new(&b, if right_transposed { k } else { n }, right_transposed);
        let scale = if add { 0.75 } else { 1.0 };
        let settings = Gemm { sizes, scale };
        let mut out = match add {
            true => numbers(m * n, 3),
            false => vec![0.0; m * n],
        };
        let expected = expected(left, right, settings, &out);
        let right = Right::Dense(right);
        match add {
            true => gemm_add(simd, left, right, settings, &mut out),
            false => out = gemm(simd, left, right, settings),
        }
        assert_close(&out, &expected, k);
    }

    /// A matrix in the midst of a weight, whose rows end within a block and within a word.
    #[rstest]
    fn a_packed_weight_is_multiplied_as_its_decoded_values(
        #[values(Simd::Portable, Simd::Avx2, Simd::Avx512)] simd: Simd,
        #[values([64, 128], [100, 300], [805, 77], [13, 1600])] stored: [usize; 2],
        #[values(false, true)] transposed: bool,
        #[values(QuantConfig::default(), QuantConfig::flat())] config: QuantConfig,
    ) {
        if !simd.is_available() {
            return;
        }
        const START: usize = 3;
        let [rows, columns] = stored;
        let elems = START + rows * columns;
        let weight = numbers(elems, 4);
        let words = host::quantize(&weight, &[elems], config).expect("a weight");
        let layout = PackedLayout::new(elems, config);
        let mut decoded = vec![0.0; rows * columns];
        host::dequantize(&words, &layout, START, &mut decoded);

        let [k, n] = if transposed {
            [columns, rows]
        } else {
            [rows, columns]
        };
        let m = 37;
        let x = numbers(m * k, 5);
        let left = Strided::new(&x, k, false);
        let settings = Gemm {
            sizes: [m, n, k],
            scale: 1.0,
        };
        let right = Strided::new(&decoded, columns, transposed);
        let expected = expected(left, right, settings, &vec![0.0; m * n]);
        let right = Right::Packed(PackedMatrix {
            words: &words,
            layout: &layout,
            start: START,
            columns,
            transposed,
        });
        assert_close(&gemm(simd, left, right, settings), &expected, k);
    }
}
