//! `delta`: what the softmax's gradient subtracts.

use cubecl::prelude::*;

use super::{AttentionView, TokenStrides};

/// The sum of `output * grad` over each head of a query.
///
/// - `output`, `grad`: `[batch, queries, heads, head_dim]`, with these strides in vectors of `N`; `delta`:
///   `[batch, heads, queries]`.
/// - A unit a sum, counted along `[batch, queries, heads]`.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn attention_delta_kernel<F: Float, N: Size>(
    output: &[Vector<F, N>],
    grad: &[Vector<F, N>],
    delta: &mut [f32],
    output_strides: TokenStrides,
    grad_strides: TokenStrides,
    view: AttentionView,
    #[comptime] head_dim: usize,
    #[define(F)] _dtype: ElemType,
) {
    let vector = N::value().comptime();
    let heads = view.kv_heads * view.group;
    let head = ABSOLUTE_POS % heads;
    let query = ABSOLUTE_POS / heads % view.queries;
    let batch = ABSOLUTE_POS / heads / view.queries;
    if batch < view.batch {
        let output_start = output_strides.start(batch, query, head);
        let grad_start = grad_strides.start(batch, query, head);
        let mut sums = Vector::<f32, N>::new(0.0f32);
        for i in 0..comptime!(head_dim / vector) {
            let values = Vector::<f32, N>::cast_from(output[output_start + i]);
            sums += values * Vector::<f32, N>::cast_from(grad[grad_start + i]);
        }
        let mut sum = 0.0f32;
        #[unroll]
        for e in 0..vector {
            sum += sums.extract(e);
        }
        delta[(batch * heads + head) * view.queries + query] = sum;
    }
}
