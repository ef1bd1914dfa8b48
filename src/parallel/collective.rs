//! Sums over devices as Burn's dispatch sees them.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, backend_extension};
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::{ElemType, FloatKind, UIntKind};
use cubecl::server::ReduceOperation;
use cubecl_common::device::DeviceId;

#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;

use crate::op::owned;

/// Which devices sum.
#[derive(Debug, Clone)]
pub struct CollectiveSpec {
    /// All devices of the group, in one order on each of them.
    pub devices: Vec<DeviceId>,
}

/// Sums over devices, on a stream of the device that only they have. All devices of a group must come to them in
/// one order.
#[backend_extension(Cube: cfg(feature = "cube"), Fusion: cfg(feature = "fusion"))]
pub trait CollectiveBackend: Backend {
    /// The sums of the elements over the devices, in place if the tensor has no other owner.
    ///
    /// # Shapes
    /// - `tensor`: any, f32, and so the result
    #[fusion(meta = |tensor: &TensorSpec, _spec: &CollectiveSpec| tensor.clone())]
    fn sum_over_devices(tensor: FloatTensor<Self>, spec: CollectiveSpec) -> FloatTensor<Self>;

    /// Begins to sum words. The result must not be read, nor dropped, before [`end_sum`](Self::end_sum).
    ///
    /// # Shapes
    /// - `words`: any, u32, and so the result
    #[fusion(meta = |words: &TensorSpec, _spec: &CollectiveSpec| words.clone())]
    fn begin_sum(words: IntTensor<Self>, spec: CollectiveSpec) -> IntTensor<Self>;

    /// Has what comes after it wait for all sums that were begun.
    ///
    /// # Shapes
    /// - `words`: what [`begin_sum`](Self::begin_sum) gave, and so the result
    #[fusion(meta = |words: &TensorSpec| words.clone())]
    fn end_sum(words: IntTensor<Self>) -> IntTensor<Self>;
}

impl CollectiveBackend for CubeBackend {
    fn sum_over_devices(tensor: FloatTensor<Self>, spec: CollectiveSpec) -> FloatTensor<Self> {
        let tensor = begin(tensor, ElemType::Float(FloatKind::F32), spec);
        tensor.client.sync_collective();
        tensor
    }

    fn begin_sum(words: IntTensor<Self>, spec: CollectiveSpec) -> IntTensor<Self> {
        begin(words, ElemType::UInt(UIntKind::U32), spec)
    }

    fn end_sum(words: IntTensor<Self>) -> IntTensor<Self> {
        words.client.sync_collective();
        words
    }
}

fn begin(tensor: CubeTensor, dtype: ElemType, spec: CollectiveSpec) -> CubeTensor {
    let tensor = owned(tensor);
    let handle = || tensor.handle.clone();
    tensor.client.clone().all_reduce(
        handle(),
        handle(),
        dtype,
        spec.devices,
        ReduceOperation::Sum,
    );
    tensor
}
