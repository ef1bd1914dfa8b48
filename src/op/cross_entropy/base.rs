//! The operations as Burn's dispatch sees them.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, backend_extension};

use crate::cross_entropy::CrossEntropyOptions;
use crate::format::FloatType;

#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;
#[cfg(feature = "fusion")]
use burn::tensor::{DType, Shape};

/// Rows of logits with a target each.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CrossEntropySpec {
    /// Rows.
    pub rows: usize,
    /// Logits of a row.
    pub vocabulary: usize,
    /// How the loss is computed.
    pub options: CrossEntropyOptions,
    /// Type of the logits.
    pub dtype: FloatType,
    /// Whether the backward pass begins at the sum of the result, so that the gradients that come are ones and
    /// need not be multiplied with.
    pub is_root: bool,
}

/// Cross-entropy of a backend: by one kernel on CubeCL, by `host` on Flex.
#[backend_extension(
    Autodiff,
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Fusion: cfg(feature = "fusion"),
)]
pub trait CrossEntropyBackend: Backend {
    /// The loss of each row.
    ///
    /// # Shapes
    /// - `logits`: `[spec.rows, spec.vocabulary]`, of `spec.dtype`
    /// - `targets`: `[spec.rows]`, i32 or i64
    /// - returns `[spec.rows]`, f32
    #[fusion(dtype = DType::F32, shape = Shape::from([spec.rows]))]
    fn cross_entropy(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        spec: CrossEntropySpec,
    ) -> FloatTensor<Self>;

    /// The loss of each row and its gradient with respect to the logits, in their place if nobody else holds
    /// them. No gradient flows through.
    ///
    /// # Shapes
    /// - as for [`cross_entropy`](Self::cross_entropy); the gradient is as the logits
    #[fusion(meta = |logits: &TensorSpec, _targets: &TensorSpec, spec: &CrossEntropySpec| {
        let of_rows = TensorSpec::new(Shape::from([spec.rows]), DType::F32);
        let of_logits = Shape::from([spec.rows, spec.vocabulary]);
        (of_rows, TensorSpec::new(of_logits, logits.dtype))
    })]
    fn cross_entropy_with_gradient(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        spec: CrossEntropySpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// `value`, whose gradient with respect to `parent` is known already.
    ///
    /// # Shapes
    /// - `value`: `[1]`, f32, and so the result; `parent`: any; `gradient`: that of `parent`
    #[fusion(default)]
    fn with_gradient(
        value: FloatTensor<Self>,
        parent: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let _ = (parent, gradient);
        value
    }
}
