//! Multiplication by numbers of a config, and soft caps.

use burn::tensor::{DType, Tensor, bf16, f16};

/// The factor of the embeddings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum EmbeddingScale {
    /// The number itself, as in Granite.
    Exact(f64),
    /// The number rounded to the type of the model, as in Gemma.
    Rounded(f64),
}

impl EmbeddingScale {
    /// The embeddings of a model, scaled.
    ///
    /// # Shapes
    /// - `x`: any, and so the result
    pub fn apply<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        let dtype = x.dtype();
        match self {
            Self::Exact(factor) => scaled(x, factor),
            Self::Rounded(factor) => scaled(x, round_to(factor, dtype)),
        }
    }
}

fn round_to(factor: f64, dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => bf16::from_f64(factor).to_f64(),
        DType::F16 => f16::from_f64(factor).to_f64(),
        _ => f64::from(factor as f32),
    }
}

/// `factor x`, rounded once: Burn would round the factor to the type of `x` too.
pub(super) fn scaled<const D: usize>(x: Tensor<D>, factor: f64) -> Tensor<D> {
    if factor == 1.0 {
        return x;
    }
    let dtype = x.dtype();
    (x.cast(DType::F32) * factor).cast(dtype)
}

/// `cap tanh(x / cap)`, if there is a cap, in f32 inside.
pub(super) fn soft_capped<const D: usize>(x: Tensor<D>, cap: Option<f64>) -> Tensor<D> {
    let Some(cap) = cap else {
        return x;
    };
    let dtype = x.dtype();
    ((x.cast(DType::F32) / cap).tanh() * cap).cast(dtype)
}
