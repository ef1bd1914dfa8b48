//! Products of small matrices of f32, in tiles that stay in registers.

use super::vector::Vector;

/// The left matrix of a product, with any strides.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) start: *const f32,
    /// Elements from one row to the next.
    pub(super) row: usize,
    /// Elements from one column to the next.
    pub(super) column: usize,
}

/// A matrix of whole vectors.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) start: *const f32,
    /// Elements from one row to the next.
    pub(super) stride: usize,
}

impl Rows {
    pub(super) fn left(self) -> Left {
        Left {
            start: self.start,
            row: self.stride,
            column: 1,
        }
    }
}

/// `out = left right`, or `out += left right` if `ADD`.
///
/// # Shapes
/// - `left`: `[rows, inner]`; `right`: `[inner, columns]`
/// - `out`: `[rows, columns]`, rows `stride` apart; `columns` is a multiple of the lanes of a vector
///
/// # Safety
/// The processor must have the instructions of `V`, and pointers be to matrices of these shapes.
#[inline(always)]
pub(super) unsafe fn product<V: Vector, const ADD: bool>(
    left: Left,
    right: Rows,
    [rows, inner, columns]: [usize; 3],
    out: *mut f32,
    stride: usize,
) {
    let mut column = 0;
    while column < columns {
        let pair = column + 2 * V::LANES <= columns;
        // SAFETY: as the caller vouches.
        unsafe {
            let right = Rows {
                start: right.start.add(column),
                ..right
            };
            let out = out.add(column);
            match pair {
                true => panel::<V, 2, ADD>(left, right, rows, inner, out, stride),
                false => panel::<V, 1, ADD>(left, right, rows, inner, out, stride),
            }
        }
        column += if pair { 2 } else { 1 } * V::LANES;
    }
}

/// [`product`] with a few vectors of columns.
///
/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn panel<V: Vector, const VECTORS: usize, const ADD: bool>(
    left: Left,
    right: Rows,
    rows: usize,
    inner: usize,
    out: *mut f32,
    stride: usize,
) {
    let mut row = 0;
    while row < rows {
        let left_rows = (rows - row).min(V::ROWS);
        // SAFETY: as the caller vouches.
        let tile_rows = unsafe {
            let left = Left {
                start: left.start.add(row * left.row),
                ..left
            };
            let out = out.add(row * stride);
            match left_rows {
                8.. => tile::<V, 8, VECTORS, ADD>(left, right, inner, out, stride),
                4.. => tile::<V, 4, VECTORS, ADD>(left, right, inner, out, stride),
                2.. => tile::<V, 2, VECTORS, ADD>(left, right, inner, out, stride),
                _ => tile::<V, 1, VECTORS, ADD>(left, right, inner, out, stride),
            }
        };
        row += tile_rows;
    }
}

/// [`product`] with a few rows and a few vectors of columns. Returns how many rows.
///
/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn tile<V: Vector, const ROWS: usize, const VECTORS: usize, const ADD: bool>(
    left: Left,
    right: Rows,
    inner: usize,
    out: *mut f32,
    stride: usize,
) -> usize {
    // SAFETY: as the caller vouches.
    unsafe {
        let mut sums = [[V::splat(0.0); VECTORS]; ROWS];
        for i in 0..inner {
            let mut vectors = [V::splat(0.0); VECTORS];
            for (j, vector) in vectors.iter_mut().enumerate() {
                *vector = V::load(right.start.add(i * right.stride + j * V::LANES));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let factor = V::splat(*left.start.add(row * left.row + i * left.column));
                for (sum, vector) in sums.iter_mut().zip(vectors) {
                    *sum = factor.mul_add(vector, *sum);
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            for (j, sum) in sums.into_iter().enumerate() {
                let to = out.add(row * stride + j * V::LANES);
                match ADD {
                    true => V::load(to).add(sum).store(to),
                    false => sum.store(to),
                }
            }
        }
    }
    ROWS
}
