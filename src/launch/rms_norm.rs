//! Launches of the kernel that normalises rows.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{
    Buffer, address_type, check_dtype, cube_count, elem_type, has_barriers, units_per_cube,
    vector_size,
};
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::kernel::rms_norm::{RmsNormBlueprint, rms_norm_kernel};
use crate::norm_form::NormForm;

/// What to normalise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RmsNormProblem {
    /// Rows.
    pub rows: usize,
    /// Elements of a row, normalised together.
    pub size: usize,
    /// Added to the mean of the squares.
    pub eps: f32,
    /// How the weight is applied.
    pub form: NormForm,
    /// Type of all tensors.
    pub dtype: FloatType,
}

impl RmsNormProblem {
    /// Bytes of the result, and of what is normalised.
    pub fn out_bytes(&self) -> usize {
        self.rows * self.size * self.dtype.size_bytes()
    }
}

/// What [`rms_norm`] adds before it normalises.
#[derive(Debug, Clone)]
pub struct Residual {
    /// `[rows, size]`: added to `x`.
    pub added: Handle,
    /// `[rows, size]`: where the sum goes.
    pub sum: Handle,
}

/// Normalises rows, or those of a sum.
///
/// # Shapes
/// - `x`, `out`: `[rows, size]`, contiguous
/// - `weight`: `[size]`
///
/// # Errors
/// [`Nf4Error::DeviceDtype`] if the device has no such type, [`Nf4Error::Length`] if a buffer is too small,
/// [`Nf4Error::Alignment`] if it does not begin at a multiple of 16 bytes, [`Nf4Error::ElementCount`] for no
/// elements.
pub fn rms_norm(
    client: &Client,
    problem: RmsNormProblem,
    x: Handle,
    residual: Option<Residual>,
    weight: Handle,
    out: Handle,
) -> Result<(), Nf4Error> {
    let RmsNormProblem {
        rows,
        size,
        eps,
        form,
        dtype,
    } = problem;
    let elems = rows * size;
    if elems == 0 {
        return Err(Nf4Error::ElementCount {
            tensor: "x".into(),
            shape: vec![rows, size],
        });
    }
    check_dtype(client, dtype)?;
    let adds = residual.is_some();
    let Residual { added, sum } = residual.unwrap_or_else(|| Residual {
        added: x.clone(),
        sum: out.clone(),
    });
    let whole = [rows, size];
    for (name, handle, dims) in [
        ("x", &x, whole),
        ("added", &added, whole),
        ("sum", &sum, whole),
        ("weight", &weight, [1, size]),
        ("normalised", &out, whole),
    ] {
        Buffer {
            name,
            handle,
            dims,
            elem_bytes: dtype.size_bytes(),
        }
        .check()?;
    }
    let vector = vector_size(client, dtype, 8, &[size]);
    let vectors = size / vector;
    let units = (units_per_cube(client) as usize).min(vectors.next_power_of_two());
    let blueprint = RmsNormBlueprint {
        vectors,
        units,
        rounds_first: form == NormForm::CastThenWeight,
        one_plus: form == NormForm::OnePlusWeight,
        adds,
        barriers: has_barriers(client),
    };
    // SAFETY: the buffers hold at least the elements that are declared here, and begin where vectors may
    // (checked above). A cube without a row does nothing, and a unit walks within its row. Without a residual
    // the kernel neither reads `added` nor writes `sum`.
    unsafe {
        rms_norm_kernel::launch_unchecked(
            client,
            cube_count(client, rows),
            CubeDim::new_1d(units as u32),
            address_type(elems),
            vector,
            BufferArg::from_raw_parts(x, elems),
            BufferArg::from_raw_parts(added, elems),
            BufferArg::from_raw_parts(weight, size),
            BufferArg::from_raw_parts(sum, elems),
            BufferArg::from_raw_parts(out, elems),
            rows,
            eps,
            blueprint,
            elem_type(dtype),
        );
    }
    Ok(())
}
