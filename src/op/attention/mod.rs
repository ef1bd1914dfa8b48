//! Attention that never holds its scores.

mod base;
mod ranges;

pub use base::{AttentionBackend, AttentionSpec};
pub(super) use base::{finite, of_heads};
pub use ranges::{AttentionMask, KeyRanges};

use std::ops::RangeInclusive;

use burn::backend::Dispatch;
use burn::tensor::{DType, Shape, Tensor};

use super::tensor::{check_device, check_dtype, connect_empty, tracked_zero};
use crate::error::Nf4Error;
use crate::format::{FloatType, check_shape};

/// The most elements that a head may have.
pub const MAX_HEAD_DIM: usize = 256;

/// The factors of scores with which nothing in a kernel overflows or comes to lie below the scores that
/// stand for hidden keys.
const SCALES: RangeInclusive<f32> = 1e-30..=1e8;

/// The caps of scores with which factors do not overflow, and the rounding of a capped score, which is that
/// of its cap, stays below that of a probability in f16.
const SOFTCAPS: RangeInclusive<f32> = 1e-4..=1e4;

/// How [`attention`] makes scores.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct AttentionOptions {
    /// The factor of scores, from 1e-30 to 1e8; `1 / sqrt(head_dim)` if none.
    pub scale: Option<f32>,
    /// `c` of `c tanh(score / c)`, in place of the score, as Gemma 2 has it: from 1e-4 to 1e4.
    pub softcap: Option<f32>,
}

impl AttentionOptions {
    /// Refuses factors that attention cannot compute with.
    ///
    /// # Errors
    /// [`Nf4Error::Config`] for one out of its range.
    pub fn check(&self) -> Result<(), Nf4Error> {
        let factors = [
            ("scale", self.scale, SCALES, "a number from 1e-30 to 1e8"),
            (
                "softcap",
                self.softcap,
                SOFTCAPS,
                "a number from 1e-4 to 1e4",
            ),
        ];
        for (field, number, range, expected) in factors {
            if let Some(number) = number
                && !range.contains(&number)
            {
                return Err(Nf4Error::Config {
                    field,
                    expected,
                    given: number.to_string(),
                });
            }
        }
        Ok(())
    }
}

/// `softmax(scale q kᵀ) v` for each head, over the keys that each query sees. Neither scores nor
/// probabilities are ever held: memory is linear in the number of tokens, in the backward pass too, which
/// computes them again.
///
/// Heads of queries share those of keys and values in groups (grouped-query attention): head `i` has the
/// keys of head `i / (heads / kv_heads)`. Sums and the softmax are in f32. A query that sees no key gets
/// zeros. The gradient flows to all tensors, and is the same from run to run on the same device. A NaN or an
/// infinity in a key or value may reach the results even where no query sees it, see [`AttentionMask`].
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_nf4::op::{AttentionMask, AttentionOptions, KeyRanges, attention};
///
/// let device = Device::default();
/// let [q, k, v] = [8, 2, 2]
///     .map(|heads| Tensor::<4>::random([1, heads, 10, 64], Distribution::Default, &device));
/// let ranges = KeyRanges::new(&AttentionMask::causal(), 10, 10, &device)?;
/// let y = attention(q, k, v, &ranges, None, AttentionOptions::default())?;
/// assert_eq!(y.dims(), [1, 8, 10, 64]);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// # Shapes
/// - `q`: `[batch, heads, queries, head_dim]`
/// - `k`, `v`: `[batch, kv_heads, keys, head_dim]`; views with gaps are read where they lie, and there may
///   be more keys than those of the ranges, as in a cache that is longer than what it holds: they are not
///   read
/// - `sinks`: `[heads]`: a score for each head that takes its part of every softmax and has no value; `-inf`
///   is no sink
/// - returns the shape of `q`
///
/// # Errors
/// [`Nf4Error::Shape`] for shapes that do not fit, [`Nf4Error::Config`] for a head of more than
/// [`MAX_HEAD_DIM`] elements, for heads that the heads of keys do not divide, and for a scale or cap out of
/// its range (see [`AttentionOptions`]), [`Nf4Error::Dtype`] unless all are of one type, f16, bf16 or f32
/// (sinks may be f32), [`Nf4Error::Device`] unless all are on one device, [`Nf4Error::ElementCount`] for
/// more elements than memory can address, as expanded tensors may have.
pub fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    ranges: &KeyRanges,
    sinks: Option<Tensor<1>>,
    options: AttentionOptions,
) -> Result<Tensor<4>, Nf4Error> {
    Ok(attention_with_lse(q, k, v, ranges, sinks, options)?.0)
}

/// [`attention`], and for each query the logarithm of the denominator of its softmax: to put attention over
/// several parts of the keys together.
///
/// # Shapes
/// - returns the output, and the log-sum-exp `[batch, heads, queries]`, f32, of a query that sees nothing
///   that of its sink alone, which is the sink, and `-inf` without one. No gradient flows through it.
///
/// # Errors
/// Those of [`attention`].
pub fn attention_with_lse(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    ranges: &KeyRanges,
    sinks: Option<Tensor<1>>,
    options: AttentionOptions,
) -> Result<(Tensor<4>, Tensor<3>), Nf4Error> {
    let spec = check(&q, &k, &v, ranges, sinks.as_ref(), options)?;
    let device = q.device();
    let sinks = sinks.map(|sinks| sinks.cast(DType::F32));
    if spec.query_shape().num_elements() == 0 || spec.keys == 0 {
        let y = Tensor::zeros(q.shape(), (&device, q.dtype()));
        let of_sinks = sinks.clone().and_then(tracked_zero);
        let zeros = [tracked_zero(q), tracked_zero(k), tracked_zero(v), of_sinks];
        let y = connect_empty(y, zeros.into_iter().flatten());
        let lse = match sinks {
            Some(sinks) => sinks.detach().reshape([1, spec.heads, 1]),
            None => Tensor::full([1, 1, 1], f32::NEG_INFINITY, (&device, DType::F32)),
        };
        return Ok((y, lse.expand(spec.lse_shape())));
    }
    let [q, k, v] = [q, k, v].map(|tensor| tensor.swap_dims(1, 2).into_dispatch());
    let ranges = ranges.tensor().clone().into_dispatch();
    let (output, lse) = match sinks {
        None => <Dispatch as AttentionBackend>::attention_forward(q, k, v, ranges, spec),
        Some(sinks) => {
            let sinks = sinks.into_dispatch();
            <Dispatch as AttentionBackend>::attention_sinks(q, k, v, ranges, sinks, spec)
        }
    };
    let output: Tensor<4> = Tensor::from_dispatch(output);
    Ok((output.swap_dims(1, 2), Tensor::from_dispatch(lse)))
}

fn check(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    ranges: &KeyRanges,
    sinks: Option<&Tensor<1>>,
    options: AttentionOptions,
) -> Result<AttentionSpec, Nf4Error> {
    let dtype = FloatType::from_dtype(q.dtype(), "q")?;
    let device = q.device();
    for (name, tensor) in [("k", k), ("v", v)] {
        check_dtype(name, tensor, "as q", &[q.dtype()])?;
        check_device(name, &tensor.device(), &device)?;
    }
    check_device("key ranges", &ranges.tensor().device(), &device)?;
    let [batch, heads, queries, head_dim] = q.dims();
    let [_, kv_heads, keys, _] = k.dims();
    check_shape("k", &[batch, kv_heads, keys, head_dim], &k.dims())?;
    check_shape("v", &k.dims(), &v.dims())?;
    let rows = if ranges.rows() == 1 { 1 } else { batch };
    let given = [ranges.rows(), ranges.queries(), ranges.keys()];
    // A cache may be longer than what it holds.
    let ranged = keys.min(ranges.keys());
    check_shape("key ranges", &[rows, queries, ranged], &given)?;
    if let Some(sinks) = sinks {
        check_dtype("sinks", sinks, "as q, or f32", &[q.dtype(), DType::F32])?;
        check_device("sinks", &sinks.device(), &device)?;
        check_shape("sinks", &[heads], &sinks.dims())?;
    }
    let config = |field, expected, given: String| {
        Err(Nf4Error::Config {
            field,
            expected,
            given,
        })
    };
    if head_dim == 0 || head_dim > MAX_HEAD_DIM {
        return config("head_dim", "1 to 256 elements", head_dim.to_string());
    }
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        let given = format!("{kv_heads} for {heads} heads of queries");
        return config("kv_heads", "a divisor of the heads of queries", given);
    }
    options.check()?;
    let scale = options.scale.unwrap_or((head_dim as f32).powf(-0.5));
    let spec = AttentionSpec {
        batch,
        heads,
        kv_heads,
        queries,
        keys,
        head_dim,
        scale,
        softcap: options.softcap,
        dtype,
    };
    let elems = |shape: Shape| {
        shape
            .iter()
            .try_fold(1usize, |all, &dim| all.checked_mul(dim))
    };
    let fits = |shape: Shape| elems(shape).is_some_and(|elems| elems <= isize::MAX as usize / 4);
    match fits(spec.query_shape()) && fits(spec.key_shape()) {
        true => Ok(spec),
        false => Err(Nf4Error::ElementCount {
            tensor: "an attention".into(),
            shape: vec![batch, heads, queries.max(keys), head_dim],
        }),
    }
}
