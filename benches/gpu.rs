//! A device that CubeCL drives, and what can decode a weight on it.

use burn::backend::DispatchDevice;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Device, Distribution, Shape};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use burn_nf4::Nf4Error;
use burn_nf4::format::FloatType;
use burn_nf4::launch::{self, DequantizePlan, Variant};
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::args::{Args, DeviceName, Sizes};
use crate::device_time::ROTATION_BYTES;
use crate::problems::Weight;
use crate::report::Place;
use crate::timing::Copier;
use crate::unfused;

/// A device and its yardstick.
pub struct Gpu {
    pub device: Device,
    pub client: Client,
    pub place: Place,
    /// Whether it is a graphics card; otherwise software that plays one.
    pub is_card: bool,
    pub sizes: Sizes,
    pub copier: Copier,
    /// Bytes a second that a device copy reads and writes; measured by [`Gpu::measure_copy`].
    pub copy: f64,
}

impl Gpu {
    /// # Errors
    /// If the device is not compiled in, or is not CubeCL's.
    pub fn open(name: DeviceName, args: &Args) -> Result<Self, String> {
        let device = open(name)?;
        let DispatchDevice::Cube(cube) = device.as_dispatch() else {
            return Err(format!("{device:?} is not a CubeCL device"));
        };
        let client = cube.client();
        let identity = &client.properties().identity;
        let place = Place {
            device: identity.name.clone(),
            backend: name.name(),
        };
        let is_card = identity.physical.is_some();
        let default_sizes = if is_card { Sizes::Full } else { Sizes::Small };
        Ok(Self {
            copier: Copier::new(&client, is_card),
            sizes: args.sizes.unwrap_or(default_sizes),
            device,
            client,
            place,
            is_card,
            copy: f64::NAN,
        })
    }

    pub fn measure_copy(&mut self) {
        self.copy = self.copier.bandwidth();
    }

    /// `dtype`, or f32 where the device does not have it.
    pub fn dtype_or_f32(&self, dtype: FloatType) -> FloatType {
        match launch::check_dtype(&self.client, dtype) {
            Ok(()) => dtype,
            Err(_) => FloatType::F32,
        }
    }

    /// A Burn tensor over a buffer, below the dispatch and fusion of `Tensor`.
    pub fn tensor<const D: usize>(
        &self,
        handle: Handle,
        dims: [usize; D],
        dtype: DType,
    ) -> CubeTensor {
        let (client, device) = (self.client.clone(), self.cube().clone());
        CubeTensor::new_contiguous(client, device, Shape::from(dims), handle, dtype)
    }

    /// The same of random values between -1 and 1.
    pub fn random<const D: usize>(&self, dims: [usize; D], dtype: FloatType) -> CubeTensor {
        let distribution = Distribution::Uniform(-1.0, 1.0);
        let dtype = DType::from(dtype).into();
        CubeBackend::float_random(Shape::from(dims), distribution, self.cube(), dtype)
    }

    fn cube(&self) -> &CubeDevice {
        match self.device.as_dispatch() {
            DispatchDevice::Cube(device) => device,
            other => unreachable!("`open` refuses {other:?}"),
        }
    }

    /// Copies of a weight of so many bytes that go past the caches of a card, elsewhere two.
    pub fn copies(&self, bytes: usize) -> usize {
        let rotation = if self.is_card { ROTATION_BYTES } else { 1 };
        (rotation / bytes).max(2)
    }

    /// Downloads the first `len` bytes of a buffer.
    pub fn read(&self, handle: &Handle, len: usize) -> Vec<u8> {
        let read = self.client.read_one(handle.clone());
        read.expect("the kernels ran")[..len].to_vec()
    }
}

fn open(name: DeviceName) -> Result<Device, String> {
    match name {
        #[cfg(feature = "cuda")]
        DeviceName::Cuda => Ok(Device::cuda(0)),
        #[cfg(feature = "rocm")]
        DeviceName::Rocm => Ok(Device::rocm(0)),
        #[cfg(feature = "metal")]
        DeviceName::Metal => Ok(Device::metal(Default::default())),
        #[cfg(feature = "vulkan")]
        DeviceName::Vulkan => Ok(Device::vulkan(Default::default())),
        #[cfg(feature = "wgpu")]
        DeviceName::Wgpu => Ok(Device::wgpu(Default::default())),
        #[cfg(feature = "cpu")]
        DeviceName::Cpu => Ok(Device::cpu()),
        other => Err(format!(
            "`{}` is not a CubeCL device compiled in",
            other.name()
        )),
    }
}

/// Something that decodes a packed weight.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Implementation {
    /// A kernel by name.
    Forced(Variant),
    /// The kernel that the crate chooses.
    Default,
    /// The baseline of two launches.
    Unfused,
}

impl Implementation {
    /// The baseline last.
    pub fn all() -> impl Iterator<Item = Self> {
        let forced = Variant::ALL.into_iter().map(Self::Forced);
        forced.chain([Self::Default, Self::Unfused])
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Forced(variant) => variant.name(),
            Self::Default => "default",
            Self::Unfused => "unfused",
        }
    }

    const fn variant(self) -> Option<Variant> {
        match self {
            Self::Forced(variant) => Some(variant),
            Self::Default | Self::Unfused => None,
        }
    }

    /// Why the device cannot run this, if it cannot.
    pub fn obstacle(self, gpu: &Gpu, weight: &Weight, dtype: FloatType) -> Option<String> {
        let plan = self.plan(&gpu.client, weight, dtype);
        plan.err().map(|error| error.to_string())
    }

    fn plan(
        self,
        client: &Client,
        weight: &Weight,
        dtype: FloatType,
    ) -> Result<DequantizePlan, Nf4Error> {
        let layout = &weight.layout;
        DequantizePlan::new(client, layout, 0..layout.elems(), dtype, self.variant())
    }

    /// Decodes the whole weight into `out`. `scales` is the baseline's scratch.
    pub fn launch(
        self,
        client: &Client,
        weight: &DeviceWeight,
        dtype: FloatType,
        scales: &Handle,
        out: &Handle,
    ) {
        let layout = &weight.host.layout;
        if self == Self::Unfused {
            unfused::dequantize(client, &weight.packed, layout, dtype, scales, out);
            return;
        }
        self.plan(client, weight.host, dtype)
            .and_then(|plan| plan.launch(weight.packed.clone(), out.clone()))
            .expect("a launch that was planned");
    }

    /// As [`launch`](Self::launch), with buffers allocated by the call.
    pub fn allocate_and_launch(
        self,
        client: &Client,
        weight: &DeviceWeight,
        dtype: FloatType,
    ) -> Handle {
        let layout = &weight.host.layout;
        let out = client.empty(layout.elems() * dtype.size_bytes());
        if self == Self::Unfused {
            let scales = client.empty(unfused::scales_bytes(layout));
            self.launch(client, weight, dtype, &scales, &out);
        } else {
            self.launch(client, weight, dtype, &out, &out);
        }
        out
    }
}

/// A packed weight on a device, and on the host.
pub struct DeviceWeight<'a> {
    pub packed: Handle,
    pub host: &'a Weight,
}

impl<'a> DeviceWeight<'a> {
    pub fn new(client: &Client, host: &'a Weight) -> Self {
        Self {
            packed: client.create_from_slice(bytemuck::cast_slice(&host.words)),
            host,
        }
    }
}
