//! Where to run and in which type.

use burn::tensor::{DType, Device};
use burn_nf4::format::FloatType;
use clap::ValueEnum;

use burn_nf4_llm::error::ModelError;

/// Devices other than the CPU need the cargo feature of their name.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum DeviceName {
    Cpu,
    Cuda,
    Wgpu,
}

/// The type to compute in.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum DTypeName {
    F16,
    Bf16,
    F32,
}

impl DeviceName {
    /// The device, if its feature is compiled in.
    pub fn open(self) -> Result<Device, ModelError> {
        match self {
            #[cfg(feature = "flex")]
            Self::Cpu => Ok(Device::flex()),
            #[cfg(feature = "cuda")]
            Self::Cuda => Ok(Device::cuda(0)),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Ok(Device::wgpu(Default::default())),
            #[allow(unreachable_patterns, reason = "some features may be off")]
            _ => Err(ModelError::Argument(format!(
                "{self:?} needs the cargo feature of its name"
            ))),
        }
    }

    /// The type asked for; else f32 on the CPU, and elsewhere that of the model where the device
    /// has it.
    pub fn dtype(
        self,
        asked: Option<DTypeName>,
        of_model: FloatType,
        device: &Device,
    ) -> Result<FloatType, ModelError> {
        let dtype = match (asked, self) {
            (Some(DTypeName::F16), _) => FloatType::F16,
            (Some(DTypeName::Bf16), _) => FloatType::BF16,
            (Some(DTypeName::F32), _) | (None, Self::Cpu) => FloatType::F32,
            (None, _) if device.supports_dtype(DType::from(of_model)) => of_model,
            (None, _) => FloatType::F32,
        };
        if !device.supports_dtype(DType::from(dtype)) {
            return Err(ModelError::Argument(format!(
                "{self:?} has no {} here",
                dtype.name()
            )));
        }
        Ok(dtype)
    }
}
