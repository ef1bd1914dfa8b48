//! What the units of [`tensor_core`](super::tensor_core), and in part of
//! [`levels`](super::levels), load, and the fragments that they make of it.

use cubecl::prelude::*;
use half::f16;

use super::decode::PackedView;
use super::tensor_core::TensorCoreBlueprint;

/// Bytes of a table of pairs of levels: 256 pairs, in f32 sixteen copies, in f16 32 of them.
pub const TABLE_BYTES: usize = 256 * 16 * 8;

/// A table from a byte to the levels of its two codes, as [`fill_table`] or [`fill_levels`] fills it.
pub type CodeTable = Shared<[Vector<u8, Const<1>>]>;

/// A stage of `x`, see [`x_place`].
pub type Stage = Shared<[Vector<u32, Const<4>>]>;

/// The level of the code that a lane stands for.
#[cube]
pub fn load_level(words: &[u32], view: &PackedView) -> f32 {
    f32::reinterpret(words[view.codebook + (UNIT_POS_X & 15) as usize])
}

/// The levels of the two codes in a byte, high nibble first, from those of a plane's lanes.
#[cube]
fn levels_of(level: f32, byte: u32) -> Vector<f32, Const<2>> {
    let mut pair = Vector::<f32, Const<2>>::empty();
    pair.insert(0usize, plane_shuffle(level, byte >> 4));
    pair.insert(1usize, plane_shuffle(level, byte & 15));
    pair
}

/// Fills the table from the levels of a plane's lanes, in f32: entry `16 * byte + copy`, in a pair of
/// memory banks that no other copy is in, so that sixteen lanes, each with a copy of its own, never
/// wait for each other. The caller puts a barrier behind it.
#[cube]
#[allow(clippy::needless_borrow)] // Without it CubeCL takes no slice.
pub fn fill_table(level: f32, table: &mut CodeTable, #[comptime] units: usize) {
    // Whole planes go round together, as the shuffles want it.
    let mut i = UNIT_POS;
    while i < comptime!(TABLE_BYTES as u32 / 8) {
        let pair = levels_of(level, i >> 4);
        let at = i as usize * 8;
        let entry = (&mut table[at..at + 8]).with_vector_size_mut::<Const<8>>();
        entry[0] = Vector::<u8, Const<8>>::reinterpret(pair);
        i += comptime!(units as u32);
    }
}

/// Where a lane's rows of `W` are: of each tile row `lane / 4` and the one eight below.
#[derive(CubeType)]
pub struct Rows {
    /// Starts of the rows, at the lane's first code of a chunk, in vectors of 32 codes.
    at: Array<usize>,
    /// Where the plane ends along `k`, less what the lane is ahead of its chunk.
    end: usize,
}

#[cube]
impl Rows {
    /// Those of a plane whose first row is `plane_row` and which ends at `bound` along `k`.
    pub fn new(
        plane_row: usize,
        bound: usize,
        n: usize,
        k: usize,
        #[comptime] row_tiles: usize,
    ) -> Self {
        let lane = UNIT_POS_X as usize;
        let mut at = Array::<usize>::new(comptime!(2 * row_tiles));
        #[unroll]
        for r in 0..comptime!(2 * row_tiles) {
            let row = usize::min(plane_row + (lane >> 2usize) + comptime!(r * 8), n - 1);
            at[r] = row * (k / 32) + (lane & 3);
        }
        Rows {
            at,
            end: usize::saturating_sub(bound, (lane & 3) * 32),
        }
    }

    /// Loads the lane's codes of the chunk at `at` into slot `d`, 32 of each row; past the end of
    /// the plane, where `x` is zero, the slot stays as it is or is cleared.
    pub fn load(
        &self,
        packed: &[Vector<u32, Const<4>>],
        codes: &mut Array<Vector<u32, Const<4>>>,
        at: usize,
        #[comptime] d: usize,
        #[comptime] clear: bool,
        #[comptime] row_tiles: usize,
    ) {
        let inside = at < self.end;
        #[unroll]
        for r in 0..comptime!(2 * row_tiles) {
            let slot = comptime!(d * 2 * row_tiles + r);
            if comptime!(clear) {
                codes[slot] = Vector::new(0u32);
            }
            if inside {
                codes[slot] = packed[self.at[r] + at / 32];
            }
        }
    }
}

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

/// [`fill_table`] in f16: entry `32 * byte + copy`, a copy a lane and each in a bank of its own.
#[cube]
#[allow(clippy::needless_borrow)] // Without it CubeCL takes no slice.
pub fn fill_levels(level: f32, table: &mut CodeTable, #[comptime] units: usize) {
    // Four copies at a time; whole planes go round together, as the shuffles want it.
    let mut i = UNIT_POS;
    while i < comptime!(TABLE_BYTES as u32 / 16) {
        let pair = levels_of(level, i >> 3);
        let pair = u32::reinterpret(Vector::<f16, Const<2>>::cast_from(pair));
        let at = i as usize * 16;
        let entry = (&mut table[at..at + 16]).with_vector_size_mut::<Const<16>>();
        entry[0] = Vector::<u8, Const<16>>::reinterpret(Vector::<u32, Const<4>>::new(pair));
        i += comptime!(units as u32);
    }
}

/// Where a table has the entries of a byte of a word.
#[cube]
fn place(word: u32, #[comptime] byte: u32) -> u32 {
    if comptime!(byte == 0) {
        (word << 7) & 0x7f80
    } else {
        (word >> comptime!(byte * 8 - 7)) & 0x7f80
    }
}

/// The levels of the two codes in a byte of a word, high nibble first, from a table in f16.
#[cube]
#[allow(clippy::needless_borrow)] // Without it CubeCL takes no slice.
pub fn level_pair(
    table: &CodeTable,
    copy: u32,
    word: u32,
    #[comptime] byte: u32,
) -> Vector<f16, Const<2>> {
    let at = (place(word, byte) | copy) as usize;
    let entry = (&table[at..at + 4]).with_vector_size::<Const<4>>();
    Vector::<f16, Const<2>>::reinterpret(entry[0])
}

/// What a lane contributes of `W` to one product of 16 by 8 by 16: two bytes, from `byte`, of the
/// word of its upper row and of the word eight rows below.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn fragment<F: Float>(
    table: &CodeTable,
    copy: u32,
    upper: u32,
    lower: u32,
    upper_scale: f32,
    lower_scale: f32,
    #[comptime] byte: u32,
) -> Array<Vector<F, Const<2>>> {
    let mut registers = Array::<Vector<F, Const<2>>>::new(4usize);
    registers[0] = decode_pair::<F>(table, copy, upper, upper_scale, byte);
    registers[1] = decode_pair::<F>(table, copy, lower, lower_scale, byte);
    registers[2] = decode_pair::<F>(table, copy, upper, upper_scale, comptime!(byte + 1));
    registers[3] = decode_pair::<F>(table, copy, lower, lower_scale, comptime!(byte + 1));
    registers
}

/// The two elements in a byte of a word, high nibble first.
#[cube]
#[allow(clippy::needless_borrow)] // Without it CubeCL takes no slice.
fn decode_pair<F: Float>(
    table: &CodeTable,
    copy: u32,
    word: u32,
    scale: f32,
    #[comptime] byte: u32,
) -> Vector<F, Const<2>> {
    let at = (place(word, byte) | copy) as usize;
    let entry = (&table[at..at + 8]).with_vector_size::<Const<8>>();
    let levels = Vector::<f32, Const<2>>::reinterpret(entry[0]);
    Vector::cast_from(levels * Vector::new(scale))
}
