//! `rows_backward`: the gradients of attention on any device. No two cubes add to the same gradient: the one
//! kernel has queries and walks over keys, the other has keys and walks over queries.

use cubecl::prelude::*;

use super::{AttentionView, RowsBlueprint, Sums, TokenStrides, dots, wait};

/// What both kernels read.
///
/// - `q`, `grad`: `[batch, queries, heads, head_dim]`; `k`, `v`: `[batch, keys, kv_heads, head_dim]`; with
///   the strides of [`BackwardStrides`], in vectors of `N`. `grad` is the gradient of the output.
/// - `ranges`: `[range_rows, queries, 2]`
/// - `lse`, `delta`: `[batch, heads, queries]`: the log-sum-exp, and the sums of `output * grad`
#[derive(CubeType, CubeLaunch)]
pub struct BackwardInputs<F: Float, N: Size> {
    pub q: Box<[Vector<F, N>]>,
    pub k: Box<[Vector<F, N>]>,
    pub v: Box<[Vector<F, N>]>,
    pub grad: Box<[Vector<F, N>]>,
    pub ranges: Box<[i32]>,
    pub lse: Box<[f32]>,
    pub delta: Box<[f32]>,
}

/// Where the tokens of the inputs lie.
#[derive(CubeType, CubeLaunch)]
pub struct BackwardStrides {
    pub q: TokenStrides,
    pub k: TokenStrides,
    pub v: TokenStrides,
    pub grad: TokenStrides,
}

/// A probability, and the gradient of the product of query and key behind it.
#[derive(CubeType)]
struct ScoreGrad {
    probability: f32,
    grad: f32,
}

/// - `dot`: query by key; `of_value`: gradient of the output by value
#[cube]
fn score_grad(
    view: &AttentionView,
    dot: f32,
    of_value: f32,
    lse: f32,
    delta: f32,
    #[comptime] softcap: bool,
) -> ScoreGrad {
    let mut score = dot * view.scale;
    let mut slope = view.scale;
    if comptime!(softcap) {
        let tanh = view.tanh(dot);
        score = tanh * view.softcap;
        slope *= 1.0f32 - tanh * tanh;
    }
    let probability = (score - lse).exp();
    ScoreGrad {
        probability,
        grad: probability * (of_value - delta) * slope,
    }
}

/// The gradient of the queries.
///
/// - `dq`: as `q`, contiguous.
/// - Cubes as in [`attention_rows_kernel`](super::rows::attention_rows_kernel): one has `held` rows, and
///   units take the keys of a tile in turns, then vectors of the sums with `k`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn attention_rows_dq_kernel<F: Float, N: Size>(
    inputs: &BackwardInputs<F, N>,
    dq: &mut [Vector<F, N>],
    strides: BackwardStrides,
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

    let unit = UNIT_POS as usize;
    let rows = view.rows();
    let row_cubes = rows.div_ceil(held);
    let first_row = CUBE_POS % row_cubes * held;
    let kv_head = CUBE_POS / row_cubes % view.kv_heads;
    let batch = CUBE_POS / row_cubes / view.kv_heads;

    let mut queries = Shared::<[Vector<f32, N>]>::new_slice(comptime!(held * vectors));
    let mut grads = Shared::<[Vector<f32, N>]>::new_slice(comptime!(held * vectors));
    let mut weights = Shared::<[f32]>::new_slice(comptime!(held * tile));

    if batch < view.batch {
        let mut i = unit;
        while i < comptime!(held * vectors) {
            let row = usize::min(first_row + i / vectors, rows - 1);
            let start = strides.q.row(&view, batch, kv_head, row);
            queries[i] = Vector::<f32, N>::cast_from(inputs.q[start + i % vectors]);
            let start = strides.grad.row(&view, batch, kv_head, row);
            grads[i] = Vector::<f32, N>::cast_from(inputs.grad[start + i % vectors]);
            i += units;
        }

        let mut firsts = Array::<usize>::new(held);
        let mut ends = Array::<usize>::new(held);
        let mut lse = Array::<f32>::new(held);
        let mut delta = Array::<f32>::new(held);
        let mut key = view.keys;
        let mut end = 0usize;
        #[unroll]
        for h in 0..held {
            let row = usize::min(first_row + h, rows - 1);
            firsts[h] = view.first(&inputs.ranges, batch, row / view.group);
            ends[h] = view.end(&inputs.ranges, batch, row / view.group);
            let at = view.number_at(batch, kv_head, row);
            lse[h] = inputs.lse[at];
            delta[h] = inputs.delta[at];
            if firsts[h] < ends[h] {
                key = usize::min(key, firsts[h]);
                end = usize::max(end, ends[h]);
            }
        }
        let mut sums = Sums::<N>::new(blueprint);
        wait(barriers);

        while key < end {
            let mut place = unit;
            while place < tile {
                if key + place < end {
                    let start = strides.k.start(batch, key + place, kv_head);
                    let products = dots::<F, N>(&inputs.k, start, &queries, blueprint);
                    let start = strides.v.start(batch, key + place, kv_head);
                    let of_values = dots::<F, N>(&inputs.v, start, &grads, blueprint);
                    #[unroll]
                    for h in 0..held {
                        let mut weight = 0.0f32;
                        if key + place >= firsts[h] && key + place < ends[h] {
                            weight = score_grad(
                                &view,
                                products[h],
                                of_values[h],
                                lse[h],
                                delta[h],
                                blueprint.softcap,
                            )
                            .grad;
                        }
                        weights[comptime!(h * tile) + place] = weight;
                    }
                }
                place += units;
            }
            wait(barriers);

            if sums.part < comptime!(blueprint.parts(vector)) {
                let count = usize::min(tile.runtime(), end - key);
                let mut place = sums.part;
                while place < count {
                    let start = strides.k.start(batch, key + place, kv_head);
                    sums.add::<F>(&inputs.k, start, &weights, place);
                    place += comptime!(blueprint.parts(vector));
                }
            }
            wait(barriers);
            key += tile;
        }

        sums.add_up(&mut queries);
        let mut i = unit;
        while i < comptime!(held * vectors) {
            let row = first_row + i / vectors;
            if row < rows {
                let at = view.row_at(batch, kv_head, row) * vectors + i % vectors;
                dq[at] = Vector::<F, N>::cast_from(queries[i]);
            }
            i += units;
        }
    }
}

/// The first query whose range ends past `key`; as many as there are if there is none.
#[cube]
fn first_to_reach(view: &AttentionView, ranges: &[i32], batch: usize, key: usize) -> usize {
    let mut low = 0usize;
    let mut high = view.queries;
    while low < high {
        let middle = (low + high) / 2;
        if view.end(ranges, batch, middle) > key {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
}

/// The first query whose range starts at `key` or past it; as many as there are if there is none.
#[cube]
fn first_to_leave(view: &AttentionView, ranges: &[i32], batch: usize, key: usize) -> usize {
    let mut low = 0usize;
    let mut high = view.queries;
    while low < high {
        let middle = (low + high) / 2;
        if view.first(ranges, batch, middle) >= key {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
}

/// The gradients of keys and values.
///
/// - `dk`, `dv`: as `k`, contiguous.
/// - A cube has `held` keys of a head, and walks over the rows of the queries that may see one of them,
///   `tile` at a time: ranges do not decrease, so these queries are neighbours. Its place along the grid
///   gives the keys first, then their head, then the row of the batch.
/// - Unit `u` takes the rows `u`, `u + units`, … of a tile for the probabilities and the gradients of the
///   scores; then units next to each other take vectors next to each other of the sums with `grad` and `q`,
///   and groups of them the rows in turns.
/// - Tails: keys past the last repeat it and are not stored.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn attention_rows_dkdv_kernel<F: Float, N: Size>(
    inputs: &BackwardInputs<F, N>,
    dk: &mut [Vector<F, N>],
    dv: &mut [Vector<F, N>],
    strides: BackwardStrides,
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

    let unit = UNIT_POS as usize;
    let key_cubes = view.keys.div_ceil(held);
    let first_key = CUBE_POS % key_cubes * held;
    let kv_head = CUBE_POS / key_cubes % view.kv_heads;
    let batch = CUBE_POS / key_cubes / view.kv_heads;

    let mut keys = Shared::<[Vector<f32, N>]>::new_slice(comptime!(held * vectors));
    let mut values = Shared::<[Vector<f32, N>]>::new_slice(comptime!(held * vectors));
    let mut probabilities = Shared::<[f32]>::new_slice(comptime!(held * tile));
    let mut weights = Shared::<[f32]>::new_slice(comptime!(held * tile));

    if batch < view.batch {
        let mut i = unit;
        while i < comptime!(held * vectors) {
            let key = usize::min(first_key + i / vectors, view.keys - 1);
            let start = strides.k.start(batch, key, kv_head);
            keys[i] = Vector::<f32, N>::cast_from(inputs.k[start + i % vectors]);
            let start = strides.v.start(batch, key, kv_head);
            values[i] = Vector::<f32, N>::cast_from(inputs.v[start + i % vectors]);
            i += units;
        }
        let mut row = first_to_reach(&view, &inputs.ranges, batch, first_key) * view.group;
        let past = usize::min(first_key + held, view.keys);
        let end = first_to_leave(&view, &inputs.ranges, batch, past) * view.group;
        let mut dk_sums = Sums::<N>::new(blueprint);
        let mut dv_sums = Sums::<N>::new(blueprint);
        wait(barriers);

        while row < end {
            let mut place = unit;
            while place < tile {
                if row + place < end {
                    let query = (row + place) / view.group;
                    let start = strides.q.row(&view, batch, kv_head, row + place);
                    let products = dots::<F, N>(&inputs.q, start, &keys, blueprint);
                    let start = strides.grad.row(&view, batch, kv_head, row + place);
                    let of_values = dots::<F, N>(&inputs.grad, start, &values, blueprint);
                    let first = view.first(&inputs.ranges, batch, query);
                    let query_end = view.end(&inputs.ranges, batch, query);
                    let at = view.number_at(batch, kv_head, row + place);
                    let lse = inputs.lse[at];
                    let delta = inputs.delta[at];
                    #[unroll]
                    for h in 0..held {
                        let key = first_key + comptime!(h);
                        let mut probability = 0.0f32;
                        let mut weight = 0.0f32;
                        if key >= first && key < query_end {
                            let score = score_grad(
                                &view,
                                products[h],
                                of_values[h],
                                lse,
                                delta,
                                blueprint.softcap,
                            );
                            probability = score.probability;
                            weight = score.grad;
                        }
                        probabilities[comptime!(h * tile) + place] = probability;
                        weights[comptime!(h * tile) + place] = weight;
                    }
                }
                place += units;
            }
            wait(barriers);

            if dk_sums.part < comptime!(blueprint.parts(vector)) {
                let count = usize::min(tile.runtime(), end - row);
                let mut place = dk_sums.part;
                while place < count {
                    let start = strides.grad.row(&view, batch, kv_head, row + place);
                    dv_sums.add::<F>(&inputs.grad, start, &probabilities, place);
                    let start = strides.q.row(&view, batch, kv_head, row + place);
                    dk_sums.add::<F>(&inputs.q, start, &weights, place);
                    place += comptime!(blueprint.parts(vector));
                }
            }
            wait(barriers);
            row += tile;
        }

        dk_sums.add_up(&mut keys);
        dv_sums.add_up(&mut values);
        let mut i = unit;
        while i < comptime!(held * vectors) {
            let key = first_key + i / vectors;
            if key < view.keys {
                let token = (batch * view.keys + key) * view.kv_heads + kv_head;
                let at = token * vectors + i % vectors;
                dk[at] = Vector::<F, N>::cast_from(keys[i]);
                dv[at] = Vector::<F, N>::cast_from(values[i]);
            }
            i += units;
        }
    }
}
