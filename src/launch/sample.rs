//! Launches of the kernel that chooses tokens.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{
    address_type, check_buffers, check_dtype, cube_count, elem_type, has_barriers, units_of_row,
    vector_size,
};
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::kernel::sample::{LISTED, SampleBlueprint, SampleViewLaunch, sample_kernel};
use crate::sampling::{MAX_VOCABULARY, SampleSettings, state_words};

/// What to choose from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleProblem {
    /// Rows.
    pub rows: usize,
    /// Logits of a row.
    pub vocabulary: usize,
    /// Whether the state has a history.
    pub history: bool,
    /// How to choose.
    pub settings: SampleSettings,
    /// Type of the logits.
    pub dtype: FloatType,
    /// Type of the results.
    pub int: ElemType,
}

/// What is read and written.
#[derive(Debug, Clone)]
pub struct SampleBuffers {
    /// `[rows, vocabulary]`.
    pub logits: Handle,
    /// `[rows, words]`, u32: see [`SampleState`](crate::op::SampleState); carried on in its place.
    pub state: Handle,
    /// `[rows]`: the tokens.
    pub ids: Handle,
    /// `[rows]`: how many tokens of the row were chosen before, or -1 where logits are not finite.
    pub numbers: Handle,
}

/// Chooses a token for each row. All buffers are contiguous.
///
/// # Errors
/// [`Nf4Error::Config`] for settings that make no sense, [`Nf4Error::DeviceDtype`] if the device has no such
/// type, [`Nf4Error::Length`] if a buffer is too small, [`Nf4Error::Alignment`] if it does not begin at a
/// multiple of 16 bytes, [`Nf4Error::ElementCount`] for no logits or more than 2^24 of a row.
pub fn sample(
    client: &Client,
    problem: SampleProblem,
    buffers: SampleBuffers,
) -> Result<(), Nf4Error> {
    let SampleProblem {
        rows,
        vocabulary,
        history,
        settings,
        dtype,
        int,
    } = problem;
    settings.check()?;
    let elems = rows.checked_mul(vocabulary);
    let elems = elems.filter(|&elems| elems > 0 && vocabulary <= MAX_VOCABULARY);
    let Some(elems) = elems else {
        return Err(Nf4Error::ElementCount {
            tensor: "logits".into(),
            shape: vec![rows, vocabulary],
        });
    };
    check_dtype(client, dtype)?;
    let words = state_words(history.then_some(vocabulary));
    let SampleBuffers {
        logits,
        state,
        ids,
        numbers,
    } = buffers;
    check_buffers([
        ("logits", &logits, [rows, vocabulary], dtype.size_bytes()),
        ("state", &state, [rows, words], 4),
        ("ids", &ids, [rows, 1], int.size()),
        ("numbers", &numbers, [rows, 1], int.size()),
    ])?;
    let vector = vector_size(client, dtype, 4, &[vocabulary]);
    let constants = settings.constants();
    let view = SampleViewLaunch::new(
        rows,
        vocabulary / vector,
        words,
        constants.penalty,
        constants.inverse_penalty,
        constants.per_logit,
        constants.top_k,
        constants.top_p,
        constants.farthest,
    );
    let units = units_of_row(client, LISTED as u32, vocabulary / vector);
    let blueprint = SampleBlueprint {
        units,
        greedy: constants.greedy,
        history,
        top_k: constants.top_k > 0 && !constants.greedy,
        top_p: constants.top_p > 0 && !constants.greedy,
        barriers: has_barriers(client),
    };
    // SAFETY: the buffers hold at least the elements that are declared here, and begin where vectors may
    // (checked above). A cube without a row does nothing, units walk within the row and the list, and what
    // becomes of logits that are not finite is not used as an index.
    unsafe {
        sample_kernel::launch_unchecked(
            client,
            cube_count(client, rows),
            CubeDim::new_1d(units as u32),
            address_type(elems.max(rows * words)),
            vector,
            BufferArg::from_raw_parts(logits, elems),
            BufferArg::from_raw_parts(state, rows * words),
            BufferArg::from_raw_parts(ids, rows),
            BufferArg::from_raw_parts(numbers, rows),
            view,
            blueprint,
            elem_type(dtype),
            int,
        );
    }
    Ok(())
}
