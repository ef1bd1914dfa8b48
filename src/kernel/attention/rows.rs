//! `rows`: attention on any device.

use cubecl::prelude::*;

use super::{AttentionView, RowsBlueprint, Sums, TokenStrides, dots, wait};

/// `softmax(scale q kᵀ) v` over the keys that each query sees, and the logarithm of the denominator.
///
/// - `q`, `out`: `[batch, queries, heads, head_dim]`; `k`, `v`: `[batch, keys, kv_heads, head_dim]`; with
///   these strides in vectors of `N`, which divides `head_dim`, but `out`, which is contiguous. `ranges`:
///   `[range_rows, queries, 2]`; `lse`: `[batch, heads, queries]`.
/// - A cube has `held` rows of a head of keys, see the head of this module, and walks from the first key
///   that one of them sees to the last, `tile` at a time. Its place along the grid gives the rows first,
///   then the head of keys, then the row of the batch.
/// - For the scores of a tile, unit `u` takes the keys `u`, `u + units`, … Then `units / held` lanes have a
///   row together: its largest score, and the exponentials. For the sums with `v`, units next to each other
///   take vectors next to each other, and groups of them the keys in turns.
/// - Tails: rows past the last repeat it and are not stored; keys that a row does not see have weight zero.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn attention_rows_kernel<F: Float, N: Size>(
    q: &[Vector<F, N>],
    k: &[Vector<F, N>],
    v: &[Vector<F, N>],
    ranges: &[i32],
    out: &mut [Vector<F, N>],
    lse: &mut [f32],
    q_strides: TokenStrides,
    k_strides: TokenStrides,
    v_strides: TokenStrides,
    view: AttentionView,
    #[comptime] blueprint: RowsBlueprint,
    #[define(F)] _dtype: ElemType,
) {
    let vector = N::value().comptime();
    let vectors = comptime!(blueprint.vectors(vector));
    let held = comptime!(blueprint.held);
    let tile = comptime!(blueprint.tile);
    let units = comptime!(blueprint.units);
    let barriers = comptime!(blueprint.barriers);
    let lanes = comptime!(blueprint.lanes());
    let lane_rows = comptime!(blueprint.lane_rows());

    let unit = UNIT_POS as usize;
    let rows = view.rows();
    let row_cubes = rows.div_ceil(held);
    let first_row = CUBE_POS % row_cubes * held;
    let kv_head = CUBE_POS / row_cubes % view.kv_heads;
    let batch = CUBE_POS / row_cubes / view.kv_heads;

    let mut queries = Shared::<[Vector<f32, N>]>::new_slice(comptime!(held * vectors));
    let mut scores = Shared::<[f32]>::new_slice(comptime!(held * tile));
    let mut parts = Shared::<[f32]>::new_slice(comptime!(held * lanes));
    let mut factors = Shared::<[f32]>::new_slice(held);

    if batch < view.batch {
        let mut i = unit;
        while i < comptime!(held * vectors) {
            let row = usize::min(first_row + i / vectors, rows - 1);
            let start = q_strides.row(&view, batch, kv_head, row);
            queries[i] = Vector::<f32, N>::cast_from(q[start + i % vectors]);
            i += units;
        }

        // What the rows see that this unit has a part of, and what one of all rows sees.
        let lane = unit % lanes;
        let mut firsts = Array::<usize>::new(lane_rows);
        let mut ends = Array::<usize>::new(lane_rows);
        let mut largest = Array::<f32>::new(lane_rows);
        let mut sums = Array::<f32>::new(lane_rows);
        #[unroll]
        for o in 0..lane_rows {
            let row = usize::min(first_row + unit / lanes + o * (units / lanes), rows - 1);
            firsts[o] = view.first(ranges, batch, row / view.group);
            ends[o] = view.end(ranges, batch, row / view.group);
            largest[o] = f32::new(f32::MIN);
            sums[o] = 0.0f32;
        }
        let mut key = view.keys;
        let mut end = 0usize;
        for h in 0..held {
            let row = usize::min(first_row + h, rows - 1);
            let first = view.first(ranges, batch, row / view.group);
            let row_end = view.end(ranges, batch, row / view.group);
            if first < row_end {
                key = usize::min(key, first);
                end = usize::max(end, row_end);
            }
        }
        let mut outputs = Sums::<N>::new(blueprint);
        wait(barriers);

        while key < end {
            let mut place = unit;
            while place < tile {
                if key + place < end {
                    let start = k_strides.start(batch, key + place, kv_head);
                    let products = dots::<F, N>(k, start, &queries, blueprint);
                    #[unroll]
                    for h in 0..held {
                        let score = if comptime!(blueprint.softcap) {
                            view.tanh(products[h]) * view.softcap
                        } else {
                            products[h] * view.scale
                        };
                        scores[comptime!(h * tile) + place] = score;
                    }
                }
                place += units;
            }
            wait(barriers);

            #[unroll]
            for o in 0..lane_rows {
                let h = unit / lanes + o * (units / lanes);
                let mut most = largest[o];
                let mut place = lane;
                while place < tile {
                    if key + place >= firsts[o] && key + place < ends[o] {
                        most = f32::max(most, scores[h * tile + place]);
                    }
                    place += lanes;
                }
                parts[h * lanes + lane] = most;
            }
            wait(barriers);

            #[unroll]
            for o in 0..lane_rows {
                let h = unit / lanes + o * (units / lanes);
                let mut most = parts[h * lanes];
                for other in 1..lanes {
                    most = f32::max(most, parts[h * lanes + other]);
                }
                // Nothing seen so far: the difference may not be a number.
                let none = largest[o] == f32::new(f32::MIN);
                let factor = select(none, 0.0f32, (largest[o] - most).exp());
                largest[o] = most;
                let mut sum = sums[o] * factor;
                let mut place = lane;
                while place < tile {
                    let mut weight = 0.0f32;
                    if key + place >= firsts[o] && key + place < ends[o] {
                        weight = (scores[h * tile + place] - most).exp();
                    }
                    scores[h * tile + place] = weight;
                    sum += weight;
                    place += lanes;
                }
                sums[o] = sum;
                if lane == 0 {
                    factors[h] = factor;
                }
            }
            wait(barriers);

            if outputs.part < comptime!(blueprint.parts(vector)) {
                outputs.scale(&factors);
                let count = usize::min(tile.runtime(), end - key);
                let mut place = outputs.part;
                while place < count {
                    let start = v_strides.start(batch, key + place, kv_head);
                    outputs.add::<F>(v, start, &scores, place);
                    place += comptime!(blueprint.parts(vector));
                }
            }
            wait(barriers);
            key += tile;
        }

        #[unroll]
        for o in 0..lane_rows {
            let h = unit / lanes + o * (units / lanes);
            parts[h * lanes + lane] = sums[o];
        }
        // The queries are read no more.
        outputs.add_up(&mut queries);
        if lane == 0 {
            #[unroll]
            for o in 0..lane_rows {
                let h = unit / lanes + o * (units / lanes);
                let mut sum = 0.0f32;
                for other in 0..lanes {
                    sum += parts[h * lanes + other];
                }
                let seen = firsts[o] < ends[o];
                let mut inverse = 0.0f32;
                let mut log = view.nothing;
                if seen {
                    inverse = 1.0f32 / sum;
                    log = largest[o] + sum.ln();
                }
                factors[h] = inverse;
                if first_row + h < rows {
                    lse[view.number_at(batch, kv_head, first_row + h)] = log;
                }
            }
        }
        wait(barriers);
        let mut i = unit;
        while i < comptime!(held * vectors) {
            let row = first_row + i / vectors;
            if row < rows {
                let at = view.row_at(batch, kv_head, row) * vectors + i % vectors;
                let inverse = Vector::<f32, N>::new(factors[i / vectors]);
                out[at] = Vector::<F, N>::cast_from(queries[i] * inverse);
            }
            i += units;
        }
    }
}
