//! Sums over devices by the collectives of CubeCL.
//!
//! All devices of a group must come to their sums in one order, or each waits for another one for ever. Burn's fusion
//! queues operations, and may run those that do not depend on each other in another order than they were called
//! in. So these are no operations of its own: they are submitted by the thread that calls them, after all that was
//! queued.
//!
//! CubeCL skips a sum whose operand was never written, as for want of memory, and says so where its result is read: the
//! other devices wait for it, or pair it with the next. So a rank whose device has failed must not be followed by a
//! save: ranks exchange before one, and the report of a step is read before that.

use burn::tensor::{Int, Shape, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::{ElemType, FloatKind, UIntKind};
use cubecl::server::ReduceOperation;
use cubecl_common::device::DeviceId;

use crate::op::{CubeKind, cube_tensor, from_cube, owned};

/// The devices of a group.
#[derive(Debug, Clone)]
pub(super) struct Collective {
    pub devices: Vec<DeviceId>,
}

impl Collective {
    /// The sums of f32, in place if the tensor has no other owner.
    pub fn sum(&self, tensor: Tensor<1>) -> Tensor<1> {
        let tensor = self.begin(cube(tensor), ElemType::Float(FloatKind::F32));
        tensor.client.sync_collective();
        from_cube(tensor)
    }

    /// Begins to sum words of 32 bit.
    pub fn begin_sum(&self, words: Tensor<1, Int>) -> Summing {
        Summing(Some(self.begin(cube(words), ElemType::UInt(UIntKind::U32))))
    }

    fn begin(&self, tensor: CubeTensor, dtype: ElemType) -> CubeTensor {
        let tensor = owned(tensor);
        let handle = || tensor.handle.clone();
        tensor.client.clone().all_reduce(
            handle(),
            handle(),
            dtype,
            self.devices.clone(),
            ReduceOperation::Sum,
        );
        tensor
    }
}

/// Words that the device is summing, on a stream that only its collectives have. It holds their memory, which nobody
/// may have until the sum is made.
#[derive(Debug)]
pub(super) struct Summing(Option<CubeTensor>);

impl Summing {
    /// Has what the device is given from now on wait for the sum.
    pub fn end(mut self) -> CubeTensor {
        self.ended().expect("only this takes it, once")
    }

    fn ended(&mut self) -> Option<CubeTensor> {
        let words = self.0.take()?;
        words.client.sync_collective();
        Some(words)
    }
}

impl Drop for Summing {
    fn drop(&mut self) {
        drop(self.ended());
    }
}

/// One weight of several in a buffer, as a view of it. Burn makes a copy where a view does not end at a multiple of 512
/// bytes, which no kernel needs.
pub(super) fn view(words: &CubeTensor, start: usize, len: usize) -> Tensor<1, Int> {
    let bytes = |words: usize| (words * size_of::<u32>()) as u64;
    let behind = words.meta.num_elements() - start - len;
    let handle = words.handle.clone();
    let handle = handle.offset_start(bytes(start)).offset_end(bytes(behind));
    from_cube(CubeTensor::new_contiguous(
        words.client.clone(),
        words.device.clone(),
        Shape::from([len]),
        handle,
        words.dtype,
    ))
}

fn cube<K: CubeKind>(tensor: Tensor<1, K>) -> CubeTensor {
    cube_tensor(tensor).expect("the device was looked at")
}
