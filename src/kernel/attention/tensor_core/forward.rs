//! The forward pass.

use cubecl::prelude::*;

use super::tiles::{
    add_product, add_product_of_sums, lhs_place, load_tile, rhs_place, stage_rows, store_sums,
    store_tile, write_rows, zeros,
};
use super::{FlashBlueprint, FlashStrides, LOWEST, Piece, capped, hidden, range_of, score_scale};
use crate::kernel::attention::AttentionView;

/// The output, `[batch, queries, heads, head_dim]`, and the log-sum-exp, `[batch, heads, queries]`.
///
/// Cubes along x have `blueprint.rows()` rows each, those along y a head of keys of a row of the batch.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn attention_forward_kernel<F: Float>(
    q: &[Piece<F>],
    k: &[Piece<F>],
    v: &[Piece<F>],
    ranges: &[i32],
    out: &mut [Piece<F>],
    lse: &mut [f32],
    strides: FlashStrides,
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
    let heads = view.kv_heads * group;
    let rows = view.queries * group;
    let tiles = rows.div_ceil(comptime!(blueprint.rows()).runtime());
    // The last rows, which see the most keys where attention is causal, go first.
    let cube_row = (tiles - 1 - CUBE_POS_X as usize) * comptime!(blueprint.rows());
    let kv_head = CUBE_POS_Y as usize % view.kv_heads;
    let batch = CUBE_POS_Y as usize / view.kv_heads;
    let last_row = usize::min(cube_row + comptime!(blueprint.rows()), rows) - 1;
    let (first_key, _) = range_of(ranges, batch, cube_row / group, &view);
    let (_, end_key) = range_of(ranges, batch, last_row / group, &view);

    let mut staged = Shared::<[Piece<F>]>::new_aligned_slice(
        comptime!(blueprint.row_pieces() + 4 * blueprint.tile_pieces()),
        16usize,
    );
    let keys_at = comptime!(blueprint.row_pieces());
    let values_at = comptime!(blueprint.row_pieces() + 2 * blueprint.tile_pieces());

    // The rows, and the first tile.
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
    // What the rows of this lane see, and what all rows of the plane see or none of them.
    let mut firsts = Array::<u32>::new(comptime!(2 * row_tiles));
    let mut ends = Array::<u32>::new(comptime!(2 * row_tiles));
    #[unroll]
    for i in 0..comptime!(2 * row_tiles) {
        let row = cube_row + plane_row + (lane >> 2) + comptime!(8 * i);
        let (first, end) = range_of(ranges, batch, row / group, &view);
        firsts[i] = first;
        ends[i] = end;
    }
    let plane_first = cube_row + plane_row;
    let plane_last = plane_first + comptime!(16 * row_tiles - 1);
    let (any_first, all_end) = range_of(ranges, batch, plane_first / group, &view);
    let (all_first, any_end) = range_of(ranges, batch, plane_last / group, &view);

    let mut sums = zeros(comptime!(row_tiles * value_tiles));
    let mut highest = Array::<f32>::new(comptime!(2 * row_tiles));
    let mut totals = Array::<f32>::new(comptime!(2 * row_tiles));
    #[unroll]
    for i in 0..comptime!(2 * row_tiles) {
        highest[i] = f32::new(LOWEST);
        totals[i] = 0.0f32;
    }

    let q_at = plane_row * pitch + lhs_place(pitch);
    let (k_at, v_at) = (rhs_place(pitch), lhs_place(pitch));

    let scale = score_scale(&view, comptime!(blueprint.softcap));
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
        if seen {
            add_product::<F>(
                &staged,
                q_at,
                keys_at + half + k_at,
                &mut scores,
                row_tiles,
                key_tiles,
                comptime!(blueprint.head_dim / 16),
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
            if comptime!(blueprint.softcap) {
                #[unroll]
                for i in 0..comptime!(row_tiles * key_tiles) {
                    let scores = scores.index_mut(i);
                    #[unroll]
                    for j in 0..2usize {
                        scores[j] = capped(scores[j], scale, view.softcap);
                    }
                }
            }
            if at < all_first || next > all_end {
                let column = at + 2 * (UNIT_POS_X & 3);
                #[unroll]
                for i in 0..comptime!(row_tiles * key_tiles) {
                    let scores = scores.index_mut(i);
                    #[unroll]
                    for j in 0..2usize {
                        let row = comptime!(i / key_tiles * 2 + j);
                        let column = column + comptime!((i % key_tiles * 8) as u32);
                        scores[j] = hidden(scores[j], column, firsts[row], ends[row]);
                    }
                }
            }

            // With a cap they are scaled already.
            let capped = comptime!(blueprint.softcap);
            let mut changed = false.runtime();
            let mut factors = Array::<f32>::new(comptime!(2 * row_tiles));
            #[unroll]
            for row in 0..comptime!(2 * row_tiles) {
                let mut high = highest[row];
                #[unroll]
                for i in 0..key_tiles {
                    let two = scores.index(comptime!(row / 2 * key_tiles + i))[comptime!(row % 2)];
                    high = f32::max(high, f32::max(two.extract(0usize), two.extract(1usize)));
                }
                high = f32::max(high, plane_shuffle_xor(high, 1u32));
                high = f32::max(high, plane_shuffle_xor(high, 2u32));
                let mut by = highest[row] - high;
                if comptime!(!capped) {
                    by *= scale;
                }
                factors[row] = f32::exp(by);
                changed = changed || high > highest[row];
                highest[row] = high;
            }
            if plane_any(changed) {
                #[unroll]
                for row in 0..comptime!(2 * row_tiles) {
                    totals[row] *= factors[row];
                    #[unroll]
                    for i in 0..value_tiles {
                        let sum = sums.index_mut(comptime!(row / 2 * value_tiles + i));
                        sum[comptime!(row % 2)] *= Vector::new(factors[row]);
                    }
                }
            }
            #[unroll]
            for row in 0..comptime!(2 * row_tiles) {
                let mut offset = highest[row];
                if comptime!(!capped) {
                    offset *= scale;
                }
                let mut total = totals[row];
                #[unroll]
                for i in 0..key_tiles {
                    let scores = scores.index_mut(comptime!(row / 2 * key_tiles + i));
                    let mut two = scores[comptime!(row % 2)];
                    if comptime!(!capped) {
                        two *= Vector::new(scale);
                    }
                    let mut powers = Vector::<f32, Const<2>>::new(0.0f32);
                    #[unroll]
                    for e in 0..2usize {
                        let power = f32::exp(two.extract(e) - offset);
                        powers.insert(e, power);
                        total += power;
                    }
                    scores[comptime!(row % 2)] = powers;
                }
                totals[row] = total;
            }

            add_product_of_sums::<F>(
                &scores,
                &staged,
                values_at + half + v_at,
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

    // What the rows come to, through the shared memory of their own.
    #[unroll]
    for row in 0..comptime!(2 * row_tiles) {
        let mut total = totals[row];
        total += plane_shuffle_xor(total, 1u32);
        total += plane_shuffle_xor(total, 2u32);
        let mut inverse = 0.0f32.runtime();
        let mut log = view.nothing;
        if total > 0.0 {
            inverse = 1.0 / total;
            let mut high = highest[row];
            if comptime!(!blueprint.softcap) {
                high *= scale;
            }
            log = high + total.ln();
        }
        let from = cube_row + plane_row + (lane >> 2) + comptime!(8 * row);
        if lane & 3 == 0 && from < rows {
            let (query, head) = (from / group, kv_head * group + from % group);
            lse[(batch * heads + head) * view.queries + query] = log;
        }
        #[unroll]
        for i in 0..value_tiles {
            let sum = sums.index_mut(comptime!(row / 2 * value_tiles + i));
            sum[comptime!(row % 2)] *= Vector::new(inverse);
        }
    }
    store_sums::<F>(&sums, &mut staged, q_at, row_tiles, value_tiles, pitch);
    sync_plane();
    let to = (batch * view.queries * heads + kv_head * group) * pieces;
    write_rows(
        &staged, out, plane_row, to, heads, cube_row, rows, blueprint,
    );
}
