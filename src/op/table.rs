//! The product of a few rows with a large matrix of floats.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, backend_extension};

/// Products of Flex with a matrix that may be of fewer bits than the rows, by the vectorised functions of
/// `host`. The functions in front of it call it where [`reads_tables`](super::reads_tables) says so.
#[backend_extension(Flex)]
pub trait TableBackend: Backend {
    /// `x Wᵀ`, with the exact values of `W`.
    ///
    /// # Shapes
    /// - `x`: `[m, k]`; `table`: `[n, k]`, of the dtype of `x`, or where that is f32 of f16 or bf16
    /// - returns `[m, n]`, of the dtype of `x`
    fn table_matmul(x: FloatTensor<Self>, table: FloatTensor<Self>) -> FloatTensor<Self>;
}
