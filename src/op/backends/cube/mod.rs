//! The operations on CubeCL runtimes.

#[cfg(feature = "cublaslt")]
mod cublaslt;
mod ops;
mod primitive;
mod tune;

pub(in crate::op) use ops::check_strategy;
pub(crate) use primitive::{Kind, cube_tensor, from_cube};

use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

/// A tensor that may be written to: itself if nobody else has it.
pub(crate) fn owned(tensor: CubeTensor) -> CubeTensor {
    let tensor = into_contiguous(tensor);
    match tensor.can_mut() {
        true => tensor,
        false => tensor.copy(),
    }
}
