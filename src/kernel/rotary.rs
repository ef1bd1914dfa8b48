//! `rotary`: rotary position embeddings.

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
/// - A unit has a vector of the first half and its partner in the second, or a vector of the rest.
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
        if unit >= view.half {
            let at = start + view.half + unit;
            out[at] = x[at];
        } else {
            let (low, high) = (start + unit, start + view.half + unit);
            let table = token % view.table_tokens * 2 * view.half + unit;
            let mut sin_low = sin[table];
            let mut sin_high = sin[table + view.half];
            if comptime!(inverse) {
                sin_low = sin[table + view.half];
                sin_high = sin[table];
            }
            let (a, b) = (x[low], x[high]);
            out[low] = rotated::<F, T, N>(a, b, cos[table], sin_low);
            out[high] = rotated::<F, T, N>(b, a, cos[table + view.half], sin_high);
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
