//! The dense weight is not kept between forward and backward, shown by counting bytes: on Flex
//! with an allocator that counts, on CubeCL devices with the device's own count.
//!
//! The same measurement of a dense path, which must keep the weight, shows that it can fail.

mod counting;
mod tensors;

use burn::module::Module;
#[cfg(feature = "flex")]
use burn::module::{Lora, ParamGroup};
#[cfg(feature = "flex")]
use burn::nn::Linear;
#[cfg(feature = "flex")]
use burn::tensor::Int;
use burn::tensor::{Device, Gradients, Tensor};
use burn_nf4::BlockWeight;
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::nn::QuantLinear;
#[cfg(feature = "flex")]
use burn_nf4::nn::{QLoraLinear, QLoraLinearConfig, reparameterize_linears};
#[cfg(feature = "flex")]
use burn_nf4::op::{LinearCrossEntropyOptions, linear_cross_entropy};
use counting::alone;
use tensors::*;

const SIZE: usize = 512;
#[cfg(feature = "flex")]
const RANK: usize = 4;
/// Enough that the weight is decoded and not read as it is.
const ROWS: usize = 16;
/// 1 MiB, against which everything else (x and y: 32 KiB each) is small.
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
    tensor(
        &uniform(ROWS * SIZE, 2),
        [ROWS, SIZE],
        FloatType::F32,
        device,
    )
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

fn frozen(device: &Device) -> QuantLinear {
    let dense = tensor(&weights(SIZE * SIZE, 1), [SIZE; 2], FloatType::F32, device);
    let weight = BlockWeight::quantize(dense, QuantConfig::default()).expect("valid");
    QuantLinear::new(weight, None).expect("a matrix")
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
    assert_nothing_large_kept("QuantLinear", kept);

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
        counting::live_bytes() as isize
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

    /// Forward and backward of a head. With room for all logits they are held at once, so the measurement can fail.
    #[test]
    fn the_logits_of_a_loss_are_never_held_at_once() {
        const ROWS: usize = 256;
        const HIDDEN: usize = 16;
        const VOCABULARY: usize = 4096;
        let _alone = alone();
        let device = Device::flex().autodiff();
        let x = tensor(
            &uniform(ROWS * HIDDEN, 5),
            [ROWS, HIDDEN],
            FloatType::F32,
            &device,
        );
        let x = x.require_grad();
        let shape = [VOCABULARY, HIDDEN];
        let head = tensor(
            &uniform(VOCABULARY * HIDDEN, 6),
            shape,
            FloatType::F32,
            &device,
        );
        let targets = Tensor::<1, Int>::zeros([ROWS], &device);
        let logits_bytes = ROWS * VOCABULARY * 4;
        let peak_bytes = |chunk_bytes: usize| {
            let options = LinearCrossEntropyOptions {
                chunk_bytes,
                ..Default::default()
            };
            let pass = || {
                let (x, head) = (x.clone(), head.clone());
                let loss = linear_cross_entropy(x, head, None, targets.clone(), &options);
                loss.expect("it fits").backward()
            };
            drop(pass()); // starts the threads
            counting::peak_bytes(pass).0
        };
        let in_parts = peak_bytes(logits_bytes / 16);
        assert!(in_parts < logits_bytes / 3, "{in_parts} of {logits_bytes}");
        let at_once = peak_bytes(logits_bytes);
        assert!(at_once >= logits_bytes, "{at_once} of {logits_bytes}");
    }

    /// An unchanged `Linear` with a packed weight, without an adapter and with one of Burn's.
    fn packed_linears(device: &Device) -> [(&'static str, Linear); 2] {
        let dense = frozen(device).to_dense(FloatType::F32).expect("f32");
        let linear = reparameterize_linears(dense, QuantConfig::default(), ParamGroup::all());
        let linear = linear.expect("a Linear");
        let adapted = linear.clone().apply_lora(Lora::new(RANK, 1.0));
        [
            ("a packed Linear", linear),
            ("a packed Linear with LoRA", adapted),
        ]
    }

    #[test]
    fn a_packed_linear_holds_no_dense_weight() {
        let _alone = alone();
        let device = Device::flex().autodiff();
        drop(packed_linears(&device)); // starts the threads
        let before = live_bytes(&device);
        let linears = packed_linears(&device);
        let bytes = live_bytes(&device) - before;
        assert!(bytes < DENSE_BYTES / 4, "{bytes} bytes for two layers");
        drop(linears);
    }

    /// Burn's own product keeps no operand that it can compute again: with an adapter always, without
    /// one where the device asks to save memory.
    #[test]
    fn a_packed_linear_keeps_no_dense_weight() {
        let _alone = alone();
        let device = Device::flex().autodiff();
        let [(_, linear), (what, adapted)] = packed_linears(&device);
        let kept = measure(&device, live_bytes, |x| adapted.forward(x));
        assert_nothing_large_kept(what, kept);
        let kept = measure(&device, live_bytes, |x| linear.forward(x));
        assert!(kept.after_forward_bytes >= DENSE_BYTES);

        let device = device.gradient_checkpointing();
        for (what, linear) in packed_linears(&device) {
            let kept = measure(&device, live_bytes, |x| linear.forward(x));
            assert_nothing_large_kept(what, kept);
        }
    }

    /// A batch that Burn does not fold into rows makes it reshape the weight, and without gradient
    /// checkpointing the result of that is kept: a limit that the docs of `nn` tell.
    #[test]
    fn batches_need_checkpointing_on_a_packed_linear() {
        let _alone = alone();
        let device = Device::flex().autodiff();
        let batched = |linear: &Linear, x: Tensor<2>| {
            let x = x.repeat_dim(0, 2 * 32 / ROWS).reshape([2, 32, SIZE]);
            linear.forward(x).reshape([2 * 32, SIZE])
        };
        for (what, linear) in packed_linears(&device) {
            let kept = measure(&device, live_bytes, |x| batched(&linear, x));
            assert!(kept.after_forward_bytes >= DENSE_BYTES, "{what}");
        }
        let device = device.gradient_checkpointing();
        for (what, linear) in packed_linears(&device) {
            let kept = measure(&device, live_bytes, |x| batched(&linear, x));
            // x and y are four times those of the other tests.
            let bytes = kept.after_forward_bytes;
            assert!(bytes < DENSE_BYTES / 2, "{what} keeps {bytes} bytes");
            assert!(kept.after_backward_bytes < DENSE_BYTES / 2, "{what}");
        }
    }

    /// A few rows are multiplied with the weight as it is.
    #[test]
    fn few_rows_need_no_dense_weight() {
        let _alone = alone();
        let device = Device::flex();
        let layer = frozen(&device);
        let x = input(&device).slice([0..2, 0..SIZE]);
        drop(layer.forward(x.clone())); // starts the threads
        let (bytes, y) = counting::peak_bytes(|| layer.forward(x));
        assert!(bytes < SMALL_BYTES as usize, "{bytes} bytes");
        assert_eq!(y.dims(), [2, SIZE]);
    }

    /// Forward and backward decode a piece at a time, as many as there are threads.
    #[test]
    fn no_dense_weight_exists() {
        let _alone = alone();
        let device = Device::flex().autodiff();
        let layer = frozen(&device);
        let x = input(&device).require_grad();
        let threads = rayon::ThreadPoolBuilder::new().num_threads(2).build();
        threads.expect("threads start").install(|| {
            let peak = |run: &mut dyn FnMut()| {
                let (bytes, ()) = counting::peak_bytes(run);
                bytes as isize
            };
            let mut y = layer.forward(x.clone()); // starts the threads
            let forward_bytes = peak(&mut || y = layer.forward(x.clone()));
            let mut grads = None;
            let backward_bytes = peak(&mut || grads = Some(y.clone().sum().backward()));
            assert!(x.grad(&grads.expect("ran")).is_some());
            for (what, bytes) in [("forward", forward_bytes), ("backward", backward_bytes)] {
                assert!(
                    bytes < DENSE_BYTES,
                    "{what} takes {bytes} bytes at most, the dense weight {DENSE_BYTES}"
                );
            }
        });
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
