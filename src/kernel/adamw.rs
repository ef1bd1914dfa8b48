//! `adamw`: AdamW (arXiv 1711.05101) over all parameters of a model in one flat buffer, and what it needs before:
//! gradients that are added up there, and their norm.

use cubecl::prelude::*;

use super::attention::wait;
use crate::flat::{AdamWForm, CLIP_EPS, TILE_ELEMS};

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

/// What becomes of the numbers that the units of a cube have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Reduction {
    /// Their sum.
    Sum,
    /// The largest of them.
    Largest,
}

/// The sum or the largest of what each unit of a cube has, always in the same order.
#[cube]
fn reduced(
    mine: f32,
    #[comptime] to: Reduction,
    #[comptime] units: usize,
    #[comptime] barriers: bool,
) -> f32 {
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
            let own = shared[unit];
            shared[unit] = match comptime!(to) {
                Reduction::Sum => own + other,
                Reduction::Largest => f32::max(own, other),
            };
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
    let sum = reduced(mine, Reduction::Sum, units, barriers);
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
    let sum = reduced(mine, Reduction::Sum, units, barriers);
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

/// What a step of AdamW multiplies by, the same for all tensors.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub struct StepScalars {
    /// `1 - rate * weight_decay`.
    pub decay: f32,
    /// `beta1`.
    pub keep_first: f32,
    /// `1 - beta1`.
    pub of_first: f32,
    /// `beta2`.
    pub keep_second: f32,
    /// `1 - beta2`.
    pub of_second: f32,
    /// Added to the root.
    pub eps: f32,
    /// The largest norm of all gradients.
    pub max_norm: f32,
}

/// What gradients are multiplied by.
#[cube]
fn clip(report: &[f32], scalars: &StepScalars) -> f32 {
    f32::min(scalars.max_norm / (report[1] + CLIP_EPS), 1.0f32)
}

/// A step of AdamW in place; gradients are set to zero for the next step.
///
/// - `values`, `grads`: f32, in vectors of `N`; `first`, `second`: those of the tiles of this launch, one after the
///   other.
/// - `report`: `[loss, norm]`. If either is not finite, nothing but the gradients changes.
/// - `tiles`: three words a tile, the last not used here: see `FlatLayout::tiles_of`.
/// - `factors`: two a tensor. PyTorch's are `rate / (1 - beta1^t)` and `sqrt(1 - beta2^t)`; those of bitsandbytes
///   have the first multiplied by the second. The second is zero for a tensor that has no gradient in this step and
///   stays as it is.
/// - A unit has one of `vectors`. The order of operations is that of PyTorch's `_single_tensor_adamw`, or that of
///   bitsandbytes' `kOptimizer32bit2State`.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn adamw_kernel<N: Size>(
    values: &mut [Vector<f32, N>],
    first: &mut [Vector<f32, N>],
    second: &mut [Vector<f32, N>],
    grads: &mut [Vector<f32, N>],
    report: &[f32],
    tiles: &[u32],
    factors: &[f32],
    vectors: usize,
    scalars: StepScalars,
    #[comptime] form: AdamWForm,
) {
    let vector = N::value().comptime();
    let of_tile = comptime!(TILE_ELEMS / vector);
    let moment = ABSOLUTE_POS;
    if moment >= vectors {
        terminate!();
    }
    let row = moment / of_tile * 3;
    let at = tiles[row] as usize * of_tile + moment % of_tile;
    let tensor = tiles[row + 1] as usize;
    let step_size = factors[2 * tensor];
    let root = factors[2 * tensor + 1];
    let grad = grads[at] * Vector::new(clip(report, &scalars));
    grads[at] = Vector::new(0.0f32);
    if root > 0.0f32 && is_finite(report[0]) && is_finite(report[1]) {
        let mut m = first[moment];
        let mut v = second[moment] * Vector::new(scalars.keep_second);
        let value = values[at];
        if comptime!(form == AdamWForm::Torch) {
            m += (grad - m) * Vector::new(scalars.of_first);
            v += grad * Vector::new(scalars.of_second) * grad;
            let below = Vector::sqrt(v) / Vector::new(root) + Vector::new(scalars.eps);
            values[at] = value * Vector::new(scalars.decay) - m * Vector::new(step_size) / below;
        } else {
            m = m * Vector::new(scalars.keep_first) + grad * Vector::new(scalars.of_first);
            v += grad * grad * Vector::new(scalars.of_second);
            let below = Vector::sqrt(v) + Vector::new(scalars.eps * root);
            let updated = value - m / below * Vector::new(step_size);
            values[at] = updated * Vector::new(scalars.decay);
        }
        first[moment] = m;
        second[moment] = v;
    }
}

/// The code whose value in a map, from `map` on in `maps`, is nearest to `x`, of two as near the one that
/// bitsandbytes' `quantize_2D` takes.
#[cube]
fn nearest_code(maps: &[f32], map: usize, x: f32) -> usize {
    let mut pivot = 127usize.runtime();
    let mut lower = 0usize.runtime();
    let mut upper = 255usize.runtime();
    #[unroll]
    for step in 0..7usize {
        let by = comptime!(64usize >> step);
        if x > maps[map + pivot] {
            lower = pivot;
            pivot += by;
        } else {
            upper = pivot;
            pivot -= by;
        }
    }
    let value = maps[map + pivot];
    let mut code = pivot;
    if x > value {
        if x > (maps[map + upper] + value) * 0.5f32 {
            code = upper;
        }
    } else if x < (maps[map + lower] + value) * 0.5f32 {
        code = lower;
    }
    code
}

/// The code of a first moment, which keeps its sign: the codes below 127 are negative.
#[cube]
fn first_code(maps: &[f32], m: f32, most: f32) -> u32 {
    let mut code = nearest_code(maps, 0usize, m / most) as u32;
    let negative = u32::reinterpret(m) >> 31u32 == 1u32;
    if negative && code >= 127u32 {
        code -= 1u32;
    }
    if !negative && code < 127u32 {
        code += 1u32;
    }
    code
}

/// A step of AdamW in place with moments in 8 bit, in the order of operations of bitsandbytes'
/// `kOptimizerStatic8bit2StateBlockwise`; gradients are set to zero for the next step.
///
/// - `values`, `grads`: f32; `first`, `second`: the codes of the tiles of this launch, one after the other, four a
///   word; `first_max`, `second_max`: what codes of a tile are multiplied by.
/// - `maps`: the values of the codes of first moments, 256, and of second ones.
/// - `report`, `tiles`, `factors`: as for [`adamw_kernel`]. What is past a tensor's end counts as zero.
/// - A cube has a tile, a block of bitsandbytes; a unit every `units`-th of its words.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn adamw_8bit_kernel(
    values: &mut [f32],
    first: &mut [u32],
    second: &mut [u32],
    first_max: &mut [f32],
    second_max: &mut [f32],
    grads: &mut [f32],
    report: &[f32],
    tiles: &[u32],
    factors: &[f32],
    maps: &[f32],
    count: usize,
    scalars: StepScalars,
    #[comptime] units: usize,
    #[comptime] barriers: bool,
) {
    let words = comptime!(TILE_ELEMS / 4);
    let per_unit = comptime!(TILE_ELEMS / 4 / units);
    let tile = CUBE_POS;
    if tile >= count {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let start = tiles[3 * tile] as usize * comptime!(TILE_ELEMS);
    let tensor = tiles[3 * tile + 1] as usize;
    let valid = tiles[3 * tile + 2] as usize;
    let step_size = factors[2 * tensor];
    let root = factors[2 * tensor + 1];
    let clip = clip(report, &scalars);
    let applies = root > 0.0f32 && is_finite(report[0]) && is_finite(report[1]);

    let mut ms = Array::<f32>::new(comptime!(4 * per_unit));
    let mut vs = Array::<f32>::new(comptime!(4 * per_unit));
    let old_first_max = first_max[tile];
    let old_second_max = second_max[tile];
    let mut most_first = 0.0f32;
    let mut most_second = 0.0f32;
    for w in 0..per_unit {
        let word = unit + w * units;
        let codes = first[tile * words + word];
        let second_codes = second[tile * words + word];
        #[unroll]
        for e in 0..4usize {
            let element = word * 4 + e;
            let mut m = 0.0f32;
            let mut v = 0.0f32;
            if element < valid {
                let grad = grads[start + element] * clip;
                grads[start + element] = 0.0f32;
                let shift = comptime!(8 * e as u32);
                let code = (codes >> shift) & 255u32;
                let second_code = (second_codes >> shift) & 255u32;
                v = maps[256 + second_code as usize] * old_second_max * scalars.keep_second
                    + scalars.of_second * grad * grad;
                m = maps[code as usize] * old_first_max * scalars.keep_first
                    + scalars.of_first * grad;
                if applies {
                    let below = f32::sqrt(v) + root * scalars.eps;
                    let updated = values[start + element] - step_size * (m / below);
                    values[start + element] = updated * scalars.decay;
                }
            }
            ms[w * 4 + e] = m;
            vs[w * 4 + e] = v;
            most_first = f32::max(most_first, f32::abs(m));
            most_second = f32::max(most_second, v);
        }
    }
    let most_first = reduced(most_first, Reduction::Largest, units, barriers);
    let most_second = reduced(most_second, Reduction::Largest, units, barriers);
    if applies {
        if unit == 0 {
            first_max[tile] = most_first;
            second_max[tile] = most_second;
        }
        // Nothing is divided by zero; a tile of zeros has any codes.
        let below_first = select(most_first > 0.0f32, most_first, 1.0f32);
        let below_second = select(most_second > 0.0f32, most_second, 1.0f32);
        for w in 0..per_unit {
            let word = unit + w * units;
            let mut codes = 0u32;
            let mut second_codes = 0u32;
            #[unroll]
            for e in 0..4usize {
                let m = ms[w * 4 + e];
                let code = first_code(maps, m, below_first);
                let second_code = nearest_code(maps, 256usize, vs[w * 4 + e] / below_second) as u32;
                let shift = comptime!(8 * e as u32);
                codes |= code << shift;
                second_codes |= second_code << shift;
            }
            first[tile * words + word] = codes;
            second[tile * words + word] = second_codes;
        }
    }
}
