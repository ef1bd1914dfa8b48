//! The optimizer's operations as Burn's dispatch sees them.
//!
//! Arguments are validated by [`FlatAdamW`](super::FlatAdamW) in front.

use std::sync::Arc;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, backend_extension};
#[cfg(feature = "fusion")]
use burn::tensor::{DType, Shape};

use super::parts::FlatParts;
#[cfg(feature = "fusion")]
use super::parts::FlatPartsMetadata;
use crate::flat::{AdamWScalars, FlatLayout};
use crate::format::FloatType;

#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;

/// Which tensors are added to a flat buffer.
#[derive(Debug, Clone)]
pub struct AccumulateSpec {
    /// Of the buffer.
    pub layout: Arc<FlatLayout>,
    /// Their numbers.
    pub tensors: Vec<usize>,
    /// Their type.
    pub dtype: FloatType,
}

/// A step of AdamW.
#[derive(Debug, Clone)]
pub struct AdamWSpec {
    /// Of the buffers.
    pub layout: Arc<FlatLayout>,
    pub(crate) scalars: AdamWScalars,
}

/// The optimizer of a backend: kernels on CubeCL, `host` on Flex. Buffers without another owner are written to in
/// place. None of it has a gradient.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Fusion: cfg(feature = "fusion"),
)]
pub trait AdamWBackend: Backend {
    /// The buffer with tensors added to their parts of it.
    ///
    /// # Shapes
    /// - `flat`: `[layout.elems()]`, f32, and so the result; `parts`: `[len]` each, of `spec.dtype`
    #[fusion(meta = |flat: &TensorSpec, _parts: &FlatPartsMetadata, _spec: &AccumulateSpec| flat.clone())]
    fn flat_accumulate(
        flat: FloatTensor<Self>,
        #[extension_type] parts: FlatParts<Self>,
        spec: AccumulateSpec,
    ) -> FloatTensor<Self>;

    /// The loss, and the norm of the buffer.
    ///
    /// # Shapes
    /// - `flat`: `[elems]`, a multiple of 256; `loss`: `[1]`; the result: `[2]`; all f32
    #[fusion(meta = |_flat: &TensorSpec, _loss: &TensorSpec| {
        TensorSpec::new(Shape::from([2]), DType::F32)
    })]
    fn step_report(flat: FloatTensor<Self>, loss: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Parameters and moments after a step, and gradients of zero.
    ///
    /// # Shapes
    /// - `values`, `first`, `second`, `grads`: `[layout.elems()]`, f32, and so the results
    /// - `report`: `[2]`; `tile_tensors`: `[layout.tiles()]`, u32; `factors`: `[2 * layout.tensors()]`
    #[fusion(meta = |values: &TensorSpec, first: &TensorSpec, second: &TensorSpec, grads: &TensorSpec, _report: &TensorSpec, _tile_tensors: &TensorSpec, _factors: &TensorSpec, _spec: &AdamWSpec| {
        (values.clone(), first.clone(), second.clone(), grads.clone())
    })]
    #[allow(clippy::too_many_arguments)]
    fn flat_adamw(
        values: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        grads: FloatTensor<Self>,
        report: FloatTensor<Self>,
        tile_tensors: IntTensor<Self>,
        factors: FloatTensor<Self>,
        spec: AdamWSpec,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    );
}
