//! What memory a device has.

use burn::tensor::Device;

/// Bytes of a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// All that it has.
    pub total: u64,
    /// Those that tensors of this process take. Other processes are not counted, nor are pages that the
    /// runtime keeps to use again.
    pub in_use: u64,
}

impl DeviceMemory {
    /// Bytes that tensors can still take at most.
    pub fn left(&self) -> u64 {
        self.total.saturating_sub(self.in_use)
    }
}

/// The memory of a device, where its runtime tells: CUDA, ROCm, Metal, Vulkan and CubeCL's CPU runtime do. None
/// for Flex and wgpu's other back ends.
pub fn device_memory(device: &Device) -> Option<DeviceMemory> {
    #[cfg(feature = "cube")]
    if let burn::backend::DispatchDevice::Cube(device) =
        device.clone().without_autodiff().as_dispatch()
    {
        let client = device.client();
        let total = client.properties().memory.max_memory()?;
        let report = client.memory_report(cubecl::MemoryScope::Device);
        return Some(DeviceMemory {
            total,
            in_use: report.usage().bytes_in_use,
        });
    }
    let _ = device;
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "flex")]
    #[test]
    fn flex_does_not_tell() {
        assert_eq!(device_memory(&Device::flex()), None);
    }

    /// Those of a tensor are counted, and are left again after it.
    #[cfg(feature = "cpu")]
    #[test]
    fn the_bytes_of_a_tensor_are_counted() {
        use burn::tensor::Tensor;

        let device = Device::cpu();
        let memory = || {
            device.sync().unwrap();
            device_memory(&device).unwrap()
        };
        let before = memory();
        assert!(before.total > 1 << 20);
        let tensor = Tensor::<1>::zeros([1 << 20], &device);
        let during = memory();
        assert_eq!(during.total, before.total);
        assert!(
            during.in_use >= before.in_use + (4 << 20),
            "{before:?} {during:?}"
        );
        assert_eq!(during.left(), during.total - during.in_use);
        drop(tensor);
        assert!(memory().in_use < during.in_use);
    }
}
