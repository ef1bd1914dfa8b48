//! Launches of the kernels of a gate's activation.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{
    address_type, check_buffers, check_dtype, cube_count, elem_type, units_per_cube, vector_size,
};
use crate::activation::Activation;
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::kernel::gated::{gated_backward_kernel, gated_kernel};

/// A gate and what it opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GatedProblem {
    /// Elements of each.
    pub elems: usize,
    /// The activation of the gate.
    pub activation: Activation,
    /// Type of all tensors.
    pub dtype: FloatType,
}

/// `activation(gate) up`.
///
/// # Shapes
/// - `gate`, `up`, `out`: `[elems]`, contiguous
///
/// # Errors
/// [`Nf4Error::DeviceDtype`] if the device has no such type, [`Nf4Error::Length`] if a buffer is too small,
/// [`Nf4Error::Alignment`] if it does not begin at a multiple of 16 bytes, [`Nf4Error::ElementCount`] for no
/// elements.
pub fn gated(
    client: &Client,
    problem: GatedProblem,
    [gate, up]: [Handle; 2],
    out: Handle,
) -> Result<(), Nf4Error> {
    problem.check(client, [("gate", &gate), ("up", &up), ("gated", &out)])?;
    let elems = problem.elems;
    let (vector, units) = problem.grid(client);
    let vectors = elems / vector;
    // SAFETY: the buffers hold at least the elements that are declared here, and begin where vectors may
    // (checked above). A unit without a vector does nothing.
    unsafe {
        gated_kernel::launch_unchecked(
            client,
            cube_count(client, vectors.div_ceil(units as usize)),
            CubeDim::new_1d(units),
            address_type(elems),
            vector,
            BufferArg::from_raw_parts(gate, elems),
            BufferArg::from_raw_parts(up, elems),
            BufferArg::from_raw_parts(out, elems),
            vectors,
            problem.activation,
            elem_type(problem.dtype),
        );
    }
    Ok(())
}

/// The gradients of the gate and of what it opens.
///
/// # Shapes
/// - `gate`, `up`, `grad`, `d_gate`, `d_up`: `[elems]`, contiguous
///
/// # Errors
/// Those of [`gated`].
pub fn gated_backward(
    client: &Client,
    problem: GatedProblem,
    [gate, up]: [Handle; 2],
    grad: Handle,
    [d_gate, d_up]: [Handle; 2],
) -> Result<(), Nf4Error> {
    let buffers = [
        ("gate", &gate),
        ("up", &up),
        ("grad", &grad),
        ("gradient of the gate", &d_gate),
        ("gradient of up", &d_up),
    ];
    problem.check(client, buffers)?;
    let elems = problem.elems;
    let (vector, units) = problem.grid(client);
    let vectors = elems / vector;
    // SAFETY: as in `gated`.
    unsafe {
        gated_backward_kernel::launch_unchecked(
            client,
            cube_count(client, vectors.div_ceil(units as usize)),
            CubeDim::new_1d(units),
            address_type(elems),
            vector,
            BufferArg::from_raw_parts(gate, elems),
            BufferArg::from_raw_parts(up, elems),
            BufferArg::from_raw_parts(grad, elems),
            BufferArg::from_raw_parts(d_gate, elems),
            BufferArg::from_raw_parts(d_up, elems),
            vectors,
            problem.activation,
            elem_type(problem.dtype),
        );
    }
    Ok(())
}

impl GatedProblem {
    fn check<const N: usize>(
        &self,
        client: &Client,
        buffers: [(&'static str, &Handle); N],
    ) -> Result<(), Nf4Error> {
        let &Self { elems, dtype, .. } = self;
        if elems == 0 {
            return Err(Nf4Error::ElementCount {
                tensor: "gate".into(),
                shape: vec![elems],
            });
        }
        check_dtype(client, dtype)?;
        let bytes = dtype.size_bytes();
        check_buffers(buffers.map(|(name, handle)| (name, handle, [elems, 1], bytes)))
    }

    /// Elements of a vector, and units of a cube.
    fn grid(&self, client: &Client) -> (usize, u32) {
        let vector = vector_size(client, self.dtype, 8, &[self.elems]);
        (vector, units_per_cube(client))
    }
}
