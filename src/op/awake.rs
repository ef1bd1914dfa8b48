//! Threads that stay awake between small operations.

use burn::tensor::Device;

/// Threads of the CPU that are kept awake; see [`keep_threads_awake`].
#[derive(Debug)]
pub struct Awake {
    #[cfg(feature = "flex")]
    _threads: crate::host::Awake,
}

/// Keeps the threads that compute for Flex, Burn's CPU backend, from falling asleep between operations, until
/// what is returned is dropped: for many small ones in a row, such as the steps of generating a text. Nothing on
/// other devices, and with autodiff.
///
/// See [`host::keep_awake`](crate::host::keep_awake()) for what it costs, and for what else must not use the
/// threads meanwhile.
pub fn keep_threads_awake(device: &Device) -> Option<Awake> {
    #[cfg(feature = "flex")]
    if let burn::backend::DispatchDevice::Flex(_) = device.as_dispatch() {
        return Some(Awake {
            _threads: crate::host::keep_awake(),
        });
    }
    let _ = device;
    None
}
