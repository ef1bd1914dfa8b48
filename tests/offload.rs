//! Tensors that wait in the memory of the host. In a program of its own, one test at a time: the bytes in use are
//! those of the device.
//!
//! ```text
//! cargo test --features wgpu --test offload
//! ```
#![cfg(all(feature = "flex", any(feature = "cuda", feature = "wgpu")))]

mod tensors;

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_nf4::Nf4Error;
use burn_nf4::op::OffloadStack;
use tensors::uniform;

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As f32 bits, which f16 and bf16 have too.
fn bits(x: &Tensor<2>) -> Vec<u32> {
    let data = x.clone().inner().cast(DType::F32).into_data();
    data.iter::<f32>().map(f32::to_bits).collect()
}

/// With -0, a subnormal number, an infinity and NaN among the values.
fn tensor(rows: usize, columns: usize, dtype: DType, device: &Device) -> Tensor<2> {
    let mut values = uniform(rows * columns, (rows * 31 + columns) as u64);
    let special = [-0.0, f32::INFINITY, f32::NAN, 1e-40];
    for (value, special) in values.iter_mut().zip(special) {
        *value = special;
    }
    let data = TensorData::new(values, [rows, columns]);
    Tensor::from_data(data, (device, dtype))
}

/// Sizes around pages and pieces of the pools, one element, and none.
const SHAPES: [[usize; 2]; 9] = [
    [1, 1],
    [3, 5],
    [64, 64],
    [0, 4],
    [700, 1000],
    [1, 100_003],
    [1024, 2048],
    [7, 9],
    [512, 512],
];

fn tensors_come_back_bit_for_bit(device: &Device) {
    let _alone = alone();
    let mut stack = OffloadStack::new(device).unwrap();
    let dtypes: Vec<DType> = [DType::F32, DType::F16, DType::BF16]
        .into_iter()
        .filter(|&dtype| burn_nf4::op::supports_dtype(device, dtype))
        .collect();
    // The memory of the first round is used again.
    for _ in 0..3 {
        let mut expected = Vec::new();
        for (i, [rows, columns]) in SHAPES
            .into_iter()
            .cycle()
            .take(4 * SHAPES.len())
            .enumerate()
        {
            let x = tensor(rows, columns, dtypes[i % dtypes.len()], device);
            expected.push((x.dtype(), bits(&x)));
            stack.push(x).unwrap();
        }
        assert_eq!(stack.len(), expected.len());
        for (dtype, expected) in expected.into_iter().rev() {
            let x = stack.pop().unwrap().expect("there are more");
            stack.prefetch().unwrap();
            assert_eq!(x.dtype(), dtype);
            assert!(bits(&x) == expected, "{:?}", x.dims());
        }
        assert!(stack.pop().unwrap().is_none());
    }
}

/// Nothing here is waited for: what is computed next must not reach the copies, nor they it.
fn copies_are_of_what_a_tensor_was_when_it_was_pushed(device: &Device) {
    let _alone = alone();
    let start = tensor(512, 512, DType::F32, device)
        .clamp(-1.0, 1.0)
        .mul_scalar(0.5);
    let step = |x: Tensor<2>| (x + 0.25) * 0.75;
    let mut x = start.clone();
    let mut stack = OffloadStack::new(device).unwrap();
    for _ in 0..20 {
        stack.push(x.clone()).unwrap();
        x = step(x);
    }
    let mut back = Vec::new();
    while let Some(x) = stack.pop().unwrap() {
        // In place, if somebody thinks that it is alone.
        back.push(x.clone());
        let _ = step(x);
        stack.prefetch().unwrap();
    }
    let mut expected = start;
    for back in back.into_iter().rev() {
        assert!(bits(&back) == bits(&expected));
        expected = step(expected);
    }
}

fn a_view_is_copied_without_what_is_around_it(device: &Device) {
    let _alone = alone();
    let x = tensor(40, 60, DType::F32, device);
    let views = [
        x.clone().slice([3..17, 5..50]),
        x.clone().narrow(0, 4, 16),
        x.transpose(),
    ];
    let mut stack = OffloadStack::new(device).unwrap();
    for _ in 0..2 {
        views
            .iter()
            .for_each(|view| stack.push(view.clone()).unwrap());
    }
    for view in views.iter().rev().chain(views.iter().rev()) {
        let back = stack.pop().unwrap().expect("there are more");
        assert_eq!(back.dims(), view.dims());
        assert!(bits(&back) == bits(view));
    }
}

fn autodiff_is_as_it_was(device: &Device) {
    let _alone = alone();
    let devices = [
        device.clone(),
        device.clone().autodiff(),
        device.clone().autodiff().gradient_checkpointing(),
    ];
    let mut stack = OffloadStack::new(device).unwrap();
    for device in devices.iter().cycle().take(9) {
        stack.push(tensor(4, 8, DType::F32, device)).unwrap();
    }
    for device in devices.iter().rev().cycle().take(9) {
        let x = stack.pop().unwrap().expect("there are more");
        assert_eq!(&x.device(), device);
    }
}

const MEBIBYTE: u64 = 1 << 20;

fn in_use(device: &Device) -> u64 {
    device.sync().unwrap();
    let usage = device.memory_pool_usage();
    usage.expect("a device that counts").bytes_in_use
}

/// 32 tensors of 4 MiB. At most two are on their way to the host, each in two buffers on wgpu, and two on their way
/// back.
fn memory_of_the_device_is_free_meanwhile(device: &Device) {
    let _alone = alone();
    let one = || Tensor::<2>::ones([1024, 1024], device) * 2.0;
    let before = in_use(device);
    let kept: Vec<_> = (0..32).map(|_| one()).collect();
    let with_all = in_use(device);
    assert!(with_all >= before + 128 * MEBIBYTE, "{before} {with_all}");
    drop(kept);
    let mut stack = OffloadStack::new(device).unwrap();
    for _ in 0..32 {
        stack.push(one()).unwrap();
        let now = in_use(device);
        assert!(now <= before + 32 * MEBIBYTE, "{before} {now}");
    }
    assert_eq!(stack.host_bytes(), 30 * 4 * MEBIBYTE as usize);
    // Else copies would be slow, and the device would wait for them.
    assert_eq!(stack.pageable_copies(), 0);
    while let Some(x) = stack.pop().unwrap() {
        assert!((x.sum().into_scalar::<f32>() - 2.0 * 1024.0 * 1024.0).abs() < 1.0);
        stack.prefetch().unwrap();
        let now = in_use(device);
        assert!(now <= before + 32 * MEBIBYTE, "{before} {now}");
    }
    drop(stack);
    let after = in_use(device);
    assert!(after <= before + MEBIBYTE, "{before} {after}");
}

/// On their way there, there, and on their way back.
fn what_nobody_takes_is_dropped(device: &Device) {
    let _alone = alone();
    let before = in_use(device);
    for pushed in [1, 2, 8] {
        let mut stack = OffloadStack::new(device).unwrap();
        for _ in 0..pushed {
            stack.push(Tensor::<2>::ones([1024, 1024], device)).unwrap();
        }
        drop(stack.pop().unwrap());
        stack.prefetch().unwrap();
        if pushed == 8 {
            stack.clear();
            assert!(stack.is_empty() && stack.pop().unwrap().is_none());
            let x = tensor(8, 8, DType::F32, device);
            let expected = bits(&x);
            stack.push(x).unwrap();
            assert!(bits(&stack.pop().unwrap().expect("it was pushed")) == expected);
        }
    }
    let after = in_use(device);
    assert!(after <= before + MEBIBYTE, "{before} {after}");
}

fn a_tensor_of_another_device_is_refused(device: &Device) {
    let _alone = alone();
    let mut stack = OffloadStack::new(device).unwrap();
    let elsewhere = Tensor::<2>::ones([2, 2], &Device::flex());
    let error = stack.push(elsewhere).unwrap_err();
    assert!(matches!(error, Nf4Error::Device { .. }), "{error}");
    assert!(stack.is_empty());
}

macro_rules! device_tests {
    ($name:ident, $feature:literal, $device:expr, $($test:ident)+) => {
        #[cfg(feature = $feature)]
        mod $name {
            $(
                #[test]
                fn $test() {
                    super::$test(&$device);
                }
            )+
        }
    };
}

macro_rules! on_devices_with_memory {
    ($($test:ident),+ $(,)?) => {
        device_tests!(wgpu, "wgpu", burn::tensor::Device::wgpu(Default::default()), $($test)+);
        device_tests!(cuda, "cuda", burn::tensor::Device::cuda(0), $($test)+);
    };
}

on_devices_with_memory!(
    tensors_come_back_bit_for_bit,
    copies_are_of_what_a_tensor_was_when_it_was_pushed,
    a_view_is_copied_without_what_is_around_it,
    autodiff_is_as_it_was,
    memory_of_the_device_is_free_meanwhile,
    what_nobody_takes_is_dropped,
    a_tensor_of_another_device_is_refused,
);
