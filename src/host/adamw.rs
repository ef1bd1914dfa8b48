//! A step of AdamW on the CPU.

use rayon::prelude::*;

use crate::flat::{AdamWForm, AdamWScalars, TILE_ELEMS};
use crate::format::{DYNAMIC_MAP, FloatElement};
use crate::unsigned_map::UNSIGNED_MAP;

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

/// What every step of AdamW needs.
pub(crate) struct AdamWStep<'a> {
    /// All parameters.
    pub values: &'a mut [f32],
    /// All gradients.
    pub grads: &'a mut [f32],
    /// The loss and the norm.
    pub report: [f32; 2],
    /// See `FlatLayout::tiles_of`; ascending.
    pub tiles: &'a [u32],
    /// Two a tensor, see `kernel::adamw`.
    pub factors: &'a [f32],
    pub scalars: AdamWScalars,
    pub form: AdamWForm,
}

/// The moments of the tiles of a step, one after the other.
pub(crate) enum MomentSlices<'a> {
    F32 {
        first: &'a mut [f32],
        second: &'a mut [f32],
    },
    /// Codes, a byte each, and what those of a tile are multiplied by.
    Bits8 {
        codes: [&'a mut [u8]; 2],
        maxima: [&'a mut [f32]; 2],
    },
}

/// A tile of a step.
struct Tile<'a> {
    values: &'a mut [f32],
    grads: &'a mut [f32],
    step_size: f32,
    root: f32,
    valid: usize,
}

/// A step of AdamW in place; gradients are set to zero for the next step. If the loss or the norm is not finite,
/// nothing else changes. The orders of operations are those of `kernel::adamw`.
pub(crate) fn adamw(step: AdamWStep, moments: MomentSlices) {
    let AdamWStep {
        values,
        grads,
        report,
        tiles,
        factors,
        scalars,
        form,
    } = step;
    let applies = report.iter().all(|value| value.is_finite());
    let clip = scalars.clip(report[1]);
    // The tiles that are meant, in the order of the buffers.
    let mut parts = values
        .chunks_exact_mut(TILE_ELEMS)
        .zip(grads.chunks_exact_mut(TILE_ELEMS))
        .enumerate();
    let tiles = tiles.chunks_exact(3).map(|row| {
        let [at, tensor, valid] = [0, 1, 2].map(|i| row[i] as usize);
        let (_, (values, grads)) = parts.find(|&(tile, _)| tile == at).expect("tiles ascend");
        Tile {
            values,
            grads,
            step_size: factors[2 * tensor],
            root: factors[2 * tensor + 1],
            valid,
        }
    });
    let mut tiles: Vec<Tile> = tiles.collect();
    let tiles = tiles.par_iter_mut().with_min_len(TASK_ELEMS / TILE_ELEMS);
    match moments {
        MomentSlices::F32 { first, second } => tiles
            .zip(first.par_chunks_exact_mut(TILE_ELEMS))
            .zip(second.par_chunks_exact_mut(TILE_ELEMS))
            .for_each(|((tile, first), second)| {
                if applies && tile.root > 0.0 {
                    tile.step(first, second, clip, &scalars, form);
                }
                tile.grads.fill(0.0);
            }),
        MomentSlices::Bits8 {
            codes: [first, second],
            maxima: [first_max, second_max],
        } => {
            let of_first = first.par_chunks_exact_mut(TILE_ELEMS).zip(first_max);
            let of_second = second.par_chunks_exact_mut(TILE_ELEMS).zip(second_max);
            tiles
                .zip(of_first)
                .zip(of_second)
                .for_each(|((tile, first), second)| {
                    if applies && tile.root > 0.0 {
                        tile.step_8bit(first, second, clip, &scalars);
                    }
                    tile.grads.fill(0.0);
                });
        }
    }
}

impl Tile<'_> {
    fn step(
        &mut self,
        first: &mut [f32],
        second: &mut [f32],
        clip: f32,
        scalars: &AdamWScalars,
        form: AdamWForm,
    ) {
        let (step_size, root) = (self.step_size, self.root);
        let state = self.values.iter_mut().zip(first).zip(second);
        for (((value, m), v), grad) in state.zip(self.grads.iter()) {
            let grad = grad * clip;
            *v *= scalars.keep_second;
            match form {
                AdamWForm::Torch => {
                    *m += (grad - *m) * scalars.first;
                    *v += scalars.second * grad * grad;
                    let below = v.sqrt() / root + scalars.eps;
                    *value = *value * scalars.decay - step_size * *m / below;
                }
                AdamWForm::Bnb => {
                    *m = *m * scalars.keep_first + scalars.first * grad;
                    *v += scalars.second * (grad * grad);
                    let below = v.sqrt() + scalars.eps * root;
                    *value = (*value - step_size * (*m / below)) * scalars.decay;
                }
            }
        }
    }

    fn step_8bit(
        &mut self,
        (first, first_max): (&mut [u8], &mut f32),
        (second, second_max): (&mut [u8], &mut f32),
        clip: f32,
        scalars: &AdamWScalars,
    ) {
        let (mut ms, mut vs) = ([0.0f32; TILE_ELEMS], [0.0f32; TILE_ELEMS]);
        for i in 0..self.valid {
            let grad = self.grads[i] * clip;
            let v = UNSIGNED_MAP[second[i] as usize] * *second_max;
            vs[i] = v * scalars.keep_second + scalars.second * grad * grad;
            let m = DYNAMIC_MAP[first[i] as usize] * *first_max;
            ms[i] = m * scalars.keep_first + scalars.first * grad;
            let below = vs[i].sqrt() + self.root * scalars.eps;
            let updated = self.values[i] - self.step_size * (ms[i] / below);
            self.values[i] = updated * scalars.decay;
        }
        let most = |values: &[f32]| values.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        *first_max = most(&ms);
        *second_max = most(&vs);
        // Nothing is divided by zero; a tile of zeros has any codes.
        let below = |most: f32| if most > 0.0 { most } else { 1.0 };
        let (below_first, below_second) = (below(*first_max), below(*second_max));
        for i in 0..TILE_ELEMS {
            let code = nearest_code(&DYNAMIC_MAP, ms[i] / below_first);
            // A first moment keeps its sign; the codes below 127 are negative.
            first[i] = match ms[i].is_sign_negative() {
                true if code >= 127 => code - 1,
                false if code < 127 => code + 1,
                _ => code,
            };
            second[i] = nearest_code(&UNSIGNED_MAP, vs[i] / below_second);
        }
    }
}

/// The code whose value is nearest to `x`, of two as near the one that bitsandbytes' `quantize_2D` takes.
fn nearest_code(map: &[f32; 256], x: f32) -> u8 {
    let (mut pivot, mut lower, mut upper) = (127, 0, 255);
    for by in [64, 32, 16, 8, 4, 2, 1] {
        if x > map[pivot] {
            lower = pivot;
            pivot += by;
        } else {
            upper = pivot;
            pivot -= by;
        }
    }
    let value = map[pivot];
    let code = match x > value {
        true if x > (map[upper] + value) * 0.5 => upper,
        false if x < (map[lower] + value) * 0.5 => lower,
        _ => pivot,
    };
    code as u8
}
