//! `cross_entropy`: the loss of rows of logits, and the gradient of the logits in their place.

use cubecl::prelude::*;

use super::attention::{tanh, wait};

/// What forks the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CrossEntropyBlueprint {
    /// Units of a cube, a power of two.
    pub units: usize,
    /// Whether logits are capped.
    pub capped: bool,
    /// Whether labels are smoothed.
    pub smoothed: bool,
    /// Whether the gradient takes the place of the logits.
    pub gradient: bool,
    /// Whether units wait for each other; without it there is one.
    pub barriers: bool,
}

/// Sizes and constants, see [`CrossEntropyOptions`](crate::cross_entropy::CrossEntropyOptions).
#[derive(CubeType, CubeLaunch, Debug, Clone, Copy)]
pub struct CrossEntropyView {
    /// Rows.
    pub rows: usize,
    /// Vectors of a row.
    pub vectors: usize,
    /// The last target that there is.
    pub last: usize,
    pub ignored: i32,
    pub smoothing: f32,
    pub z_loss: f32,
    pub scale: f32,
    pub cap: f32,
    /// Always zero, but the compiler does not know: NaN is no constant of WGSL.
    pub zero: u32,
}

#[cube]
impl CrossEntropyView {
    /// A logit, scaled and capped.
    fn logit(&self, x: f32, #[comptime] capped: bool) -> f32 {
        if comptime!(capped) {
            tanh(x * self.scale / self.cap) * self.cap
        } else {
            x * self.scale
        }
    }
}

/// The loss of each row, and with `gradient` its gradient with respect to the logits in their place.
///
/// - `logits`: `[rows, vectors]` in vectors of `N`; `targets`, `loss`: `[rows]`. A row without a target among
///   its logits that is not ignored has a loss and gradients of NaN.
/// - A cube has a row. Units take its vectors in turns and keep the largest logit so far and the sum of the
///   exponentials with it (arXiv 1805.02867), which are then put together in shared memory; with `gradient`
///   they go through the row once more.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn cross_entropy_kernel<F: Float, N: Size, I: Int>(
    logits: &mut [Vector<F, N>],
    targets: &[I],
    loss: &mut [f32],
    view: CrossEntropyView,
    #[comptime] blueprint: CrossEntropyBlueprint,
    #[define(F)] _dtype: ElemType,
    #[define(I)] _targets_dtype: ElemType,
) {
    let vector = N::value().comptime();
    let units = comptime!(blueprint.units);
    let capped = comptime!(blueprint.capped);
    let row = CUBE_POS;
    if row >= view.rows {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let start = row * view.vectors;

    let target = targets[row];
    let is_ignored = target == I::cast_from(view.ignored);
    let is_inside = target >= I::from_int(0) && target <= I::cast_from(view.last);
    let mut at = 0usize;
    if is_inside {
        at = usize::cast_from(target);
    }
    let (at_vector, at_element) = (at / vector, at % vector);
    // Before any unit writes to the row.
    let beside = Vector::<f32, N>::cast_from(logits[start + at_vector]);
    let mut of_target = 0.0f32;
    #[unroll]
    for e in 0..vector {
        of_target = select(at_element == e, beside.extract(e), of_target);
    }
    of_target = view.logit(of_target, capped);

    let mut most = f32::new(f32::MIN);
    let mut sum = 0.0f32;
    let mut total = 0.0f32;
    let mut end = view.vectors;
    if is_ignored {
        end = 0usize;
    }
    let mut i = unit;
    while i < end {
        let mut values = Vector::<f32, N>::cast_from(logits[start + i]);
        let mut larger = most;
        #[unroll]
        for e in 0..vector {
            let value = view.logit(values.extract(e), capped);
            values.insert(e, value);
            larger = f32::max(larger, value);
        }
        sum *= (most - larger).exp();
        most = larger;
        #[unroll]
        for e in 0..vector {
            let value = values.extract(e);
            sum += (value - most).exp();
            if comptime!(blueprint.smoothed) {
                total += value;
            }
        }
        i += units;
    }

    let mut largest = Shared::<[f32]>::new_slice(units);
    let mut sums = Shared::<[f32]>::new_slice(units);
    let mut totals = Shared::<[f32]>::new_slice(units);
    largest[unit] = most;
    sums[unit] = sum;
    totals[unit] = total;
    let steps = comptime!(units.ilog2() as usize);
    #[unroll]
    for step in 0..steps {
        let half = comptime!(units >> (step + 1));
        wait(blueprint.barriers);
        if unit < half {
            let (mine, other) = (largest[unit], largest[unit + half]);
            let most = f32::max(mine, other);
            let ours = sums[unit] * (mine - most).exp();
            let theirs = sums[unit + half] * (other - most).exp();
            largest[unit] = most;
            sums[unit] = ours + theirs;
            let total = totals[unit + half];
            totals[unit] += total;
        }
    }
    wait(blueprint.barriers);
    let lse = largest[0usize] + sums[0usize].ln();
    let count = f32::cast_from(view.vectors * vector);

    if unit == 0 {
        let mut value = (1.0f32 - view.smoothing) * (lse - of_target) + view.z_loss * lse * lse;
        if comptime!(blueprint.smoothed) {
            value += view.smoothing * (lse - totals[0usize] / count);
        }
        if !is_inside {
            value = f32::reinterpret(comptime!(f32::NAN.to_bits()) ^ view.zero);
        }
        loss[row] = select(is_ignored, 0.0f32, value);
    }

    if comptime!(blueprint.gradient) {
        let mut factor = 1.0f32 + 2.0f32 * view.z_loss * lse;
        if !is_inside {
            factor = f32::reinterpret(comptime!(f32::NAN.to_bits()) ^ view.zero);
        }
        let spread = view.smoothing / count;
        let of_target = 1.0f32 - view.smoothing;
        let mut i = unit;
        while i < view.vectors {
            let mut values = Vector::<f32, N>::cast_from(logits[start + i]);
            let has_target = i == at_vector;
            #[unroll]
            for e in 0..vector {
                let value = view.logit(values.extract(e), capped);
                let mut gradient = (value - lse).exp() * factor - spread;
                gradient -= select(has_target && at_element == e, of_target, 0.0f32);
                gradient *= view.scale;
                if comptime!(blueprint.capped) {
                    let ratio = value / view.cap;
                    gradient *= 1.0f32 - ratio * ratio;
                }
                values.insert(e, select(is_ignored, 0.0f32, gradient));
            }
            logits[start + i] = Vector::<F, N>::cast_from(values);
            i += units;
        }
    }
}
