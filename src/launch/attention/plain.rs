//! Launches of the kernels that run on every device.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{AttentionOperands, AttentionProblem, AttentionResults, TokenMajor};
use crate::error::Nf4Error;
use crate::kernel::attention::delta::attention_delta_kernel;
use crate::kernel::attention::rows::attention_rows_kernel;
use crate::kernel::attention::rows_backward::{
    BackwardInputsLaunch, BackwardStridesLaunch, attention_rows_dkdv_kernel,
    attention_rows_dq_kernel,
};
use crate::kernel::attention::{AttentionViewLaunch, RowsBlueprint, TokenStridesLaunch};
use crate::launch::{
    address_type, cube_count, elem_type, has_barriers, units_per_cube, vector_size,
};

/// Rows, or keys, that a cube has at most.
const MAX_HELD: usize = 8;

/// Units of a cube at most.
const MAX_UNITS: usize = 128;

/// What a cube of one unit walks over at a time.
const SINGLE_UNIT_TILE: usize = 64;

/// Shared memory of a cube at most, which WebGPU guarantees.
const SHARED_BYTES: usize = 16 << 10;

/// What is loaded and stored at once at most.
const VECTOR_BYTES: usize = 16;

/// Sums in registers that a unit has at most.
const UNIT_SUMS: usize = 64;

/// What a kernel holds for each of its rows, or keys.
#[derive(Clone, Copy)]
struct Held {
    /// Vectors of a head's length in shared memory.
    heads: usize,
    /// Numbers for each place of a tile in shared memory.
    tiles: usize,
    /// Sums of a head's length.
    sums: usize,
}

impl Held {
    const FORWARD: Self = Self {
        heads: 1,
        tiles: 1,
        sums: 1,
    };
    const DQ: Self = Self {
        heads: 2,
        tiles: 1,
        sums: 1,
    };
    const DKDV: Self = Self {
        heads: 2,
        tiles: 2,
        sums: 2,
    };

    /// Bytes of shared memory; besides that of heads and tiles, what lanes have of the forward pass: as many
    /// numbers as there are units or rows.
    fn shared_bytes(&self, head_dim: usize, held: usize, tile: usize, units: usize) -> usize {
        4 * (held * (self.heads * head_dim + self.tiles * tile + 1) + held.max(units))
    }
}

/// Checks that the kernels' shared memory suffices.
///
/// # Errors
/// [`Nf4Error::Variant`] if it does not.
pub(super) fn check(problem: &AttentionProblem) -> Result<(), Nf4Error> {
    let bytes = Held::DKDV.shared_bytes(problem.head_dim, 1, MAX_UNITS, MAX_UNITS);
    if bytes <= SHARED_BYTES {
        return Ok(());
    }
    Err(Nf4Error::Variant {
        variant: "rows",
        reason: format!("a head of {} elements is too long", problem.head_dim),
    })
}

/// How to compile a kernel for `count` rows, or keys, a head of keys.
fn blueprint(
    client: &Client,
    problem: &AttentionProblem,
    held: Held,
    count: usize,
    vector: usize,
) -> RowsBlueprint {
    let barriers = has_barriers(client);
    let units = (units_per_cube(client) as usize).min(MAX_UNITS);
    let tile = if barriers { units } else { SINGLE_UNIT_TILE };
    let mut most = MAX_HELD.min(count.next_power_of_two());
    while most > 1
        && (most * held.sums * vector > UNIT_SUMS
            || held.shared_bytes(problem.head_dim, most, tile, units) > SHARED_BYTES)
    {
        most /= 2;
    }
    RowsBlueprint {
        head_dim: problem.head_dim,
        held: most,
        tile,
        units,
        softcap: problem.softcap.is_some(),
        barriers,
    }
}

/// The widest vector that all tensors can be loaded with.
fn vector_of(
    client: &Client,
    problem: &AttentionProblem,
    tensors: &[(&TokenMajor, [usize; 4])],
) -> usize {
    let steps = tensors
        .iter()
        .flat_map(|(tensor, dims)| tensor.steps(*dims));
    let multiples: Vec<usize> = steps.chain([problem.head_dim]).collect();
    let limit = VECTOR_BYTES / problem.dtype.size_bytes();
    vector_size(client, problem.dtype, limit, &multiples)
}

pub(super) fn view(problem: &AttentionProblem) -> AttentionViewLaunch {
    AttentionViewLaunch::new(
        problem.batch,
        problem.queries,
        problem.keys,
        problem.kv_heads,
        problem.group(),
        problem.range_rows,
        problem.scale,
        problem.softcap.unwrap_or(1.0),
        f32::NEG_INFINITY,
    )
}

fn strides(tensor: &TokenMajor, dims: [usize; 4], vector: usize) -> TokenStridesLaunch {
    let [batch, token, head] = tensor.steps(dims).map(|step| step / vector);
    TokenStridesLaunch::new(batch, token, head)
}

/// Elements that a kernel addresses of a tensor that has been checked.
pub(super) fn extent(tensor: &TokenMajor, dims: [usize; 4]) -> usize {
    tensor.extent(dims).expect("the tensor has been checked")
}

/// # Safety
/// The tensor has been checked.
pub(super) unsafe fn arg(tensor: &TokenMajor, dims: [usize; 4]) -> BufferArg {
    // SAFETY: the caller's.
    unsafe { BufferArg::from_raw_parts(tensor.handle.clone(), extent(tensor, dims)) }
}

/// # Safety
/// The problem, the operands, and the sizes of `out` and `lse` have been checked.
pub(super) unsafe fn forward(
    client: &Client,
    problem: &AttentionProblem,
    operands: &AttentionOperands,
    out: Handle,
    lse: Handle,
) {
    let AttentionOperands { q, k, v, ranges } = operands;
    let (of_queries, of_keys) = (problem.query_dims(), problem.key_dims());
    let tensors = [(q, of_queries), (k, of_keys), (v, of_keys)];
    let vector = vector_of(client, problem, &tensors);
    let rows = problem.queries * problem.group();
    let blueprint = blueprint(client, problem, Held::FORWARD, rows, vector);
    let cubes = rows.div_ceil(blueprint.held) * problem.kv_heads * problem.batch;
    let out_elems: usize = of_queries.iter().product();
    let extents = tensors.map(|(tensor, dims)| extent(tensor, dims));
    let others = out_elems.max(problem.range_elems());
    let largest = extents.into_iter().fold(others, usize::max);
    // SAFETY: the caller's, and the kernel clamps rows to those that there are and ranges to the keys; `N`
    // divides the length of a head and all strides.
    unsafe {
        attention_rows_kernel::launch_unchecked(
            client,
            cube_count(client, cubes),
            CubeDim::new_1d(blueprint.units as u32),
            address_type(largest),
            vector,
            arg(q, of_queries),
            arg(k, of_keys),
            arg(v, of_keys),
            BufferArg::from_raw_parts(ranges.clone(), problem.range_elems()),
            BufferArg::from_raw_parts(out, out_elems),
            BufferArg::from_raw_parts(lse, problem.lse_elems()),
            strides(q, of_queries, vector),
            strides(k, of_keys, vector),
            strides(v, of_keys, vector),
            view(problem),
            blueprint,
            elem_type(problem.dtype),
        );
    }
}

/// # Safety
/// The problem, the operands and the results have been checked, and `delta` has the size of the log-sum-exp.
unsafe fn inputs<F: Float, N: Size>(
    problem: &AttentionProblem,
    operands: &AttentionOperands,
    results: &AttentionResults,
    delta: &Handle,
) -> BackwardInputsLaunch<F, N> {
    let (of_queries, of_keys) = (problem.query_dims(), problem.key_dims());
    // SAFETY: the caller's.
    unsafe {
        BackwardInputsLaunch::new(
            arg(&operands.q, of_queries),
            arg(&operands.k, of_keys),
            arg(&operands.v, of_keys),
            arg(&results.grad, of_queries),
            BufferArg::from_raw_parts(operands.ranges.clone(), problem.range_elems()),
            BufferArg::from_raw_parts(results.lse.clone(), problem.lse_elems()),
            BufferArg::from_raw_parts(delta.clone(), problem.lse_elems()),
        )
    }
}

/// # Safety
/// The problem, the operands, the results, and the sizes of `grads` have been checked.
pub(super) unsafe fn backward(
    client: &Client,
    problem: &AttentionProblem,
    operands: &AttentionOperands,
    results: &AttentionResults,
    grads: [Handle; 3],
) {
    let AttentionOperands { q, k, v, .. } = operands;
    let AttentionResults { output, grad, .. } = results;
    let (of_queries, of_keys) = (problem.query_dims(), problem.key_dims());
    let dtype = elem_type(problem.dtype);
    let lse_elems = problem.lse_elems();
    let delta = client.empty(problem.lse_bytes());

    let tensors = [(output, of_queries), (grad, of_queries)];
    let vector = vector_of(client, problem, &tensors);
    let units = units_per_cube(client);
    let extents = tensors.map(|(tensor, dims)| extent(tensor, dims));
    // SAFETY: the caller's, and the kernel guards sums by their number; `N` divides the length of a head and
    // all strides.
    unsafe {
        attention_delta_kernel::launch_unchecked(
            client,
            cube_count(client, lse_elems.div_ceil(units as usize)),
            CubeDim::new_1d(units),
            address_type(extents[0].max(extents[1]).max(lse_elems)),
            vector,
            arg(output, of_queries),
            arg(grad, of_queries),
            BufferArg::from_raw_parts(delta.clone(), lse_elems),
            strides(output, of_queries, vector),
            strides(grad, of_queries, vector),
            view(problem),
            problem.head_dim,
            dtype,
        );
    }

    let tensors = [
        (q, of_queries),
        (k, of_keys),
        (v, of_keys),
        (grad, of_queries),
    ];
    let vector = vector_of(client, problem, &tensors);
    let query_elems: usize = of_queries.iter().product();
    let key_elems: usize = of_keys.iter().product();
    let extents = tensors.map(|(tensor, dims)| extent(tensor, dims));
    let others = query_elems.max(key_elems).max(problem.range_elems());
    let address = address_type(extents.into_iter().fold(others, usize::max));
    let all_strides = || {
        BackwardStridesLaunch::new(
            strides(q, of_queries, vector),
            strides(k, of_keys, vector),
            strides(v, of_keys, vector),
            strides(grad, of_queries, vector),
        )
    };
    let heads = problem.kv_heads * problem.batch;
    let [dq, dk, dv] = grads;

    let rows = problem.queries * problem.group();
    let of_dq = blueprint(client, problem, Held::DQ, rows, vector);
    let cubes = rows.div_ceil(of_dq.held) * heads;
    // SAFETY: as of the forward pass.
    unsafe {
        attention_rows_dq_kernel::launch_unchecked(
            client,
            cube_count(client, cubes),
            CubeDim::new_1d(of_dq.units as u32),
            address,
            vector,
            inputs(problem, operands, results, &delta),
            BufferArg::from_raw_parts(dq, query_elems),
            all_strides(),
            view(problem),
            of_dq,
            dtype,
        );
    }

    let of_dkdv = blueprint(client, problem, Held::DKDV, problem.keys, vector);
    let cubes = problem.keys.div_ceil(of_dkdv.held) * heads;
    // SAFETY: the caller's, and the kernel clamps keys to those that there are, and walks over queries that
    // there are whatever the ranges hold.
    unsafe {
        attention_rows_dkdv_kernel::launch_unchecked(
            client,
            cube_count(client, cubes),
            CubeDim::new_1d(of_dkdv.units as u32),
            address,
            vector,
            inputs(problem, operands, results, &delta),
            BufferArg::from_raw_parts(dk, key_elems),
            BufferArg::from_raw_parts(dv, key_elems),
            all_strides(),
            view(problem),
            of_dkdv,
            dtype,
        );
    }
}
