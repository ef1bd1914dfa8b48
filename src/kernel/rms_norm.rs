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

/// Vectors that a unit keeps at most: of eight elements, 32 registers of values and 32 of factors.
const MOST_HELD: usize = 4;

impl RmsNormBlueprint {
    /// Vectors that a unit keeps until the sum is known, so that it does not read them again.
    fn held(&self) -> usize {
        self.vectors.div_ceil(self.units).min(MOST_HELD)
    }
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

    let held = comptime!(blueprint.held());
    let mut values = Array::<Vector<f32, N>>::new(held);
    let mut factors = Array::<Vector<f32, N>>::new(held);
    let mut squares = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for h in 0..held {
        let i = unit + h * units;
        if i < vectors {
            factors[h] = factor_of(weight, i, blueprint.one_plus);
            values[h] = summed(x, y, sum, start + i, blueprint.adds);
            squares += values[h] * values[h];
        }
    }
    let mut i = unit + held * units;
    while i < vectors {
        let value = summed(x, y, sum, start + i, blueprint.adds);
        squares += value * value;
        i += units;
    }
    let mut mine = 0.0f32;
    #[unroll]
    for e in 0..vector {
        mine += squares.extract(e);
    }
    let size = comptime!((vectors * vector) as f32);
    let mean = cube_sum(mine, unit, units, blueprint.barriers) / size;
    let scale = 1.0f32 / f32::sqrt(mean + eps);

    #[unroll]
    for h in 0..held {
        let i = unit + h * units;
        if i < vectors {
            let value = scaled::<F, N>(values[h], scale, blueprint.rounds_first);
            out[start + i] = Vector::cast_from(value * factors[h]);
        }
    }
    let mut i = unit + held * units;
    while i < vectors {
        let mut value = Vector::<f32, N>::cast_from(x[start + i]);
        if comptime!(blueprint.adds) {
            value = Vector::cast_from(sum[start + i]);
        }
        let value = scaled::<F, N>(value, scale, blueprint.rounds_first);
        let factor = factor_of(weight, i, blueprint.one_plus);
        out[start + i] = Vector::cast_from(value * factor);
        i += units;
    }
}

/// The gradient of what was normalised, `s (g w - n mean(g w n))` with `n = s x` the normalised row, in f32
/// inside; with `adds` and `residual`, the gradient that comes past the norm.
///
/// - `x`, `grad`, `residual`, `out`: `[rows, size]`; `weight`: `[size]`. `residual` is not used without
///   `adds`.
/// - A cube has a row.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn rms_norm_backward_kernel<F: Float, N: Size>(
    x: &[Vector<F, N>],
    grad: &[Vector<F, N>],
    weight: &[Vector<F, N>],
    residual: &[Vector<F, N>],
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

    let held = comptime!(blueprint.held());
    let mut values = Array::<Vector<f32, N>>::new(held);
    let mut weighted = Array::<Vector<f32, N>>::new(held);
    let mut squares = Vector::<f32, N>::new(0.0f32);
    let mut along = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for h in 0..held {
        let i = unit + h * units;
        if i < vectors {
            values[h] = Vector::cast_from(x[start + i]);
            let factor = factor_of(weight, i, blueprint.one_plus);
            weighted[h] = Vector::<f32, N>::cast_from(grad[start + i]) * factor;
            squares += values[h] * values[h];
            along += values[h] * weighted[h];
        }
    }
    let mut i = unit + held * units;
    while i < vectors {
        let value = Vector::<f32, N>::cast_from(x[start + i]);
        let factor = factor_of(weight, i, blueprint.one_plus);
        squares += value * value;
        along += value * (Vector::<f32, N>::cast_from(grad[start + i]) * factor);
        i += units;
    }
    let mut of_squares = 0.0f32;
    let mut of_along = 0.0f32;
    #[unroll]
    for e in 0..vector {
        of_squares += squares.extract(e);
        of_along += along.extract(e);
    }
    let size = comptime!((vectors * vector) as f32);
    let mean = cube_sum(of_squares, unit, units, blueprint.barriers) / size;
    let scale = 1.0f32 / f32::sqrt(mean + eps);
    // Of the normalised row: `s mean(g w n)`.
    let along = cube_sum(of_along, unit, units, blueprint.barriers) * scale / size;

    #[unroll]
    for h in 0..held {
        let i = unit + h * units;
        if i < vectors {
            let mut dx =
                (weighted[h] - values[h] * Vector::new(scale * along)) * Vector::new(scale);
            if comptime!(blueprint.adds) {
                dx += Vector::cast_from(residual[start + i]);
            }
            out[start + i] = Vector::cast_from(dx);
        }
    }
    let mut i = unit + held * units;
    while i < vectors {
        let value = Vector::<f32, N>::cast_from(x[start + i]);
        let factor = factor_of(weight, i, blueprint.one_plus);
        let weighted = Vector::<f32, N>::cast_from(grad[start + i]) * factor;
        let mut dx = (weighted - value * Vector::new(scale * along)) * Vector::new(scale);
        if comptime!(blueprint.adds) {
            dx += Vector::cast_from(residual[start + i]);
        }
        out[start + i] = Vector::cast_from(dx);
        i += units;
    }
}

/// Element `at` of `x`, or of `x + y`, which goes to `sum`.
#[cube]
fn summed<F: Float, N: Size>(
    x: &[Vector<F, N>],
    y: &[Vector<F, N>],
    sum: &mut [Vector<F, N>],
    at: usize,
    #[comptime] adds: bool,
) -> Vector<f32, N> {
    let mut value = Vector::<f32, N>::cast_from(x[at]);
    if comptime!(adds) {
        let total = Vector::<F, N>::cast_from(value + Vector::cast_from(y[at]));
        sum[at] = total;
        value = Vector::cast_from(total);
    }
    value
}

/// What values are multiplied by.
#[cube]
fn factor_of<F: Float, N: Size>(
    weight: &[Vector<F, N>],
    at: usize,
    #[comptime] one_plus: bool,
) -> Vector<f32, N> {
    let mut factor = Vector::<f32, N>::cast_from(weight[at]);
    if comptime!(one_plus) {
        factor += Vector::new(1.0f32);
    }
    factor
}

/// A value of root-mean-square one.
#[cube]
fn scaled<F: Float, N: Size>(
    value: Vector<f32, N>,
    scale: f32,
    #[comptime] rounds_first: bool,
) -> Vector<f32, N> {
    let mut value = value * Vector::new(scale);
    if comptime!(rounds_first) {
        value = Vector::cast_from(Vector::<F, N>::cast_from(value));
    }
    value
}

/// The sum of what each unit of the cube has: columns of it first, then those.
#[cube]
fn cube_sum(mine: f32, unit: usize, #[comptime] units: usize, #[comptime] barriers: bool) -> f32 {
    let columns = comptime!(units.min(32));
    let mut shared = Shared::<[f32]>::new_slice(units);
    shared[unit] = mine;
    wait(barriers);
    if unit < columns {
        let mut column = mine;
        #[unroll]
        for row in 1..comptime!(units / columns) {
            column += shared[unit + row * columns];
        }
        shared[unit] = column;
    }
    wait(barriers);
    let mut total = 0.0f32;
    #[unroll]
    for column in 0..columns {
        total += shared[column];
    }
    total
}
