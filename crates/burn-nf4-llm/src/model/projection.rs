//! The linear layers of the model: 4-bit, 16-bit, and either with a trained branch.

use burn::module::{Module, Param};
use burn::nn::{Dropout, Linear};
use burn::tensor::{DType, Device, Tensor};
use burn_nf4::Nf4Error;
use burn_nf4::nn::{Nf4Linear, QLoraLinear, QLoraLinearConfig};
use burn_nf4::op::{MatmulOptions, matmul};

use crate::model::cache::element_bytes;

/// A linear layer in whatever form the checkpoint has it.
#[derive(Module, Debug)]
pub enum Projection {
    /// A packed weight.
    Nf4(Nf4Linear),
    /// A packed weight and a trained branch.
    QLora(QLoraLinear),
    /// A float weight: "dynamic" checkpoints leave some layers in 16 bit.
    Dense(Linear),
    /// A float weight and a trained branch.
    DenseLora(DenseLora),
}

/// A frozen float layer with a trained low-rank branch: what [`QLoraLinear`] is to 4 bit.
#[derive(Module, Debug)]
pub struct DenseLora {
    /// The frozen layer.
    pub base: Linear,
    /// `A`, `[d_input, rank]`.
    pub lora_a: Param<Tensor<2>>,
    /// `B`, `[rank, d_output]`.
    pub lora_b: Param<Tensor<2>>,
    /// With DoRA the length of each row of the weight, `[d_output]`.
    pub lora_magnitude: Option<Param<Tensor<1>>>,
    /// Applied to the input of the branch in training.
    pub dropout: Dropout,
    /// The factor of the branch.
    pub scale: f64,
}

/// `x W + b`.
///
/// # Shapes
/// - `x`: `[..., d_input]`
/// - `weight`: `[d_input, d_output]`
fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    // A trained bias is in f32 whatever the dtype of the model.
    let bias = bias.map(|bias| bias.cast(x.dtype()));
    matmul(x, weight.unsqueeze(), bias, MatmulOptions::default()).expect("the layer fits")
}

impl DenseLora {
    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let dtype = x.dtype();
        let weight = self.base.weight.val();
        let bias = self.base.bias.as_ref().map(Param::val);
        let y = linear(x.clone(), weight.clone(), bias);
        let (a, b) = (self.lora_a.val(), self.lora_b.val());
        let dropped = self.dropout.forward(x);
        let input = dropped.clone().cast(a.dtype());
        let branch = linear(linear(input, a, None), b, None) * self.scale;
        let Some(magnitude) = &self.lora_magnitude else {
            return y + branch.cast(dtype);
        };
        // As in PEFT's `DoraLinearLayer`: the norm is a constant to the gradient.
        let factor: Tensor<D> = (magnitude.val() / self.row_norms()).unsqueeze();
        let through_base = linear(dropped, weight, None).cast(branch.dtype());
        let change = (factor.clone() - 1.0) * through_base + factor * branch;
        y + change.cast(dtype)
    }

    /// The norm of each row of the weight with its branch, in f32, outside of any graph; a few rows
    /// at a time, as the weight can be a large head.
    fn row_norms(&self) -> Tensor<1> {
        let weight = self.base.weight.val().inner();
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
}

/// Weights that are widened at a time while norms are taken: 16 MiB.
const NORM_CHUNK_ELEMS: usize = 1 << 22;

impl Projection {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - `x`: `[..., d_input]`
    /// - returns `[..., d_output]`, of the dtype of `x`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Nf4(layer) => layer.forward(x),
            Self::QLora(layer) => layer.forward(x),
            Self::Dense(layer) => {
                let bias = layer.bias.as_ref().map(Param::val);
                linear(x, layer.weight.val(), bias)
            }
            Self::DenseLora(layer) => layer.forward(x),
        }
    }

    /// Bytes of packed weights and of float weights held.
    pub fn size_bytes(&self) -> (usize, usize) {
        let dense = |layer: &Linear| {
            let weight = layer.weight.val();
            weight.shape().num_elements() * element_bytes(weight.dtype())
        };
        match self {
            Self::Nf4(layer) => (layer.weight.size_bytes(), 0),
            Self::QLora(layer) => (layer.base.weight.size_bytes(), 0),
            Self::Dense(layer) => (0, dense(layer)),
            Self::DenseLora(layer) => (0, dense(&layer.base)),
        }
    }

    /// The frozen layer, without a branch.
    pub fn into_base(self) -> Self {
        match self {
            Self::QLora(layer) => Self::Nf4(layer.base),
            Self::DenseLora(layer) => Self::Dense(layer.base),
            frozen => frozen,
        }
    }

    /// The bias of the frozen layer.
    pub fn bias(&self) -> Option<&Param<Tensor<1>>> {
        let bias = match self {
            Self::Nf4(layer) => &layer.bias,
            Self::QLora(layer) => &layer.base.bias,
            Self::Dense(layer) => &layer.bias,
            Self::DenseLora(layer) => &layer.base.bias,
        };
        bias.as_ref()
    }

    /// The layer with another bias.
    pub fn with_bias(mut self, bias: Param<Tensor<1>>) -> Self {
        let slot = match &mut self {
            Self::Nf4(layer) => &mut layer.bias,
            Self::QLora(layer) => &mut layer.base.bias,
            Self::Dense(layer) => &mut layer.bias,
            Self::DenseLora(layer) => &mut layer.base.bias,
        };
        *slot = Some(bias);
        self
    }

    /// `[d_output, d_input]`.
    pub fn dims(&self) -> [usize; 2] {
        let dense = |layer: &Linear| {
            let [d_input, d_output] = layer.weight.dims();
            [d_output, d_input]
        };
        match self {
            Self::Nf4(layer) => layer.dims(),
            Self::QLora(layer) => layer.base.dims(),
            Self::Dense(layer) => dense(layer),
            Self::DenseLora(layer) => dense(&layer.base),
        }
    }

    /// Puts a fresh branch on the layer, in place of any that is there.
    pub fn with_lora(self, lora: &QLoraLinearConfig, device: &Device) -> Result<Self, Nf4Error> {
        match self.into_base() {
            Self::Nf4(base) => Ok(Self::QLora(lora.init(base, device)?)),
            Self::Dense(base) => dense_lora(base, lora, device).map(Self::DenseLora),
            adapted => Ok(adapted),
        }
    }
}

/// Initialised as [`QLoraLinearConfig::init`] does it: the branch of a 4-bit layer of that size.
fn dense_lora(
    base: Linear,
    lora: &QLoraLinearConfig,
    device: &Device,
) -> Result<DenseLora, Nf4Error> {
    let [d_input, d_output] = base.weight.dims();
    let shape = burn_nf4::nn::Nf4LinearConfig::new(d_input, d_output).with_bias(false);
    let without_dora = lora.clone().with_use_dora(false);
    let branch = without_dora.init(shape.init(device)?, device)?;
    let mut layer = DenseLora {
        base: base.to_device(device),
        lora_a: branch.lora_a,
        lora_b: branch.lora_b,
        lora_magnitude: None,
        dropout: branch.dropout,
        scale: branch.scale,
    };
    if lora.use_dora {
        let norms = Tensor::from_data(layer.row_norms().into_data(), (device, DType::F32));
        layer.lora_magnitude = Some(Param::from_tensor(norms));
    }
    Ok(layer)
}
