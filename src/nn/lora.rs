//! A frozen float linear layer with a trained low-rank branch.

use burn::module::{Content, DisplaySettings, Module, ModuleDisplay, ModuleVisitor, Param};
use burn::nn::{Dropout, DropoutConfig, Linear};
use burn::tensor::{DType, Device, Tensor};

use super::REPARAMETERIZATION;
use super::params::in_floats;
use super::qlora::{NORM_CHUNK_ELEMS, QLoraLinearConfig, drops, given_magnitude, merge_weight};
use crate::error::Nf4Error;
use crate::format::{FloatType, check_shape};
use crate::op::{LowRank, MatmulOptions, matmul};

/// What panics call the layer.
const NAME: &str = "LoraLinear";

/// LoRA: `y = x W + b + s · (dropout(x) A) B`, with a float `W` frozen and `A`, `B` trained.
///
/// What [`QLoraLinear`](super::QLoraLinear) is to a weight in 4 bit; DoRA and dropout act as there. The
/// branch is computed in the dtype of `A` and `B` and its result cast to that of `x`.
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_nf4::nn::QLoraLinearConfig;
///
/// let device = Device::default().autodiff();
/// let dense = LinearConfig::new(128, 256).init(&device);
/// let layer = QLoraLinearConfig::new(8).with_use_dora(true).init_dense(dense, &device)?;
/// let x = Tensor::<2>::random([4, 128], Distribution::Default, &device);
/// let grads = layer.forward(x).mean().backward();
/// assert!(layer.lora_b.grad(&grads).is_some());
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct LoraLinear {
    /// The frozen layer.
    pub base: Linear,
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

impl QLoraLinearConfig {
    /// As [`init`](Self::init), on a layer of floats: its weight and bias are frozen.
    ///
    /// # Errors
    /// Those of [`init`](Self::init), and [`Nf4Error::Config`] for a layer with a reparameterization of
    /// Burn's, such as that of `apply_lora`: the branch would be one of another weight.
    pub fn init_dense(&self, base: Linear, device: &Device) -> Result<LoraLinear, Nf4Error> {
        self.check()?;
        check_materialized(&base)?;
        let [d_input, d_output] = base.weight.dims();
        let (lora_a, lora_b) = self.fresh_factors([d_output, d_input], device);
        self.build_dense(base.to_device(device), lora_a, lora_b)
    }

    /// As [`init_with`](Self::init_with), on a layer of floats: its weight and bias are frozen.
    ///
    /// # Errors
    /// Those of [`init_with`](Self::init_with) and [`init_dense`](Self::init_dense).
    pub fn init_dense_with(
        &self,
        base: Linear,
        lora_a: Tensor<2>,
        lora_b: Tensor<2>,
    ) -> Result<LoraLinear, Nf4Error> {
        check_materialized(&base)?;
        let [d_input, d_output] = base.weight.dims();
        let (a, b) = self.given_factors([d_output, d_input], lora_a, lora_b)?;
        self.build_dense(base, a, b)
    }

    fn build_dense(
        &self,
        base: Linear,
        lora_a: Param<Tensor<2>>,
        lora_b: Param<Tensor<2>>,
    ) -> Result<LoraLinear, Nf4Error> {
        self.check()?;
        let mut layer = LoraLinear {
            base: base.no_grad(),
            lora_a,
            lora_b,
            lora_magnitude: None,
            dropout: DropoutConfig::new(self.dropout).init(),
            scale: self.scale(),
            enabled: true,
        };
        if self.use_dora {
            let device = layer.lora_a.lazy_device();
            let norms = layer.row_norms().into_data();
            let magnitude = Tensor::from_data(norms, (&device, DType::F32));
            layer.lora_magnitude = Some(Param::from_tensor(magnitude));
        }
        Ok(layer)
    }
}

impl LoraLinear {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - `x`: `[..., d_input]`
    /// - returns `[..., d_output]`, of the dtype of `x`
    ///
    /// # Panics
    /// If `x` does not fit the weight or is of another dtype.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let weight = self.base.weight.val();
        let bias = self.base.bias.as_ref().map(Param::val);
        if !self.enabled {
            return dense_linear(NAME, x, weight, bias);
        }
        let dtype = x.dtype();
        let Some(magnitude) = &self.lora_magnitude else {
            let y = dense_linear(NAME, x.clone(), weight, bias);
            return y + self.branch(self.dropout.forward(x)).cast(dtype);
        };
        let branch_dtype = self.lora_a.val().dtype();
        let factor = (magnitude.val().cast(DType::F32) / self.row_norms()).cast(branch_dtype);
        let factor: Tensor<D> = factor.unsqueeze();
        if drops(&self.dropout, &x) {
            let y = dense_linear(NAME, x.clone(), weight.clone(), bias);
            let x = self.dropout.forward(x);
            let dropped = dense_linear(NAME, x.clone(), weight, None).cast(branch_dtype);
            let change = (factor.clone() - 1.0) * dropped + factor * self.branch(x);
            return y + change.cast(dtype);
        }
        let y = dense_linear(NAME, x.clone(), weight, None).cast(branch_dtype);
        let y = (y + self.branch(x)) * factor;
        let y = match bias {
            None => y,
            Some(bias) => y + in_floats(bias).cast(branch_dtype).unsqueeze(),
        };
        y.cast(dtype)
    }

    /// `s (x A) B`, in the dtype of `A`.
    fn branch<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let (a, b) = (self.lora_a.val(), self.lora_b.val());
        let x = x.cast(a.dtype());
        dense_linear(NAME, dense_linear(NAME, x, a, None), b, None) * self.scale
    }

    /// The norm of each row of the weight with its branch, in f32, outside of any graph; a few rows
    /// at a time, as the weight can be a large head.
    fn row_norms(&self) -> Tensor<1> {
        let weight = in_floats(self.base.weight.val().inner());
        let a = self.lora_a.val().inner().cast(DType::F32);
        let b = self.lora_b.val().inner().cast(DType::F32);
        let [d_input, d_output] = weight.dims();
        let step = (NORM_CHUNK_ELEMS / d_input).max(1);
        let norms = (0..d_output).step_by(step).map(|start| {
            let rows = step.min(d_output - start);
            let branch = a.clone().matmul(b.clone().narrow(1, start, rows)) * self.scale;
            let merged = weight.clone().narrow(1, start, rows).cast(DType::F32) + branch;
            merged.square().sum_dim(0).sqrt().reshape([rows])
        });
        // A row of zeros stays one, whatever its magnitude.
        Tensor::cat(norms.collect(), 0).clamp_min(f32::MIN_POSITIVE)
    }

    /// The layer with these magnitudes, see
    /// [`QLoraLinear::with_magnitude`](super::QLoraLinear::with_magnitude).
    ///
    /// # Shapes
    /// - `magnitude`: `[d_output]`
    ///
    /// # Errors
    /// [`Nf4Error::Shape`] if they do not fit.
    pub fn with_magnitude(mut self, magnitude: Tensor<1>) -> Result<Self, Nf4Error> {
        let [_, d_output] = self.base.weight.dims();
        let magnitude = given_magnitude(magnitude, d_output, &self.lora_a.lazy_device())?;
        self.lora_magnitude = Some(magnitude);
        Ok(self)
    }

    /// The dense layer with the branch added to the weight, see
    /// [`QLoraLinear::merge`](super::QLoraLinear::merge).
    ///
    /// # Errors
    /// [`Nf4Error::NonFinite`] if a merged weight overflows `dtype` or is NaN,
    /// [`Nf4Error::DeviceDtype`] if the device has no such type.
    pub fn merge(&self, dtype: FloatType) -> Result<Linear, Nf4Error> {
        dtype.check_device(&self.lora_a.lazy_device())?;
        let branch = LowRank {
            a: self.lora_a.val(),
            b: self.lora_b.val(),
            scale: self.scale,
        };
        let magnitude = self.lora_magnitude.as_ref();
        let factor = magnitude.map(|magnitude| magnitude.val().cast(DType::F32) / self.row_norms());
        let weight = in_floats(self.base.weight.val()).cast(DType::F32);
        let bias = self.base.bias.as_ref();
        let bias = bias.map(|bias| in_floats(bias.val()).cast(DType::from(dtype)).detach());
        Ok(Linear {
            weight: Param::from_tensor(merge_weight(weight, branch, factor, dtype)?),
            bias: bias.map(Param::from_tensor),
        })
    }

    /// Rank of the branch.
    pub fn rank(&self) -> usize {
        self.lora_a.lazy_shape()[1]
    }
}

/// `x W + b` of a layer.
///
/// # Shapes
/// - `x`: `[..., d_input]`
/// - `weight`: `[d_input, d_output]`
///
/// # Panics
/// If `x` does not fit, with the name of the layer's type.
pub(super) fn dense_linear<const D: usize>(
    layer: &'static str,
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    let (mut expected, given) = (x.dims(), x.dims());
    expected[D - 1] = weight.dims()[0];
    if let Err(error) = check_shape("x", &expected, &given) {
        panic!("{layer}::forward: {error}");
    }
    // A trained bias is in f32 whatever the dtype of the model.
    let bias = bias.map(|bias| in_floats(bias).cast(x.dtype()));
    if matches!(weight.dtype(), DType::QFloat(_)) {
        return burn::tensor::module::linear(x, weight, bias);
    }
    // As one matrix: the weight, often a view of a checkpoint's transpose, would be copied if it were given
    // as many dimensions as `x`.
    let mut shape = x.dims();
    let [_, d_output] = weight.dims();
    let d_input = shape[D - 1];
    let rows = shape[..D - 1].iter().product();
    shape[D - 1] = d_output;
    let options = MatmulOptions::default();
    let y = match rows {
        // Not a reshape: it would read the zero as "keep this dimension".
        0 => matmul(x, weight.unsqueeze(), bias, options),
        _ => matmul(x.reshape([rows, d_input]), weight, bias, options).map(|y| y.reshape(shape)),
    };
    match y {
        Ok(y) => y,
        Err(error) => panic!("{layer}::forward: {error}"),
    }
}

/// # Errors
/// [`Nf4Error::Config`] for a weight with a reparameterization of Burn's: it has another value than the
/// one that it stores, and often another shape.
fn check_materialized(layer: &Linear) -> Result<(), Nf4Error> {
    struct Visitor(bool);

    impl ModuleVisitor for Visitor {
        fn enter_module(&mut self, _name: &str, container_type: &str) {
            self.0 |= container_type == REPARAMETERIZATION;
        }
    }

    let mut visitor = Visitor(false);
    layer.weight.visit(&mut visitor);
    match visitor.0 {
        false => Ok(()),
        true => Err(Nf4Error::unmaterialized("base", "weight")),
    }
}

impl ModuleDisplay for LoraLinear {
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
