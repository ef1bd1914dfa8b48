//! `gated`: the activation of a gate times what it opens.

use cubecl::prelude::*;

use super::sums::{activated, opened};
use crate::activation::Activation;

/// `activation(gate) up` of each element. The activation is computed in f32 and rounded before it is
/// multiplied, as when each is an operation.
///
/// - `gate`, `up`, `out`: of the same length; a unit has a vector
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn gated_kernel<F: Float, N: Size>(
    gate: &[Vector<F, N>],
    up: &[Vector<F, N>],
    out: &mut [Vector<F, N>],
    vectors: usize,
    #[comptime] activation: Activation,
    #[define(F)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= vectors {
        terminate!();
    }
    let x = Vector::<f32, N>::cast_from(gate[i]);
    let up = Vector::<f32, N>::cast_from(up[i]);
    let mut y = Vector::<f32, N>::new(0.0f32);
    let mut factor = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for e in 0..N::value().comptime() {
        y.insert(e, activated(x.extract(e), activation));
        factor.insert(e, opened(up.extract(e), activation));
    }
    let y = Vector::<f32, N>::cast_from(Vector::<F, N>::cast_from(y));
    out[i] = Vector::cast_from(y * factor);
}

/// The gradients of `gate` and `up`, in f32 inside.
///
/// - `gate`, `up`, `grad`, `d_gate`, `d_up`: of the same length; a unit has a vector
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn gated_backward_kernel<F: Float, N: Size>(
    gate: &[Vector<F, N>],
    up: &[Vector<F, N>],
    grad: &[Vector<F, N>],
    d_gate: &mut [Vector<F, N>],
    d_up: &mut [Vector<F, N>],
    vectors: usize,
    #[comptime] activation: Activation,
    #[define(F)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= vectors {
        terminate!();
    }
    let x = Vector::<f32, N>::cast_from(gate[i]);
    let grad = Vector::<f32, N>::cast_from(grad[i]);
    let up = Vector::<f32, N>::cast_from(up[i]);
    let mut y = Vector::<f32, N>::new(0.0f32);
    let mut slope = Vector::<f32, N>::new(0.0f32);
    let mut factor = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for e in 0..N::value().comptime() {
        let passes = passes(up.extract(e), activation);
        y.insert(e, activated(x.extract(e), activation) * passes);
        slope.insert(e, slope_of(x.extract(e), activation));
        factor.insert(e, opened(up.extract(e), activation));
    }
    d_gate[i] = Vector::cast_from(grad * factor * slope);
    d_up[i] = Vector::cast_from(grad * y);
}

/// The derivative of an activation.
#[cube]
fn slope_of(x: f32, #[comptime] activation: Activation) -> f32 {
    match comptime!(activation) {
        Activation::Silu => {
            let sigmoid = 1.0f32 / (1.0f32 + f32::exp(-x));
            sigmoid * (1.0f32 + x * (1.0f32 - sigmoid))
        }
        Activation::GeluTanh => {
            // sqrt(2 / pi)
            let factor = 0.797_884_6f32;
            let cubic = 0.044_715f32 * x * x;
            let tanh = f32::tanh(factor * x * (1.0f32 + cubic));
            let inner = factor * (1.0f32 + 3.0f32 * cubic);
            0.5f32 * (1.0f32 + tanh) + 0.5f32 * x * (1.0f32 - tanh * tanh) * inner
        }
        Activation::ClampedSwiglu => {
            let alpha = comptime!(Activation::SWIGLU_ALPHA);
            let sigmoid = 1.0f32 / (1.0f32 + f32::exp(-(alpha * x)));
            let slope = sigmoid * (1.0f32 + alpha * x * (1.0f32 - sigmoid));
            select(x <= comptime!(Activation::SWIGLU_LIMIT), slope, 0.0f32)
        }
    }
}

/// The derivative of what the activation is multiplied with: one, or zero beyond a limit.
#[cube]
fn passes(up: f32, #[comptime] activation: Activation) -> f32 {
    match comptime!(activation) {
        Activation::Silu | Activation::GeluTanh => 1.0f32.runtime(),
        Activation::ClampedSwiglu => {
            let is_inside = f32::abs(up) <= comptime!(Activation::SWIGLU_LIMIT);
            select(is_inside, 1.0f32, 0.0f32)
        }
    }
}
