//! Root-mean-square normalisation (arXiv 1910.07467).

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn_nf4::op::{NormForm, add_rms_norm, rms_norm, rms_norm_beside};

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
        let weight = self.weight.val().cast(x.dtype());
        rms_norm(x, weight, self.eps, self.form).expect("the weight fits")
    }

    /// `x`, to go past the norm, and the norm of it.
    ///
    /// # Shapes
    /// - `x`: `[.., size]`, and so the results
    pub fn forward_beside<const D: usize>(&self, x: Tensor<D>) -> (Tensor<D>, Tensor<D>) {
        let weight = self.weight.val().cast(x.dtype());
        rms_norm_beside(x, weight, self.eps, self.form).expect("the weight fits")
    }

    /// `x + y`, and the norm of it.
    ///
    /// # Shapes
    /// - `x`, `y`: `[.., size]`, and so the results
    pub fn add_forward<const D: usize>(
        &self,
        x: Tensor<D>,
        y: Tensor<D>,
    ) -> (Tensor<D>, Tensor<D>) {
        let weight = self.weight.val().cast(x.dtype());
        add_rms_norm(x, y, weight, self.eps, self.form).expect("the weight fits")
    }
}
