//! Launches of the kernel that chooses experts.

use cubecl::features::TypeUsage;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::embedding::largest;
use super::{
    address_type, check_buffers, check_dtype, cube_count, elem_type, lanes_of_plane, units_per_cube,
};
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::kernel::route::{RouteBlueprint, route_kernel};
use crate::routing::{RouteForm, check};

/// What to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RouteProblem {
    /// Rows.
    pub tokens: usize,
    /// Scores of a row.
    pub experts: usize,
    /// Experts to choose for each.
    pub per_token: usize,
    /// What the weights are.
    pub form: RouteForm,
    /// Type of the scores.
    pub dtype: FloatType,
    /// Type of the numbers of experts.
    pub int: ElemType,
}

/// Chooses the experts of each token. All buffers are contiguous.
///
/// # Shapes
/// - `logits`: `[tokens, experts]`
/// - `ids`, `weights`: `[tokens, per_token]`, the latter f32
///
/// # Errors
/// [`Nf4Error::ElementCount`] for no tokens, no experts or more than 1024, [`Nf4Error::Config`] unless a token
/// has one expert or more, up to all, [`Nf4Error::Dtype`] for ids of a type that has not their numbers,
/// [`Nf4Error::DeviceDtype`] if the device has no such types,
/// [`Nf4Error::Length`] if a buffer is too small, [`Nf4Error::Alignment`] if it does not begin at a multiple of
/// 16 bytes.
pub fn route(
    client: &Client,
    problem: RouteProblem,
    logits: Handle,
    ids: Handle,
    weights: Handle,
) -> Result<(), Nf4Error> {
    let RouteProblem {
        tokens,
        experts,
        per_token,
        form,
        dtype,
        int,
    } = problem;
    check(tokens, experts, per_token)?;
    check_dtype(client, dtype)?;
    let usage = client.properties().type_usage(int);
    if !usage.contains(TypeUsage::Buffer) {
        return Err(Nf4Error::DeviceDtype {
            device: client.name().into(),
            dtype: format!("{int:?}"),
        });
    }
    if largest(int)? < experts as u64 - 1 {
        return Err(Nf4Error::Dtype {
            tensor: "ids".into(),
            expected: format!("an integer that counts {experts} experts"),
            given: format!("{int:?}"),
        });
    }
    check_buffers([
        ("logits", &logits, [tokens, experts], dtype.size_bytes()),
        ("ids", &ids, [tokens, per_token], int.size()),
        ("weights", &weights, [tokens, per_token], 4),
    ])?;
    let lanes = lanes_of_plane(client);
    let rows = units_per_cube(client) / lanes;
    let blueprint = RouteBlueprint {
        per_token,
        normalised: form.is_normalised(),
        planes: lanes > 1,
    };
    // SAFETY: the buffers hold at least the elements that are declared here (checked above). Tokens past the
    // last one read the last and store nothing, lanes walk within the scores of a token.
    unsafe {
        route_kernel::launch_unchecked(
            client,
            cube_count(client, tokens.div_ceil(rows as usize)),
            CubeDim::new_2d(lanes, rows),
            address_type(tokens * experts),
            BufferArg::from_raw_parts(logits, tokens * experts),
            BufferArg::from_raw_parts(ids, tokens * per_token),
            BufferArg::from_raw_parts(weights, tokens * per_token),
            tokens,
            experts,
            0,
            blueprint,
            elem_type(dtype),
            int,
        );
    }
    Ok(())
}
