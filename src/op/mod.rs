//! The custom Burn ops: quantize, dequantize and a linear map with a packed weight, on every
//! backend that Burn dispatches to, with autodiff.

mod autodiff;
mod backend;
#[cfg(feature = "cube")]
mod cube;
#[cfg(feature = "cublaslt")]
mod cublaslt;
mod dense;
mod embedding;
#[cfg(feature = "flex")]
mod flex;
mod linear;
mod reproducible;
mod spec;
#[cfg(feature = "cube")]
mod tune;
mod weight;

pub use backend::{
    DenseSpec, DequantizeSpec, EmbeddingSpec, LinearSpec, LoraSpec, MatmulSpec, MatmulStrategy,
    Nf4Backend, QuantizeSpec,
};
pub use dense::{DenseProvider, MatmulOptions, dense_provider, matmul, set_dense_provider};
pub use embedding::embedding;
pub(crate) use linear::connect_empty;
pub use linear::{LowRank, expert_linear, linear, linear_with, lora_linear};
pub use reproducible::{REPRODUCIBLE_VARIABLE, is_reproducible, set_reproducible};
pub use weight::Nf4Weight;

use burn::tensor::{DType, Device};

use crate::error::Nf4Error;
use crate::format::FloatType;

impl From<FloatType> for DType {
    fn from(dtype: FloatType) -> Self {
        match dtype {
            FloatType::F16 => Self::F16,
            FloatType::BF16 => Self::BF16,
            FloatType::F32 => Self::F32,
        }
    }
}

impl FloatType {
    /// The float type that a tensor's dtype is; `tensor` is the name put in the error.
    ///
    /// # Errors
    /// [`Nf4Error::Dtype`] unless it is f16, bf16 or f32.
    pub fn from_dtype(dtype: DType, tensor: &str) -> Result<Self, Nf4Error> {
        match dtype {
            DType::F16 => Ok(Self::F16),
            DType::BF16 => Ok(Self::BF16),
            DType::F32 | DType::Flex32 => Ok(Self::F32),
            _ => Err(Nf4Error::Dtype {
                tensor: tensor.into(),
                expected: "f16, bf16 or f32".into(),
                given: format!("{dtype:?}"),
            }),
        }
    }
    /// Checks that a device can hold this type.
    ///
    /// # Errors
    /// [`Nf4Error::DeviceDtype`].
    pub(crate) fn check_device(self, device: &Device) -> Result<(), Nf4Error> {
        if device.supports_dtype(DType::from(self)) {
            return Ok(());
        }
        Err(Nf4Error::DeviceDtype {
            device: format!("{device:?}"),
            dtype: self.name().into(),
        })
    }
}
