//! The operations as Burn's dispatch sees them.
//!
//! Arguments are validated by the functions over [`Tensor`](burn::tensor::Tensor) in front; in
//! here an impossible call is a bug and panics.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata, backend_extension};
use burn::tensor::DType;

use crate::format::{FloatType, PackedLayout};

/// What to decode of a packed weight, and to what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DequantizeSpec {
    /// Layout of the packed weight.
    pub layout: PackedLayout,
    /// Rows of the result.
    pub rows: usize,
    /// Columns of the result: `rows * columns` elements are decoded.
    pub columns: usize,
    /// First element to decode.
    pub start: usize,
    /// Type to decode to.
    pub dtype: FloatType,
}

/// How to quantize a weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuantizeSpec {
    /// Layout of the packed weight.
    pub layout: PackedLayout,
    /// Shape of the weight.
    pub shape: Vec<usize>,
    /// Type of the weight.
    pub dtype: FloatType,
}

/// NF4 operations of a backend.
///
/// Implemented for the CubeCL runtimes, for Flex, and over them for Fusion and Autodiff.
#[backend_extension(
    Autodiff,
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Fusion: cfg(feature = "fusion"),
)]
pub trait Nf4Backend: Backend {
    /// Quantizes a weight. No gradient flows through.
    ///
    /// # Shapes
    /// - `weight`: `spec.shape`, of `spec.dtype`
    /// - returns `[spec.layout.words]`, u32
    #[fusion(dtype = DType::U32, shape = burn::tensor::Shape::from([spec.layout.words]))]
    fn nf4_quantize(weight: FloatTensor<Self>, spec: QuantizeSpec) -> IntTensor<Self>;

    /// Decodes a range of a packed weight.
    ///
    /// # Shapes
    /// - `packed`: `[spec.layout.words]`, u32
    /// - returns `[spec.rows, spec.columns]`, of `spec.dtype`
    #[fusion(dtype = DType::from(spec.dtype), shape = burn::tensor::Shape::from([spec.rows, spec.columns]))]
    fn nf4_dequantize(packed: IntTensor<Self>, spec: DequantizeSpec) -> FloatTensor<Self>;

    /// `y = x Wᵀ` with a packed weight `W`.
    ///
    /// # Shapes
    /// - `x`: `[m, k]`, of `spec.dtype`
    /// - `packed`: `[spec.layout.words]`, u32, a weight `[n, k] = [spec.rows, spec.columns]`
    /// - returns `[m, n]`
    #[fusion(default)]
    fn nf4_linear(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: DequantizeSpec,
    ) -> FloatTensor<Self> {
        let weight = Self::nf4_dequantize(packed, spec);
        Self::float_matmul(x, Self::float_swap_dims(weight, 0, 1))
    }

    /// `dx = dy W`, the gradient of [`nf4_linear`](Self::nf4_linear) for `x`. The weight is
    /// decoded again.
    ///
    /// # Shapes
    /// - `grad`: `[m, n]`, of `spec.dtype`
    /// - `packed`: as for `nf4_linear`
    /// - returns `[m, k]`
    #[fusion(default)]
    fn nf4_linear_backward(
        grad: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: DequantizeSpec,
    ) -> FloatTensor<Self> {
        let weight = Self::nf4_dequantize(packed, spec);
        Self::float_matmul(grad, weight)
    }
}

/// Checks in debug builds what the functions in front have promised.
pub(super) fn debug_check(packed: &impl TensorMetadata, layout: &PackedLayout) {
    debug_assert_eq!(packed.shape().as_slice(), [layout.words]);
    debug_assert_eq!(packed.dtype(), DType::U32);
}
