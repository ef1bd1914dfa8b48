//! The activation of a gate times what it opens, and its gradients.

use rayon::prelude::*;

use super::Simd;
#[cfg(target_arch = "x86_64")]
use super::attention::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::attention::avx512::Avx512;
use super::attention::portable::Portable;
use super::attention::vector::Vector;
use super::float_matmul::load;
use crate::activation::Activation;
use crate::format::FloatElement;

/// Elements of a task.
const TASK_ELEMS: usize = 1 << 14;

/// Elements that are computed at a time, a multiple of all lanes.
const BLOCK: usize = 64;

/// `activation(gate) up`. The activation, and what it opens, are rounded to the type before they are
/// multiplied.
///
/// # Shapes
/// - `gate`, `up`: as many elements, and so the result
pub(crate) fn gated<T: FloatElement>(
    simd: Simd,
    gate: &[T],
    up: &[T],
    activation: Activation,
) -> Vec<T> {
    let Kernels { forward, .. } = kernels(simd);
    let mut out = vec![T::zeroed(); gate.len()];
    let tasks = out.par_chunks_mut(TASK_ELEMS);
    let tasks = tasks.zip(gate.par_chunks(TASK_ELEMS).zip(up.par_chunks(TASK_ELEMS)));
    // SAFETY: the processor has the instructions of the kernels, as was checked.
    tasks.for_each(|(out, (gate, up))| unsafe { forward([gate, up], activation, out) });
    out
}

/// The gradients of the gate and of what it opens.
///
/// # Shapes
/// - `gate`, `up`, `grad`: as many elements, and so the results
pub(crate) fn gated_backward<T: FloatElement>(
    simd: Simd,
    [gate, up]: [&[T]; 2],
    grad: &[T],
    activation: Activation,
) -> [Vec<T>; 2] {
    let Kernels { backward, .. } = kernels(simd);
    let mut of_gate = vec![T::zeroed(); gate.len()];
    let mut of_up = of_gate.clone();
    let out = of_gate.par_chunks_mut(TASK_ELEMS);
    let out = out.zip(of_up.par_chunks_mut(TASK_ELEMS));
    let operands = gate.par_chunks(TASK_ELEMS).zip(up.par_chunks(TASK_ELEMS));
    let operands = operands.zip(grad.par_chunks(TASK_ELEMS));
    out.zip(operands)
        .for_each(|((of_gate, of_up), ((gate, up), grad))| {
            // SAFETY: the processor has the instructions of the kernels, as was checked.
            unsafe { backward([gate, up, grad], activation, [of_gate, of_up]) }
        });
    [of_gate, of_up]
}

/// Of gate and what it opens.
///
/// # Safety
/// The processor must have the instructions that it uses.
type Forward<T> = unsafe fn([&[T]; 2], Activation, &mut [T]);

/// Of these and the gradient of the result.
///
/// # Safety
/// As [`Forward`].
type Backward<T> = unsafe fn([&[T]; 3], Activation, [&mut [T]; 2]);

struct Kernels<T> {
    forward: Forward<T>,
    backward: Backward<T>,
}

/// # Panics
/// If this processor does not have `simd`.
fn kernels<T: FloatElement>(simd: Simd) -> Kernels<T> {
    simd.assert_available();
    match simd {
        Simd::Portable => Kernels {
            forward: forward::<T, Portable>,
            backward: backward::<T, Portable>,
        },
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => Kernels {
            forward: avx2_forward::<T>,
            backward: avx2_backward::<T>,
        },
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 | Simd::Avx512Bf16 => Kernels {
            forward: avx512_forward::<T>,
            backward: avx512_backward::<T>,
        },
        #[cfg(not(target_arch = "x86_64"))]
        Simd::Avx2 | Simd::Avx512 | Simd::Avx512Bf16 => unreachable!("not available"),
    }
}

macro_rules! with_features {
    ($features:literal, $vector:ty, $forward:ident, $backward:ident) => {
        /// # Safety
        /// The processor must have these features.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        unsafe fn $forward<T: FloatElement>(
            operands: [&[T]; 2],
            activation: Activation,
            out: &mut [T],
        ) {
            // SAFETY: this function has the features.
            unsafe { forward::<T, $vector>(operands, activation, out) }
        }

        /// # Safety
        /// The processor must have these features.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        unsafe fn $backward<T: FloatElement>(
            operands: [&[T]; 3],
            activation: Activation,
            out: [&mut [T]; 2],
        ) {
            // SAFETY: this function has the features.
            unsafe { backward::<T, $vector>(operands, activation, out) }
        }
    };
}

with_features!("avx2,f16c,fma", Avx2, avx2_forward, avx2_backward);
with_features!(
    "avx512f,avx512bw,avx512vl",
    Avx512,
    avx512_forward,
    avx512_backward
);

/// # Safety
/// The processor must have the instructions of `V`.
#[inline(always)]
unsafe fn forward<T: FloatElement, V: Vector>(
    [gate, up]: [&[T]; 2],
    activation: Activation,
    out: &mut [T],
) {
    let (mut of_gate, mut of_up) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
    let parts = gate.chunks(BLOCK).zip(up.chunks(BLOCK));
    for (out, (gate, up)) in out.chunks_mut(BLOCK).zip(parts) {
        // SAFETY: as the caller vouches; blocks have a whole number of vectors.
        unsafe {
            widen::<T, V>(gate, &mut of_gate);
            widen::<T, V>(up, &mut of_up);
            if activation == Activation::ClampedSwiGlu {
                cut(&mut of_gate, &mut of_up);
                round::<T>(&mut of_up);
            }
            for at in (0..BLOCK).step_by(V::LANES) {
                let at = of_gate.as_mut_ptr().add(at);
                activated(V::load(at), activation).value.store(at);
            }
        }
        round::<T>(&mut of_gate);
        for (out, (gate, up)) in out.iter_mut().zip(of_gate.iter().zip(&of_up)) {
            *out = T::from_f32(gate * up);
        }
    }
}

/// # Safety
/// The processor must have the instructions of `V`.
#[inline(always)]
unsafe fn backward<T: FloatElement, V: Vector>(
    [gate, up, grad]: [&[T]; 3],
    activation: Activation,
    [to_gate, to_up]: [&mut [T]; 2],
) {
    let [mut of_gate, mut of_up, mut of_grad, mut slopes] = [[0.0f32; BLOCK]; 4];
    let parts = gate.chunks(BLOCK).zip(up.chunks(BLOCK));
    let parts = parts.zip(grad.chunks(BLOCK));
    let to = to_gate.chunks_mut(BLOCK).zip(to_up.chunks_mut(BLOCK));
    for ((to_gate, to_up), ((gate, up), grad)) in to.zip(parts) {
        // SAFETY: as the caller vouches; blocks have a whole number of vectors.
        unsafe {
            widen::<T, V>(gate, &mut of_gate);
            widen::<T, V>(up, &mut of_up);
            widen::<T, V>(grad, &mut of_grad);
            if activation == Activation::ClampedSwiGlu {
                cut(&mut of_gate, &mut of_up);
            }
            for at in (0..BLOCK).step_by(V::LANES) {
                let gate = of_gate.as_mut_ptr().add(at);
                let activated = activated(V::load(gate), activation);
                activated.value.store(gate);
                let along = V::load(of_grad.as_ptr().add(at)).mul(V::load(of_up.as_ptr().add(at)));
                along
                    .mul(activated.slope)
                    .store(slopes.as_mut_ptr().add(at));
            }
        }
        round::<T>(&mut of_gate);
        for (to, &slope) in to_gate.iter_mut().zip(&slopes) {
            *to = T::from_f32(slope);
        }
        for (to, (grad, gate)) in to_up.iter_mut().zip(of_grad.iter().zip(&of_gate)) {
            *to = T::from_f32(grad * gate);
        }
        if activation == Activation::ClampedSwiGlu {
            let is_above = |x: f32| x > Activation::LIMIT;
            zero_where(to_gate, gate, is_above);
            zero_where(to_up, up, |x| is_above(x.abs()));
        }
    }
}

/// Cuts the operands of the clamped SwiGLU, and adds one to what the gate opens. A NaN stays one.
#[inline(always)]
fn cut(gate: &mut [f32; BLOCK], up: &mut [f32; BLOCK]) {
    const LIMIT: f32 = Activation::LIMIT;
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = if *gate > LIMIT { LIMIT } else { *gate };
        *up = up.clamp(-LIMIT, LIMIT) + 1.0;
    }
}

/// Zeros for gradients of numbers that were cut.
#[inline(always)]
fn zero_where<T: FloatElement>(gradients: &mut [T], numbers: &[T], is_cut: impl Fn(f32) -> bool) {
    for (gradient, number) in gradients.iter_mut().zip(numbers) {
        if is_cut(number.to_f32()) {
            *gradient = T::zeroed();
        }
    }
}

/// Numbers in f32, zeros behind them.
///
/// # Safety
/// The processor must have the instructions of `V`.
#[inline(always)]
unsafe fn widen<T: FloatElement, V: Vector>(from: &[T], to: &mut [f32; BLOCK]) {
    if from.len() == BLOCK {
        for at in (0..BLOCK).step_by(V::LANES) {
            // SAFETY: as the caller vouches; both have a vector there.
            unsafe { load::<T, V>(from.as_ptr().add(at)).store(to.as_mut_ptr().add(at)) };
        }
        return;
    }
    to.fill(0.0);
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.to_f32();
    }
}

fn round<T: FloatElement>(values: &mut [f32]) {
    for value in values {
        *value = T::from_f32(*value).to_f32();
    }
}

/// The activation of numbers, and its slope there.
struct Activated<V> {
    value: V,
    slope: V,
}

/// # Safety
/// The processor must have the instructions of `V`.
#[inline(always)]
unsafe fn activated<V: Vector>(x: V, activation: Activation) -> Activated<V> {
    // SAFETY: as the caller vouches.
    unsafe {
        let one = V::splat(1.0);
        // All are x sigmoid(u), where u of GELU is twice what the tangent is of.
        let (u, slope_of_u) = match activation {
            Activation::Silu => (x, one),
            Activation::ClampedSwiGlu => {
                let alpha = V::splat(Activation::ALPHA);
                (x.mul(alpha), alpha)
            }
            Activation::GeluTanh => {
                const CUBIC: f32 = 0.044_715;
                const FACTOR: f32 =
                    2.0 * std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;
                let (square, factor) = (x.mul(x), V::splat(FACTOR));
                let u = square.mul_add(V::splat(CUBIC), one).mul(x).mul(factor);
                let slope = square.mul_add(V::splat(3.0 * CUBIC), one).mul(factor);
                (u, slope)
            }
        };
        let power = u.mul(V::splat(-std::f32::consts::LOG2_E)).exp2();
        let sigmoid = one.div(one.add(power));
        let value = x.mul(sigmoid);
        let along = value.mul(one.sub(sigmoid));
        Activated {
            value,
            slope: along.mul_add(slope_of_u, sigmoid),
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// The formula in f64.
    fn expected(x: f64, activation: Activation) -> f64 {
        match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::GeluTanh => {
                let root = (2.0 / std::f64::consts::PI).sqrt();
                0.5 * x * (1.0 + (root * (x + 0.044_715 * x * x * x)).tanh())
            }
            Activation::ClampedSwiGlu => {
                let x = x.min(7.0);
                x / (1.0 + (-1.702 * x).exp())
            }
        }
    }

    fn opened(x: f64, activation: Activation) -> f64 {
        match activation {
            Activation::ClampedSwiGlu => x.clamp(-7.0, 7.0) + 1.0,
            _ => x,
        }
    }

    /// Whatever instructions there are, in numbers that end in the midst of a vector and of a block.
    #[rstest]
    fn all_instructions_compute_the_formula_and_its_slope(
        #[values(Simd::Portable, Simd::Avx2, Simd::Avx512)] simd: Simd,
        #[values(1, 64, 203)] count: usize,
        #[values(Activation::Silu, Activation::GeluTanh, Activation::ClampedSwiGlu)]
        activation: Activation,
    ) {
        if !simd.is_available() {
            return;
        }
        let numbers = |factor: usize, scale: f32| -> Vec<f32> {
            let number = |i: usize| ((i * factor + 1) % 97) as f32 / 48.0 - 1.0;
            (0..count).map(|i| number(i) * scale).collect()
        };
        // No number is where one of them bends.
        let (gate, up, grad) = (numbers(31, 11.9), numbers(17, 9.1), numbers(59, 2.0));
        let y = gated(simd, &gate, &up, activation);
        let [of_gate, of_up] = gated_backward(simd, [&gate, &up], &grad, activation);
        for i in 0..count {
            let [x, up, grad] = [gate[i], up[i], grad[i]].map(f64::from);
            let value = expected(x, activation);
            let slope_of = |f: fn(f64, Activation) -> f64, x| {
                (f(x + 1e-4, activation) - f(x - 1e-4, activation)) / 2e-4
            };
            let (slope, opened_slope) = (slope_of(expected, x), slope_of(opened, up));
            let up = opened(up, activation);
            for (what, given, expected) in [
                ("y", y[i], value * up),
                ("gradient of the gate", of_gate[i], grad * up * slope),
                (
                    "gradient of what it opens",
                    of_up[i],
                    grad * value * opened_slope,
                ),
            ] {
                let difference = (f64::from(given) - expected).abs();
                let tolerance = 4e-6 * expected.abs().max(1.0);
                assert!(difference < tolerance, "{what} at {x}: {given} {expected}");
            }
        }
    }
}
