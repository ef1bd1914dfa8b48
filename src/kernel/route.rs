//! `route`: the experts of each token and their weights, from the scores of a router.

use cubecl::prelude::*;

use super::sample::order::{key, value_of};
use super::sample::{INFINITE, MINUS_INFINITE};

/// What forks the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RouteBlueprint {
    /// Experts of a token.
    pub per_token: usize,
    /// Whether the weights of a token add up to one.
    pub normalised: bool,
    /// The lanes of a plane share a token; without it a unit has one alone.
    pub planes: bool,
}

/// Chooses the experts with the highest scores of each token, the highest first and of equal ones the lower
/// number.
///
/// - `logits`: `[tokens, experts]`; `ids`, `weights`: `[tokens, per_token]`; `zero`: always zero.
/// - The cube is `(lanes, tokens)`: a plane has a token, and its lanes take the experts in turn. For each
///   choice they look once more for the best that comes after the last one: scores are few and cached.
/// - Scores are compared as integers in their order, which all devices do alike. NaN is above all.
/// - Weights are `exp(score - highest)` over the sum of these, and NaN where the highest is not finite.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn route_kernel<F: Float, I: Int>(
    logits: &[F],
    ids: &mut [I],
    weights: &mut [f32],
    tokens: usize,
    experts: usize,
    zero: u32,
    #[comptime] blueprint: RouteBlueprint,
    #[define(F)] _dtype: ElemType,
    #[define(I)] _ids_dtype: ElemType,
) {
    let per_token = comptime!(blueprint.per_token);
    let token = CUBE_POS * CUBE_DIM_Y as usize + UNIT_POS_Y as usize;
    let first = usize::min(token, tokens - 1) * experts;

    let mut powers = Array::<f32>::new(per_token);
    let mut sum = 0.0f32;
    let mut highest = 0u32.runtime();
    let mut last_key = 0xffff_ffffu32.runtime();
    let mut last_id = 0u32.runtime();
    #[unroll]
    for choice in 0..per_token {
        let mut best_key = 0u32.runtime();
        let mut best_id = 0xffff_ffffu32.runtime();
        let mut id = UNIT_POS_X;
        while (id as usize) < experts {
            let key = key(f32::cast_from(logits[first + id as usize]));
            let is_left =
                comptime!(choice == 0) || key < last_key || (key == last_key && id > last_id);
            // Of equal ones a lane sees the lower number first.
            if is_left && (best_id == 0xffff_ffffu32 || key > best_key) {
                best_key = key;
                best_id = id;
            }
            id += CUBE_DIM_X;
        }
        if comptime!(blueprint.planes) {
            let key = plane_max(best_key);
            best_id = plane_min(select(best_key == key, best_id, 0xffff_ffffu32));
            best_key = key;
        }
        if comptime!(choice == 0) {
            highest = best_key;
        }
        last_key = best_key;
        last_id = best_id;
        let power = f32::exp(value_of(best_key) - value_of(highest));
        powers[choice] = power;
        sum += power;
        if token < tokens && UNIT_POS_X == 0 {
            ids[token * per_token + choice] = I::cast_from(best_id);
        }
    }
    if comptime!(!blueprint.normalised) {
        sum = 0.0f32;
        let mut id = UNIT_POS_X as usize;
        while id < experts {
            let score = f32::cast_from(logits[first + id]);
            sum += f32::exp(score - value_of(highest));
            id += CUBE_DIM_X as usize;
        }
        if comptime!(blueprint.planes) {
            sum = plane_sum(sum);
        }
    }
    if token < tokens && UNIT_POS_X == 0 {
        let finite = highest > MINUS_INFINITE && highest < INFINITE;
        // Not a constant: WGSL has no literal for it.
        let nan = f32::reinterpret(comptime!(f32::NAN.to_bits()) ^ zero);
        #[unroll]
        for choice in 0..per_token {
            let weight = powers[choice] / sum;
            weights[token * per_token + choice] = select(finite, weight, nan);
        }
    }
}
