//! `rms_norm`: root-mean-square normalisation.

use cubecl::prelude::*;

use super::attention::wait;

/// What forks the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RmsNormBlueprint {
    /// Vectors of a row.
    pub vectors: usize,
    /// Units of a cube, a power of two.
    pub units: usize,
    /// Whether values are rounded before they are multiplied by the weight.
    pub rounds_first: bool,
    /// Whether the weight is what is added to one.
    pub one_plus: bool,
    /// Whether another tensor is added first.
    pub adds: bool,
    /// Whether units wait for each other; without it there is one.
    pub barriers: bool,
}

/// `x / rms(x) * weight` of each row, in f32 inside; with `adds` of `x + y`, which is written to `sum`.
///
/// - `x`, `y`, `sum`, `out`: `[rows, size]`; `weight`: `[size]`. `y` and `sum` are not used without `adds`.
/// - A cube has a row.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn rms_norm_kernel<F: Float, N: Size>(
    x: &[Vector<F, N>],
    y: &[Vector<F, N>],
    weight: &[Vector<F, N>],
    sum: &mut [Vector<F, N>],
    out: &mut [Vector<F, N>],
    rows: usize,
    eps: f32,
    #[comptime] blueprint: RmsNormBlueprint,
    #[define(F)] _dtype: ElemType,
) {
    let vector = N::value().comptime();
    let vectors = comptime!(blueprint.vectors);
    let units = comptime!(blueprint.units);
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let start = row * vectors;

    let mut squares = Vector::<f32, N>::new(0.0f32);
    let mut i = unit;
    while i < vectors {
        let mut value = Vector::<f32, N>::cast_from(x[start + i]);
        if comptime!(blueprint.adds) {
            let total = Vector::<F, N>::cast_from(value + Vector::cast_from(y[start + i]));
            sum[start + i] = total;
            value = Vector::cast_from(total);
        }
        squares += value * value;
        i += units;
    }
    let mut mine = 0.0f32;
    #[unroll]
    for e in 0..vector {
        mine += squares.extract(e);
    }
    let mut shared = Shared::<[f32]>::new_slice(units);
    shared[unit] = mine;
    let steps = comptime!(units.ilog2() as usize);
    #[unroll]
    for step in 0..steps {
        let half = comptime!(units >> (step + 1));
        wait(blueprint.barriers);
        if unit < half {
            let other = shared[unit + half];
            shared[unit] += other;
        }
    }
    wait(blueprint.barriers);
    let size = comptime!((vectors * vector) as f32);
    let scale = 1.0f32 / f32::sqrt(shared[0usize] / size + eps);

    let mut i = unit;
    while i < vectors {
        let mut value = Vector::<f32, N>::cast_from(x[start + i]);
        if comptime!(blueprint.adds) {
            value = Vector::cast_from(sum[start + i]);
        }
        value *= Vector::new(scale);
        if comptime!(blueprint.rounds_first) {
            value = Vector::cast_from(Vector::<F, N>::cast_from(value));
        }
        let mut factor = Vector::<f32, N>::cast_from(weight[i]);
        if comptime!(blueprint.one_plus) {
            factor += Vector::new(1.0f32);
        }
        out[start + i] = Vector::cast_from(value * factor);
        i += units;
    }
}
