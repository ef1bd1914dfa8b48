//! The backward pass: the gradients of queries, and those of keys and values.

use cubecl::prelude::*;

use super::tiles::{
    Sums, add_product, add_product_of_sums, lhs_place, load_rows, load_tile, rhs_place, stage_rows,
    store_sums, store_tile, write_rows, zeros,
};
use super::{FlashBlueprint, FlashStrides, Piece, range_of, score_scale};
use crate::kernel::attention::{AttentionView, TokenStrides};

/// `dq`, and for the other kernel of each row the log-sum-exp and the sum of `dO O`.
///
/// - `out`, `grad`, `dq`: `[batch, queries, heads, head_dim]`, contiguous
/// - `lse`: `[batch, heads, queries]`
/// - `stats`: `[batch, kv_heads, queries * group]` of those two
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn attention_dq_kernel<F: Float>(
    q: &[Piece<F>],
    k: &[Piece<F>],
    v: &[Piece<F>],
    ranges: &[i32],
    out: &[Piece<F>],
    lse: &[f32],
    grad: &[Piece<F>],
    dq: &mut [Piece<F>],
    stats: &mut [Vector<f32, Const<2>>],
    strides: FlashStrides,
    of_grad: TokenStrides,
    view: AttentionView,
    #[comptime] blueprint: FlashBlueprint,
    #[define(F)] _dtype: ElemType,
) {
    let row_tiles = comptime!(blueprint.row_tiles);
    let pieces = comptime!(blueprint.pieces());
    let pitch = comptime!(blueprint.pitch());
    let key_tiles = comptime!(blueprint.keys / 8);
    let value_tiles = comptime!(blueprint.head_dim / 8);
    let tile = comptime!(blueprint.tile_pieces());
    let group = comptime!(blueprint.group);
    let steps = comptime!(blueprint.head_dim / 16);

    let heads = view.kv_heads * group;
    let rows = view.queries * group;
    let tiles = rows.div_ceil(comptime!(blueprint.rows()).runtime());
    let cube_row = (tiles - 1 - CUBE_POS_X as usize) * comptime!(blueprint.rows());
    let kv_head = CUBE_POS_Y as usize % view.kv_heads;
    let batch = CUBE_POS_Y as usize / view.kv_heads;
    let last_row = usize::min(cube_row + comptime!(blueprint.rows()), rows) - 1;
    let (first_key, _) = range_of(ranges, batch, cube_row / group, &view);
    let (_, end_key) = range_of(ranges, batch, last_row / group, &view);

    let mut staged = Shared::<[Piece<F>]>::new_aligned_slice(
        comptime!(2 * blueprint.row_pieces() + 4 * blueprint.tile_pieces()),
        16usize,
    );
    let grads_at = comptime!(blueprint.row_pieces());
    let keys_at = comptime!(2 * blueprint.row_pieces());
    let values_at = comptime!(2 * blueprint.row_pieces() + 2 * blueprint.tile_pieces());

    let of_q = batch * strides.q.batch + kv_head * group * strides.q.head;
    stage_rows(
        q,
        &mut staged,
        0usize.runtime(),
        of_q,
        &strides.q,
        cube_row,
        rows,
        blueprint,
    );
    let of_out = batch * of_grad.batch + kv_head * group * of_grad.head;
    stage_rows(
        grad,
        &mut staged,
        grads_at.runtime(),
        of_out,
        &of_grad,
        cube_row,
        rows,
        blueprint,
    );
    let of_k = batch * strides.k.batch + kv_head * strides.k.head;
    let of_v = batch * strides.v.batch + kv_head * strides.v.head;
    let mut carried = Array::<Piece<F>>::new(comptime!(blueprint.carried()));
    load_tile(
        k,
        &mut carried,
        of_k,
        strides.k.token,
        first_key,
        end_key,
        blueprint,
    );
    store_tile(&mut staged, &carried, keys_at.runtime(), blueprint);
    load_tile(
        v,
        &mut carried,
        of_v,
        strides.v.token,
        first_key,
        end_key,
        blueprint,
    );
    store_tile(&mut staged, &carried, values_at.runtime(), blueprint);
    sync_cube();

    let lane = UNIT_POS_X as usize;
    let plane_row = UNIT_POS_Y as usize * comptime!(16 * row_tiles);
    let mut firsts = Array::<u32>::new(comptime!(2 * row_tiles));
    let mut ends = Array::<u32>::new(comptime!(2 * row_tiles));
    let mut logs = Array::<f32>::new(comptime!(2 * row_tiles));
    let mut deltas = Array::<f32>::new(comptime!(2 * row_tiles));
    #[unroll]
    for i in 0..comptime!(2 * row_tiles) {
        let in_cube = plane_row + (lane >> 2) + comptime!(8 * i);
        let row = cube_row + in_cube;
        let (first, end) = range_of(ranges, batch, row / group, &view);
        firsts[i] = first;
        ends[i] = end;
        let row_of = usize::min(row, rows - 1);
        let (query, head) = (row_of / group, kv_head * group + row_of % group);
        let log = lse[(batch * heads + head) * view.queries + query];
        // Four lanes share a row.
        let mut delta = 0.0f32.runtime();
        let at = ((batch * view.queries + query) * heads + head) * pieces;
        let mut piece = lane & 3;
        while piece < pieces {
            let of_out = out[at + piece];
            let of_grad = staged[grads_at + in_cube * pitch + piece];
            #[unroll]
            for e in 0..8usize {
                delta += f32::cast_from(of_out.extract(e)) * f32::cast_from(of_grad.extract(e));
            }
            piece += 4;
        }
        delta += plane_shuffle_xor(delta, 1u32);
        delta += plane_shuffle_xor(delta, 2u32);
        logs[i] = log;
        deltas[i] = delta;
        if lane & 3 == 0 && row < rows {
            let mut both = Vector::<f32, Const<2>>::new(log);
            both.insert(1usize, delta);
            stats[(batch * view.kv_heads + kv_head) * rows + row] = both;
        }
    }
    let plane_first = cube_row + plane_row;
    let plane_last = plane_first + comptime!(16 * row_tiles - 1);
    let (any_first, all_end) = range_of(ranges, batch, plane_first / group, &view);
    let (all_first, any_end) = range_of(ranges, batch, plane_last / group, &view);

    let mut sums = zeros(comptime!(row_tiles * value_tiles));
    let q_at = plane_row * pitch + lhs_place(pitch);
    let (k_at, v_at) = (rhs_place(pitch), lhs_place(pitch));

    let scaling = Scaling::new(&view, blueprint);
    let mut at = first_key;
    let mut half = 0usize.runtime();
    while at < end_key {
        let next = at + comptime!(blueprint.keys as u32);
        let other = tile - half;
        load_tile(
            k,
            &mut carried,
            of_k,
            strides.k.token,
            next,
            end_key,
            blueprint,
        );
        let seen = at < any_end && next > any_first;
        let mut scores = zeros(comptime!(row_tiles * key_tiles));
        let mut grads = zeros(comptime!(row_tiles * key_tiles));
        if seen {
            let keys = keys_at + half + k_at;
            add_product::<F>(
                &staged,
                q_at,
                keys,
                &mut scores,
                row_tiles,
                key_tiles,
                steps,
                pitch,
            );
        }
        store_tile(&mut staged, &carried, keys_at + other, blueprint);
        load_tile(
            v,
            &mut carried,
            of_v,
            strides.v.token,
            next,
            end_key,
            blueprint,
        );
        if seen {
            let (lhs, values) = (grads_at + q_at, values_at + half + k_at);
            add_product::<F>(
                &staged, lhs, values, &mut grads, row_tiles, key_tiles, steps, pitch,
            );
            let column = at + 2 * (UNIT_POS_X & 3);
            let partly = at < all_first || next > all_end;
            #[unroll]
            for i in 0..comptime!(row_tiles * key_tiles) {
                #[unroll]
                for j in 0..2usize {
                    let row = comptime!(i / key_tiles * 2 + j);
                    let column = column + comptime!((i % key_tiles * 8) as u32);
                    let mut of_scores = Vector::<f32, Const<2>>::new(0.0f32);
                    #[unroll]
                    for e in 0..2usize {
                        let score = scores.index(i)[j].extract(e);
                        let key = column + comptime!(e as u32);
                        let sees = !partly || (key >= firsts[row] && key < ends[row]);
                        let (_, of_score) = score_grad(
                            score,
                            grads.index(i)[j].extract(e),
                            logs[row],
                            deltas[row],
                            sees,
                            &scaling,
                            blueprint,
                        );
                        of_scores.insert(e, of_score);
                    }
                    let grads = grads.index_mut(i);
                    grads[j] = of_scores;
                }
            }
            let keys = keys_at + half + v_at;
            add_product_of_sums::<F>(
                &grads,
                &staged,
                keys,
                &mut sums,
                row_tiles,
                key_tiles,
                value_tiles,
                pitch,
            );
        }
        store_tile(&mut staged, &carried, values_at + other, blueprint);
        sync_cube();
        at = next;
        half = other;
    }

    scale_sums(&mut sums, view.scale, comptime!(row_tiles * value_tiles));
    store_sums::<F>(&sums, &mut staged, q_at, row_tiles, value_tiles, pitch);
    sync_plane();
    let to = (batch * view.queries * heads + kv_head * group) * pieces;
    write_rows(&staged, dq, plane_row, to, heads, cube_row, rows, blueprint);
}

/// `dk` and `dv`. Here the rows of a cube are keys, and tiles are rows of queries.
///
/// - `stats`: what [`attention_dq_kernel`] wrote
/// - `dk`, `dv`: `[batch, keys, kv_heads, head_dim]`, contiguous
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn attention_dkv_kernel<F: Float>(
    q: &[Piece<F>],
    k: &[Piece<F>],
    v: &[Piece<F>],
    ranges: &[i32],
    grad: &[Piece<F>],
    stats: &[Vector<f32, Const<2>>],
    dk: &mut [Piece<F>],
    dv: &mut [Piece<F>],
    strides: FlashStrides,
    of_grad: TokenStrides,
    view: AttentionView,
    #[comptime] blueprint: FlashBlueprint,
    #[define(F)] _dtype: ElemType,
) {
    let row_tiles = comptime!(blueprint.row_tiles);
    let pieces = comptime!(blueprint.pieces());
    let pitch = comptime!(blueprint.pitch());
    let query_tiles = comptime!(blueprint.keys / 8);
    let value_tiles = comptime!(blueprint.head_dim / 8);
    let tile = comptime!(blueprint.tile_pieces());
    let group = comptime!(blueprint.group);
    let steps = comptime!(blueprint.head_dim / 16);

    let rows = view.queries * group;
    let cube_key = CUBE_POS_X as usize * comptime!(blueprint.rows());
    let kv_head = CUBE_POS_Y as usize % view.kv_heads;
    let batch = CUBE_POS_Y as usize / view.kv_heads;
    let end_key = usize::min(cube_key + comptime!(blueprint.rows()), view.keys);

    // The queries that see any of these keys: neither end of their ranges decreases.
    let first_query = first_beyond(ranges, batch, cube_key as u32, true, &view);
    let end_query = first_beyond(ranges, batch, end_key as u32 - 1, false, &view);
    let (first_row, end_row) = (first_query * group, end_query * group);

    let mut staged = Shared::<[Piece<F>]>::new_aligned_slice(
        comptime!(2 * blueprint.row_pieces() + 4 * blueprint.tile_pieces()),
        16usize,
    );
    let values_at = comptime!(blueprint.row_pieces());
    let queries_at = comptime!(2 * blueprint.row_pieces());
    let grads_at = comptime!(2 * blueprint.row_pieces() + 2 * blueprint.tile_pieces());

    let of_k = batch * strides.k.batch + kv_head * strides.k.head;
    let of_v = batch * strides.v.batch + kv_head * strides.v.head;
    stage_keys(
        k,
        &mut staged,
        0usize.runtime(),
        of_k,
        strides.k.token,
        cube_key,
        end_key,
        blueprint,
    );
    stage_keys(
        v,
        &mut staged,
        values_at.runtime(),
        of_v,
        strides.v.token,
        cube_key,
        end_key,
        blueprint,
    );
    let of_q = batch * strides.q.batch + kv_head * group * strides.q.head;
    let of_grads = batch * of_grad.batch + kv_head * group * of_grad.head;
    let mut carried = Array::<Piece<F>>::new(comptime!(blueprint.carried()));
    load_rows(
        q,
        &mut carried,
        of_q,
        &strides.q,
        first_row,
        end_row,
        blueprint,
    );
    store_tile(&mut staged, &carried, queries_at.runtime(), blueprint);
    load_rows(
        grad,
        &mut carried,
        of_grads,
        &of_grad,
        first_row,
        end_row,
        blueprint,
    );
    store_tile(&mut staged, &carried, grads_at.runtime(), blueprint);
    sync_cube();

    let lane = UNIT_POS_X as usize;
    let plane_row = UNIT_POS_Y as usize * comptime!(16 * row_tiles);
    let plane_first = (cube_key + plane_row) as u32;
    let plane_end = plane_first + comptime!(16 * row_tiles as u32);
    let lane_key = plane_first + (lane >> 2) as u32;
    let of_stats = (batch * view.kv_heads + kv_head) * rows;

    let mut key_sums = zeros(comptime!(row_tiles * value_tiles));
    let mut value_sums = zeros(comptime!(row_tiles * value_tiles));
    let k_at = plane_row * pitch + lhs_place(pitch);
    let (across, down) = (rhs_place(pitch), lhs_place(pitch));

    let scaling = Scaling::new(&view, blueprint);
    let mut at = first_row;
    let mut half = 0usize.runtime();
    while at < end_row {
        let next = at + comptime!(blueprint.keys);
        let other = tile - half;
        load_rows(q, &mut carried, of_q, &strides.q, next, end_row, blueprint);
        let last = usize::min(next, end_row) - 1;
        let (any_first, all_end) = range_of(ranges, batch, at / group, &view);
        let (all_first, any_end) = range_of(ranges, batch, last / group, &view);
        let seen = plane_first < any_end && plane_end > any_first;
        let partly = plane_first < all_first || plane_end > all_end || next > end_row;
        let mut scores = zeros(comptime!(row_tiles * query_tiles));
        let mut grads = zeros(comptime!(row_tiles * query_tiles));
        if seen {
            let rhs = queries_at + half + across;
            add_product::<F>(
                &staged,
                k_at,
                rhs,
                &mut scores,
                row_tiles,
                query_tiles,
                steps,
                pitch,
            );
        }
        store_tile(&mut staged, &carried, queries_at + other, blueprint);
        load_rows(
            grad,
            &mut carried,
            of_grads,
            &of_grad,
            next,
            end_row,
            blueprint,
        );
        if seen {
            let (lhs, rhs) = (values_at + k_at, grads_at + half + across);
            add_product::<F>(
                &staged,
                lhs,
                rhs,
                &mut grads,
                row_tiles,
                query_tiles,
                steps,
                pitch,
            );
            #[unroll]
            for column in 0..query_tiles {
                #[unroll]
                for e in 0..2usize {
                    let row = at + 2 * (lane & 3) + comptime!(8 * column + e);
                    let stat = stats[of_stats + usize::min(row, rows - 1)];
                    let mut first = 0u32.runtime();
                    let mut end = 0u32.runtime();
                    if partly && row < end_row {
                        let (from, to) = range_of(ranges, batch, row / group, &view);
                        first = from;
                        end = to;
                    }
                    #[unroll]
                    for i in 0..row_tiles {
                        let at = comptime!(i * query_tiles + column);
                        #[unroll]
                        for j in 0..2usize {
                            let key = lane_key + comptime!((16 * i + 8 * j) as u32);
                            let sees = !partly || (key >= first && key < end);
                            let (power, of_score) = score_grad(
                                scores.index(at)[j].extract(e),
                                grads.index(at)[j].extract(e),
                                stat.extract(0usize),
                                stat.extract(1usize),
                                sees,
                                &scaling,
                                blueprint,
                            );
                            let mut powers = scores.index(at)[j];
                            powers.insert(e, power);
                            let scores = scores.index_mut(at);
                            scores[j] = powers;
                            let mut of_scores = grads.index(at)[j];
                            of_scores.insert(e, of_score);
                            let grads = grads.index_mut(at);
                            grads[j] = of_scores;
                        }
                    }
                }
            }
            let rhs = grads_at + half + down;
            add_product_of_sums::<F>(
                &scores,
                &staged,
                rhs,
                &mut value_sums,
                row_tiles,
                query_tiles,
                value_tiles,
                pitch,
            );
            let rhs = queries_at + half + down;
            add_product_of_sums::<F>(
                &grads,
                &staged,
                rhs,
                &mut key_sums,
                row_tiles,
                query_tiles,
                value_tiles,
                pitch,
            );
        }
        store_tile(&mut staged, &carried, grads_at + other, blueprint);
        sync_cube();
        at = next;
        half = other;
    }

    scale_sums(
        &mut key_sums,
        view.scale,
        comptime!(row_tiles * value_tiles),
    );
    let to = (batch * view.keys * view.kv_heads + kv_head) * pieces;
    store_sums::<F>(&key_sums, &mut staged, k_at, row_tiles, value_tiles, pitch);
    sync_plane();
    write_keys(
        &staged,
        dk,
        plane_row,
        to,
        view.kv_heads,
        cube_key,
        end_key,
        blueprint,
    );
    sync_plane();
    store_sums::<F>(
        &value_sums,
        &mut staged,
        k_at,
        row_tiles,
        value_tiles,
        pitch,
    );
    sync_plane();
    write_keys(
        &staged,
        dv,
        plane_row,
        to,
        view.kv_heads,
        cube_key,
        end_key,
        blueprint,
    );
}

/// How scores are scaled and capped.
#[derive(CubeType, Clone, Copy)]
struct Scaling {
    scale: f32,
    cap: f32,
}

#[cube]
impl Scaling {
    fn new(view: &AttentionView, #[comptime] blueprint: FlashBlueprint) -> Scaling {
        Scaling {
            scale: score_scale(view, comptime!(blueprint.softcap)),
            cap: view.softcap,
        }
    }
}

/// The probability of a score, and the gradient of it, but for the factor of scores.
#[cube]
fn score_grad(
    score: f32,
    grad: f32,
    log: f32,
    delta: f32,
    sees: bool,
    scaling: &Scaling,
    #[comptime] blueprint: FlashBlueprint,
) -> (f32, f32) {
    let score = score * scaling.scale;
    if comptime!(blueprint.softcap) {
        // tanh(x) = 1 - 2 / (exp(2 x) + 1)
        let tanh = 1.0 - 2.0 / (f32::exp(2.0 * score) + 1.0);
        let power = select(sees, f32::exp(scaling.cap * tanh - log), 0.0f32);
        (power, power * (grad - delta) * (1.0 - tanh * tanh))
    } else {
        let power = select(sees, f32::exp(score - log), 0.0f32);
        (power, power * (grad - delta))
    }
}

#[cube]
fn scale_sums(sums: &mut Sequence<Sums>, factor: f32, #[comptime] tiles: usize) {
    #[unroll]
    for i in 0..tiles {
        let sum = sums.index_mut(i);
        #[unroll]
        for j in 0..2usize {
            sum[j] *= Vector::new(factor);
        }
    }
}

/// The first query whose range ends past a key, or with `ends` false starts past it.
#[cube]
fn first_beyond(
    ranges: &[i32],
    batch: usize,
    key: u32,
    #[comptime] ends: bool,
    view: &AttentionView,
) -> usize {
    let mut low = 0usize.runtime();
    let mut high = view.queries;
    while low < high {
        let middle = (low + high) / 2;
        let (first, end) = range_of(ranges, batch, middle, view);
        let mut beyond = first > key;
        if comptime!(ends) {
            beyond = end > key;
        }
        if beyond {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
}

/// Puts the keys or values of a cube into shared memory; zeros past the last.
#[cube]
#[allow(clippy::too_many_arguments)]
fn stage_keys<F: Float>(
    from: &[Piece<F>],
    staged: &mut Shared<[Piece<F>]>,
    to: usize,
    base: usize,
    token: usize,
    first: usize,
    end: usize,
    #[comptime] blueprint: FlashBlueprint,
) {
    let pieces = comptime!(blueprint.pieces());
    #[unroll]
    for c in 0..comptime!(blueprint.row_share()) {
        let i = UNIT_POS as usize + comptime!(c * blueprint.units());
        let (row, piece) = (i / pieces, i % pieces);
        let mut value = Piece::<F>::new(F::from_int(0));
        if first + row < end {
            value = from[base + (first + row) * token + piece];
        }
        staged[to + row * comptime!(blueprint.pitch()) + piece] = value;
    }
}

/// Writes the keys or values of a plane from shared memory.
#[cube]
#[allow(clippy::too_many_arguments)]
fn write_keys<F: Float>(
    staged: &Shared<[Piece<F>]>,
    out: &mut [Piece<F>],
    plane_row: usize,
    to: usize,
    kv_heads: usize,
    first: usize,
    end: usize,
    #[comptime] blueprint: FlashBlueprint,
) {
    let pieces = comptime!(blueprint.pieces());
    #[unroll]
    for c in 0..comptime!(16 * blueprint.row_tiles * blueprint.pieces() / 32) {
        let i = UNIT_POS_X as usize + comptime!(c * 32);
        let (row, piece) = (plane_row + i / pieces, i % pieces);
        if first + row < end {
            out[to + (first + row) * kv_heads * pieces + piece] =
                staged[row * comptime!(blueprint.pitch()) + piece];
        }
    }
}
