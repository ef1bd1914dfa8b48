//! How a parameter lies to what is stored of it.

use std::borrow::Cow;

use super::elements::transpose;
use crate::error::Nf4Error;
use crate::format::{FloatElement, matrix_dims};

/// Whether a quantized parameter is what is stored, or the transpose of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Orientation {
    AsStored,
    /// The transposed matrix, as bitsandbytes has it.
    Transposed,
    /// A stack of transposed matrices: the experts of gpt-oss are `[experts, k, rows]`, and their blocks lie
    /// along `k`.
    TransposedStack,
}

/// Transposes the matrices of a stack, which is row-major.
///
/// # Shapes
/// - `dims`: matrices, rows, columns
pub(crate) fn transpose_stack<T: FloatElement>(
    [matrices, rows, columns]: [usize; 3],
    values: &[T],
) -> Vec<T> {
    if matrices == 1 {
        return transpose([rows, columns], |index| values[index]);
    }
    // A stack without elements has no matrices to take apart.
    let matrices = values.chunks_exact((rows * columns).max(1));
    let transposed = matrices.map(|matrix| transpose([rows, columns], |index| matrix[index]));
    transposed.collect::<Vec<_>>().concat()
}

/// The shape of the transposed matrices of a stack.
pub(crate) fn swap_sides(shape: &mut [usize]) {
    let last = shape.len() - 1;
    shape.swap(last - 1, last);
}

impl Orientation {
    /// Matrices, rows and columns of what is to be transposed; `None` if nothing is.
    ///
    /// # Errors
    /// [`Nf4Error::NotAMatrix`] for a transposed weight of other than two dimensions.
    pub fn dims(self, key: &str, shape: &[usize]) -> Result<Option<[usize; 3]>, Nf4Error> {
        match (self, shape) {
            (Self::AsStored, _) => Ok(None),
            (Self::TransposedStack, [matrices @ .., rows, columns]) => {
                Ok(Some([matrices.iter().product(), *rows, *columns]))
            }
            _ => matrix_dims(key, shape).map(|[rows, columns]| Some([1, rows, columns])),
        }
    }

    /// Transposes what is stored into the parameter, or the parameter into what is stored.
    ///
    /// # Errors
    /// Those of [`dims`](Self::dims).
    pub fn turn<'a, T: FloatElement>(
        self,
        key: &str,
        values: Cow<'a, [T]>,
        shape: &mut [usize],
    ) -> Result<Cow<'a, [T]>, Nf4Error> {
        let Some(dims) = self.dims(key, shape)? else {
            return Ok(values);
        };
        swap_sides(shape);
        Ok(transpose_stack(dims, &values).into())
    }
}
