//! The linear layers of the model: 4-bit, 16-bit, and either with a trained branch.

use burn::module::{Module, Param};
use burn::nn::{Dropout, Linear};
use burn::tensor::{Device, Tensor};
use burn_nf4::Nf4Error;
use burn_nf4::nn::{Nf4Linear, QLoraLinear, QLoraLinearConfig};

use crate::cache::element_bytes;

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
    pub base: Linear,
    /// `A`, `[d_input, rank]`.
    pub lora_a: Param<Tensor<2>>,
    /// `B`, `[rank, d_output]`.
    pub lora_b: Param<Tensor<2>>,
    pub dropout: Dropout,
    pub scale: f64,
}

impl DenseLora {
    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let dtype = x.dtype();
        let y = self.base.forward(x.clone());
        let (a, b) = (self.lora_a.val(), self.lora_b.val());
        let x = self.dropout.forward(x).cast(a.dtype());
        let branch = x.matmul(a.unsqueeze()).matmul(b.unsqueeze()) * self.scale;
        y + branch.cast(dtype)
    }
}

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
            Self::Dense(layer) => layer.forward(x),
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

    /// Puts a fresh branch on the layer, in place of any that is there.
    pub fn with_lora(self, lora: &QLoraLinearConfig, device: &Device) -> Result<Self, Nf4Error> {
        match self {
            Self::Nf4(base) => Ok(Self::QLora(lora.init(base, device)?)),
            Self::QLora(layer) => Ok(Self::QLora(lora.init(layer.base, device)?)),
            Self::Dense(base) | Self::DenseLora(DenseLora { base, .. }) => {
                dense_lora(base, lora, device).map(Self::DenseLora)
            }
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
    let branch = lora.init(shape.init(device)?, device)?;
    Ok(DenseLora {
        base,
        lora_a: branch.lora_a,
        lora_b: branch.lora_b,
        dropout: branch.dropout,
        scale: branch.scale,
    })
}
