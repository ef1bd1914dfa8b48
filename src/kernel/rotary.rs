//! Rotary position embeddings: by themselves, and on the way of keys and values into a cache.

use cubecl::prelude::*;

/// Sizes of a rotation, in vectors of `N`.
#[derive(CubeType, CubeLaunch, Debug, Clone, Copy)]
pub struct RotaryView {
    /// Tokens of all rows.
    pub tokens: usize,
    /// Tokens of the tables: as many, or those of one row of the batch for all.
    pub table_tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Half of what is rotated of a head.
    pub half: usize,
    /// What is not.
    pub rest: usize,
}

/// `x cos + swap_halves(x) sin` of the first `2 half` elements of each head, the others as they are.
///
/// - `x`, `out`: `[tokens, heads, 2 half + rest]`; `cos`, `sin`: `[table_tokens, 2 half]`. The sines of the
///   first half are negative.
/// - Products and sums are rounded to the type of the tables, as operations of their own would round them.
/// - With `inverse` the rotation is undone, which is what gradients need.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn rotary_kernel<F: Float, T: Float, N: Size>(
    x: &[Vector<F, N>],
    cos: &[Vector<T, N>],
    sin: &[Vector<T, N>],
    out: &mut [Vector<F, N>],
    view: RotaryView,
    #[comptime] inverse: bool,
    #[define(F)] _dtype: ElemType,
    #[define(T)] _table_dtype: ElemType,
) {
    let units = view.half + view.rest;
    let unit = ABSOLUTE_POS % units;
    let head = ABSOLUTE_POS / units;
    let token = head / view.heads;
    if token < view.tokens {
        let start = head * (2 * view.half + view.rest);
        let table = token % view.table_tokens * 2 * view.half;
        rotate_unit::<F, T, N>(
            x, cos, sin, out, start, start, table, unit, view.half, inverse,
        );
    }
}

/// What a unit rotates of a head: a vector of the first half and its partner in the second, or a vector of
/// the rest, which stays as it is.
#[cube]
#[allow(clippy::too_many_arguments)]
fn rotate_unit<F: Float, T: Float, N: Size>(
    x: &[Vector<F, N>],
    cos: &[Vector<T, N>],
    sin: &[Vector<T, N>],
    out: &mut [Vector<F, N>],
    from: usize,
    to: usize,
    table: usize,
    unit: usize,
    half: usize,
    #[comptime] inverse: bool,
) {
    if unit >= half {
        out[to + half + unit] = x[from + half + unit];
    } else {
        let table = table + unit;
        let mut sin_low = sin[table];
        let mut sin_high = sin[table + half];
        if comptime!(inverse) {
            sin_low = sin[table + half];
            sin_high = sin[table];
        }
        let (a, b) = (x[from + unit], x[from + half + unit]);
        out[to + unit] = rotated::<F, T, N>(a, b, cos[table], sin_low);
        out[to + half + unit] = rotated::<F, T, N>(b, a, cos[table + half], sin_high);
    }
}

/// Sizes of [`rotary_append_kernel`], in vectors of `N` where elements are meant.
#[derive(CubeType, CubeLaunch, Debug, Clone, Copy)]
pub struct RotaryAppendView {
    /// Rows of the batch.
    pub rows: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and of values.
    pub kv_heads: usize,
    /// Half of what is rotated of a head.
    pub half: usize,
    /// What is not.
    pub rest: usize,
    /// Rows of the tables: one, or as many as the batch has.
    pub table_rows: usize,
    /// Positions given: one for all rows, or one for each.
    pub positions: usize,
    /// Positions that the caches have room for.
    pub capacity: usize,
}

/// Rotates queries and keys of one token a row, and writes keys and values into their caches.
///
/// - `q`, `out`: `[rows, heads, head_dim]`; `k`, `v`: `[rows, kv_heads, head_dim]`
/// - `cos`, `sin`: `[table_rows, 2 half]`, as for [`rotary_kernel`]
/// - `positions`: where the caches get the token; past their end nothing is written
/// - `keys`, `values`: `[rows, kv_heads, capacity, head_dim]`
/// - A unit has a vector of the first half and its partner in the second, or a vector of the rest.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn rotary_append_kernel<F: Float, T: Float, I: Int, N: Size>(
    q: &[Vector<F, N>],
    k: &[Vector<F, N>],
    v: &[Vector<F, N>],
    cos: &[Vector<T, N>],
    sin: &[Vector<T, N>],
    positions: &[I],
    out: &mut [Vector<F, N>],
    keys: &mut [Vector<F, N>],
    values: &mut [Vector<F, N>],
    view: RotaryAppendView,
    #[define(F)] _dtype: ElemType,
    #[define(T)] _table_dtype: ElemType,
    #[define(I)] _positions_dtype: ElemType,
) {
    let half = view.half;
    let units = half + view.rest;
    let width = units + half;
    let unit = ABSOLUTE_POS % units;
    let head = ABSOLUTE_POS / units;
    let all_heads = view.heads + 2 * view.kv_heads;
    let row = head / all_heads;
    let head = head % all_heads;
    if row < view.rows {
        let table = row % view.table_rows * 2 * half;
        let position = usize::cast_from(positions[row % view.positions]);
        if head < view.heads {
            let at = (row * view.heads + head) * width;
            rotate_unit::<F, T, N>(q, cos, sin, out, at, at, table, unit, half, false);
        } else if position < view.capacity {
            let head = head - view.heads;
            let is_key = head < view.kv_heads;
            let kv_head = row * view.kv_heads + head % view.kv_heads;
            let from = kv_head * width;
            let to = (kv_head * view.capacity + position) * width;
            if is_key {
                rotate_unit::<F, T, N>(k, cos, sin, keys, from, to, table, unit, half, false);
            } else {
                values[to + half + unit] = v[from + half + unit];
                if unit < half {
                    values[to + unit] = v[from + unit];
                }
            }
        }
    }
}

/// `x cos + partner sin`.
#[cube]
fn rotated<F: Float, T: Float, N: Size>(
    x: Vector<F, N>,
    partner: Vector<F, N>,
    cos: Vector<T, N>,
    sin: Vector<T, N>,
) -> Vector<F, N> {
    let one = rounded::<T, N>(Vector::cast_from(x) * Vector::<f32, N>::cast_from(cos));
    let other = rounded::<T, N>(Vector::cast_from(partner) * Vector::<f32, N>::cast_from(sin));
    Vector::cast_from(rounded::<T, N>(one + other))
}

/// To the type of the tables and back.
#[cube]
fn rounded<T: Float, N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    Vector::cast_from(Vector::<T, N>::cast_from(x))
}
