//! The rows of a packed weight that ids ask for.

use super::Simd;
use super::dequantize::{Source, Task, assert_words, task_elems};
use crate::format::{FloatElement, PackedLayout};

/// Decodes the rows `ids` of a weight `[rows, columns]`, one after the other, and nothing else.
///
/// The result is that of [`dequantize`](super::dequantize()) for each row to the bit. `transposed` says
/// that the weight is stored `[columns, rows]`.
///
/// ```
/// use burn_nf4::format::{PackedLayout, QuantConfig};
/// use burn_nf4::host;
///
/// let weight: Vec<f32> = (0..128 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
/// let config = QuantConfig::default();
/// let words = host::quantize(&weight, &[128, 64], config)?;
/// let layout = PackedLayout::new(128 * 64, config);
///
/// let mut rows = [0.0f32; 2 * 64];
/// host::embedding(&words, &layout, [128, 64], false, &[7, 3], &mut rows);
/// let mut row = [0.0f32; 64];
/// host::dequantize(&words, &layout, 3 * 64, &mut row);
/// assert_eq!(rows[64..], row);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// # Shapes
/// - `words`: `layout.words()`; the header is not looked at
/// - `out`: `[ids.len(), columns]`
///
/// # Panics
/// If `words` is shorter than `layout` asks for, if the weight has not `rows * columns` elements, if
/// `out` is of another size, or if there is no such row.
pub fn embedding<T: FloatElement>(
    words: &[u32],
    layout: &PackedLayout,
    [rows, columns]: [usize; 2],
    transposed: bool,
    ids: &[usize],
    out: &mut [T],
) {
    assert_words(words, layout);
    assert_eq!(
        rows.checked_mul(columns),
        Some(layout.elems()),
        "a weight [{rows}, {columns}] of {} elements",
        layout.elems()
    );
    assert_eq!(
        ids.len().checked_mul(columns),
        Some(out.len()),
        "room for {} rows of {columns} elements",
        ids.len()
    );
    if let Some(id) = ids.iter().find(|&&id| id >= rows) {
        panic!("row {id} of {rows}");
    }
    if out.is_empty() {
        return;
    }
    let gather = Gather {
        task: Task {
            source: Source::new(words, layout),
            simd: Simd::detect(),
            // What is gathered is read again at once.
            stream: false,
        },
        rows,
        columns,
        transposed,
    };
    gather.divide(ids, out);
}

/// How to gather rows of one weight.
struct Gather<'a> {
    task: Task<'a>,
    rows: usize,
    columns: usize,
    transposed: bool,
}

impl Gather<'_> {
    /// Halves the ids until they are few, between rayon's threads.
    fn divide<T: FloatElement>(&self, ids: &[usize], out: &mut [T]) {
        if ids.len() <= 1 || out.len() <= task_elems(self.task.simd) {
            for (&id, row) in ids.iter().zip(out.chunks_exact_mut(self.columns)) {
                self.decode(id, row);
            }
            return;
        }
        let (left_ids, right_ids) = ids.split_at(ids.len() / 2);
        let (left, right) = out.split_at_mut(left_ids.len() * self.columns);
        rayon::join(
            || self.divide(left_ids, left),
            || self.divide(right_ids, right),
        );
    }

    fn decode<T: FloatElement>(&self, id: usize, row: &mut [T]) {
        if !self.transposed {
            return self.task.decode::<T, T>(id * self.columns, row);
        }
        for (column, element) in row.iter_mut().enumerate() {
            let start = column * self.rows + id;
            let element = std::slice::from_mut(element);
            self.task.decode::<T, T>(start, element);
        }
    }
}
