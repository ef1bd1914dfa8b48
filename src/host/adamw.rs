//! A step of AdamW on the CPU.

use rayon::prelude::*;

use crate::flat::{AdamWScalars, FlatLayout, TILE_ELEMS};
use crate::format::FloatElement;

/// Elements of a task.
const TASK_ELEMS: usize = 1 << 15;

/// Adds a tensor to its part of a flat buffer.
pub(crate) fn accumulate<T: FloatElement>(flat: &mut [f32], values: &[T]) {
    for (sum, value) in flat.iter_mut().zip(values) {
        *sum += value.to_f32();
    }
}

/// The norm of a flat buffer, whose sums do not depend on the number of threads.
pub(crate) fn norm(flat: &[f32]) -> f32 {
    let sums: Vec<f64> = flat
        .par_chunks(TASK_ELEMS)
        .map(|part| part.iter().map(|&x| f64::from(x) * f64::from(x)).sum())
        .collect();
    sums.iter().sum::<f64>().sqrt() as f32
}

/// The buffers of a step.
pub(crate) struct AdamWSlices<'a> {
    pub values: &'a mut [f32],
    pub first: &'a mut [f32],
    pub second: &'a mut [f32],
    pub grads: &'a mut [f32],
}

/// A step of AdamW in place, in the order of operations of PyTorch's `_single_tensor_adamw`; gradients are set to
/// zero for the next step. If the loss or the norm of `report` is not finite, nothing else changes.
///
/// `factors` are `rate / (1 - beta1^t)` and `sqrt(1 - beta2^t)` of each tensor, the second zero for one that has no
/// gradient in this step and stays as it is.
pub(crate) fn adamw(
    slices: AdamWSlices,
    report: [f32; 2],
    layout: &FlatLayout,
    factors: &[f32],
    scalars: AdamWScalars,
) {
    let AdamWSlices {
        values,
        first,
        second,
        grads,
    } = slices;
    let applies = report.iter().all(|value| value.is_finite());
    let clip = scalars.clip(report[1]);
    let tensors = layout.tile_tensors();
    let values = values.par_chunks_mut(TILE_ELEMS);
    let moments = first
        .par_chunks_mut(TILE_ELEMS)
        .zip(second.par_chunks_mut(TILE_ELEMS));
    let tiles = values
        .zip(moments)
        .zip(grads.par_chunks_mut(TILE_ELEMS))
        .zip(tensors.par_iter());
    tiles.with_min_len(TASK_ELEMS / TILE_ELEMS).for_each(
        |(((values, (first, second)), grads), &tensor)| {
            let [step_size, root] = [0, 1].map(|i| factors[2 * tensor as usize + i]);
            if applies && root > 0.0 {
                let state = values.iter_mut().zip(first).zip(second);
                for (((value, m), v), grad) in state.zip(grads.iter()) {
                    let grad = grad * clip;
                    *m += (grad - *m) * scalars.first;
                    *v = *v * scalars.keep_second + scalars.second * grad * grad;
                    let below = v.sqrt() / root + scalars.eps;
                    *value = *value * scalars.decay - step_size * *m / below;
                }
            }
            grads.fill(0.0);
        },
    );
}
