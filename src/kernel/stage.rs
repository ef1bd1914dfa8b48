//! The stages of `x` in shared memory that [`tensor_core`](super::tensor_core) multiplies with.

use cubecl::prelude::*;

use super::fragments::in_fp8_order;
use super::tensor_core_blueprint::TensorCoreBlueprint;

/// A stage of `x`, see [`x_place`].
pub type Stage = Shared<[Vector<u32, Const<4>>]>;

/// Where a lane finds its elements of `x` in the first chunk of a stage, in vectors.
#[cube]
pub fn x_places(k_plane: usize, #[comptime] blueprint: TensorCoreBlueprint) -> Array<usize> {
    let lane = UNIT_POS_X as usize;
    let group = lane >> 2usize;
    let member = lane & 3;
    // Rows of x that are not there repeat the last one; their products are not stored.
    let x_rows = comptime!(blueprint.x_rows);
    let mut x_row = group;
    if comptime!(x_rows < 8) {
        x_row = usize::min(group, comptime!(x_rows - 1).runtime());
    }
    let base = (k_plane * x_rows + x_row) * comptime!(blueprint.plane_k() / 8) + member * 4;
    let fold = (member >> 1) ^ ((x_row & 1) << 1);
    let mut at = Array::<usize>::new(4usize);
    #[unroll]
    for q in 0..4usize {
        at[q] = base + (q ^ fold);
    }
    at
}

/// Vector `i` of the stage that starts at `start`: rows of a plane's part, then the next plane's.
#[cube]
fn x_vector(
    x: &[Vector<u32, Const<4>>],
    i: usize,
    start: usize,
    m: usize,
    k: usize,
    #[comptime] blueprint: TensorCoreBlueprint,
) -> Vector<u32, Const<4>> {
    let pitch = comptime!(blueprint.plane_k() / 8);
    let row = i / pitch % blueprint.x_rows;
    let piece = i / comptime!(pitch * blueprint.x_rows);
    let at = start + piece * comptime!(blueprint.plane_k()) + i % pitch * 8;
    let mut value = Vector::<u32, Const<4>>::new(0u32);
    if row < m && at < k {
        value = x[(row * k + at) / 8];
        if comptime!(blueprint.code_bits == 8) {
            value = in_fp8_order(value);
        }
    }
    value
}

/// Where vector `i` of a stage lies in shared memory.
///
/// The eight lanes that read at once are two rows and four members; members are four vectors
/// apart, rows a multiple of eight. Folding one bit of either into the position gives them eight
/// different groups of banks.
#[cube]
fn x_place(i: usize, #[comptime] blueprint: TensorCoreBlueprint) -> usize {
    let pitch = comptime!(blueprint.plane_k() / 8);
    let row = i / pitch % blueprint.x_rows;
    i ^ ((i >> 3) & 1) ^ ((row & 1) << 1)
}

/// Loads the beginning of a unit's share of the cube's first stage.
#[cube]
pub fn load_first_x(
    x: &[Vector<u32, Const<4>>],
    start: usize,
    m: usize,
    k: usize,
    #[comptime] blueprint: TensorCoreBlueprint,
) -> Array<Vector<u32, Const<4>>> {
    let mut carried = Array::<Vector<u32, Const<4>>>::new(comptime!(blueprint.first_carried()));
    #[unroll]
    for c in 0..comptime!(blueprint.first_carried()) {
        let i = UNIT_POS as usize + comptime!(c * blueprint.sums.units());
        carried[c] = x_vector(x, i, start, m, k, blueprint);
    }
    carried
}

/// Puts it into shared memory, and the rest of the share after it; the caller puts a barrier behind
/// it.
#[cube]
pub fn stage_first_x(
    x: &[Vector<u32, Const<4>>],
    carried: &Array<Vector<u32, Const<4>>>,
    staged: &mut Stage,
    start: usize,
    m: usize,
    k: usize,
    #[comptime] blueprint: TensorCoreBlueprint,
) {
    let units = comptime!(blueprint.sums.units());
    let all = comptime!(blueprint.stage_vectors());
    #[unroll]
    for c in 0..comptime!(blueprint.first_carried()) {
        let i = UNIT_POS as usize + comptime!(c * units);
        if comptime!((c + 1) * units <= all) || i < all {
            staged[x_place(i, blueprint)] = carried[c];
        }
    }
    let mut i = UNIT_POS as usize + comptime!(blueprint.first_carried() * units);
    while i < all {
        staged[x_place(i, blueprint)] = x_vector(x, i, start, m, k, blueprint);
        i += units;
    }
}

/// Loads a part of a unit's share of the stage at `start` into registers.
#[cube]
pub fn load_x(
    x: &[Vector<u32, Const<4>>],
    carried: &mut Array<Vector<u32, Const<4>>>,
    start: usize,
    m: usize,
    k: usize,
    #[comptime] part: usize,
    #[comptime] blueprint: TensorCoreBlueprint,
) {
    let all = comptime!(blueprint.stage_vectors());
    #[unroll]
    for c in 0..comptime!(blueprint.carried()) {
        let first = comptime!((part * blueprint.carried() + c) * blueprint.sums.units());
        if comptime!(first < all) {
            carried[c] = x_vector(x, UNIT_POS as usize + first, start, m, k, blueprint);
        }
    }
}

/// Puts it into the half of shared memory that begins at `half`.
#[cube]
pub fn store_x(
    staged: &mut Stage,
    carried: &Array<Vector<u32, Const<4>>>,
    #[comptime] half: usize,
    #[comptime] part: usize,
    #[comptime] blueprint: TensorCoreBlueprint,
) {
    let all = comptime!(blueprint.stage_vectors());
    let units = comptime!(blueprint.sums.units());
    #[unroll]
    for c in 0..comptime!(blueprint.carried()) {
        let first = comptime!((part * blueprint.carried() + c) * units);
        let i = UNIT_POS as usize + first;
        if comptime!(first + units <= all) || (comptime!(first < all) && i < all) {
            staged[half + x_place(i, blueprint)] = carried[c];
        }
    }
}
