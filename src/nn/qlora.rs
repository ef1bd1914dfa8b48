//! A frozen 4-bit linear layer with a trained low-rank branch.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay, Param};
use burn::nn::{Dropout, DropoutConfig, Initializer, Linear};
use burn::tensor::{DType, Device, Tensor};

use super::Nf4Linear;
use crate::error::Nf4Error;
use crate::format::FloatType;

/// Configuration of the low-rank branch of a [`QLoraLinear`].
#[derive(Config, Debug)]
pub struct QLoraLinearConfig {
    /// Rank `r` of the branch.
    pub rank: usize,
    /// Numerator `α` of the branch's factor.
    #[config(default = 16.0)]
    pub alpha: f64,
    /// Probability of dropping an input of the branch while training.
    #[config(default = 0.0)]
    pub dropout: f64,
    /// Whether the factor is `α / √r` (rank-stabilised LoRA, arXiv 2312.03732) instead of `α / r`.
    #[config(default = false)]
    pub use_rslora: bool,
}

impl QLoraLinearConfig {
    /// The factor `s` of the branch.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }

    /// Puts a fresh branch on a frozen layer: `A` uniform in `±1/√d_input` (PyTorch's
    /// `kaiming_uniform` with `a = √5`, as in PEFT), `B` zero, so that nothing changes at first.
    ///
    /// The branch is created on `device`, which needs autodiff to train it, and the frozen layer
    /// is moved there.
    ///
    /// # Errors
    /// [`Nf4Error::Config`] if the rank is zero, the dropout outside of `[0, 1)`, or alpha not
    /// finite.
    pub fn init(&self, base: Nf4Linear, device: &Device) -> Result<QLoraLinear, Nf4Error> {
        let [d_output, d_input] = base.dims();
        let base = base.to_device(device);
        let initializer = Initializer::KaimingUniform {
            gain: 1.0 / 3f64.sqrt(),
            fan_out_only: false,
        };
        let lora_a =
            initializer.init_with([d_input, self.rank], Some(d_input), Some(self.rank), device);
        let lora_b = Initializer::Zeros.init([self.rank, d_output], device);
        self.build(base, lora_a, lora_b)
    }

    /// Puts a given branch on a frozen layer on the same device. The matrices are taken as values,
    /// without their graph.
    ///
    /// # Shapes
    /// - `lora_a`: `[d_input, rank]`, the transpose of PEFT's `lora_A.weight`
    /// - `lora_b`: `[rank, d_output]`, the transpose of PEFT's `lora_B.weight`
    ///
    /// # Errors
    /// [`Nf4Error::Shape`] if a matrix does not fit, and those of [`init`](Self::init).
    pub fn init_with(
        &self,
        base: Nf4Linear,
        lora_a: Tensor<2>,
        lora_b: Tensor<2>,
    ) -> Result<QLoraLinear, Nf4Error> {
        let [d_output, d_input] = base.dims();
        for (tensor, expected, given) in [
            ("lora_a", [d_input, self.rank], lora_a.dims()),
            ("lora_b", [self.rank, d_output], lora_b.dims()),
        ] {
            if expected != given {
                return Err(Nf4Error::Shape {
                    tensor: tensor.into(),
                    expected: expected.to_vec(),
                    given: given.to_vec(),
                });
            }
        }
        self.build(
            base,
            Param::from_tensor(lora_a.detach()),
            Param::from_tensor(lora_b.detach()),
        )
    }

    fn build(
        &self,
        base: Nf4Linear,
        lora_a: Param<Tensor<2>>,
        lora_b: Param<Tensor<2>>,
    ) -> Result<QLoraLinear, Nf4Error> {
        let invalid = |field, expected, given: String| {
            Err(Nf4Error::Config {
                field,
                expected,
                given,
            })
        };
        if self.rank == 0 {
            return invalid("rank", "at least 1", self.rank.to_string());
        }
        if !self.alpha.is_finite() {
            return invalid("alpha", "a finite number", self.alpha.to_string());
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return invalid(
                "dropout",
                "at least 0 and below 1",
                self.dropout.to_string(),
            );
        }
        Ok(QLoraLinear {
            base,
            lora_a,
            lora_b,
            dropout: DropoutConfig::new(self.dropout).init(),
            scale: self.scale(),
        })
    }
}

/// QLoRA: `y = x Wᵀ + b + s · (dropout(x) A) B`, with `W` frozen in 4 bit and `A`, `B` trained.
///
/// Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_nf4::format::QuantConfig;
/// use burn_nf4::nn::{Nf4Linear, QLoraLinearConfig};
///
/// let device = Device::default().autodiff();
/// let dense = LinearConfig::new(128, 256).init(&device);
/// let base = Nf4Linear::quantize(dense, QuantConfig::default())?;
/// let layer = QLoraLinearConfig::new(8).with_alpha(16.0).init(base, &device)?;
/// let x = Tensor::<2>::random([4, 128], Distribution::Default, &device);
/// let grads = layer.forward(x).mean().backward();
/// assert!(layer.lora_b.grad(&grads).is_some());
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct QLoraLinear {
    /// The frozen layer.
    pub base: Nf4Linear,
    /// `A`, `[d_input, rank]`.
    pub lora_a: Param<Tensor<2>>,
    /// `B`, `[rank, d_output]`.
    pub lora_b: Param<Tensor<2>>,
    /// Dropout on the input of the branch.
    pub dropout: Dropout,
    /// The factor `s` of the branch.
    pub scale: f64,
}

impl QLoraLinear {
    /// Applies the layer.
    ///
    /// The branch is computed in the dtype of `A` and `B` and its result cast to that of `x`.
    ///
    /// # Shapes
    /// - `x`: `[..., d_input]`
    /// - returns `[..., d_output]`, of the dtype of `x`
    ///
    /// # Panics
    /// If `x` does not fit the weight or is neither f16, bf16 nor f32.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let dtype = x.dtype();
        let a = self.lora_a.val();
        let b = self.lora_b.val();
        let mut shape = x.dims();
        let [d_output, d_input] = self.base.dims();
        let rows = x.shape().num_elements() / shape[D - 1].max(1);

        let y = self.base.forward(x.clone());
        if rows == 0 {
            return y;
        }
        let branch_in = self.dropout.forward(x).cast(a.dtype());
        // Folding the batch axes keeps both products plain matrix products.
        let branch = branch_in.reshape([rows, d_input]).matmul(a).matmul(b) * self.scale;
        shape[D - 1] = d_output;
        y + branch.cast(dtype).reshape(shape)
    }

    /// The dense layer with the branch added to the weight: `W + s (A B)ᵀ`, summed in f32.
    ///
    /// # Errors
    /// [`Nf4Error::NonFinite`] if a merged weight overflows `dtype` or is NaN,
    /// [`Nf4Error::DeviceDtype`] if the device has no such type.
    pub fn merge(&self, dtype: FloatType) -> Result<Linear, Nf4Error> {
        let mut dense = self.base.to_dense(dtype)?;
        let weight = self
            .base
            .weight
            .dequantize::<2>(FloatType::F32)?
            .transpose();
        let a = self.lora_a.val().cast(DType::F32);
        let b = self.lora_b.val().cast(DType::F32);
        let merged = (weight + a.matmul(b) * self.scale).cast(DType::from(dtype));
        let data = merged.to_data();
        if let Some((index, given)) = data.iter::<f32>().enumerate().find(|(_, w)| !w.is_finite()) {
            return Err(Nf4Error::NonFinite {
                tensor: "merged weight".into(),
                index,
                given,
            });
        }
        dense.weight = Param::from_tensor(merged.detach());
        Ok(dense)
    }

    /// Rank of the branch.
    pub fn rank(&self) -> usize {
        self.lora_a.lazy_shape()[1]
    }
}

impl ModuleDisplay for QLoraLinear {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new()
            .with_new_line_after_attribute(false)
            .optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        content
            .add("base", &self.base)
            .add("rank", &self.rank())
            .add("scale", &self.scale)
            .add("dropout", &self.dropout.prob)
            .optional()
    }
}
