//! A frozen 4-bit linear layer with a trained low-rank branch.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay, Param};
use burn::nn::{Dropout, DropoutConfig, Initializer, Linear};
use burn::tensor::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::QuantLinear;
use crate::error::Nf4Error;
use crate::format::{FloatType, check_finite, check_shape};
use crate::op::{LowRank, connect_empty};

/// Decoded weights that exist at a time while norms are taken: 16 MiB.
pub(super) const NORM_CHUNK_ELEMS: usize = 1 << 22;

/// How the factors of a fresh branch begin.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum LoraInit {
    /// `A` uniform in `±1/√d_input` (PyTorch's `kaiming_uniform` with `a = √5`), `B` zero: PEFT's `true`.
    #[default]
    ZeroB,
    /// `A` so, and `B` uniform in `±1/√rank`: the branch changes the layer from the start. PEFT's `false`.
    RandomB,
    /// `A` normal with a standard deviation of `1/rank`, `B` zero: PEFT's `gaussian`.
    Gaussian,
}

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
    /// Whether each output has a trained magnitude (DoRA, arXiv 2402.09353).
    #[config(default = false)]
    pub use_dora: bool,
    /// How the factors begin.
    #[config(default = "LoraInit::ZeroB")]
    pub init: LoraInit,
}

impl QLoraLinearConfig {
    /// The factor `s` of the branch.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }

    /// Puts a fresh branch on a frozen layer, with factors that begin as [`LoraInit`] says, and with DoRA
    /// magnitudes that are those of the weight with the branch: where `B` is zero nothing changes at first.
    ///
    /// The branch is created on `device`, which needs autodiff to train it, and the frozen layer
    /// is moved there.
    ///
    /// # Errors
    /// [`Nf4Error::Config`] if the rank is zero, the dropout outside of `[0, 1)`, or alpha not
    /// finite.
    pub fn init(&self, base: QuantLinear, device: &Device) -> Result<QLoraLinear, Nf4Error> {
        self.check()?;
        let (lora_a, lora_b) = self.fresh_factors(base.dims(), device);
        self.build(base.to_device(device), lora_a, lora_b)
    }

    /// `A` and `B` of a fresh branch on a weight `[d_output, d_input]`.
    pub(super) fn fresh_factors(
        &self,
        [d_output, d_input]: [usize; 2],
        device: &Device,
    ) -> (Param<Tensor<2>>, Param<Tensor<2>>) {
        let uniform = Initializer::KaimingUniform {
            gain: 1.0 / 3f64.sqrt(),
            fan_out_only: false,
        };
        let of_a = match self.init {
            LoraInit::ZeroB | LoraInit::RandomB => uniform.clone(),
            LoraInit::Gaussian => Initializer::Normal {
                mean: 0.0,
                std: 1.0 / self.rank as f64,
            },
        };
        let of_b = match self.init {
            LoraInit::RandomB => uniform,
            LoraInit::ZeroB | LoraInit::Gaussian => Initializer::Zeros,
        };
        let factor = |initializer: Initializer, [d_input, d_output]: [usize; 2]| {
            initializer.init_with([d_input, d_output], Some(d_input), Some(d_output), device)
        };
        (
            factor(of_a, [d_input, self.rank]),
            factor(of_b, [self.rank, d_output]),
        )
    }

    /// Puts a given branch on a frozen layer on the same device. The matrices are taken as values,
    /// without their graph. With DoRA the magnitudes are those of the weight with the branch;
    /// [`QLoraLinear::with_magnitude`] sets others.
    ///
    /// # Shapes
    /// - `lora_a`: `[d_input, rank]`, the transpose of PEFT's `lora_A.weight`
    /// - `lora_b`: `[rank, d_output]`, the transpose of PEFT's `lora_B.weight`
    ///
    /// # Errors
    /// [`Nf4Error::Shape`] if a matrix does not fit, [`Nf4Error::Dtype`] unless both are of the same
    /// type, f16, bf16 or f32, and those of [`init`](Self::init).
    pub fn init_with(
        &self,
        base: QuantLinear,
        lora_a: Tensor<2>,
        lora_b: Tensor<2>,
    ) -> Result<QLoraLinear, Nf4Error> {
        let (lora_a, lora_b) = self.given_factors(base.dims(), lora_a, lora_b)?;
        self.build(base, lora_a, lora_b)
    }

    /// Given `A` and `B` as parameters, checked against a weight `[d_output, d_input]`.
    pub(super) fn given_factors(
        &self,
        dims: [usize; 2],
        lora_a: Tensor<2>,
        lora_b: Tensor<2>,
    ) -> Result<(Param<Tensor<2>>, Param<Tensor<2>>), Nf4Error> {
        let branch = LowRank {
            a: lora_a.detach(),
            b: lora_b.detach(),
            scale: self.scale(),
        };
        branch.check(dims, self.rank)?;
        Ok((Param::from_tensor(branch.a), Param::from_tensor(branch.b)))
    }

    /// Checks the settings themselves.
    pub(super) fn check(&self) -> Result<(), Nf4Error> {
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
        Ok(())
    }

    fn build(
        &self,
        base: QuantLinear,
        lora_a: Param<Tensor<2>>,
        lora_b: Param<Tensor<2>>,
    ) -> Result<QLoraLinear, Nf4Error> {
        self.check()?;
        let mut layer = QLoraLinear {
            base,
            lora_a,
            lora_b,
            lora_magnitude: None,
            dropout: DropoutConfig::new(self.dropout).init(),
            scale: self.scale(),
            enabled: true,
        };
        if self.use_dora {
            let device = layer.lora_a.lazy_device();
            let magnitude = layer.row_norms()?;
            let magnitude = Tensor::from_data(magnitude.into_data(), (&device, DType::F32));
            layer.lora_magnitude = Some(Param::from_tensor(magnitude));
        }
        Ok(layer)
    }
}

/// QLoRA: `y = x Wᵀ + b + s · (dropout(x) A) B`, with `W` frozen in 4 bit and `A`, `B` trained.
///
/// Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.
///
/// With a magnitude `m` (DoRA: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv
/// 2402.09353) each row of the weight with its branch is brought to the length `m`:
/// `y = m / n · (x Wᵀ + s (x A) B) + b`, where `n` is the norm of each row of `W + s (A B)ᵀ`. As in
/// the paper, and in PEFT, `n` is a constant to the gradient. Where dropout acts, it acts as in
/// PEFT: `y = x Wᵀ + b + (m / n - 1) · d Wᵀ + m / n · s (d A) B` with `d = dropout(x)`.
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_nf4::format::QuantConfig;
/// use burn_nf4::nn::{QuantLinear, QLoraLinearConfig};
///
/// let device = Device::default().autodiff();
/// let dense = LinearConfig::new(128, 256).init(&device);
/// let base = QuantLinear::quantize(dense, QuantConfig::default())?;
/// let layer = QLoraLinearConfig::new(8).with_alpha(16.0).init(base, &device)?;
/// let x = Tensor::<2>::random([4, 128], Distribution::Default, &device);
/// let grads = layer.forward(x).mean().backward();
/// assert!(layer.lora_b.grad(&grads).is_some());
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct QLoraLinear {
    /// The frozen layer.
    pub base: QuantLinear,
    /// `A`, `[d_input, rank]`.
    pub lora_a: Param<Tensor<2>>,
    /// `B`, `[rank, d_output]`.
    pub lora_b: Param<Tensor<2>>,
    /// With DoRA the length of each row of the weight, `[d_output]`.
    pub lora_magnitude: Option<Param<Tensor<1>>>,
    /// Dropout on the input of the branch.
    pub dropout: Dropout,
    /// The factor `s` of the branch.
    pub scale: f64,
    /// Whether the branch takes part; not part of a record.
    pub enabled: bool,
}

impl QLoraLinear {
    /// Applies the layer.
    ///
    /// The branch is computed in the dtype of `A` and `B` and its result cast to that of `x`; without
    /// autodiff the product with the frozen weight adds it where it can, see
    /// [`lora_linear`](crate::op::lora_linear).
    ///
    /// # Shapes
    /// - `x`: `[..., d_input]`
    /// - returns `[..., d_output]`, of the dtype of `x`
    ///
    /// # Panics
    /// If `x` does not fit the weight or is neither f16, bf16 nor f32.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        if !self.enabled {
            return self.base.forward(x);
        }
        let shape = x.dims();
        let rows = x.shape().num_elements() / shape[D - 1].max(1);
        if rows == 0 {
            let y = self.base.forward(x);
            let branch = [self.lora_a.val().sum(), self.lora_b.val().sum()];
            let magnitude = self.lora_magnitude.as_ref().map(|param| param.val().sum());
            return connect_empty(y, branch.into_iter().chain(magnitude));
        }
        match &self.lora_magnitude {
            None if drops(&self.dropout, &x) => {
                let y = self.base.forward(x.clone());
                let branch = self.branch(self.dropout.forward(x), rows);
                let branch = branch.cast(y.dtype()).reshape(y.shape());
                y + branch
            }
            None => self.base.forward_with(x, self.low_rank()),
            Some(magnitude) => self.forward_dora(x, rows, magnitude.val()),
        }
    }

    /// The branch, if it is added to the product with `x` as it is: without a magnitude, and without
    /// dropout that acts.
    pub(super) fn plain_branch<const D: usize>(&self, x: &Tensor<D>) -> Option<LowRank> {
        let plain = self.lora_magnitude.is_none() && !drops(&self.dropout, x);
        let rows = x.shape().num_elements() > 0;
        (plain && rows).then(|| self.low_rank())
    }

    fn low_rank(&self) -> LowRank {
        LowRank {
            a: self.lora_a.val(),
            b: self.lora_b.val(),
            scale: self.scale,
        }
    }

    /// `s (x A) B`, in the dtype of `A`, with the batch axes folded: that keeps both products plain
    /// matrix products.
    fn branch<const D: usize>(&self, x: Tensor<D>, rows: usize) -> Tensor<2> {
        let [_, d_input] = self.base.dims();
        match self.low_rank().forward(x.reshape([rows, d_input])) {
            Ok(branch) => branch,
            Err(error) => panic!("QLoraLinear::forward: {error}"),
        }
    }

    fn forward_dora<const D: usize>(
        &self,
        x: Tensor<D>,
        rows: usize,
        magnitude: Tensor<1>,
    ) -> Tensor<D> {
        let norms = match self.row_norms() {
            Ok(norms) => norms,
            Err(error) => panic!("QLoraLinear::forward: {error}"),
        };
        let dtype = x.dtype();
        let branch_dtype = self.lora_a.val().dtype();
        let factor: Tensor<2> = (magnitude.cast(DType::F32) / norms)
            .cast(branch_dtype)
            .unsqueeze();
        let [d_output, _] = self.base.dims();
        let fold = |y: Tensor<D>| y.cast(branch_dtype).reshape([rows, d_output]);

        if drops(&self.dropout, &x) {
            let y = self.base.forward(x.clone());
            let x = self.dropout.forward(x);
            let dropped = fold(self.base.forward_without_bias(x.clone()));
            let change = (factor.clone() - 1.0) * dropped + factor * self.branch(x, rows);
            let change = change.cast(dtype).reshape(y.shape());
            return y + change;
        }
        let y = self.base.forward_without_bias(x.clone());
        let shape = y.shape();
        let y = (fold(y) + self.branch(x, rows)) * factor;
        let y = match &self.base.bias {
            None => y,
            Some(bias) => y + bias.val().cast(branch_dtype).unsqueeze(),
        };
        y.cast(dtype).reshape(shape)
    }

    /// The norm of each row of the weight with its branch, `W + s (A B)ᵀ`, outside of any graph, in
    /// f32. The weight is decoded a few rows at a time.
    fn row_norms(&self) -> Result<Tensor<1>, Nf4Error> {
        let [d_output, d_input] = self.base.dims();
        let a = self.lora_a.val().inner().cast(DType::F32).transpose();
        let b = self.lora_b.val().inner().cast(DType::F32).transpose();
        let step = (NORM_CHUNK_ELEMS / d_input).max(1);
        let norms = (0..d_output)
            .step_by(step)
            .map(|start| {
                let end = (start + step).min(d_output);
                let weight = self
                    .base
                    .weight
                    .dequantize_rows(start..end, FloatType::F32)?;
                let branch = b.clone().narrow(0, start, end - start).matmul(a.clone());
                let merged = weight.inner() + branch * self.scale;
                let norms = (merged.clone() * merged).sum_dim(1).sqrt();
                Ok(norms.reshape([end - start]))
            })
            .collect::<Result<Vec<Tensor<1>>, Nf4Error>>()?;
        // A row of zeros stays one, whatever its magnitude.
        Ok(Tensor::cat(norms, 0).clamp_min(f32::MIN_POSITIVE))
    }

    /// The layer with these magnitudes, which makes it a DoRA layer. They are taken as values,
    /// without their graph, to the device of the layer.
    ///
    /// # Shapes
    /// - `magnitude`: `[d_output]`
    ///
    /// # Errors
    /// [`Nf4Error::Shape`] if they do not fit.
    pub fn with_magnitude(mut self, magnitude: Tensor<1>) -> Result<Self, Nf4Error> {
        let [d_output, _] = self.base.dims();
        let magnitude = given_magnitude(magnitude, d_output, &self.lora_a.lazy_device())?;
        self.lora_magnitude = Some(magnitude);
        Ok(self)
    }

    /// The dense layer with the branch added to the weight: `W + s (A B)ᵀ`, summed in f32, and with
    /// DoRA each row brought to its magnitude.
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
        let factor = match &self.lora_magnitude {
            None => None,
            Some(magnitude) => Some(magnitude.val().cast(DType::F32) / self.row_norms()?),
        };
        let merged = merge_weight(weight, self.low_rank(), factor, dtype)?;
        dense.weight = Param::from_tensor(merged);
        Ok(dense)
    }

    /// Rank of the branch.
    pub fn rank(&self) -> usize {
        self.lora_a.lazy_shape()[1]
    }
}

/// Whether dropout acts on `x`.
pub(super) fn drops<const D: usize>(dropout: &Dropout, x: &Tensor<D>) -> bool {
    dropout.prob > 0.0 && dropout.training.is_enabled() && x.device().is_autodiff()
}

/// Magnitudes as a parameter on a device, taken as values.
///
/// # Errors
/// [`Nf4Error::Shape`] unless they are `[d_output]`.
pub(super) fn given_magnitude(
    magnitude: Tensor<1>,
    d_output: usize,
    device: &Device,
) -> Result<Param<Tensor<1>>, Nf4Error> {
    check_shape("lora_magnitude", &[d_output], &magnitude.dims())?;
    Ok(Param::from_tensor(magnitude.detach().to_device(device)))
}

/// `(W + s A B)`, each output times its factor, in `dtype` and without a graph.
///
/// # Shapes
/// - `weight`: `[d_input, d_output]`, in f32
/// - `factor`: `[d_output]`, in f32
///
/// # Errors
/// [`Nf4Error::NonFinite`] if a merged weight overflows `dtype` or is NaN.
pub(super) fn merge_weight(
    weight: Tensor<2>,
    branch: LowRank,
    factor: Option<Tensor<1>>,
    dtype: FloatType,
) -> Result<Tensor<2>, Nf4Error> {
    let (a, b) = (branch.a.cast(DType::F32), branch.b.cast(DType::F32));
    let mut merged = weight + a.matmul(b) * branch.scale;
    if let Some(factor) = factor {
        merged = merged * factor.unsqueeze();
    }
    let merged = merged.cast(DType::from(dtype)).detach();
    check_finite("merged weight", merged.to_data().iter::<f32>())?;
    Ok(merged)
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
            .add("dora", &self.lora_magnitude.is_some())
            .add("dropout", &self.dropout.prob)
            .add("enabled", &self.enabled)
            .optional()
    }
}
