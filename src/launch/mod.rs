//! The host side of the kernels: validate, choose, launch. Works on CubeCL clients and handles.

mod adamw;
mod attention;
mod cross_entropy;
#[cfg(feature = "cublaslt")]
mod dense;
mod dequantize;
mod embedding;
mod gated;
mod grouped;
mod levels;
mod lora;
mod matmul;
mod product;
mod quantize;
mod rms_norm;
mod rotary;
mod route;
mod sample;
mod strategy;
mod tensor_core;
mod tile;
mod tune_key;

pub use crate::flat::MAX_PARTS;
pub use adamw::{AccumulatePart, flat_accumulate, step_report};
pub(crate) use adamw::{AdamWBuffers, MomentBuffers, adamw};
pub use attention::{
    AttentionOperands, AttentionPlan, AttentionProblem, AttentionResults, AttentionVariant,
    TokenMajor,
};
pub use cross_entropy::{CrossEntropyProblem, cross_entropy};
#[cfg(feature = "cublaslt")]
pub use dense::{
    CUBLASLT_VARIABLE, DenseOperands, DensePlan, DenseProduct, MatrixLayout, set_cublaslt_path,
};
pub use dequantize::{DequantizePlan, Variant};
pub use embedding::{EmbeddingPlan, EmbeddingProblem};
pub use gated::{GatedProblem, gated, gated_backward};
pub use grouped::{GroupedOperands, GroupedPlan, GroupedProblem};
pub use levels::{JoinedPlan, JoinedWeight, MAX_JOINED};
pub use lora::Lora;
pub use matmul::{MatmulPlan, Operands};
pub use product::Product;
pub use quantize::quantize;
pub use rms_norm::{Residual, RmsNormProblem, rms_norm, rms_norm_backward};
pub use rotary::{RotaryAppendBuffers, RotaryAppendProblem, RotaryProblem, rotary, rotary_append};
pub use route::{RouteProblem, route};
pub use sample::{SampleBuffers, SampleProblem, sample};
pub(crate) use strategy::Candidate;
pub use strategy::MatmulVariant;
pub(crate) use tensor_core::has_tensor_cores;
pub(crate) use tile::TileRule;
pub use tile::{TENSOR_CORE_ROWS, TensorCoreTile};
pub(crate) use tune_key::MatmulKey;

use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use cubecl::server::Handle;

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

/// A buffer by the name that errors give it, with the elements that a kernel takes it for.
struct Buffer<'a> {
    name: &'static str,
    handle: &'a Handle,
    /// The product of these is the number of elements.
    dims: [usize; 2],
    elem_bytes: usize,
}

/// What kernels load and store at once at most.
const VECTOR_BYTES: u64 = 16;

impl Buffer<'_> {
    /// Checks that the kernel stays within the buffer, and that it begins where vectors may.
    ///
    /// # Errors
    /// [`Nf4Error::Length`], in bytes, or [`Nf4Error::Alignment`].
    fn check(&self) -> Result<(), Nf4Error> {
        let Self {
            name,
            handle,
            dims: [rows, columns],
            elem_bytes,
        } = *self;
        let elems = rows.checked_mul(columns);
        let expected = elems.and_then(|elems| elems.checked_mul(elem_bytes));
        let start = handle.offset_start.unwrap_or(0);
        let end = handle.offset_end.unwrap_or(0);
        let given = handle.size().saturating_sub(start).saturating_sub(end) as usize;
        if expected.is_none_or(|expected| given < expected) {
            return Err(Nf4Error::Length {
                tensor: name.into(),
                expected: expected.unwrap_or(usize::MAX),
                given,
            });
        }
        if !start.is_multiple_of(VECTOR_BYTES) {
            return Err(Nf4Error::Alignment {
                tensor: name.into(),
                expected: VECTOR_BYTES,
                given: start,
            });
        }
        Ok(())
    }
}

/// Whether the device can hold a float type in a buffer and convert f32 to it.
///
/// # Errors
/// [`Nf4Error::DeviceDtype`] if it cannot.
pub fn check_dtype(client: &Client, dtype: FloatType) -> Result<(), Nf4Error> {
    use cubecl::features::TypeUsage;
    let usage = client.properties().type_usage(elem_type(dtype));
    let has = usage.contains(TypeUsage::Buffer) && usage.contains(TypeUsage::Conversion);
    if has && (dtype != FloatType::BF16 || client.name() != "cpu" || rounds_to_bf16()) {
        return Ok(());
    }
    Err(Nf4Error::DeviceDtype {
        device: client.name().into(),
        dtype: dtype.name().into(),
    })
}

/// Whether kernels of CubeCL's CPU runtime can round to bf16: where the processor has no instruction for
/// it, they call a function that libgcc has from GCC 13 on.
#[cfg(all(feature = "cpu", target_os = "linux"))]
pub(crate) fn rounds_to_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512bf16") {
        return true;
    }
    // SAFETY: the program itself is opened, which runs nothing, and the function is not called.
    unsafe {
        let program = libloading::os::unix::Library::this();
        program
            .get::<unsafe extern "C" fn()>("__truncsfbf2")
            .is_ok()
    }
}

#[cfg(not(all(feature = "cpu", target_os = "linux")))]
pub(crate) fn rounds_to_bf16() -> bool {
    true
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

/// Checks buffers: the name of each, its dimensions and the bytes of an element.
fn check_buffers<'a>(
    buffers: impl IntoIterator<Item = (&'static str, &'a Handle, [usize; 2], usize)>,
) -> Result<(), Nf4Error> {
    buffers
        .into_iter()
        .try_for_each(|(name, handle, dims, elem_bytes)| {
            Buffer {
                name,
                handle,
                dims,
                elem_bytes,
            }
            .check()
        })
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
    units_up_to(client, 256)
}

/// As [`units_per_cube`], with another limit of ours, a power of two.
fn units_up_to(client: &Client, most: u32) -> u32 {
    let hardware = &client.properties().hardware;
    if !has_barriers(client) {
        return 1;
    }
    let limit = hardware.max_units_per_cube.min(hardware.max_cube_dim.0);
    // A power of two, so that tiles come out even.
    most.min(1 << limit.max(1).ilog2())
}

/// The lanes of a plane that can add their values up, or one where no cube's row is known to be a plane.
fn lanes_of_plane(client: &Client) -> u32 {
    let hardware = &client.properties().hardware;
    let planes = has_barriers(client)
        && hardware.plane_size_min == hardware.plane_size_max
        && (2..=units_per_cube(client)).contains(&hardware.plane_size_max);
    if planes { hardware.plane_size_max } else { 1 }
}

/// Units of a cube that has a whole row of so many vectors: as many as there can be up to a power of two, but
/// for those that would have nothing to do.
fn units_of_row(client: &Client, most: u32, vectors: usize) -> usize {
    (units_up_to(client, most) as usize).min(vectors.next_power_of_two())
}

/// The index type that reaches past the last element, overshoot of the last cube included.
fn address_type(elems: usize) -> AddressType {
    AddressType::from_len_signed(elems)
}
