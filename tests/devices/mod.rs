//! Tests that run on every device of a build. Shared by those whose functions take the device alone.

/// A test of each function on each device whose feature is on: `on_every_device!(every_shape, gradients);`
/// makes `flex::every_shape`, `wgpu::every_shape` and so on, which fail if there is no such device.
macro_rules! on_every_device {
    ($($test:ident),+ $(,)?) => {
        on_every_device!(@on flex, burn::tensor::Device::flex(), $($test)+);
        #[cfg(feature = "wgpu")]
        on_every_device!(@on wgpu, burn::tensor::Device::wgpu(Default::default()), $($test)+);
        #[cfg(feature = "cpu")]
        on_every_device!(@on cpu, burn::tensor::Device::cpu(), $($test)+);
        #[cfg(feature = "cuda")]
        on_every_device!(@on cuda, burn::tensor::Device::cuda(0), $($test)+);
    };
    (@on $module:ident, $device:expr, $($test:ident)+) => {
        mod $module {
            $(
                #[test]
                fn $test() {
                    super::$test(&$device);
                }
            )+
        }
    };
}
