//! What devices say of themselves.

use burn::tensor::Device;

/// Whether a device records its launches in a graph and replays them as one call, which is what
/// [`burn::tensor::capture`] needs to gain anything: elsewhere it runs the closure again. CUDA, ROCm and
/// wgpu do, without autodiff.
pub fn has_graphs(device: &Device) -> bool {
    #[cfg(feature = "cube")]
    if let burn::backend::DispatchDevice::Cube(device) = device.as_dispatch() {
        return device.client().name() != "cpu";
    }
    let _ = device;
    false
}

/// The bytes that a device has for all that it holds, where it says so: CUDA, ROCm and CubeCL's CPU do.
pub fn device_memory_bytes(device: &Device) -> Option<u64> {
    #[cfg(feature = "cube")]
    if let burn::backend::DispatchDevice::Cube(device) =
        device.clone().without_autodiff().as_dispatch()
    {
        return device.client().properties().memory.max_memory();
    }
    let _ = device;
    None
}
