//! What a dense product is.

use std::fmt;

use crate::error::Nf4Error;
use crate::format::FloatType;

/// How a matrix lies in its buffer, row after row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MatrixLayout {
    /// Whether the buffer holds the transpose of the matrix.
    pub transposed: bool,
    /// Elements from one stored row to the next.
    pub leading: usize,
    /// Elements from one matrix of a batch to the next; zero uses one for all.
    pub batch_stride: usize,
}

impl MatrixLayout {
    /// Rows without gaps, matrices without gaps.
    pub const fn contiguous(rows: usize, columns: usize) -> Self {
        Self {
            transposed: false,
            leading: columns,
            batch_stride: rows.saturating_mul(columns),
        }
    }

    /// The transpose of the matrix without gaps; the sizes are those of the matrix.
    pub const fn contiguous_transposed(rows: usize, columns: usize) -> Self {
        Self {
            transposed: true,
            leading: rows,
            batch_stride: rows.saturating_mul(columns),
        }
    }

    /// The sizes as they are stored, of a matrix of these sizes.
    pub(super) fn stored(&self, rows: usize, columns: usize) -> [usize; 2] {
        match self.transposed {
            false => [rows, columns],
            true => [columns, rows],
        }
    }

    /// Elements up to the end of the last matrix; `None` if they are more than can be counted.
    pub(super) fn elems(&self, rows: usize, columns: usize, batch: usize) -> Option<usize> {
        let [rows, columns] = self.stored(rows, columns);
        let matrix = (rows - 1).checked_mul(self.leading)?.checked_add(columns)?;
        (batch - 1)
            .checked_mul(self.batch_stride)?
            .checked_add(matrix)
    }

    /// The same without what does not matter: the distance between rows or matrices where there is one.
    fn normalized(self, rows: usize, columns: usize, batch: usize) -> Self {
        let [stored_rows, width] = self.stored(rows, columns);
        Self {
            leading: if stored_rows == 1 {
                width
            } else {
                self.leading
            },
            batch_stride: if batch == 1 { 0 } else { self.batch_stride },
            ..self
        }
    }

    fn check(&self, name: &str, rows: usize, columns: usize, batch: usize) -> Result<(), Nf4Error> {
        let [stored_rows, width] = self.stored(rows, columns);
        if self.leading < width {
            return Err(Nf4Error::Shape {
                tensor: format!("rows of {name}"),
                expected: vec![stored_rows, width],
                given: vec![stored_rows, self.leading],
            });
        }
        match self.elems(rows, columns, batch) {
            Some(elems) if elems <= isize::MAX as usize / 4 => Ok(()),
            _ => Err(Nf4Error::ElementCount {
                tensor: name.into(),
                shape: vec![batch, rows, columns],
            }),
        }
    }
}

/// `D = s A B + C + b`, of matrices of one type, for each of a batch.
///
/// Sums are in f32. For some sizes cuBLASLt rounds `s A B` to the type before it adds `C` and `b`, as
/// operations one after the other do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DenseProduct {
    /// Matrices of the batch.
    pub batch: usize,
    /// Rows of `A` and `D`.
    pub m: usize,
    /// Columns of `B` and `D`.
    pub n: usize,
    /// Columns of `A`, rows of `B`.
    pub k: usize,
    /// How `A` lies in memory.
    pub lhs: MatrixLayout,
    /// How `B` lies in memory.
    pub rhs: MatrixLayout,
    /// Type of all matrices.
    pub dtype: FloatType,
    /// Whether f32 may be multiplied as TF32, with 11 bits of each factor.
    pub tf32: bool,
    /// Whether there is a `b`, added to each row.
    pub bias: bool,
}

impl DenseProduct {
    /// `D = A B` of one pair of matrices without gaps.
    pub const fn new(m: usize, n: usize, k: usize, dtype: FloatType) -> Self {
        Self {
            batch: 1,
            m,
            n,
            k,
            lhs: MatrixLayout::contiguous(m, k),
            rhs: MatrixLayout::contiguous(k, n),
            dtype,
            tf32: false,
            bias: false,
        }
    }

    /// The product that all products which are computed alike have in common.
    pub(super) fn normalized(self) -> Self {
        let Self { batch, m, n, k, .. } = self;
        Self {
            lhs: self.lhs.normalized(m, k, batch),
            rhs: self.rhs.normalized(k, n, batch),
            tf32: self.tf32 && self.dtype == FloatType::F32,
            ..self
        }
    }

    /// # Errors
    /// [`Nf4Error::ElementCount`] for a size that is zero or larger than cuBLASLt or memory can address,
    /// [`Nf4Error::Shape`] for rows that overlap.
    pub(super) fn check(&self) -> Result<(), Nf4Error> {
        let Self { batch, m, n, k, .. } = *self;
        let most = i32::MAX as usize;
        if [batch, m, n, k]
            .iter()
            .any(|&size| size == 0 || size > most)
        {
            return Err(Nf4Error::ElementCount {
                tensor: "a dense product".into(),
                shape: vec![batch, m, n, k],
            });
        }
        self.lhs.check("lhs", m, k, batch)?;
        self.rhs.check("rhs", k, n, batch)?;
        MatrixLayout::contiguous(m, n).check("product", m, n, batch)
    }
}

impl fmt::Display for DenseProduct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { batch, m, n, k, .. } = self;
        let dtype = self.dtype.name();
        write!(
            f,
            "product of {batch} x [{m}, {k}] and [{k}, {n}] in {dtype}"
        )
    }
}
