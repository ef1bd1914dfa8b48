//! `levels`: matrix products with packed weights for one row of `x`, on tensor cores.
//!
//! With a single row there is nothing to share the work of decoding with, so there is as little of
//! it as can be: the tensor cores multiply `x` by the bare levels of the codebook in f16, two to a
//! look-up, and only the sum over a run of elements with the same scale is multiplied by that
//! scale, in f32. What is multiplied is thus a weight whose level is rounded to f16 and whose scale
//! is not rounded at all, where dequantization rounds their product to the dtype of `x`.
//!
//! Of the eight columns of the instruction's other side, the even ones hold `x` where the first half
//! of a chunk is and zeros elsewhere, the odd ones the other way round; so the sums of both runs of
//! a chunk come out apart. Of shorter runs, each of four columns holds a quarter of the chunk, and where a
//! quarter is two runs, these are multiplied one after the other. Elements of `x` in bf16 are brought into
//! the range of f16 by a power of two.
//!
//! Sources: those of [`tensor_core`](super::tensor_core).

use cubecl::cmma::MmaDefinition;
use cubecl::prelude::*;
use half::f16;

use super::decode::PackedView;
use super::fragments::{
    CodeTable, FP8_FACTOR, Rows, TABLE_BYTES, fill_levels, find_nan, fp8_pair, in_fp8_order,
    lane_vectors, level_pair, load_level, nan_or_zero,
};
use super::lora::{LoraBranch, UP_LOADS};
use super::scales::{CHUNK, ScaleBlueprint, ScaleMap, ScalePlace, Scales, load_offset};
use super::sums::{SumsBlueprint, Target, store_gated, store_sums};
use crate::activation::Activation;

/// What forks a compiled kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LevelsBlueprint {
    /// Which scales a plane needs, as sums lie. `depth` chunks are on their way at a time.
    pub scales: ScaleBlueprint,
    /// `depth` is two, and the scales of the two chunks are in one word, which is loaded once.
    pub paired: bool,
    /// Bits of a code, 4 or 8.
    pub code_bits: usize,
    /// How planes share the work: one column tile, not split.
    pub sums: SumsBlueprint,
    /// Chunks along `k` of a plane, a multiple of `depth`; so many are neighbours, and the next are
    /// another plane's.
    pub chunks: usize,
    /// `x` is in bf16, not in f16.
    pub wide: bool,
    /// What the products of a launch have to do with each other.
    pub joined: Joined,
}

impl LevelsBlueprint {
    /// Runs of a lane's codes, whose products are summed apart.
    const fn lane_runs(&self) -> usize {
        if self.scales.run_log2 == 4 { 2 } else { 1 }
    }

    /// Chunks along `k` of a cube.
    const fn all_chunks(&self) -> usize {
        self.chunks * self.sums.k_planes
    }

    const fn is_gated(&self) -> bool {
        matches!(self.joined, Joined::Gated(_))
    }

    /// Planes next to each other that have different results.
    pub const fn result_planes(&self) -> usize {
        match self.joined {
            Joined::Apart => self.sums.row_planes,
            Joined::Gated(_) => self.sums.row_planes / 2,
        }
    }

    /// Maps of scales that the planes of a cube use.
    const fn maps(&self) -> usize {
        if self.is_gated() { 2 } else { 1 }
    }

    /// Results of a cube.
    pub const fn result_rows(&self) -> usize {
        16 * self.sums.row_tiles * self.result_planes()
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
        let sums = match self.joined {
            Joined::Apart => self.sums.shared_vectors(),
            Joined::Gated(_) => self.sums.cube_vectors() * self.sums.k_planes,
        };
        if staged > sums { staged } else { sums }
    }

    /// Bytes of shared memory that a cube takes.
    pub const fn shared_bytes(&self) -> usize {
        TABLE_BYTES + self.maps() * 256 * 4 + 32 * 4 + self.shared_vectors() * 16
    }
}

/// Vectors that a chunk of `x` takes: sixteen, and one left free in the middle and one at the end,
/// so that the four lanes that read at once find four different groups of banks.
const PITCH: usize = CHUNK / 8 + 2;

/// Zero vectors before the first chunk, so many that each plane finds four of them in banks that
/// its other lanes do not read from.
const ZEROS: usize = 16;

/// What the products of a launch have to do with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Joined {
    /// Each has cubes and results of its own.
    Apart,
    /// There are two, and `activation(first) second` is the result: half of a cube's planes have rows of
    /// the one, the others those of the other.
    Gated(Activation),
}

/// A weight that a row is multiplied with.
#[derive(CubeType, CubeLaunch)]
pub struct LevelsWeight<F: Float, G: Float> {
    /// The whole packed weight.
    pub packed: Box<[Vector<u32, Const<4>>]>,
    /// The same buffer once more.
    pub words: Box<[u32]>,
    /// `[n]`.
    pub bias: ComptimeOption<Box<[F]>>,
    /// The low-rank branch, if there is one.
    pub lora: ComptimeOption<LoraBranch<G>>,
    /// Where the sections of the packed weight are.
    pub view: PackedView,
    /// Rows.
    pub n: usize,
    /// The first of its cubes.
    pub first_cube: usize,
    /// Where its results start.
    pub first_out: usize,
}

/// `y = x Wᵀ + b + s (x A) B` for a single row and one weight or several.
///
/// - `x`: `[k]`, two elements a u32, in vectors of eight elements; `out`: the results of `n` each, or what
///   `joined` makes of them; `bias`, `parts` and `counters` are what `store_sums` takes, and not used.
/// - All weights are quantized in one way, and all have a bias or a branch or none has.
/// - A cube of `(32, row_planes * k_planes)` units computes `16 * row_tiles * row_planes` columns
///   of `y`; planes with the same rows add their sums up at the end.
/// - Tails: rows past `n` repeat the last one and are not stored, elements past `k` count as zero.
///   `k` is a multiple of 64.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn matmul_levels_kernel<F: Float, G: Float>(
    x: &[Vector<u32, Const<4>>],
    weights: Sequence<LevelsWeight<F, G>>,
    bias: &[F],
    out: &mut [F],
    parts: &mut [Vector<u32, Const<4>>],
    counters: &[Atomic<u32>],
    k: usize,
    #[comptime] blueprint: LevelsBlueprint,
    #[define(F)] _dtype: ElemType,
    #[define(G)] _lora_dtype: ElemType,
) {
    let row_tiles = comptime!(blueprint.sums.row_tiles);
    let depth = comptime!(blueprint.scales.depth);
    let lane_runs = comptime!(blueprint.lane_runs());
    let k_planes = comptime!(blueprint.sums.k_planes);
    let scale_blueprint = comptime!(blueprint.scales);
    let count = weights.len().comptime();

    let plane = UNIT_POS_Y as usize;
    let mut row_plane = plane % comptime!(blueprint.sums.row_planes);
    let k_plane = plane / comptime!(blueprint.sums.row_planes);
    let first = weights.index(0usize);
    let zero = first.view.zero;
    let mut part = 0usize.runtime();
    let mut n = first.n;
    let mut first_out = 0usize.runtime();
    let mut cube = CUBE_POS;
    if comptime!(blueprint.is_gated()) {
        part = row_plane / comptime!(blueprint.result_planes());
        row_plane %= comptime!(blueprint.result_planes());
    } else {
        #[unroll]
        for w in 1..count {
            let weight = weights.index(w);
            if CUBE_POS >= weight.first_cube {
                part = w.runtime();
                n = weight.n;
                first_out = weight.first_out;
                cube = CUBE_POS - weight.first_cube;
            }
        }
    }
    let plane_row =
        cube * comptime!(blueprint.result_rows()) + row_plane * comptime!(16 * row_tiles);

    // All loads from global memory are issued before the first value is used.
    let code_bits = comptime!(blueprint.code_bits);
    let vectors = comptime!(lane_vectors(blueprint.code_bits));
    // NaN would be found in what was never loaded.
    let clear = comptime!(blueprint.code_bits == 8);
    let rows = Rows::new(plane_row, k, n, k, row_tiles, code_bits);
    let mut codes = Array::<Vector<u32, Const<4>>>::new(comptime!(2 * row_tiles * depth * vectors));
    let mut scales = Scales::new(ScalePlace::of_sums(), plane_row, k, n, k, scale_blueprint);
    let mut at = k_plane * comptime!(depth * CHUNK);
    let ahead_by = comptime!(usize::max(depth - 1, 1));
    let units = comptime!(blueprint.sums.units());
    let maps = comptime!(blueprint.maps());
    let mut map = ScaleMap::new(zero, maps, units);
    let mut offset = 0.0f32;
    #[unroll]
    for w in 0..count {
        if comptime!(count == 1) || part == w {
            let weight = weights.index(w);
            #[unroll]
            for d in 0..ahead_by {
                let chunk_at = at + comptime!(d * CHUNK);
                rows.load(
                    &weight.packed,
                    &mut codes,
                    chunk_at,
                    d,
                    clear,
                    row_tiles,
                    code_bits,
                );
                scales.load(
                    &weight.words,
                    &weight.view,
                    chunk_at,
                    d,
                    false,
                    scale_blueprint,
                );
            }
            offset = load_offset(&weight.words, &weight.view, scale_blueprint);
            if comptime!(maps == 1) {
                map.load(&weight.words, &weight.view, 0usize, units, scale_blueprint);
            }
        }
    }
    if comptime!(maps == 1) {
        map.select(0usize.runtime(), offset);
    } else {
        #[unroll]
        for w in 0..count {
            let weight = weights.index(w);
            map.load(&weight.words, &weight.view, w, units, scale_blueprint);
        }
        map.select(part, offset);
    }
    // The codebook is that of the way to quantize.
    let mut level = 0.0f32;
    if comptime!(code_bits == 4) {
        level = load_level(&first.words, &first.view);
    }
    let values = load_x(x, k, blueprint);
    let mut table = CodeTable::new_aligned_slice(TABLE_BYTES, 128usize);
    if comptime!(code_bits == 4) {
        fill_levels(level, &mut table, units);
    }
    map.store(maps, units, scale_blueprint);
    let mut staged =
        Shared::<[Vector<u32, Const<4>>]>::new_slice(comptime!(blueprint.shared_vectors()));
    let unscale = stage_x(&values, &mut staged, blueprint);
    sync_cube();

    let lane = UNIT_POS_X;
    let member = (lane & 3) as usize;
    // Unknown to the compiler, which would otherwise mask it again in each look-up.
    let copy = (lane ^ zero) * 4;
    // Lanes of a column that has nothing here stay with the zeros.
    let mut x_at = (2 * k_plane + 2) & 7;
    let mut x_step = 0usize.runtime();
    let mut has_x = (lane >> 2) & 3 == lane & 3;
    if comptime!(scale_blueprint.run_log2 == 6) {
        has_x = (lane >> 2) & 1 == (lane >> 1) & 1;
    }
    if has_x {
        x_at =
            k_plane * comptime!(depth * PITCH) + comptime!(ZEROS) + member * 4 + (member >> 1usize);
        x_step = comptime!(PITCH).runtime();
    }

    let def = MmaDefinition::<f16, f16, f32>::new(16usize, 8usize, 16usize);
    // Of the sums of a chunk, two rows by its runs, each of the four lanes that have them all scales
    // its own: those of 64 elements of one row.
    let lower_row = lane & 2 != 0;
    let second_run = lane & 1 != 0;
    let mut totals = Array::<f32>::new(row_tiles);
    let mut later = Array::<f32>::new(row_tiles);
    // Of codes of eight bits: where the lane's rows have NaN.
    let mut found_nan = Array::<u32>::new(comptime!(2 * row_tiles));
    #[unroll]
    for row_tile in 0..row_tiles {
        totals[row_tile] = 0.0f32;
        later[row_tile] = 0.0f32;
    }
    // What is added to a row besides: its four lanes share it, and planes along `k` do.
    let mut added = Array::<f32>::new(comptime!(2 * row_tiles));
    #[unroll]
    for r in 0..comptime!(2 * row_tiles) {
        added[r] = 0.0f32;
        found_nan[r] = 0u32;
    }
    #[unroll]
    for w in 0..count {
        if comptime!(count == 1) || part == w {
            add_others::<F, G>(weights.index(w), &mut added, plane_row, k_plane, blueprint);
        }
    }
    let zero = zero as usize;
    while at < k {
        #[unroll]
        for d in 0..depth {
            let chunk_at = at + comptime!(d * CHUNK);
            let slot = comptime!((d + ahead_by) % depth);
            let rounds = comptime!((d + ahead_by) / depth);
            let ahead = at + comptime!((rounds * k_planes * depth + slot) * CHUNK);
            if comptime!(depth > 1) {
                #[unroll]
                for w in 0..count {
                    if comptime!(count == 1) || part == w {
                        let weight = weights.index(w);
                        rows.load(
                            &weight.packed,
                            &mut codes,
                            ahead,
                            slot,
                            clear,
                            row_tiles,
                            code_bits,
                        );
                        if comptime!(slot == 0 || !blueprint.paired) {
                            let (words, view) = (&weight.words, &weight.view);
                            scales.load(words, view, ahead, slot, false, scale_blueprint);
                        }
                    }
                }
            }
            // The compiler does not know that this is true of a first chunk: a branch keeps it from
            // moving the loads above to where they are used.
            if chunk_at + zero < k {
                let mut products = Sequence::<Array<Vector<f32, Const<2>>>>::new();
                #[unroll]
                for _ in 0..comptime!(row_tiles * lane_runs) {
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
                        let run = comptime!(q * lane_runs / 4);
                        let product = products.index_mut(comptime!(row_tile * lane_runs + run));
                        #[unroll]
                        for half in 0..2usize {
                            let byte = comptime!(2 * half as u32);
                            let mut levels = Array::<Vector<f16, Const<2>>>::new(4usize);
                            if comptime!(code_bits == 4) {
                                let upper = codes[slot].extract(q);
                                let lower = codes[comptime!(slot + 1)].extract(q);
                                levels[0] = level_pair(&table, copy, upper, byte);
                                levels[1] = level_pair(&table, copy, lower, byte);
                                levels[2] = level_pair(&table, copy, upper, comptime!(byte + 1));
                                levels[3] = level_pair(&table, copy, lower, comptime!(byte + 1));
                            } else {
                                let vector = comptime!(slot * 2 + q / 2);
                                let word = comptime!(2 * (q % 2) + half);
                                let upper = codes[vector].extract(word);
                                let lower = codes[comptime!(vector + 2)].extract(word);
                                found_nan[comptime!(2 * row_tile)] |= find_nan(upper);
                                found_nan[comptime!(2 * row_tile + 1)] |= find_nan(lower);
                                levels[0] = fp8_pair(upper, false);
                                levels[1] = fp8_pair(lower, false);
                                levels[2] = fp8_pair(upper, true);
                                levels[3] = fp8_pair(lower, true);
                            }
                            let mut values = Array::<Vector<f16, Const<2>>>::new(2usize);
                            values[0] = Vector::reinterpret(four.extract(comptime!(2 * half)));
                            values[1] = Vector::reinterpret(four.extract(comptime!(2 * half + 1)));
                            def.execute_inplace(&levels, &values, product);
                        }
                    }
                }
                #[unroll]
                for row_tile in 0..row_tiles {
                    if comptime!(scale_blueprint.run_log2 == 6) {
                        let mut scale = later[row_tile];
                        if comptime!(d == 0 || !blueprint.paired) {
                            scale = scales.decode(chunk_at, &map, row_tile, d, scale_blueprint);
                        }
                        if comptime!(d == 0 && blueprint.paired) {
                            let next = chunk_at + comptime!(CHUNK);
                            later[row_tile] =
                                scales.decode(next, &map, row_tile, d, scale_blueprint);
                        }
                        let product = products.index(row_tile);
                        let upper = product[0];
                        let upper =
                            select(second_run, upper.extract(1usize), upper.extract(0usize));
                        let lower = product[1];
                        let lower =
                            select(second_run, lower.extract(1usize), lower.extract(0usize));
                        totals[row_tile] += select(lower_row, lower, upper) * scale;
                    } else {
                        let each = comptime!(2 * lane_runs);
                        #[unroll]
                        for run in 0..each {
                            let e = comptime!(row_tile * each + run);
                            let scale = scales.decode(chunk_at, &map, e, d, scale_blueprint);
                            let of_lane = comptime!(row_tile * lane_runs + run % lane_runs);
                            let product = products.index(of_lane);
                            let quarter = comptime!(run / lane_runs);
                            let upper = product[0].extract(quarter);
                            let lower = product[1].extract(quarter);
                            totals[row_tile] += select(lower_row, lower, upper) * scale;
                        }
                    }
                }
            }
            if comptime!(depth == 1) {
                #[unroll]
                for w in 0..count {
                    if comptime!(count == 1) || part == w {
                        let weight = weights.index(w);
                        rows.load(
                            &weight.packed,
                            &mut codes,
                            ahead,
                            d,
                            clear,
                            row_tiles,
                            code_bits,
                        );
                        scales.load(
                            &weight.words,
                            &weight.view,
                            ahead,
                            d,
                            false,
                            scale_blueprint,
                        );
                    }
                }
            }
        }
        x_at += x_step * comptime!(depth * k_planes);
        at += comptime!(depth * k_planes * CHUNK);
    }

    let mut unscale = unscale;
    if comptime!(code_bits == 8) {
        unscale *= FP8_FACTOR;
        #[unroll]
        for r in 0..comptime!(2 * row_tiles) {
            added[r] += nan_or_zero(found_nan[r]);
        }
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
            if first.bias.is_some() || first.lora.is_some() || code_bits == 8 {
                let mut share = added[comptime!(2 * row_tile + r)];
                share += plane_shuffle_xor(share, 1u32);
                total += share + plane_shuffle_xor(share, 2u32);
            }
            sum[r] = Vector::new(total);
        }
        sums.push(sum);
    }
    let target = Target {
        cube,
        k_cube: 0usize.runtime(),
        m: 1usize.runtime(),
        n,
        first_out,
    };
    let sums_blueprint = comptime!(blueprint.sums);
    #[comptime]
    match blueprint.joined {
        Joined::Gated(activation) => {
            store_gated::<F>(
                &sums,
                &mut staged,
                bias,
                out,
                &target,
                activation,
                sums_blueprint,
            );
        }
        Joined::Apart => {
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
    }
}

/// Adds a lane's share of a weight's bias and of its branch to the sums of its rows.
#[cube]
fn add_others<F: Float, G: Float>(
    weight: &LevelsWeight<F, G>,
    sums: &mut Array<f32>,
    plane_row: usize,
    k_plane: usize,
    #[comptime] blueprint: LevelsBlueprint,
) {
    let row_tiles = comptime!(blueprint.sums.row_tiles);
    #[comptime]
    match &weight.bias {
        ComptimeOption::Some(bias) => {
            if k_plane == 0 && UNIT_POS_X & 3 == 0 {
                #[unroll]
                for r in 0..comptime!(2 * row_tiles) {
                    let row = plane_row + (UNIT_POS_X >> 2) as usize + comptime!(8 * r);
                    sums[r] += f32::cast_from(bias[usize::min(row, weight.n - 1)]);
                }
            }
        }
        ComptimeOption::None => {}
    }
    #[comptime]
    match &weight.lora {
        ComptimeOption::Some(lora) => {
            let mut up = Array::<G>::new(comptime!(2 * row_tiles * UP_LOADS));
            let mut tile = k_plane;
            while tile < lora.tiles() {
                lora.load_up(&mut up, tile, plane_row, weight.n, row_tiles);
                lora.add_row(sums, &up, tile, comptime!(2 * row_tiles));
                tile += comptime!(blueprint.sums.k_planes);
            }
        }
        ComptimeOption::None => {}
    }
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
        if comptime!(blueprint.code_bits == 8) {
            eight = in_fp8_order(eight);
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
