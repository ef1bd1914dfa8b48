//! Where to run and in which type.

#[cfg(any(feature = "cuda", feature = "wgpu", feature = "rocm"))]
use burn::tensor::DeviceType;
use burn::tensor::{DType, Device};
use burn_nf4::Nf4Error;
use burn_nf4::format::FloatType;
use clap::ValueEnum;

use burn_nf4_llm::error::ModelError;

use crate::args::FloatArg;

/// Each needs a cargo feature to be on, the first the one that is on by default.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum DeviceName {
    /// The CPU, by Flex (feature `flex`).
    Cpu,
    /// An NVIDIA GPU (feature `cuda`).
    Cuda,
    /// An AMD GPU (feature `rocm`).
    Rocm,
    /// A GPU through wgpu (feature `wgpu`, `vulkan` or `metal`).
    Wgpu,
    /// The CPU, by CubeCL's runtime (feature `cpu`).
    CubeclCpu,
}

impl DeviceName {
    /// The cargo feature that it needs.
    fn feature(self) -> &'static str {
        match self {
            Self::Cpu => "flex",
            Self::Cuda => "cuda",
            Self::Rocm => "rocm",
            Self::Wgpu => "wgpu",
            Self::CubeclCpu => "cpu",
        }
    }

    /// The name as it is given.
    pub fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().into())
    }

    /// Has the CPU compute on this thread too, and not on others while this one sleeps: for commands that
    /// compute on one thread only. To be called before anything is computed.
    pub fn use_this_thread(self) {
        if self == Self::Cpu {
            let pool = rayon::ThreadPoolBuilder::new().use_current_thread();
            // There is one already, which does as well.
            let _ = pool.build_global();
        }
    }

    /// Refuses to move tensors to the host from a device that has them there.
    pub fn check_offload(self, argument: &str) -> Result<(), ModelError> {
        match self {
            Self::Cpu | Self::CubeclCpu => Err(ModelError::setting(
                "--device",
                self.name(),
                format!("a GPU for {argument}: on a CPU all is in the memory of the host"),
            )),
            Self::Cuda | Self::Rocm | Self::Wgpu => Ok(()),
        }
    }

    /// What the device calls itself.
    pub fn own_name(self, device: &Device) -> String {
        #[cfg(any(feature = "cuda", feature = "wgpu", feature = "rocm", feature = "cpu"))]
        if let Some(identity) = device.identity() {
            return identity.name;
        }
        let _ = device;
        processor().unwrap_or_else(|| std::env::consts::ARCH.into())
    }

    /// The device, if its feature is compiled in.
    pub fn open(self) -> Result<Device, ModelError> {
        match self {
            #[cfg(feature = "flex")]
            Self::Cpu => Ok(Device::flex()),
            #[cfg(feature = "cuda")]
            Self::Cuda => Ok(Device::cuda(0)),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Ok(Device::wgpu(Default::default())),
            #[cfg(feature = "rocm")]
            Self::Rocm => Ok(Device::rocm(0)),
            #[cfg(feature = "cpu")]
            Self::CubeclCpu => Ok(Device::cpu()),
            #[allow(unreachable_patterns, reason = "some features may be off")]
            _ => Err(ModelError::setting(
                "--device",
                self.name(),
                format!(
                    "a device of this build, or a build with the cargo feature `{}`",
                    self.feature()
                ),
            )),
        }
    }

    /// One of several such devices, by its number. On the CPU all numbers are the same one.
    pub fn open_at(self, index: usize) -> Result<Device, ModelError> {
        let first = self.open()?;
        let Some(all) = self.numbered() else {
            return Ok(first);
        };
        let count = all.len();
        all.into_iter().nth(index).ok_or_else(|| {
            let expected = format!(
                "a number below {count}, as many {} devices are here",
                self.name()
            );
            ModelError::setting("--devices", index, expected)
        })
    }

    /// All devices of the kind, if it is one of which there can be several.
    #[cfg(any(feature = "cuda", feature = "wgpu", feature = "rocm"))]
    fn numbered(self) -> Option<Vec<Device>> {
        let kind = match self {
            #[cfg(feature = "cuda")]
            Self::Cuda => DeviceType::Cuda,
            #[cfg(feature = "wgpu")]
            Self::Wgpu => DeviceType::Wgpu,
            #[cfg(feature = "rocm")]
            Self::Rocm => DeviceType::Rocm,
            _ => return None,
        };
        Some(Device::enumerate(kind).into_iter().collect())
    }

    #[cfg(not(any(feature = "cuda", feature = "wgpu", feature = "rocm")))]
    fn numbered(self) -> Option<Vec<Device>> {
        None
    }

    /// The type asked for; else f32 on the CPU, and elsewhere that of the model where the device
    /// has it.
    pub fn dtype(
        self,
        asked: Option<FloatArg>,
        of_model: FloatType,
        device: &Device,
    ) -> Result<FloatType, ModelError> {
        let dtype = match (asked, self) {
            (Some(asked), _) => asked.into(),
            (None, Self::Cpu | Self::CubeclCpu) => FloatType::F32,
            (None, _) if device.supports_dtype(DType::from(of_model)) => of_model,
            (None, _) => FloatType::F32,
        };
        if !device.supports_dtype(DType::from(dtype)) {
            return Err(Nf4Error::DeviceDtype {
                device: self.name(),
                dtype: dtype.name().into(),
            }
            .into());
        }
        Ok(dtype)
    }
}

/// Waits for all that was asked of a device.
pub fn sync(device: &Device) -> Result<(), ModelError> {
    device.sync().map_err(|error| fault(device, error))
}

/// What a device says that fails.
pub fn fault(device: &Device, error: impl std::fmt::Display) -> ModelError {
    ModelError::Device {
        device: format!("{device:?}"),
        message: error.to_string(),
    }
}

/// The processor's name, where the system tells (Linux).
fn processor() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    line.split_once(": ").map(|(_, name)| name.trim().into())
}
