//! Norms and rotations of rows.

use rayon::prelude::*;

use crate::format::FloatElement;
use crate::norm_form::NormForm;

/// Elements of a task.
const TASK_ELEMS: usize = 1 << 15;

/// How rows are normalised.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RmsNorm {
    /// Elements of a row.
    pub size: usize,
    /// Added to the mean of the squares.
    pub eps: f64,
    /// How the weight is applied.
    pub form: NormForm,
}

/// `x / rms(x) * weight` of each row, in f32 inside.
///
/// # Shapes
/// - `x`: `[rows, size]`, and so the result; `weight`: `[size]`
pub(crate) fn rms_norm<T: FloatElement>(x: &[T], weight: &[T], norm: RmsNorm) -> Vec<T> {
    let size = norm.size;
    let mut out = vec![T::zeroed(); x.len()];
    let rows = out.par_chunks_mut(size).zip(x.par_chunks(size));
    rows.with_min_len(TASK_ELEMS.div_ceil(size))
        .for_each(|(out, x)| {
            let mean = sum(x, x, |x, again| x.to_f32() * again.to_f32()) / size as f32;
            let scale = 1.0 / (mean + norm.eps as f32).sqrt();
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                let (x, weight) = (x.to_f32() * scale, weight.to_f32());
                *out = match norm.form {
                    NormForm::CastThenWeight => T::from_f32(T::from_f32(x).to_f32() * weight),
                    NormForm::WeightThenCast => T::from_f32(x * weight),
                    NormForm::OnePlusWeight => T::from_f32(x * (1.0 + weight)),
                };
            }
        });
    out
}

/// The sum of a function of the elements of two rows, in parts that add up side by side.
#[inline(always)]
fn sum<A: Copy, B: Copy>(a: &[A], b: &[B], term: impl Fn(A, B) -> f32) -> f32 {
    let mut sums = [0.0f32; 16];
    for (a, b) in a.chunks(sums.len()).zip(b.chunks(sums.len())) {
        for (sum, (&a, &b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += term(a, b);
        }
    }
    sums.iter().sum()
}

/// The gradient of `x` in [`rms_norm`], and `residual` added to it, in f32 inside. With `n` the normalised row, `w`
/// the factors and `s` the scale: `s (g w - n mean(g w n))`.
///
/// # Shapes
/// - `x`, `grad`, `residual`: `[rows, size]`, and so the result; `weight`: `[size]`
pub(crate) fn rms_norm_backward<T: FloatElement>(
    x: &[T],
    weight: &[T],
    grad: &[T],
    residual: Option<&[T]>,
    norm: RmsNorm,
) -> Vec<T> {
    let size = norm.size;
    let one = match norm.form {
        NormForm::OnePlusWeight => 1.0,
        NormForm::CastThenWeight | NormForm::WeightThenCast => 0.0,
    };
    let factors: Vec<f32> = weight.iter().map(|weight| weight.to_f32() + one).collect();
    let mut out = vec![T::zeroed(); x.len()];
    let rows = out.par_chunks_mut(size).enumerate();
    rows.with_min_len(TASK_ELEMS.div_ceil(size))
        .for_each(|(row, out)| {
            let row = row * size..(row + 1) * size;
            let (x, grad) = (&x[row.clone()], &grad[row.clone()]);
            let mean = sum(x, x, |x, again| x.to_f32() * again.to_f32()) / size as f32;
            let scale = 1.0 / (mean + norm.eps as f32).sqrt();
            let mut weighted = vec![0.0; size];
            for (weighted, (grad, factor)) in weighted.iter_mut().zip(grad.iter().zip(&factors)) {
                *weighted = grad.to_f32() * factor;
            }
            let along = sum(&weighted, x, |weighted, x| weighted * (x.to_f32() * scale));
            let along = along / size as f32;
            for ((out, x), weighted) in out.iter_mut().zip(x).zip(&weighted) {
                *out = T::from_f32((weighted - x.to_f32() * scale * along) * scale);
            }
            if let Some(residual) = residual {
                for (out, residual) in out.iter_mut().zip(&residual[row]) {
                    *out = T::from_f32(out.to_f32() + residual.to_f32());
                }
            }
        });
    out
}

/// The sizes of a rotation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rotation {
    /// Tokens of a row of the batch.
    pub tokens: usize,
    /// Heads of a token.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Those that are rotated, the first ones.
    pub rotary_dim: usize,
    /// Rows of the tables: one, or as many as the batch has.
    pub table_rows: usize,
    /// Whether the rotation is undone.
    pub inverse: bool,
}

/// `x cos + swap_halves(x) sin` of the first elements of each head, in the type of the tables, and the others as
/// they are.
///
/// # Shapes
/// - `x`: `[batch, tokens, heads, head_dim]`, and so the result
/// - `cos`, `sin`: `[table_rows, tokens, rotary_dim]`
pub(crate) fn rotate<T: FloatElement, D: FloatElement>(
    x: &[T],
    cos: &[D],
    sin: &[D],
    rotation: Rotation,
) -> Vec<T> {
    let Rotation {
        tokens,
        heads,
        head_dim,
        rotary_dim,
        table_rows,
        inverse,
    } = rotation;
    let (half, size) = (rotary_dim / 2, heads * head_dim);
    let mut out = x.to_vec();
    let positions = out.par_chunks_mut(size).zip(x.par_chunks(size)).enumerate();
    let positions = positions.with_min_len(TASK_ELEMS.div_ceil(size));
    positions.for_each(|(position, (out, x))| {
        let row = if table_rows == 1 {
            position % tokens
        } else {
            position
        };
        let [cos, sin] = [cos, sin].map(|table| &table[row * rotary_dim..][..rotary_dim]);
        for (out, x) in out.chunks_exact_mut(head_dim).zip(x.chunks_exact(head_dim)) {
            for (at, out) in out[..rotary_dim].iter_mut().enumerate() {
                let other = if at < half { at + half } else { at - half };
                let sin = if inverse { sin[other] } else { sin[at] };
                let [x, swapped] = [x[at], x[other]].map(|x| D::from_f32(x.to_f32()).to_f32());
                let along = D::from_f32(x * cos[at].to_f32());
                let across = D::from_f32(swapped * sin.to_f32());
                let sum = D::from_f32(along.to_f32() + across.to_f32());
                *out = T::from_f32(sum.to_f32());
            }
        }
    });
    out
}
