//! Launches of the kernel of cross-entropy.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{
    address_type, check_buffers, check_dtype, cube_count, elem_type, has_barriers, units_of_row,
    vector_size,
};
use crate::cross_entropy::CrossEntropyOptions;
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::kernel::cross_entropy::{
    CrossEntropyBlueprint, CrossEntropyViewLaunch, cross_entropy_kernel,
};

/// Most units of a cube, which has a whole row.
const MAX_UNITS: u32 = 1024;

/// Rows of logits with a target each.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CrossEntropyProblem {
    /// Rows.
    pub rows: usize,
    /// Logits of a row.
    pub vocabulary: usize,
    /// How the loss is computed.
    pub options: CrossEntropyOptions,
    /// Whether the gradient takes the place of the logits.
    pub gradient: bool,
    /// Type of the logits.
    pub dtype: FloatType,
    /// Type of the targets: an integer of 32 or 64 bit, with a sign.
    pub targets_dtype: ElemType,
}

/// The loss of each row, and if it is asked for its gradient with respect to the logits in their place, in one
/// launch. A row without a target among its logits has a loss of NaN, unless that is the one to be ignored.
///
/// # Shapes
/// - `logits`: `[rows, vocabulary]`, contiguous; written if the gradient is asked for
/// - `targets`: `[rows]`; `loss`: `[rows]`, f32
///
/// # Errors
/// [`Nf4Error::Config`] for options that make no sense, [`Nf4Error::DeviceDtype`] if the device has no such
/// type, [`Nf4Error::Length`] if a buffer is too small, [`Nf4Error::Alignment`] if it does not begin at a
/// multiple of 16 bytes, [`Nf4Error::ElementCount`] for no logits or more of a row than an i32 counts.
pub fn cross_entropy(
    client: &Client,
    problem: CrossEntropyProblem,
    logits: Handle,
    targets: Handle,
    loss: Handle,
) -> Result<(), Nf4Error> {
    let CrossEntropyProblem {
        rows,
        vocabulary,
        options,
        gradient,
        dtype,
        targets_dtype,
    } = problem;
    options.check()?;
    let elems = rows.checked_mul(vocabulary);
    let Some(elems) = elems.filter(|&elems| elems > 0 && i32::try_from(vocabulary).is_ok()) else {
        return Err(Nf4Error::ElementCount {
            tensor: "logits".into(),
            shape: vec![rows, vocabulary],
        });
    };
    check_dtype(client, dtype)?;
    check_buffers([
        ("logits", &logits, [rows, vocabulary], dtype.size_bytes()),
        ("targets", &targets, [rows, 1], targets_dtype.size()),
        ("loss", &loss, [rows, 1], 4),
    ])?;
    let vector = vector_size(client, dtype, 8, &[vocabulary]);
    let vectors = vocabulary / vector;
    let units = units_of_row(client, MAX_UNITS, vectors);
    let view = CrossEntropyViewLaunch::new(
        rows,
        vectors,
        vocabulary - 1,
        options.ignore_index,
        options.label_smoothing as f32,
        options.z_loss as f32,
        options.logit_scale as f32,
        options.soft_cap.unwrap_or(1.0) as f32,
        0,
    );
    let blueprint = CrossEntropyBlueprint {
        units,
        capped: options.soft_cap.is_some(),
        smoothed: options.label_smoothing > 0.0,
        gradient,
        barriers: has_barriers(client),
    };
    // SAFETY: the buffers hold at least the elements that are declared here, and begin where vectors may
    // (checked above). A cube without a row does nothing, a unit walks within its row, and a target is an index
    // only if it is one of the row.
    unsafe {
        cross_entropy_kernel::launch_unchecked(
            client,
            cube_count(client, rows),
            CubeDim::new_1d(units as u32),
            address_type(elems),
            vector,
            BufferArg::from_raw_parts(logits, elems),
            BufferArg::from_raw_parts(targets, rows),
            BufferArg::from_raw_parts(loss, rows),
            view,
            blueprint,
            elem_type(dtype),
            targets_dtype,
        );
    }
    Ok(())
}
