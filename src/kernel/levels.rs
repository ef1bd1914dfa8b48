//! `levels`: a matrix product with a packed weight for one row of `x`, on tensor cores.
//!
//! With a single row there is nothing to share the work of decoding with, so there is as little of
//! it as can be: the tensor cores multiply `x` by the bare levels of the codebook in f16, two to a
//! look-up, and only the sum over a run of elements with the same scale is multiplied by that
//! scale, in f32. What is multiplied is thus a weight whose level is rounded to f16 and whose scale
//! is not rounded at all, where dequantization rounds their product to the dtype of `x`.
//!
//! Of the eight columns of the instruction's other side, the even ones hold `x` where the first half
//! of a chunk is and zeros elsewhere, the odd ones the other way round; so the sums of both runs of
//! a chunk come out apart. Elements of `x` in bf16 are brought into the range of f16 by a power of
//! two.
//!
//! Sources: those of [`tensor_core`](super::tensor_core).

use cubecl::cmma::MmaDefinition;
use cubecl::prelude::*;
use half::f16;

use super::decode::PackedView;
use super::fragments::{CodeTable, Rows, TABLE_BYTES, fill_levels, level_pair, load_level};
use super::lora::{LoraBranch, UP_LOADS};
use super::scales::{CHUNK, ScaleBlueprint, ScaleMap, ScalePlace, Scales};
use super::sums::{SumsBlueprint, Target, store_sums};

/// What forks a compiled kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LevelsBlueprint {
    /// Which scales a plane needs; runs are 64 long. `depth` chunks are on their way at a time.
    pub scales: ScaleBlueprint,
    /// `depth` is two, and the scales of the two chunks are in one word, which is loaded once.
    pub paired: bool,
    /// How planes share the work: one column tile, not split.
    pub sums: SumsBlueprint,
    /// Chunks along `k` of a plane, a multiple of `depth`; so many are neighbours, and the next are
    /// another plane's.
    pub chunks: usize,
    /// `x` is in bf16, not in f16.
    pub wide: bool,
}

impl LevelsBlueprint {
    /// Chunks along `k` of a cube.
    const fn all_chunks(&self) -> usize {
        self.chunks * self.sums.k_planes
    }

    /// Vectors of eight elements of `x`.
    const fn x_vectors(&self) -> usize {
        self.all_chunks() * CHUNK / 8
    }

    /// Vectors of `x` of a unit.
    const fn unit_vectors(&self) -> usize {
        self.x_vectors().div_ceil(self.sums.units())
    }

    /// Vectors of four words of shared memory for `x`, and for sums after it.
    pub const fn shared_vectors(&self) -> usize {
        let staged = self.all_chunks() * PITCH + ZEROS;
        let sums = self.sums.shared_vectors();
        if staged > sums { staged } else { sums }
    }

    /// Bytes of shared memory that a cube takes.
    pub const fn shared_bytes(&self) -> usize {
        TABLE_BYTES + 256 * 4 + 32 * 4 + self.shared_vectors() * 16
    }
}

/// Vectors that a chunk of `x` takes: sixteen, and one left free in the middle and one at the end,
/// so that the four lanes that read at once find four different groups of banks.
const PITCH: usize = CHUNK / 8 + 2;

/// Zero vectors before the first chunk, so many that each plane finds four of them in banks that
/// its other lanes do not read from.
const ZEROS: usize = 16;

/// `y = x Wᵀ + b + s (x A) B` for a single row.
///
/// - `x`: `[k]`, two elements a u32, in vectors of eight elements; `packed`: the whole packed
///   weight, and `words` the same buffer once more; `bias`: `[n]`, unused without one; `out`:
///   `[n]`; `parts` and `counters` are not used; `lora`: the low-rank branch, if there is one.
/// - A cube of `(32, row_planes * k_planes)` units computes `16 * row_tiles * row_planes` columns
///   of `y`; planes with the same rows add their sums up at the end.
/// - Tails: rows past `n` repeat the last one and are not stored, elements past `k` count as zero.
///   `k` is a multiple of 64.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn matmul_levels_kernel<F: Float, G: Float>(
    x: &[Vector<u32, Const<4>>],
    packed: &[Vector<u32, Const<4>>],
    words: &[u32],
    bias: &[F],
    out: &mut [F],
    parts: &mut [Vector<u32, Const<4>>],
    counters: &[Atomic<u32>],
    lora: ComptimeOption<LoraBranch<G>>,
    view: PackedView,
    n: usize,
    k: usize,
    #[comptime] blueprint: LevelsBlueprint,
    #[define(F)] _dtype: ElemType,
    #[define(G)] _lora_dtype: ElemType,
) {
    let row_tiles = comptime!(blueprint.sums.row_tiles);
    let depth = comptime!(blueprint.scales.depth);
    let k_planes = comptime!(blueprint.sums.k_planes);
    let scale_blueprint = comptime!(blueprint.scales);

    let plane = UNIT_POS_Y as usize;
    let row_plane = plane % comptime!(blueprint.sums.row_planes);
    let k_plane = plane / comptime!(blueprint.sums.row_planes);
    let plane_row =
        CUBE_POS * comptime!(blueprint.sums.cube_rows()) + row_plane * comptime!(16 * row_tiles);

    // All loads from global memory are issued before the first value is used.
    let rows = Rows::new(plane_row, k, n, k, row_tiles);
    let mut codes = Array::<Vector<u32, Const<4>>>::new(comptime!(2 * row_tiles * depth));
    let mut scales = Scales::new(ScalePlace::of_sums(), plane_row, k, n, k, scale_blueprint);
    let mut at = k_plane * comptime!(depth * CHUNK);
    let ahead_by = comptime!(usize::max(depth - 1, 1));
    #[unroll]
    for d in 0..ahead_by {
        let chunk_at = at + comptime!(d * CHUNK);
        rows.load(packed, &mut codes, chunk_at, d, false, row_tiles);
        scales.load(words, &view, chunk_at, d, false, scale_blueprint);
    }
    let units = comptime!(blueprint.sums.units());
    let mut map = ScaleMap::load(words, &view, units, scale_blueprint);
    let level = load_level(words, &view);
    let values = load_x(x, k, blueprint);
    let mut table = CodeTable::new_aligned_slice(TABLE_BYTES, 128usize);
    fill_levels(level, &mut table, units);
    map.store(units, scale_blueprint);
    let mut staged =
        Shared::<[Vector<u32, Const<4>>]>::new_slice(comptime!(blueprint.shared_vectors()));
    let unscale = stage_x(&values, &mut staged, blueprint);
    sync_cube();

    let lane = UNIT_POS_X;
    let member = (lane & 3) as usize;
    // Unknown to the compiler, which would otherwise mask it again in each look-up.
    let copy = (lane ^ view.zero) * 4;
    // Lanes of a column that has nothing here stay with the zeros.
    let mut x_at = (2 * k_plane + 2) & 7;
    let mut x_step = 0usize.runtime();
    if (lane >> 2) & 1 == (lane >> 1) & 1 {
        x_at =
            k_plane * comptime!(depth * PITCH) + comptime!(ZEROS) + member * 4 + (member >> 1usize);
        x_step = comptime!(PITCH).runtime();
    }

    let def = MmaDefinition::<f16, f16, f32>::new(16usize, 8usize, 16usize);
    // Of the sums of a chunk, two rows by two runs, each of the four lanes that have them all scales
    // its own.
    let lower_row = lane & 2 != 0;
    let second_run = lane & 1 != 0;
    let mut totals = Array::<f32>::new(row_tiles);
    let mut later = Array::<f32>::new(row_tiles);
    #[unroll]
    for row_tile in 0..row_tiles {
        totals[row_tile] = 0.0f32;
        later[row_tile] = 0.0f32;
    }
    let mut of_branch = Array::<f32>::new(comptime!(2 * row_tiles));
    #[unroll]
    for r in 0..comptime!(2 * row_tiles) {
        of_branch[r] = 0.0f32;
    }
    #[comptime]
    match &lora {
        ComptimeOption::Some(lora) => {
            let mut up = Array::<G>::new(comptime!(2 * row_tiles * UP_LOADS));
            let mut tile = k_plane;
            while tile < lora.tiles() {
                lora.load_up(&mut up, tile, plane_row, n, row_tiles);
                lora.add_row(&mut of_branch, &up, tile, comptime!(2 * row_tiles));
                tile += k_planes;
            }
        }
        ComptimeOption::None => {}
    }
    let zero = view.zero as usize;
    while at < k {
        #[unroll]
        for d in 0..depth {
            let chunk_at = at + comptime!(d * CHUNK);
            let slot = comptime!((d + ahead_by) % depth);
            let rounds = comptime!((d + ahead_by) / depth);
            let ahead = at + comptime!((rounds * k_planes * depth + slot) * CHUNK);
            if comptime!(depth > 1) {
                rows.load(packed, &mut codes, ahead, slot, false, row_tiles);
                if comptime!(slot == 0 || !blueprint.paired) {
                    scales.load(words, &view, ahead, slot, false, scale_blueprint);
                }
            }
            // The compiler does not know that this is true of a first chunk: a branch keeps it from
            // moving the loads above to where they are used.
            if chunk_at + zero < k {
                let mut products = Sequence::<Array<Vector<f32, Const<2>>>>::new();
                #[unroll]
                for _ in 0..row_tiles {
                    let mut product = Array::<Vector<f32, Const<2>>>::new(2usize);
                    product[0] = Vector::new(0.0f32);
                    product[1] = Vector::new(0.0f32);
                    products.push(product);
                }
                #[unroll]
                for q in 0..4usize {
                    let four = staged[x_at + d * x_step + q];
                    #[unroll]
                    for row_tile in 0..row_tiles {
                        let slot = comptime!((d * row_tiles + row_tile) * 2);
                        let upper = codes[slot].extract(q);
                        let lower = codes[comptime!(slot + 1)].extract(q);
                        let product = products.index_mut(row_tile);
                        #[unroll]
                        for half in 0..2usize {
                            let byte = comptime!(2 * half as u32);
                            let mut levels = Array::<Vector<f16, Const<2>>>::new(4usize);
                            levels[0] = level_pair(&table, copy, upper, byte);
                            levels[1] = level_pair(&table, copy, lower, byte);
                            levels[2] = level_pair(&table, copy, upper, comptime!(byte + 1));
                            levels[3] = level_pair(&table, copy, lower, comptime!(byte + 1));
                            let mut values = Array::<Vector<f16, Const<2>>>::new(2usize);
                            values[0] = Vector::reinterpret(four.extract(comptime!(2 * half)));
                            values[1] = Vector::reinterpret(four.extract(comptime!(2 * half + 1)));
                            def.execute_inplace(&levels, &values, product);
                        }
                    }
                }
                #[unroll]
                for row_tile in 0..row_tiles {
                    let mut scale = later[row_tile];
                    if comptime!(d == 0 || !blueprint.paired) {
                        scale = scales.decode(chunk_at, &map, row_tile, d, scale_blueprint);
                    }
                    if comptime!(d == 0 && blueprint.paired) {
                        let next = chunk_at + comptime!(CHUNK);
                        later[row_tile] = scales.decode(next, &map, row_tile, d, scale_blueprint);
                    }
                    let product = products.index(row_tile);
                    let upper = product[0];
                    let upper = select(second_run, upper.extract(1usize), upper.extract(0usize));
                    let lower = product[1];
                    let lower = select(second_run, lower.extract(1usize), lower.extract(0usize));
                    totals[row_tile] += select(lower_row, lower, upper) * scale;
                }
            }
            if comptime!(depth == 1) {
                rows.load(packed, &mut codes, ahead, d, false, row_tiles);
                scales.load(words, &view, ahead, d, false, scale_blueprint);
            }
        }
        x_at += x_step * comptime!(depth * k_planes);
        at += comptime!(depth * k_planes * CHUNK);
    }

    let mut sums = Sequence::<Array<Vector<f32, Const<2>>>>::new();
    #[unroll]
    for row_tile in 0..row_tiles {
        let mut sum = Array::<Vector<f32, Const<2>>>::new(2usize);
        // The first of four lanes stores both rows, see `store_sums`.
        let own = totals[row_tile] + plane_shuffle_xor(totals[row_tile], 1u32);
        let other = plane_shuffle_xor(own, 2u32);
        #[unroll]
        for r in 0..2usize {
            let mut total = own * unscale;
            if comptime!(r == 1) {
                total = other * unscale;
            }
            #[comptime]
            if lora.is_some() {
                let mut share = of_branch[comptime!(2 * row_tile + r)];
                share += plane_shuffle_xor(share, 1u32);
                total += share + plane_shuffle_xor(share, 2u32);
            }
            sum[r] = Vector::new(total);
        }
        sums.push(sum);
    }
    let target = Target {
        cube: CUBE_POS,
        k_cube: 0usize.runtime(),
        m: 1usize.runtime(),
        n,
    };
    let sums_blueprint = comptime!(blueprint.sums);
    store_sums::<F>(
        &sums,
        &mut staged,
        bias,
        out,
        parts,
        counters,
        &target,
        sums_blueprint,
    );
}

/// Loads a unit's share of `x`, zeros past its end.
#[cube]
fn load_x(
    x: &[Vector<u32, Const<4>>],
    k: usize,
    #[comptime] blueprint: LevelsBlueprint,
) -> Array<Vector<u32, Const<4>>> {
    let units = comptime!(blueprint.sums.units());
    let mut values = Array::<Vector<u32, Const<4>>>::new(comptime!(blueprint.unit_vectors()));
    #[unroll]
    for v in 0..comptime!(blueprint.unit_vectors()) {
        let i = UNIT_POS as usize + comptime!(v * units);
        let mut eight = Vector::<u32, Const<4>>::new(0u32);
        if i < k / 8 {
            eight = x[i];
        }
        values[v] = eight;
    }
    values
}

/// Puts `x` into shared memory in f16, behind zeros; returns what sums with it are to be multiplied
/// by. The caller puts a barrier behind it.
#[cube]
fn stage_x(
    values: &Array<Vector<u32, Const<4>>>,
    staged: &mut Shared<[Vector<u32, Const<4>>]>,
    #[comptime] blueprint: LevelsBlueprint,
) -> f32 {
    let units = comptime!(blueprint.sums.units());
    let unit = UNIT_POS as usize;
    let mut scale = 1.0f32;
    let mut unscale = 1.0f32;
    if comptime!(blueprint.wide) {
        let exponent = largest_exponent(values, comptime!(blueprint.sums.units() / 32));
        // The largest comes to lie between 2^14 and 2^15, where it is finite; what is not finite
        // stays so.
        let exponent = u32::min(u32::max(exponent, 20u32), 254u32);
        scale = f32::reinterpret((268u32 - exponent) << 23);
        unscale = f32::reinterpret((exponent - 14u32) << 23);
    }
    #[unroll]
    for v in 0..comptime!(blueprint.unit_vectors()) {
        let i = unit + comptime!(v * units);
        let mut eight = values[v];
        if comptime!(blueprint.wide) {
            #[unroll]
            for p in 0..4usize {
                let word = eight.extract(p);
                let mut two = Vector::<f32, Const<2>>::empty();
                two.insert(0usize, f32::reinterpret(word << 16) * scale);
                two.insert(1usize, f32::reinterpret(word & 0xffff_0000u32) * scale);
                eight.insert(p, u32::reinterpret(Vector::<f16, Const<2>>::cast_from(two)));
            }
        }
        if i < comptime!(blueprint.x_vectors()) {
            let in_chunk = i % comptime!(CHUNK / 8);
            let chunk = i / comptime!(CHUNK / 8);
            staged[comptime!(ZEROS) + chunk * PITCH + in_chunk + (in_chunk >> 3usize)] = eight;
        }
    }
    if unit < comptime!(ZEROS) {
        staged[unit] = Vector::new(0u32);
    }
    unscale
}

/// The largest biased exponent of the cube's bf16 values.
#[cube]
fn largest_exponent(values: &Array<Vector<u32, Const<4>>>, #[comptime] planes: usize) -> u32 {
    let mut largest = 0u32;
    #[unroll]
    for v in 0..values.len() {
        let eight = values[v];
        #[unroll]
        for p in 0..4usize {
            let word = eight.extract(p);
            largest = u32::max(
                largest,
                u32::max(word & 0x7f80u32, (word >> 16) & 0x7f80u32),
            );
        }
    }
    let mut of_planes = Shared::<[u32]>::new_slice(32usize);
    let largest = plane_max(largest);
    if UNIT_POS_X == 0 {
        of_planes[UNIT_POS_Y as usize] = largest;
    }
    sync_cube();
    let mut of_plane = 0u32;
    if UNIT_POS_X < comptime!(planes as u32) {
        of_plane = of_planes[UNIT_POS_X as usize];
    }
    plane_max(of_plane) >> 7
}
