//! `adamw`: AdamW (arXiv 1711.05101) over all parameters of a model in one flat buffer, and what it needs before:
//! gradients that are added up there, and their norm.

use cubecl::prelude::*;

use super::attention::wait;
use crate::flat::{CLIP_EPS, TILE_ELEMS};

/// A tensor that is added to a part of a flat buffer.
#[derive(CubeType, CubeLaunch)]
pub struct FlatPart<F: Float> {
    /// `[len]`.
    pub values: Box<[F]>,
    /// Where it begins in the flat buffer.
    pub start: usize,
    /// Elements.
    pub len: usize,
    /// The first of its cubes.
    pub first_cube: usize,
}

/// Adds tensors to parts of a flat buffer.
///
/// - `flat`: f32; `parts`: see [`FlatPart`], ordered by their first cubes, in parts of the buffer that do not
///   overlap.
/// - A cube has `per_unit` elements a unit of one tensor, neighbouring units neighbouring elements. Elements past
///   the tensor's end are left out.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn flat_accumulate_kernel<F: Float>(
    flat: &mut [f32],
    parts: Sequence<FlatPart<F>>,
    #[comptime] per_unit: usize,
    #[define(F)] _dtype: ElemType,
) {
    let count = parts.len().comptime();
    let units = CUBE_DIM as usize;
    let mut chosen = 0usize.runtime();
    #[unroll]
    for p in 1..count {
        if CUBE_POS >= parts.index(p).first_cube {
            chosen = p.runtime();
        }
    }
    #[unroll]
    for p in 0..count {
        if chosen == p {
            let part = parts.index(p);
            let first = (CUBE_POS - part.first_cube) * units * per_unit + UNIT_POS as usize;
            for i in 0..per_unit {
                let at = first + i * units;
                if at < part.len {
                    flat[part.start + at] += f32::cast_from(part.values[at]);
                }
            }
        }
    }
}

/// The sum of what each unit of a cube has, in the first element of `shared`.
#[cube]
fn cube_sum(mine: f32, #[comptime] units: usize, #[comptime] barriers: bool) -> f32 {
    let unit = UNIT_POS as usize;
    let mut shared = Shared::<[f32]>::new_slice(units);
    shared[unit] = mine;
    let steps = comptime!(units.ilog2() as usize);
    #[unroll]
    for step in 0..steps {
        let half = comptime!(units >> (step + 1));
        wait(barriers);
        if unit < half {
            let other = shared[unit + half];
            shared[unit] += other;
        }
    }
    wait(barriers);
    shared[0usize]
}

/// The sums of squares of the parts of a flat buffer, one a cube, always in the same order.
///
/// - `flat`: f32, `vectors` of `N`; `sums`: `[cubes]`.
/// - Cubes and their units take turns along the buffer.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn square_sums_kernel<N: Size>(
    flat: &[Vector<f32, N>],
    sums: &mut [f32],
    vectors: usize,
    cubes: usize,
    #[comptime] units: usize,
    #[comptime] barriers: bool,
) {
    let vector = N::value().comptime();
    if CUBE_POS >= cubes {
        terminate!();
    }
    let mut squares = Vector::<f32, N>::new(0.0f32);
    let mut i = CUBE_POS * units + UNIT_POS as usize;
    while i < vectors {
        let value = flat[i];
        squares += value * value;
        i += cubes * units;
    }
    let mut mine = 0.0f32;
    #[unroll]
    for e in 0..vector {
        mine += squares.extract(e);
    }
    let sum = cube_sum(mine, units, barriers);
    if UNIT_POS == 0 {
        sums[CUBE_POS] = sum;
    }
}

/// What the host reads of a step: the loss, and the root of the sum of `sums`.
///
/// - `sums`: `[count]`; `loss`: `[1]`; `report`: `[2]`. One cube.
#[cube(launch_unchecked)]
pub fn step_report_kernel(
    sums: &[f32],
    loss: &[f32],
    report: &mut [f32],
    count: usize,
    #[comptime] units: usize,
    #[comptime] barriers: bool,
) {
    let mut mine = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < count {
        mine += sums[i];
        i += units;
    }
    let sum = cube_sum(mine, units, barriers);
    if UNIT_POS == 0 {
        report[0] = loss[0];
        report[1] = f32::sqrt(sum);
    }
}

/// Whether a number is neither NaN nor infinite. Compilers for shading languages take comparisons of such numbers
/// for what they like, so the bits are looked at.
#[cube]
fn is_finite(value: f32) -> bool {
    u32::reinterpret(value) & 0x7f80_0000u32 != 0x7f80_0000u32
}

/// A step of AdamW in place, in the order of operations of PyTorch's `_single_tensor_adamw`; gradients are set to
/// zero for the next step.
///
/// - `values`, `grads`: f32, in vectors of `N`; `first`, `second`: those from vector `start` on.
/// - `report`: `[loss, norm]`. If either is not finite, nothing but the gradients changes.
/// - `tile_tensors`: the tensor that each tile belongs to; `factors`: two a tensor, `rate / (1 - beta1^t)` and
///   `sqrt(1 - beta2^t)`. The second is zero for a tensor that has no gradient in this step and stays as it is.
/// - A unit has a vector of the `vectors` from `start` on.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn adamw_kernel<N: Size>(
    values: &mut [Vector<f32, N>],
    first: &mut [Vector<f32, N>],
    second: &mut [Vector<f32, N>],
    grads: &mut [Vector<f32, N>],
    report: &[f32],
    tile_tensors: &[u32],
    factors: &[f32],
    start: usize,
    vectors: usize,
    decay: f32,
    of_first: f32,
    keep_second: f32,
    of_second: f32,
    eps: f32,
    max_norm: f32,
) {
    let vector = N::value().comptime();
    let moment = ABSOLUTE_POS;
    if moment >= vectors {
        terminate!();
    }
    let at = start + moment;
    let tensor = tile_tensors[at / comptime!(TILE_ELEMS / vector)] as usize;
    let step_size = factors[2 * tensor];
    let root = factors[2 * tensor + 1];
    let norm = report[1];
    let clip = f32::min(max_norm / (norm + CLIP_EPS), 1.0f32);
    let grad = grads[at] * Vector::new(clip);
    grads[at] = Vector::new(0.0f32);
    if root > 0.0f32 && is_finite(report[0]) && is_finite(norm) {
        let mut m = first[moment];
        m += (grad - m) * Vector::new(of_first);
        first[moment] = m;
        let mut v = second[moment] * Vector::new(keep_second);
        v += grad * Vector::new(of_second) * grad;
        second[moment] = v;
        let below = Vector::sqrt(v) / Vector::new(root) + Vector::new(eps);
        values[at] = values[at] * Vector::new(decay) - m * Vector::new(step_size) / below;
    }
}
