//! Launches of the kernel that normalises rows.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{
    address_type, check_buffers, check_dtype, cube_count, elem_type, has_barriers, units_of_row,
    vector_size,
};
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::kernel::rms_norm::{RmsNormBlueprint, rms_norm_backward_kernel, rms_norm_kernel};
use crate::norm_form::NormForm;

/// Units of a cube: a row of 4,096 elements in vectors of eight is one vector a unit.
const MOST_UNITS: u32 = 512;

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
    let adds = residual.is_some();
    let Residual { added, sum } = residual.unwrap_or_else(|| Residual {
        added: x.clone(),
        sum: out.clone(),
    });
    problem.check(
        client,
        [
            ("x", &x),
            ("added", &added),
            ("sum", &sum),
            ("normalised", &out),
        ],
        &weight,
    )?;
    let (vector, blueprint) = problem.blueprint(client, adds);
    let RmsNormProblem {
        rows, size, eps, ..
    } = problem;
    let elems = rows * size;
    // SAFETY: the buffers hold at least the elements that are declared here, and begin where vectors may
    // (checked above). A cube without a row does nothing, and a unit walks within its row. Without a residual
    // the kernel neither reads `added` nor writes `sum`.
    unsafe {
        rms_norm_kernel::launch_unchecked(
            client,
            cube_count(client, rows),
            CubeDim::new_1d(blueprint.units as u32),
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
            elem_type(problem.dtype),
        );
    }
    Ok(())
}

/// The gradient of what was normalised, and with `residual` that and a gradient that comes past the norm.
///
/// # Shapes
/// - `x`: what was normalised; `grad`: the gradient of the result; `residual`, `out`: `[rows, size]` each,
///   contiguous
/// - `weight`: `[size]`
///
/// # Errors
/// Those of [`rms_norm`].
pub fn rms_norm_backward(
    client: &Client,
    problem: RmsNormProblem,
    x: Handle,
    grad: Handle,
    residual: Option<Handle>,
    weight: Handle,
    out: Handle,
) -> Result<(), Nf4Error> {
    let adds = residual.is_some();
    let residual = residual.unwrap_or_else(|| grad.clone());
    problem.check(
        client,
        [
            ("x", &x),
            ("grad", &grad),
            ("residual", &residual),
            ("gradient of x", &out),
        ],
        &weight,
    )?;
    let (vector, blueprint) = problem.blueprint(client, adds);
    let RmsNormProblem {
        rows, size, eps, ..
    } = problem;
    let elems = rows * size;
    // SAFETY: as in `rms_norm`; without `adds` the kernel does not read `residual`.
    unsafe {
        rms_norm_backward_kernel::launch_unchecked(
            client,
            cube_count(client, rows),
            CubeDim::new_1d(blueprint.units as u32),
            address_type(elems),
            vector,
            BufferArg::from_raw_parts(x, elems),
            BufferArg::from_raw_parts(grad, elems),
            BufferArg::from_raw_parts(weight, size),
            BufferArg::from_raw_parts(residual, elems),
            BufferArg::from_raw_parts(out, elems),
            rows,
            eps,
            blueprint,
            elem_type(problem.dtype),
        );
    }
    Ok(())
}

impl RmsNormProblem {
    /// Checks the type, that there are elements, and the buffers, of `[rows, size]` but for the weight's.
    fn check(
        &self,
        client: &Client,
        buffers: [(&'static str, &Handle); 4],
        weight: &Handle,
    ) -> Result<(), Nf4Error> {
        let &Self {
            rows, size, dtype, ..
        } = self;
        if rows * size == 0 {
            return Err(Nf4Error::ElementCount {
                tensor: "x".into(),
                shape: vec![rows, size],
            });
        }
        check_dtype(client, dtype)?;
        let bytes = dtype.size_bytes();
        let buffers = buffers.map(|(name, handle)| (name, handle, [rows, size], bytes));
        check_buffers(
            buffers
                .into_iter()
                .chain([("weight", weight, [1, size], bytes)]),
        )
    }

    /// The size of a vector, and what forks the kernel.
    fn blueprint(&self, client: &Client, adds: bool) -> (usize, RmsNormBlueprint) {
        let vector = vector_size(client, self.dtype, 8, &[self.size]);
        let vectors = self.size / vector;
        let blueprint = RmsNormBlueprint {
            vectors,
            units: units_of_row(client, MOST_UNITS, vectors),
            rounds_first: self.form == NormForm::CastThenWeight,
            one_plus: self.form == NormForm::OnePlusWeight,
            adds,
            barriers: has_barriers(client),
        };
        (vector, blueprint)
    }
}
