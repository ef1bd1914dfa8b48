//! The experts of tokens, and their weights.

use super::sample::{key, value};
use crate::format::FloatElement;
use crate::routing::RouteForm;

/// The experts with the highest scores of each token and their weights, as the kernel `route` chooses them.
///
/// # Shapes
/// - `logits`: `[tokens, experts]`
/// - returns `[tokens, per_token]` each; `per_token` is at most the number of experts
pub(crate) fn route<T: FloatElement>(
    logits: &[T],
    experts: usize,
    per_token: usize,
    form: RouteForm,
) -> (Vec<usize>, Vec<f32>) {
    let entries = logits.len() / experts * per_token;
    let (mut ids, mut weights) = (Vec::with_capacity(entries), Vec::with_capacity(entries));
    let mut order: Vec<usize> = Vec::with_capacity(experts);
    for row in logits.chunks_exact(experts) {
        let scores: Vec<f32> = row.iter().map(|score| score.to_f32()).collect();
        let keys: Vec<u32> = scores.iter().map(|&score| key(score)).collect();
        order.clear();
        order.extend(0..experts);
        order.sort_unstable_by_key(|&id| (std::cmp::Reverse(keys[id]), id));
        order.truncate(per_token);
        let highest = value(keys[order[0]]);
        let power = |id: usize| (scores[id] - highest).exp();
        let sum: f32 = match form.is_normalised() {
            true => order.iter().map(|&id| power(id)).sum(),
            false => (0..experts).map(power).sum(),
        };
        let weight = |&id: &usize| match highest.is_finite() {
            true => power(id) / sum,
            false => f32::NAN,
        };
        weights.extend(order.iter().map(weight));
        ids.extend_from_slice(&order);
    }
    (ids, weights)
}
