//! The host side of the kernels: validate, choose, launch. Works on CubeCL clients and handles.

mod dequantize;
mod lora;
mod matmul;
mod quantize;
mod tensor_core;

pub use dequantize::{DequantizePlan, Variant, dequantize};
pub use lora::Lora;
pub use matmul::{MatmulPlan, MatmulVariant, Operands, Product};
pub use quantize::quantize;
pub(crate) use tensor_core::has_tensor_cores;
pub use tensor_core::{Cut, TENSOR_CORE_ROWS, TensorCoreTile};

use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;

use crate::error::Nf4Error;
use crate::format::FloatType;

/// CubeCL's name for a float type.
pub fn elem_type(dtype: FloatType) -> ElemType {
    ElemType::Float(match dtype {
        FloatType::F16 => FloatKind::F16,
        FloatType::BF16 => FloatKind::BF16,
        FloatType::F32 => FloatKind::F32,
    })
}

/// Whether kernels on this device may use barriers: CubeCL's CPU runtime hangs on them.
fn has_barriers(client: &Client) -> bool {
    client.properties().hardware.num_cpu_cores.is_none()
}

/// Checks that buffers, by name, hold what is expected of them at least.
fn check_lengths<const N: usize>(lengths: [(&str, usize, usize); N]) -> Result<(), Nf4Error> {
    for (tensor, expected, given) in lengths {
        if given < expected {
            return Err(Nf4Error::Length {
                tensor: tensor.into(),
                expected,
                given,
            });
        }
    }
    Ok(())
}

/// Whether the device can hold a float type in a buffer and convert f32 to it.
///
/// # Errors
/// [`Nf4Error::DeviceDtype`] if it cannot.
pub fn check_dtype(client: &Client, dtype: FloatType) -> Result<(), Nf4Error> {
    use cubecl::features::TypeUsage;
    let usage = client.properties().type_usage(elem_type(dtype));
    if usage.contains(TypeUsage::Buffer) && usage.contains(TypeUsage::Conversion) {
        return Ok(());
    }
    Err(Nf4Error::DeviceDtype {
        device: client.name().into(),
        dtype: dtype.name().into(),
    })
}

/// The widest vector that the device stores at once, at most `limit` elements, and that divides
/// all of `multiples`.
fn vector_size(client: &Client, dtype: FloatType, limit: usize, multiples: &[usize]) -> usize {
    client
        .io_optimized_vector_sizes(dtype.size_bytes())
        .filter(|&size| size <= limit && size.is_power_of_two())
        .filter(|&size| {
            multiples
                .iter()
                .all(|multiple| multiple.is_multiple_of(size))
        })
        .max()
        .unwrap_or(1)
}

/// Spreads `cubes` over the three dimensions of a grid. Kernels count along `CUBE_POS` and leave
/// out what overshoots.
fn cube_count(client: &Client, cubes: usize) -> CubeCount {
    let (max_x, max_y, _) = client.properties().hardware.max_cube_count;
    let x = cubes.min(max_x as usize);
    let y = cubes.div_ceil(x).min(max_y as usize);
    let z = cubes.div_ceil(x * y);
    CubeCount::Static(x as u32, y as u32, z as u32)
}

/// Units of a cube for kernels that do not care: 256, or what the device allows.
fn units_per_cube(client: &Client) -> u32 {
    let hardware = &client.properties().hardware;
    if !has_barriers(client) {
        return 1;
    }
    let limit = hardware.max_units_per_cube.min(hardware.max_cube_dim.0);
    // A power of two, so that tiles come out even.
    256.min(1 << limit.max(1).ilog2())
}

/// The index type that reaches past the last element, overshoot of the last cube included.
fn address_type(elems: usize) -> AddressType {
    AddressType::from_len_signed(elems)
}
