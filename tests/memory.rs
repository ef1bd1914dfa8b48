//! The dense weight is not kept between forward and backward, shown by counting bytes: on Flex
//! with an allocator that counts, on CubeCL devices with the device's own count.
//!
//! The same measurement of a dense path, which must keep the weight, shows that it can fail.

mod tensors;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::module::Module;
use burn::tensor::{Device, Gradients, Tensor};
use burn_nf4::Nf4Weight;
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::nn::Nf4Linear;
#[cfg(feature = "flex")]
use burn_nf4::nn::{QLoraLinear, QLoraLinearConfig};
use tensors::*;

/// Counts the bytes allocated and not freed, and the most there ever were.
struct Counting;

static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);
static PEAK_BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is handed on to the system allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller keeps to the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller keeps to the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller keeps to the contract of `dealloc`.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(new_size);
        LIVE_BYTES.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller keeps to the contract of `realloc`.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

fn count(bytes: usize) {
    let live = LIVE_BYTES.fetch_add(bytes, Relaxed) + bytes;
    PEAK_BYTES.fetch_max(live, Relaxed);
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One measurement at a time: the counts are the process's and the device's.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

const SIZE: usize = 512;
#[cfg(feature = "flex")]
const RANK: usize = 4;
/// 1 MiB, against which everything else (x and y: 8 rows, 16 KiB each) is small.
const DENSE_BYTES: isize = (SIZE * SIZE * 4) as isize;
const SMALL_BYTES: isize = DENSE_BYTES / 8;

/// Bytes in use on a device.
type LiveBytes = fn(&Device) -> isize;

/// What a forward pass leaves behind, and what a backward pass after it does.
struct Kept {
    after_forward_bytes: isize,
    after_backward_bytes: isize,
}

fn input(device: &Device) -> Tensor<2> {
    tensor(&uniform(8 * SIZE, 2), [8, SIZE], FloatType::F32, device)
}

/// Runs forward and backward, holding on to the output and the gradients as training does.
fn measure(
    device: &Device,
    live_bytes: LiveBytes,
    forward: impl Fn(Tensor<2>) -> Tensor<2>,
) -> Kept {
    let pass = |x: &Tensor<2>| -> (isize, isize, Gradients) {
        let y = forward(x.clone());
        let after_forward = live_bytes(device);
        let grads = y.sum().backward();
        let dx = x.grad(&grads).expect("a gradient");
        assert!(values(&dx).iter().any(|&g| g != 0.0));
        (after_forward, live_bytes(device), grads)
    };
    // The first pass starts threads, compiles and tunes.
    pass(&input(device).require_grad());
    let x = input(device).require_grad();
    let before = live_bytes(device);
    let (after_forward, after_backward, _grads) = pass(&x);
    Kept {
        after_forward_bytes: after_forward - before,
        after_backward_bytes: after_backward - before,
    }
}

fn frozen(device: &Device) -> Nf4Linear {
    let dense = tensor(&weights(SIZE * SIZE, 1), [SIZE; 2], FloatType::F32, device);
    let weight = Nf4Weight::quantize(dense, QuantConfig::default()).expect("valid");
    Nf4Linear::new(weight, None).expect("a matrix")
}

#[cfg(feature = "flex")]
fn qlora(device: &Device) -> QLoraLinear {
    let a = tensor(
        &uniform(SIZE * RANK, 3),
        [SIZE, RANK],
        FloatType::F32,
        device,
    );
    let b = tensor(
        &uniform(SIZE * RANK, 4),
        [RANK, SIZE],
        FloatType::F32,
        device,
    );
    QLoraLinearConfig::new(RANK)
        .init_with(frozen(device), a, b)
        .expect("it fits")
}

#[track_caller]
fn assert_nothing_large_kept(what: &str, kept: Kept) {
    let Kept {
        after_forward_bytes,
        after_backward_bytes,
    } = kept;
    assert!(
        after_forward_bytes < SMALL_BYTES,
        "{what} keeps {after_forward_bytes} bytes after forward"
    );
    assert!(
        after_backward_bytes < SMALL_BYTES,
        "{what} keeps {after_backward_bytes} bytes after backward"
    );
}

fn the_dense_weight_is_not_kept(device: Device, live_bytes: LiveBytes) {
    let _alone = alone();
    let device = device.autodiff();
    let layer = frozen(&device);
    let packed_bytes = layer.weight.size_bytes() as isize;
    assert!(packed_bytes < DENSE_BYTES / 7, "{packed_bytes}");
    let kept = measure(&device, live_bytes, |x| layer.forward(x));
    assert_nothing_large_kept("Nf4Linear", kept);

    // Decoding first and multiplying with the result keeps it for the backward pass: the
    // measurement sees a weight where there is one.
    let dense = measure(&device, live_bytes, |x| {
        let dense = layer.to_dense(FloatType::F32).expect("f32");
        dense.no_grad().forward(x)
    });
    assert!(
        dense.after_forward_bytes >= DENSE_BYTES,
        "the dense weight is {DENSE_BYTES} bytes, the count rose by {}",
        dense.after_forward_bytes
    );
    assert!(dense.after_backward_bytes < SMALL_BYTES);
}

/// The allocator sees no GPU memory, but Flex's.
#[cfg(feature = "flex")]
mod flex {
    use super::*;

    fn live_bytes(_: &Device) -> isize {
        LIVE_BYTES.load(Relaxed) as isize
    }

    #[test]
    fn the_dense_weight_is_not_kept() {
        super::the_dense_weight_is_not_kept(Device::flex(), live_bytes);
    }

    #[test]
    fn the_dense_weight_is_not_kept_beside_a_branch_or_with_checkpointing() {
        let _alone = alone();
        let device = Device::flex().autodiff();
        for device in [device.clone(), device.gradient_checkpointing()] {
            let layer = qlora(&device);
            let kept = measure(&device, live_bytes, |x| layer.forward(x));
            assert_nothing_large_kept("QLoraLinear", kept);
            let dora = layer.with_magnitude(Tensor::ones([SIZE], &device));
            let dora = dora.expect("it fits");
            let kept = measure(&device, live_bytes, |x| dora.forward(x));
            assert_nothing_large_kept("QLoraLinear with DoRA", kept);
        }
    }

    /// Forward and backward each decode the whole weight once, one after the other.
    #[test]
    fn one_dense_weight_exists_at_a_time() {
        let _alone = alone();
        let device = Device::flex().autodiff();
        let layer = frozen(&device);
        let x = input(&device).require_grad();
        let peak = |run: &mut dyn FnMut()| {
            let before = live_bytes(&device);
            PEAK_BYTES.store(before as usize, Relaxed);
            run();
            PEAK_BYTES.load(Relaxed) as isize - before
        };
        let mut y = layer.forward(x.clone()); // starts the threads
        let forward_bytes = peak(&mut || y = layer.forward(x.clone()));
        let mut grads = None;
        let backward_bytes = peak(&mut || grads = Some(y.clone().sum().backward()));
        assert!(x.grad(&grads.expect("ran")).is_some());
        for (what, bytes) in [("forward", forward_bytes), ("backward", backward_bytes)] {
            assert!(
                (DENSE_BYTES..2 * DENSE_BYTES).contains(&bytes),
                "{what} takes {bytes} bytes at most, the dense weight {DENSE_BYTES}"
            );
        }
    }
}

macro_rules! device_tests {
    ($name:ident, $feature:literal, $device:expr) => {
        #[cfg(feature = $feature)]
        mod $name {
            use super::*;

            fn live_bytes(device: &Device) -> isize {
                device.sync().expect("a device that runs");
                let usage = device.memory_pool_usage().expect("a device that counts");
                usage.bytes_in_use as isize
            }

            #[test]
            fn the_dense_weight_is_not_kept() {
                super::the_dense_weight_is_not_kept($device, live_bytes);
            }
        }
    };
}

device_tests!(cuda, "cuda", Device::cuda(0));
device_tests!(rocm, "rocm", Device::rocm(0));
device_tests!(wgpu, "wgpu", Device::wgpu(Default::default()));
device_tests!(vulkan, "vulkan", Device::vulkan(Default::default()));
device_tests!(metal, "metal", Device::metal(Default::default()));
// Not on CubeCL's CPU runtime: Burn's tuning of a product of this size waits in barriers there for
// many minutes.
