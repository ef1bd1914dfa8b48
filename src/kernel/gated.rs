//! `gated`: the activation of a gate times what it opens.

use cubecl::prelude::*;

use super::sums::activated;
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
    let mut y = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for e in 0..N::value().comptime() {
        y.insert(e, activated(x.extract(e), activation));
    }
    let y = Vector::<f32, N>::cast_from(Vector::<F, N>::cast_from(y));
    out[i] = Vector::cast_from(y * Vector::cast_from(up[i]));
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
    let mut y = Vector::<f32, N>::new(0.0f32);
    let mut slope = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for e in 0..N::value().comptime() {
        y.insert(e, activated(x.extract(e), activation));
        slope.insert(e, slope_of(x.extract(e), activation));
    }
    d_gate[i] = Vector::cast_from(grad * Vector::cast_from(up[i]) * slope);
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
    }
}
