//! The product of a few rows with a large matrix of floats.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata, backend_extension};

/// Products of a backend with a matrix that may be of fewer bits than the rows: by the vectorised functions of
/// `host` on Flex, of Burn's operations on others.
#[backend_extension(
    Autodiff,
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Fusion: cfg(feature = "fusion"),
)]
pub trait TableBackend: Backend {
    /// `x Wᵀ`, with the exact values of `W`.
    ///
    /// # Shapes
    /// - `x`: `[m, k]`; `table`: `[n, k]`, of the dtype of `x`, or where that is f32 of f16 or bf16
    /// - returns `[m, n]`, of the dtype of `x`
    #[fusion(default)]
    fn table_matmul(x: FloatTensor<Self>, table: FloatTensor<Self>) -> FloatTensor<Self> {
        let table = Self::float_cast(table, x.dtype().into());
        Self::float_matmul(x, Self::float_transpose(table))
    }
}
