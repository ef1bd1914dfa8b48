//! `tensor_core`: a matrix product with a packed weight for a few to many rows of `x`.
//!
//! The product is transposed, `yᵀ = W xᵀ`, so that the long side of the tensor cores' tile lies
//! along the rows of `W` and the short one (8) along the few rows of `x`. Each lane decodes just
//! the elements of `W` that the instruction wants from it, straight into its registers: the order
//! of `k` inside of a product is free as long as both sides agree, so a lane takes 32 neighbouring
//! codes with one 16-byte load (of FP8 with two) and hands them over four at a time.
//!
//! FP8 (E4M3) needs no table: its bits are those of an f16 with another bias, see `fp8_pair` in
//! [`fragments`](super::fragments).
//!
//! The values multiplied are those that dequantization gives, rounded to the dtype of `x`; sums
//! are in f32.
//!
//! Sources: the fragment layout of `mma.sync.m16n8k16` (PTX ISA, "Matrix Fragments for
//! mma.m16n8k16"); reordering `k` to suit packed weights is Marlin's idea (Frantar and
//! Alistarh, arXiv 2408.11743); looking a byte up for two codes, in a table of which each lane
//! has a copy to itself, is FLUTE's (Guo et al., arXiv 2407.10960).

use cubecl::cmma::MmaDefinition;
use cubecl::prelude::*;

use super::decode::PackedView;
use super::fragments::{
    CodeTable, FP8_FACTOR, Rows, TABLE_BYTES, fill_table, find_nan, fp8_fragment, fragment,
    lane_vectors, load_level, nan_or_zero,
};
use super::lora::{LoraBranch, UP_LOADS};
use super::scales::{CHUNK, ScaleBlueprint, ScaleMap, ScalePlace, Scales, load_offset};
use super::stage::{load_first_x, load_x, stage_first_x, store_x, x_places};
use super::sums::{Target, store_sums};
use super::tensor_core_blueprint::{PARTS, TensorCoreBlueprint};
use half::bf16;

/// `y = x Wᵀ + b + s (x A) B`.
///
/// - `x`: `[m, k]`, two elements a u32, in vectors of eight elements; `packed`: the whole packed
///   weight, and `words` the same buffer once more; `bias`: `[n]`, unused without one; `out`:
///   `[m, n]`; `parts` and `counters`: see [`store_sums`]; `lora`: the low-rank branch, if there is
///   one.
/// - A cube of `(32, row_planes * k_planes)` units computes `16 * row_tiles * row_planes` columns
///   of `y`, all its rows: planes with the same rows add their sums up at the end.
/// - `k_cubes` cubes share those columns, each taking some stages.
/// - A stage is a piece along `k` whose part of `x` is in shared memory. Unless there is only one,
///   the next stage is loaded while this one is multiplied.
/// - Tails: rows past `n` repeat the last one and are not stored, elements past `k` count as zero.
///   `k` is a multiple of `2^run_log2` and of 32, `m` at most `8 * column_tiles`.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn matmul_tensor_core_kernel<F: Float, G: Float>(
    x: &[Vector<u32, Const<4>>],
    packed: &[Vector<u32, Const<4>>],
    words: &[u32],
    bias: &[F],
    out: &mut [F],
    parts: &mut [Vector<u32, Const<4>>],
    counters: &[Atomic<u32>],
    lora: ComptimeOption<LoraBranch<G>>,
    view: PackedView,
    m: usize,
    n: usize,
    k: usize,
    #[comptime] blueprint: TensorCoreBlueprint,
    #[define(F)] _dtype: ElemType,
    #[define(G)] _lora_dtype: ElemType,
) {
    let row_tiles = comptime!(blueprint.sums.row_tiles);
    let column_tiles = comptime!(blueprint.sums.column_tiles);
    let depth = comptime!(blueprint.scales.depth);
    let plane_k = comptime!(blueprint.plane_k());
    let stage_k = comptime!(blueprint.stage_k());
    let scale_blueprint = comptime!(blueprint.scales);

    let plane = UNIT_POS_Y as usize;
    let row_plane = plane % comptime!(blueprint.sums.row_planes);
    let k_plane = plane / comptime!(blueprint.sums.row_planes);
    let mut cube = CUBE_POS;
    let mut k_cube = 0usize.runtime();
    let k_cubes = comptime!(blueprint.sums.k_cubes);
    if comptime!(k_cubes > 1) {
        k_cube = CUBE_POS % k_cubes;
        cube = CUBE_POS / k_cubes;
    }
    let plane_row =
        cube * comptime!(blueprint.sums.cube_rows()) + row_plane * comptime!(16 * row_tiles);
    let stages = k.div_ceil(stage_k.runtime());
    let stages_each = stages.div_ceil(k_cubes.runtime());
    let first_stage = k_cube * stages_each;
    let end_stage = usize::min(first_stage + stages_each, stages);
    // Where this plane is along `k`, and where what it multiplies ends.
    let mut at = first_stage * stage_k + k_plane * plane_k;
    let mut bound = usize::min(end_stage * stage_k, k);
    if comptime!(blueprint.once) {
        bound = usize::min(at + plane_k, k);
    }

    // All loads from global memory are issued before the first value is used.
    let code_bits = comptime!(blueprint.code_bits);
    let rows = Rows::new(plane_row, bound, n, k, row_tiles, code_bits);
    let x_at = x_places(k_plane, blueprint);
    // Unknown to the compiler, which would otherwise mask it again in each look-up.
    let copy = ((UNIT_POS_X & 15) ^ view.zero) * 8;
    let vectors = comptime!(lane_vectors(blueprint.code_bits));
    let mut codes = Array::<Vector<u32, Const<4>>>::new(comptime!(
        2 * row_tiles * blueprint.scales.depth * vectors
    ));
    // Of codes of eight bits: where the lane's rows have NaN.
    let mut found_nan = Array::<u32>::new(comptime!(2 * row_tiles));
    #[unroll]
    for r in 0..comptime!(2 * row_tiles) {
        found_nan[r] = 0u32;
    }
    let scale_at = ScalePlace::in_order(scale_blueprint);
    let mut scales = Scales::new(scale_at, plane_row, bound, n, k, scale_blueprint);
    // From a chunk of a plane to its next.
    let step = comptime!(if blueprint.once { CHUNK } else { stage_k });
    let ahead_by = comptime!(usize::max(depth - 1, 1));
    // NaN would be found in what was never loaded.
    let clear = comptime!(!blueprint.once || blueprint.code_bits == 8);
    #[unroll]
    for d in 0..ahead_by {
        let chunk_at = at + comptime!(d * step);
        rows.load(packed, &mut codes, chunk_at, d, clear, row_tiles, code_bits);
        scales.load(words, &view, chunk_at, d, clear, scale_blueprint);
    }
    let mut up = Array::<G>::new(comptime!(2 * row_tiles * UP_LOADS));
    let first_tile = k_cube * comptime!(blueprint.sums.k_planes) + k_plane;
    #[comptime]
    match &lora {
        ComptimeOption::Some(lora) => {
            lora.load_up(&mut up, first_tile, plane_row, n, row_tiles);
        }
        ComptimeOption::None => {}
    }
    let units = comptime!(blueprint.sums.units());
    let first_x = load_first_x(x, first_stage * stage_k, m, k, blueprint);
    let mut table = CodeTable::new_aligned_slice(TABLE_BYTES, 128usize);
    if comptime!(code_bits == 4) {
        fill_table(load_level(words, &view), &mut table, units);
    }
    let mut map = ScaleMap::new(view.zero, 1usize, units);
    map.load(words, &view, 0usize, units, scale_blueprint);
    map.select(0usize.runtime(), load_offset(words, &view, scale_blueprint));
    map.store(1usize, units, scale_blueprint);
    let mut staged =
        Shared::<[Vector<u32, Const<4>>]>::new_slice(comptime!(blueprint.shared_vectors()));
    stage_first_x(
        x,
        &first_x,
        &mut staged,
        first_stage * stage_k,
        m,
        k,
        blueprint,
    );
    sync_cube();

    let def = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    let mut sums = Sequence::<Array<Vector<f32, Const<2>>>>::new();
    #[unroll]
    for _ in 0..comptime!(row_tiles * column_tiles) {
        let mut sum = Array::<Vector<f32, Const<2>>>::new(2usize);
        sum[0] = Vector::new(0.0f32);
        sum[1] = Vector::new(0.0f32);
        sums.push(sum);
    }

    #[comptime]
    match &lora {
        ComptimeOption::Some(lora) => {
            let mut tile = first_tile;
            while tile < lora.tiles() {
                if comptime!(blueprint.branch_parts == 1) {
                    lora.add_tile::<F>(&mut sums, &up, tile, m, row_tiles, column_tiles, 1usize);
                } else {
                    let parts = comptime!(blueprint.branch_parts);
                    lora.add_tile::<bf16>(&mut sums, &up, tile, m, row_tiles, column_tiles, parts);
                }
                tile += comptime!(blueprint.sums.k_planes * k_cubes);
                lora.load_up(&mut up, tile, plane_row, n, row_tiles);
            }
        }
        ComptimeOption::None => {}
    }

    let zero = view.zero as usize;
    let mut x_chunk = 0usize.runtime();
    // With a barrier for each chunk all planes take the same number of them.
    let mut lead = 0usize.runtime();
    if comptime!(!blueprint.once) {
        lead = k_plane * plane_k;
    }
    while at < bound + lead {
        #[unroll]
        for d in 0..depth {
            let chunk_at = at + comptime!(d * step);
            let ahead = chunk_at + comptime!(ahead_by * step);
            let slot = comptime!((d + ahead_by) % depth);
            let mut inside = true.runtime();
            if comptime!(blueprint.once) {
                if comptime!(depth > 1) {
                    rows.load(packed, &mut codes, ahead, slot, clear, row_tiles, code_bits);
                    scales.load(words, &view, ahead, slot, clear, scale_blueprint);
                }
                // The compiler does not know that this is true: a branch keeps it from moving the
                // loads above to where they are used.
                inside = chunk_at + zero < bound;
            } else if comptime!(d > 0) {
                inside = chunk_at < bound + lead;
            }
            if inside {
                if comptime!(!blueprint.once) {
                    rows.load(packed, &mut codes, ahead, slot, clear, row_tiles, code_bits);
                    scales.load(words, &view, ahead, slot, clear, scale_blueprint);
                    sync_plane();
                }
                let row_scales = row_scales(&scales, &map, chunk_at, d, scale_blueprint);
                // Which half of shared memory is read.
                let half = comptime!(if blueprint.once {
                    0
                } else {
                    d * blueprint.stage_vectors()
                });
                #[unroll]
                for part in 0..PARTS {
                    let mut carried = Array::<Vector<u32, Const<4>>>::new(comptime!(usize::max(
                        blueprint.carried(),
                        1
                    )));
                    if comptime!(!blueprint.once) {
                        let next = chunk_at + step - lead;
                        load_x(x, &mut carried, next, m, k, part, blueprint);
                        sync_plane();
                    }
                    #[unroll]
                    for quarter in 0..comptime!(4 / PARTS) {
                        let q = comptime!(part * 4 / PARTS + quarter);
                        let mut w_first = Sequence::<Array<Vector<F, Const<2>>>>::new();
                        let mut w_second = Sequence::<Array<Vector<F, Const<2>>>>::new();
                        #[unroll]
                        for row_tile in 0..row_tiles {
                            let slot = comptime!((d * row_tiles + row_tile) * 2);
                            // Of a row's 32 codes the first half can have another scale.
                            let each_log2 = comptime!(scale_blueprint.row_scales_log2());
                            let place =
                                comptime!(((2 * row_tile) << each_log2) + (q >> 1) * each_log2);
                            let upper_scale = row_scales[place];
                            let lower_scale = row_scales[comptime!(place + (1 << each_log2))];
                            if comptime!(code_bits == 4) {
                                let upper = codes[slot].extract(q);
                                let lower = codes[comptime!(slot + 1)].extract(q);
                                w_first.push(fragment::<F>(
                                    &table,
                                    copy,
                                    upper,
                                    lower,
                                    upper_scale,
                                    lower_scale,
                                    0u32,
                                ));
                                w_second.push(fragment::<F>(
                                    &table,
                                    copy,
                                    upper,
                                    lower,
                                    upper_scale,
                                    lower_scale,
                                    2u32,
                                ));
                            } else {
                                let vector = comptime!(slot * 2 + q / 2);
                                let (uppers, lowers) =
                                    (codes[vector], codes[comptime!(vector + 2)]);
                                let at = comptime!(2 * (q % 2));
                                let (upper, lower) = (uppers.extract(at), lowers.extract(at));
                                found_nan[comptime!(2 * row_tile)] |= find_nan(upper);
                                found_nan[comptime!(2 * row_tile + 1)] |= find_nan(lower);
                                w_first.push(fp8_fragment::<F>(
                                    upper,
                                    lower,
                                    upper_scale,
                                    lower_scale,
                                ));
                                let at = comptime!(2 * (q % 2) + 1);
                                let (upper, lower) = (uppers.extract(at), lowers.extract(at));
                                found_nan[comptime!(2 * row_tile)] |= find_nan(upper);
                                found_nan[comptime!(2 * row_tile + 1)] |= find_nan(lower);
                                w_second.push(fp8_fragment::<F>(
                                    upper,
                                    lower,
                                    upper_scale,
                                    lower_scale,
                                ));
                            }
                        }
                        #[unroll]
                        for tile in 0..column_tiles {
                            let further = comptime!(half + tile * blueprint.plane_k());
                            let four = staged[x_chunk + x_at[q] + further];
                            let mut first = Array::<Vector<F, Const<2>>>::new(2usize);
                            let mut second = Array::<Vector<F, Const<2>>>::new(2usize);
                            #[unroll]
                            for p in 0..2usize {
                                first[p] = Vector::reinterpret(four.extract(p));
                                second[p] = Vector::reinterpret(four.extract(p + 2));
                            }
                            #[unroll]
                            for row_tile in 0..row_tiles {
                                let sum = sums.index_mut(comptime!(row_tile * column_tiles + tile));
                                def.execute_inplace(w_first.index(row_tile), &first, sum);
                                def.execute_inplace(w_second.index(row_tile), &second, sum);
                            }
                        }
                    }
                    if comptime!(!blueprint.once) {
                        let other = comptime!(blueprint.stage_vectors() - half);
                        store_x(&mut staged, &carried, other, part, blueprint);
                    }
                }
                if comptime!(blueprint.once) {
                    x_chunk += comptime!(CHUNK / 8);
                } else {
                    sync_cube();
                }
            }
            if comptime!(blueprint.once && depth == 1) {
                rows.load(packed, &mut codes, ahead, d, clear, row_tiles, code_bits);
                scales.load(words, &view, ahead, d, clear, scale_blueprint);
            }
        }
        at += comptime!(depth * step);
    }

    if comptime!(code_bits == 8) {
        #[unroll]
        for row_tile in 0..row_tiles {
            #[unroll]
            for r in 0..2usize {
                let found = found_nan[comptime!(2 * row_tile + r)];
                let found = found | plane_shuffle_xor(found, 1u32);
                let found = found | plane_shuffle_xor(found, 2u32);
                #[unroll]
                for tile in 0..column_tiles {
                    let sum = sums.index_mut(comptime!(row_tile * column_tiles + tile));
                    sum[r] += Vector::new(nan_or_zero(found));
                }
            }
        }
    }

    let target = Target {
        cube,
        k_cube,
        m,
        n,
        first_out: 0usize.runtime(),
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

/// The scales of a lane's rows in the chunk at `at` in slot `d`, of each pair of rows the upper's
/// first. A lane's 32 codes are in one run, and where that is 64 long, another lane has its scale; or they
/// are in two runs, whose scales follow each other.
#[cube]
fn row_scales(
    scales: &Scales,
    map: &ScaleMap,
    at: usize,
    #[comptime] d: usize,
    #[comptime] blueprint: ScaleBlueprint,
) -> Array<f32> {
    let each = comptime!(1 << blueprint.row_scales_log2());
    let mut rows = Array::<f32>::new(comptime!(2 * blueprint.row_tiles * each));
    #[unroll]
    for e in 0..comptime!(blueprint.lane_scales()) {
        let mut scale = scales.decode(at, map, e, d, blueprint);
        if comptime!(blueprint.kind.goes_by_rows()) {
            scale *= FP8_FACTOR;
        }
        if comptime!(blueprint.run_log2 == 6) {
            let upper = ((UNIT_POS_X >> 2) << 1) | ((UNIT_POS_X >> 1) & 1);
            rows[comptime!(2 * e)] = plane_shuffle(scale, upper);
            rows[comptime!(2 * e + 1)] = plane_shuffle(scale, upper + 16);
        } else {
            rows[e] = scale;
        }
    }
    rows
}
