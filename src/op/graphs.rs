//! Which devices record what they compute.

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
