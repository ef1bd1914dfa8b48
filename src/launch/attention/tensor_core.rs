//! Launches of the kernels on tensor cores.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{AttentionOperands, AttentionProblem, AttentionResults, TokenMajor};
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::kernel::attention::TokenStridesLaunch;
use crate::kernel::attention::tensor_core::{
    FewBlueprint, FlashBlueprint, FlashStridesLaunch, attention_dkv_kernel, attention_dq_kernel,
    attention_few_kernel, attention_forward_kernel,
};
use crate::launch::tensor_core::{MAX_COUNTERS, counters, has_device_scope, has_fragments};
use crate::launch::tile::multiprocessors;
use crate::launch::{address_type, elem_type};

use super::plain::{arg, extent, view};

/// Elements that are loaded and stored at once.
pub(super) const PIECE: usize = 8;

/// Rows up to which the kernel for a few queries is used: one tile or two of them.
const FEW_ROWS: usize = 2 * FewBlueprint::ROWS;

/// How the kernels cut up their work, by the length of a head: planes of a cube, tiles of 16 rows of a
/// plane, and keys of a tile. Measured on an H100, see `benches/NOTES.md`.
#[derive(Debug, Clone, Copy)]
struct Tiling {
    planes: usize,
    row_tiles: usize,
    keys: usize,
}

impl Tiling {
    const fn new(planes: usize, row_tiles: usize, keys: usize) -> Self {
        Self {
            planes,
            row_tiles,
            keys,
        }
    }

    fn blueprint(self, problem: &AttentionProblem) -> FlashBlueprint {
        FlashBlueprint {
            head_dim: problem.head_dim,
            planes: self.planes,
            row_tiles: self.row_tiles,
            keys: self.keys,
            group: problem.group(),
            softcap: problem.softcap.is_some(),
        }
    }
}

/// The first of some tilings that suits a problem and is not larger than a cube may be. Sixty-four keys
/// and four planes suit all.
fn tiling(
    client: &Client,
    problem: &AttentionProblem,
    bytes: fn(&FlashBlueprint) -> usize,
    tilings: &[Tiling],
) -> Option<FlashBlueprint> {
    let most = client.properties().hardware.max_shared_memory_size;
    let last = Tiling::new(4, 1, 64);
    let all = tilings.iter().chain(std::iter::once(&last));
    all.map(|tiling| tiling.blueprint(problem))
        .find(|blueprint| blueprint.is_even() && bytes(blueprint) <= most)
}

fn forward_blueprint(client: &Client, problem: &AttentionProblem) -> Option<FlashBlueprint> {
    let tilings = match problem.head_dim {
        ..=64 => [Tiling::new(4, 2, 64), Tiling::new(8, 1, 64)],
        65..=128 => [Tiling::new(8, 2, 64), Tiling::new(8, 1, 64)],
        _ => [Tiling::new(8, 1, 64), Tiling::new(8, 1, 32)],
    };
    let cubes = |tiling: &Tiling| {
        let rows = tiling.blueprint(problem).rows();
        (problem.queries * problem.group()).div_ceil(rows) * problem.kv_heads * problem.batch
    };
    // With few rows smaller cubes, so that all multiprocessors have one.
    let first = match problem.head_dim <= 128 && cubes(&tilings[0]) < multiprocessors(client) {
        true => 1,
        false => 0,
    };
    tiling(
        client,
        problem,
        FlashBlueprint::forward_bytes,
        &tilings[first..],
    )
}

fn dq_blueprint(client: &Client, problem: &AttentionProblem) -> Option<FlashBlueprint> {
    let tilings: &[_] = match problem.head_dim {
        ..=128 => &[Tiling::new(4, 2, 32)],
        _ => &[Tiling::new(8, 1, 32), Tiling::new(4, 1, 32)],
    };
    tiling(client, problem, FlashBlueprint::backward_bytes, tilings)
}

fn dkv_blueprint(client: &Client, problem: &AttentionProblem) -> Option<FlashBlueprint> {
    let tilings: &[_] = match problem.head_dim {
        ..=64 => &[],
        65..=128 => &[Tiling::new(4, 1, 32)],
        _ => &[Tiling::new(8, 1, 32), Tiling::new(4, 1, 32)],
    };
    tiling(client, problem, FlashBlueprint::backward_bytes, tilings)
}

/// What the kernels of a problem are compiled for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blueprints {
    forward: FlashBlueprint,
    dq: FlashBlueprint,
    dkv: FlashBlueprint,
}

impl Blueprints {
    /// # Errors
    /// [`Nf4Error::Variant`] if the device has not the instructions, or the sizes do not suit them.
    pub fn new(client: &Client, problem: &AttentionProblem) -> Result<Self, Nf4Error> {
        let fail = |reason: String| {
            Err(Nf4Error::Variant {
                variant: "tensor_core",
                reason,
            })
        };
        let AttentionProblem {
            head_dim, dtype, ..
        } = *problem;
        if dtype == FloatType::F32 || !has_fragments(client, elem_type(dtype)) {
            return fail(format!(
                "the device has no m16n8k16 tensor core instruction for {}",
                dtype.name()
            ));
        }
        if !head_dim.is_multiple_of(16) {
            return fail(format!(
                "a head of {head_dim} elements is no multiple of 16"
            ));
        }
        let all = [forward_blueprint, dq_blueprint, dkv_blueprint];
        let [Some(forward), Some(dq), Some(dkv)] = all.map(|of| of(client, problem)) else {
            return fail(format!("a head of {head_dim} elements is too long"));
        };
        // The grid's second dimension.
        if problem.batch * problem.kv_heads > u16::MAX as usize {
            return fail(format!(
                "{} heads of keys in a batch of {} are more than a grid has",
                problem.kv_heads, problem.batch
            ));
        }
        Ok(Self { forward, dq, dkv })
    }
}

/// Checks that tensors can be read eight elements at a time.
///
/// # Errors
/// [`Nf4Error::Variant`] if not.
pub(super) fn check_strides(tensors: &[(&TokenMajor, [usize; 4])]) -> Result<(), Nf4Error> {
    let mut steps = tensors
        .iter()
        .flat_map(|(tensor, dims)| tensor.steps(*dims));
    match steps.find(|step| !step.is_multiple_of(PIECE)) {
        None => Ok(()),
        Some(step) => Err(Nf4Error::Variant {
            variant: "tensor_core",
            reason: format!("a stride of {step} elements is no multiple of {PIECE}"),
        }),
    }
}

fn strides(tensor: &TokenMajor, dims: [usize; 4]) -> TokenStridesLaunch {
    let [batch, token, head] = tensor.steps(dims).map(|step| step / PIECE);
    TokenStridesLaunch::new(batch, token, head)
}

fn all_strides(problem: &AttentionProblem, operands: &AttentionOperands) -> FlashStridesLaunch {
    let (of_queries, of_keys) = (problem.query_dims(), problem.key_dims());
    FlashStridesLaunch::new(
        strides(&operands.q, of_queries),
        strides(&operands.k, of_keys),
        strides(&operands.v, of_keys),
    )
}

/// The index type that reaches all elements of these tensors, and tiles that overshoot.
fn address(problem: &AttentionProblem, tensors: &[(&TokenMajor, [usize; 4])]) -> AddressType {
    let extents = tensors.iter().map(|(tensor, dims)| extent(tensor, *dims));
    let own = [problem.query_dims(), problem.key_dims()].map(|dims| dims.iter().product());
    let elems = extents.chain(own).max().unwrap_or(0);
    address_type(elems.saturating_add(1 << 20))
}

/// # Safety
/// The blueprints are those of the problem; this, the operands, and the sizes of `out` and `lse` have been
/// checked, and by [`check_strides`].
pub(super) unsafe fn forward(
    client: &Client,
    blueprints: &Blueprints,
    problem: &AttentionProblem,
    operands: &AttentionOperands,
    out: Handle,
    lse: Handle,
) {
    let AttentionOperands { q, k, v, ranges } = operands;
    let (of_queries, of_keys) = (problem.query_dims(), problem.key_dims());
    let rows = problem.queries * problem.group();
    let heads = problem.kv_heads * problem.batch;
    let address = address(problem, &[(q, of_queries), (k, of_keys), (v, of_keys)]);
    let dtype = elem_type(problem.dtype);
    let range_elems = problem.range_rows * problem.queries * 2;
    let out_elems = of_queries.iter().product();
    let row_tiles = rows.div_ceil(FewBlueprint::ROWS);
    let targets = heads * row_tiles;
    let mut few = FewBlueprint {
        head_dim: problem.head_dim,
        planes: 4,
        group: problem.group(),
        softcap: problem.softcap.is_some(),
        shared: false,
    };
    if rows <= FEW_ROWS
        && problem.head_dim.is_multiple_of(32)
        && targets <= u16::MAX as usize
        && few.shared_bytes() <= client.properties().hardware.max_shared_memory_size
    {
        // As many cubes as run side by side, two a multiprocessor: more only add to what the last one has
        // to put together.
        let wanted = 2 * multiprocessors(client) / targets;
        let mut splits = wanted.min(problem.keys.div_ceil(few.keys()));
        splits = splits.clamp(1, FewBlueprint::MAX_SPLITS);
        if targets > MAX_COUNTERS || !has_device_scope(client) {
            splits = 1;
        }
        few.shared = splits > 1;
        let part_elems = match few.shared {
            true => 4 * targets * splits * few.part(),
            false => 4,
        };
        let parts = client.empty(part_elems * 4);
        let stat_elems = match few.shared {
            true => 2 * targets * splits * FewBlueprint::ROWS,
            false => 2,
        };
        let part_stats = client.empty(stat_elems * 4);
        let (counters, counter_elems) = match few.shared {
            true => (counters(client, &parts), MAX_COUNTERS),
            false => (parts.clone(), 1),
        };
        // SAFETY: the caller's; the kernel clamps rows and keys to those that there are, and the parts
        // have room for all cubes.
        unsafe {
            attention_few_kernel::launch_unchecked(
                client,
                CubeCount::Static(splits as u32, targets as u32, 1),
                CubeDim::new_2d(32, few.planes as u32),
                address,
                arg(q, of_queries),
                arg(k, of_keys),
                arg(v, of_keys),
                BufferArg::from_raw_parts(ranges.clone(), range_elems),
                BufferArg::from_raw_parts(out, out_elems),
                BufferArg::from_raw_parts(lse, problem.lse_elems()),
                BufferArg::from_raw_parts(parts, part_elems),
                BufferArg::from_raw_parts(part_stats, stat_elems),
                BufferArg::from_raw_parts(counters, counter_elems),
                all_strides(problem, operands),
                view(problem),
                splits,
                few,
                dtype,
            );
        }
        return;
    }
    let blueprint = blueprints.forward;
    let cubes = rows.div_ceil(blueprint.rows());
    // SAFETY: the caller's; the kernel clamps rows and keys to those that there are.
    unsafe {
        attention_forward_kernel::launch_unchecked(
            client,
            CubeCount::Static(cubes as u32, heads as u32, 1),
            CubeDim::new_2d(32, blueprint.planes as u32),
            address,
            arg(q, of_queries),
            arg(k, of_keys),
            arg(v, of_keys),
            BufferArg::from_raw_parts(ranges.clone(), range_elems),
            BufferArg::from_raw_parts(out, out_elems),
            BufferArg::from_raw_parts(lse, problem.lse_elems()),
            all_strides(problem, operands),
            view(problem),
            blueprint,
            dtype,
        );
    }
}

/// # Safety
/// The blueprints are those of the problem; this, the operands, the results, and the sizes of `grads` have
/// been checked, and by [`check_strides`]; the output is contiguous.
pub(super) unsafe fn backward(
    client: &Client,
    blueprints: &Blueprints,
    problem: &AttentionProblem,
    operands: &AttentionOperands,
    results: &AttentionResults,
    grads: [Handle; 3],
) {
    let AttentionOperands { q, k, v, ranges } = operands;
    let AttentionResults { output, grad, lse } = results;
    let (of_queries, of_keys) = (problem.query_dims(), problem.key_dims());
    let rows = problem.queries * problem.group();
    let heads = problem.kv_heads * problem.batch;
    let tensors = [
        (q, of_queries),
        (k, of_keys),
        (v, of_keys),
        (grad, of_queries),
    ];
    let address = address(problem, &tensors);
    let dtype = elem_type(problem.dtype);
    let range_elems = problem.range_rows * problem.queries * 2;
    let query_elems: usize = of_queries.iter().product();
    let key_elems: usize = of_keys.iter().product();
    let stat_elems = 2 * problem.lse_elems();
    let stats = client.empty(stat_elems * 4);
    // SAFETY: the ranges have been checked.
    let ranges = || unsafe { BufferArg::from_raw_parts(ranges.clone(), range_elems) };
    let [dq, dk, dv] = grads;

    let blueprint = blueprints.dq;
    let cubes = rows.div_ceil(blueprint.rows());
    // SAFETY: the caller's; the kernel clamps rows and keys to those that there are.
    unsafe {
        attention_dq_kernel::launch_unchecked(
            client,
            CubeCount::Static(cubes as u32, heads as u32, 1),
            CubeDim::new_2d(32, blueprint.planes as u32),
            address,
            arg(q, of_queries),
            arg(k, of_keys),
            arg(v, of_keys),
            ranges(),
            BufferArg::from_raw_parts(output.handle.clone(), query_elems),
            BufferArg::from_raw_parts(lse.clone(), problem.lse_elems()),
            arg(grad, of_queries),
            BufferArg::from_raw_parts(dq, query_elems),
            BufferArg::from_raw_parts(stats.clone(), stat_elems),
            all_strides(problem, operands),
            strides(grad, of_queries),
            view(problem),
            blueprint,
            dtype,
        );
    }

    let blueprint = blueprints.dkv;
    let cubes = problem.keys.div_ceil(blueprint.rows());
    // SAFETY: the caller's; the kernel clamps keys to those that there are, and walks over queries that
    // there are whatever the ranges hold.
    unsafe {
        attention_dkv_kernel::launch_unchecked(
            client,
            CubeCount::Static(cubes as u32, heads as u32, 1),
            CubeDim::new_2d(32, blueprint.planes as u32),
            address,
            arg(q, of_queries),
            arg(k, of_keys),
            arg(v, of_keys),
            ranges(),
            arg(grad, of_queries),
            BufferArg::from_raw_parts(stats, stat_elems),
            BufferArg::from_raw_parts(dk, key_elems),
            BufferArg::from_raw_parts(dv, key_elems),
            all_strides(problem, operands),
            strides(grad, of_queries),
            view(problem),
            blueprint,
            dtype,
        );
    }
}
