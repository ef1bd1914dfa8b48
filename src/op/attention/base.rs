//! Attention as Burn's dispatch sees it.
//!
//! At this level queries, keys and values are token-major, `[batch, tokens, heads, head_dim]`, the order in
//! which projections give them. Inputs may have any strides; results are contiguous.
//!
//! Arguments are validated by the functions over [`Tensor`](burn::tensor::Tensor) in front; in here an
//! impossible call is a bug and panics.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata, backend_extension, get_device_settings};
use burn::tensor::{DType, Shape};

use crate::format::FloatType;

/// The sizes and constants of an attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// Rows of the batch.
    pub batch: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values; divides `heads`.
    pub kv_heads: usize,
    /// Queries of a row and head.
    pub queries: usize,
    /// Keys of a row and head.
    pub keys: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// The factor of scores.
    pub scale: f32,
    /// `c` of `c tanh(score / c)`, if scores are capped.
    pub softcap: Option<f32>,
    /// Type of all tensors but the log-sum-exp, which is f32.
    pub dtype: FloatType,
}

impl AttentionSpec {
    /// Shape of queries and of the output.
    pub fn query_shape(&self) -> Shape {
        Shape::from([self.batch, self.queries, self.heads, self.head_dim])
    }

    /// Shape of keys, and of values.
    pub fn key_shape(&self) -> Shape {
        Shape::from([self.batch, self.keys, self.kv_heads, self.head_dim])
    }

    /// Shape of the log-sum-exp.
    pub fn lse_shape(&self) -> Shape {
        Shape::from([self.batch, self.heads, self.queries])
    }
}

#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;

/// Attention of a backend.
///
/// Implemented for the CubeCL runtimes, for Flex, and over them for Fusion and Autodiff.
#[backend_extension(
    Autodiff,
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Fusion: cfg(feature = "fusion"),
)]
pub trait AttentionBackend: Backend {
    /// `softmax(scale q kᵀ) v` over the keys that each query sees, and the logarithm of the softmax's
    /// denominator.
    ///
    /// # Shapes
    /// - `q`: [`AttentionSpec::query_shape`]; `k`, `v`: [`AttentionSpec::key_shape`]
    /// - `ranges`: `[batch or 1, queries, 2]`, i32: the first key that a query sees, and the one past the
    ///   last; neither decreases from one query of a row to the next; no keys give zeros, and `-inf`
    /// - returns the output, of the shape of `q`, and the log-sum-exp, [`AttentionSpec::lse_shape`], f32,
    ///   through which no gradient flows
    #[fusion(meta = |q: &TensorSpec, _k: &TensorSpec, _v: &TensorSpec, _ranges: &TensorSpec, spec: &AttentionSpec| {
        (
            TensorSpec::new(spec.query_shape(), q.dtype),
            TensorSpec::new(spec.lse_shape(), DType::F32),
        )
    })]
    fn attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        spec: AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// The gradients of [`attention_forward`](Self::attention_forward) for `q`, `k` and `v`.
    ///
    /// # Shapes
    /// - `output`, `lse`: what the forward pass returned; with sinks, what became of it
    /// - `grad`: the gradient of the output, of its shape
    /// - returns the gradients, of the shapes of `q`, `k` and `v`
    #[fusion(meta = |q: &TensorSpec, _k: &TensorSpec, _v: &TensorSpec, _ranges: &TensorSpec, _output: &TensorSpec, _lse: &TensorSpec, _grad: &TensorSpec, spec: &AttentionSpec| {
        let of_keys = TensorSpec::new(spec.key_shape(), q.dtype);
        (TensorSpec::new(spec.query_shape(), q.dtype), of_keys.clone(), of_keys)
    })]
    #[allow(clippy::too_many_arguments)]
    fn attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        output: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// [`attention_forward`](Self::attention_forward) with one more score for each query, that of its
    /// head's sink, which takes its part of the softmax and has no value.
    ///
    /// # Shapes
    /// - `sinks`: `[heads]`, f32
    #[fusion(default)]
    fn attention_sinks(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        sinks: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (output, lse) = Self::attention_forward(q, k, v, ranges, spec);
        add_sinks::<Self>(output, lse, sinks, spec)
    }
}

/// A tensor with one number for each head, as one of the shape of the log-sum-exp.
pub(in crate::op) fn of_heads<B: Backend>(
    sinks: FloatTensor<B>,
    spec: AttentionSpec,
) -> FloatTensor<B> {
    let sinks = B::float_reshape(sinks, Shape::from([1, spec.heads, 1]));
    B::float_expand(sinks, spec.lse_shape())
}

/// A tensor of the shape of the log-sum-exp as one that multiplies the output.
fn of_output<B: Backend>(numbers: FloatTensor<B>, spec: AttentionSpec) -> FloatTensor<B> {
    let numbers = B::float_swap_dims(numbers, 1, 2);
    let [batch, queries, heads] = [spec.batch, spec.queries, spec.heads];
    let numbers = B::float_reshape(numbers, Shape::from([batch, queries, heads, 1]));
    B::float_expand(numbers, spec.query_shape())
}

/// Numbers of which there is every difference: infinities are replaced by the largest numbers.
pub(in crate::op) fn finite<B: Backend>(numbers: FloatTensor<B>) -> FloatTensor<B> {
    B::float_clamp(numbers, f32::MIN.into(), f32::MAX.into())
}

/// What output and log-sum-exp become with a sink: the one is `sigmoid(lse - sink)` of what it was, the
/// other `log(exp(lse) + exp(sink))`. A sink of `-inf` changes neither.
fn add_sinks<B: Backend>(
    output: FloatTensor<B>,
    lse: FloatTensor<B>,
    sinks: FloatTensor<B>,
    spec: AttentionSpec,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let sinks = of_heads::<B>(sinks, spec);
    let above = B::float_sub(finite::<B>(lse.clone()), finite::<B>(sinks.clone()));
    let part = of_output::<B>(B::sigmoid(above.clone()), spec);
    let dtype = output.dtype();
    let output = B::float_mul(B::float_cast(output, DType::F32.into()), part);
    let output = B::float_cast(output, dtype.into());
    let rest = B::float_log1p(B::float_exp(B::float_neg(B::float_abs(above))));
    // Neither by adding a difference to one of them: it rounds to the digits of the other.
    let bools = get_device_settings::<B>(&lse.device()).bool_dtype;
    let is_below = B::float_lower(lse.clone(), sinks.clone(), bools);
    let larger = B::float_mask_where(lse, is_below, sinks);
    (output, B::float_add(larger, rest))
}
