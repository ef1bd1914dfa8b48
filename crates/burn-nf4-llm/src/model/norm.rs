//! Root-mean-square normalisation (arXiv 1910.07467).

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};

/// How a norm applies its weight to the normalised values. The first two differ in bf16 and f16 alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormForm {
    /// The values are cast to the type of the model, then multiplied by the weight, as in Llama.
    CastThenWeight,
    /// The values are multiplied by the weight in f32, then cast, as in OLMo 2.
    WeightThenCast,
    /// The values are multiplied by one plus the weight in f32, then cast, as in Gemma.
    OnePlusWeight,
}

impl NormForm {
    /// The weight that changes nothing.
    pub fn neutral_weight(self) -> f64 {
        match self {
            Self::CastThenWeight | Self::WeightThenCast => 1.0,
            Self::OnePlusWeight => 0.0,
        }
    }
}

/// Root-mean-square normalisation, in f32 whatever the dtype of the model, as in transformers.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[size]`: a factor for each element that is normalised together.
    pub weight: Param<Tensor<1>>,
    /// Added to the mean of the squares.
    pub eps: f64,
    /// How the weight is applied.
    #[module(skip)]
    pub form: NormForm,
}

impl RmsNorm {
    /// `x / rms(x) * weight`, in f32 inside, over the last axis.
    ///
    /// # Shapes
    /// - `x`: `[.., size]`, and so the result
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let dtype = x.dtype();
        // Before the arithmetic: a reshape in the middle of it ends what Burn fuses to one kernel.
        let weight = self.weight.val().unsqueeze();
        let x = x.cast(DType::F32);
        let variance = x.clone().square().mean_dim(D - 1);
        let normed = x * (variance + self.eps).sqrt().recip();
        match self.form {
            NormForm::CastThenWeight => normed.cast(dtype) * weight,
            NormForm::WeightThenCast => (normed * weight.cast(DType::F32)).cast(dtype),
            NormForm::OnePlusWeight => (normed * (weight.cast(DType::F32) + 1.0)).cast(dtype),
        }
    }
}
