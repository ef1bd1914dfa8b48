//! Loading to a device takes one copy in host memory and no more, shown on Flex, where the copy
//! becomes the tensor, with an allocator that counts.
//!
//! What counts is every byte that the process allocates: the map is none of them, the tensor on
//! the device is. A test takes the peak of a load over what was live before it, and the most that
//! a load may take is [`ALLOWED`] times the tensor that it leaves behind; of several loads, times
//! the largest one beyond the tensors that stay.
#![cfg(feature = "checkpoint")]
#![cfg(feature = "flex")]

mod counting;
mod stored;

use std::path::Path;

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{DType, Device, Tensor};
use burn_nf4::checkpoint::{Checkpoint, CheckpointStore, Dtype, SINGLE_FILE, SafetensorsFile};
use burn_nf4::format::{BlockTensor, FloatType, QuantConfig};
use burn_nf4::nn::{QuantLinear, QuantLinearConfig};
use burn_nf4::{BlockWeight, linear};
use burn_store::ModuleSnapshot;
use counting::{alone, live_bytes, peak_bytes};
use rstest::rstest;

/// Largest host memory of a load, as a multiple of the tensor loaded.
const ALLOWED: f64 = 1.1;
const SHAPE: [usize; 2] = [1024, 1536];
const WEIGHTS: usize = 4;
/// Loading allocates this much for names, shapes and the 1 KiB map, whatever the weight's size.
const SMALL_BYTES: usize = 64 * 1024;

/// A file of several quantized weights and dense tensors, in a folder of its own.
fn write(folder: &Path, config: QuantConfig) {
    let elems = SHAPE[0] * SHAPE[1];
    let mut tensors = stored::Tensors::new();
    for i in 0..WEIGHTS {
        let mut weight = BlockTensor::zeros(&SHAPE, config, FloatType::F32).unwrap();
        weight = BlockTensor::from_parts(
            weight.codes().iter().map(|code| code ^ i as u8).collect(),
            weight.absmax().clone(),
            SHAPE.to_vec(),
            config.block_size,
            FloatType::F32,
            config.quant_type,
        )
        .unwrap();
        tensors.extend(stored::weight(&format!("layer.{i}.weight"), &weight));
    }
    for (name, dtype, size) in [("bf16", Dtype::BF16, 2), ("f32", Dtype::F32, 4)] {
        let tensor = stored::Stored {
            dtype,
            shape: SHAPE.to_vec(),
            // The bits of small floats in either type.
            bytes: (0..elems * size).map(|j| (j % 61) as u8).collect(),
        };
        tensors.insert(name.into(), tensor);
    }
    stored::write(folder, &tensors);
}

/// Runs a load and checks what it takes.
#[track_caller]
fn assert_one_copy<T>(what: &str, tensor_bytes: usize, run: impl FnOnce() -> T) -> T {
    let (peak, out) = peak_bytes(run);
    // Less than the tensor itself would mean that the count missed it.
    assert!(
        peak >= tensor_bytes,
        "{what}: {peak} of {tensor_bytes} bytes"
    );
    assert!(
        peak as f64 <= ALLOWED * tensor_bytes as f64,
        "{what}: {peak} bytes at most, {tensor_bytes} in the tensor"
    );
    out
}

#[rstest]
#[case::nested(QuantConfig::default())]
#[case::flat(QuantConfig::flat())]
fn a_quantized_weight_is_copied_once(#[case] config: QuantConfig) {
    let _alone = alone();
    let device = Device::flex();
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), config);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let file = SafetensorsFile::open(folder.path().join(SINGLE_FILE)).unwrap();
    let bytes = BlockWeight::zeros(&SHAPE, config, FloatType::F32, &device)
        .unwrap()
        .size_bytes();
    assert_one_copy("Checkpoint", bytes, || {
        checkpoint.load_weight("layer.0.weight", &device).unwrap()
    });
    assert_one_copy("SafetensorsFile", bytes, || {
        file.load_weight("layer.1.weight", &device).unwrap()
    });

    // The way over `BlockTensor` has two copies at once: the measurement sees a second one.
    let (two_copies, _) = peak_bytes(|| {
        let host = file.load_quantized("layer.0.weight").unwrap();
        BlockWeight::from_host(&host, &device)
    });
    assert!(two_copies as f64 > 1.9 * bytes as f64, "{two_copies}");
}

/// The weights that stay are those loaded, each in one copy.
#[test]
fn weights_loaded_one_after_the_other_add_up_to_themselves() {
    let _alone = alone();
    let device = Device::flex();
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), QuantConfig::default());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let before = live_bytes();
    let (peak, weights) = peak_bytes(|| -> Vec<BlockWeight> {
        let prefixes = checkpoint.quantized_weights();
        let load = |prefix: &&str| checkpoint.load_weight(prefix, &device).unwrap();
        prefixes.iter().map(load).collect()
    });
    assert_eq!(weights.len(), WEIGHTS);
    let one = weights[0].size_bytes();
    let stays = live_bytes() - before;
    assert!((WEIGHTS * one..WEIGHTS * one + SMALL_BYTES).contains(&stays));
    assert!(
        peak - stays <= one / 10,
        "{} bytes beyond those that stay, a weight has {one}",
        peak - stays
    );
}

#[rstest]
#[case::bf16("bf16", None, 2)]
#[case::f32("f32", None, 4)]
#[case::widened("bf16", Some(FloatType::F32), 4)]
#[case::rounded("f32", Some(FloatType::BF16), 2)]
#[case::rounded_to_f16("f32", Some(FloatType::F16), 2)]
fn a_dense_tensor_is_copied_once_converted_or_not(
    #[case] key: &str,
    #[case] dtype: Option<FloatType>,
    #[case] size: usize,
) {
    let _alone = alone();
    let device = Device::flex();
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), QuantConfig::default());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let tensor: Tensor<2> = assert_one_copy(key, SHAPE[0] * SHAPE[1] * size, || {
        checkpoint.load_tensor(key, dtype, &device).unwrap()
    });
    assert_eq!(tensor.dims(), SHAPE);
    if let Some(dtype) = dtype {
        assert_eq!(tensor.dtype(), DType::from(dtype));
    }
}

/// A module's weight of zeros costs nothing until it is used, so that loading over it does not
/// either.
#[test]
fn zeros_take_their_memory_when_used() {
    let _alone = alone();
    let device = Device::flex();
    let config = QuantConfig::default();
    let (peak, zeros) =
        peak_bytes(|| BlockWeight::zeros(&SHAPE, config, FloatType::F32, &device).unwrap());
    assert!(peak < SMALL_BYTES, "{peak}");
    let before = live_bytes();
    assert_eq!(zeros.packed().dims(), [zeros.layout().words()]);
    // Threads of the tests before may free a little in between.
    assert!(live_bytes() + SMALL_BYTES >= before + zeros.size_bytes());
}

/// The backward pass of a transposed weight decodes it again.
#[test]
fn a_transposed_layer_keeps_no_dense_weight() {
    let _alone = alone();
    let device = Device::flex().autodiff();
    let folder = tempfile::tempdir().unwrap();
    let values: Vec<f32> = (0..512 * 512).map(|i| (i as f32 * 0.7).sin()).collect();
    let host = BlockTensor::quantize(&values, &[512, 512], QuantConfig::default()).unwrap();
    let mut tensors = stored::weight("weight", &host);
    stored::transpose(&mut tensors, "weight");
    stored::write(folder.path(), &tensors);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let weight = checkpoint.load_weight("weight", &device).unwrap();
    let pass = || {
        let x = Tensor::<2>::ones([8, 512], &device).require_grad();
        let before = live_bytes();
        let y = linear(x.clone(), &weight, None).unwrap();
        let after_forward = live_bytes() - before;
        let grads = y.sum().backward();
        let dx = x.grad(&grads).unwrap().to_data();
        assert!(dx.iter::<f32>().any(|g| g != 0.0));
        after_forward
    };
    pass(); // starts the threads
    let kept = pass();
    assert!(
        kept < weight.shape().iter().product::<usize>() * 4 / 8,
        "{kept}"
    );
}

#[derive(Module, Debug)]
struct Model {
    layer: Vec<QuantLinear>,
    /// Of these PyTorch stores the transpose.
    bf16: Linear,
    f32: Linear,
}

/// What a module loads is in memory once, beside what it has loaded already.
#[test]
fn a_module_is_loaded_one_tensor_at_a_time() {
    let _alone = alone();
    let device = Device::flex();
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), QuantConfig::default());
    let mut store = CheckpointStore::open(folder.path())
        .unwrap()
        .with_key_remapping("^(bf16|f32)$", "$1.weight")
        .unwrap();
    let [d_output, d_input] = SHAPE;
    let layer = QuantLinearConfig::new(d_input, d_output).with_bias(false);
    let dense = LinearConfig::new(d_input, d_output).with_bias(false);
    let mut model = Model {
        layer: (0..WEIGHTS).map(|_| layer.init(&device).unwrap()).collect(),
        bf16: dense.init(&device),
        f32: dense.init(&device),
    };
    let before = live_bytes();
    let (peak, result) = peak_bytes(|| model.load_from(&mut store).unwrap());
    assert_eq!(result.applied.len(), WEIGHTS + 2);
    assert_eq!(model.bf16.weight.dims(), [d_input, d_output]);
    let stays = live_bytes() - before;
    let dense_bytes = d_input * d_output * (2 + 4);
    let expected = WEIGHTS * model.layer[0].weight.size_bytes() + dense_bytes;
    assert!((expected..expected + SMALL_BYTES).contains(&stays));
    let largest = d_input * d_output * 4;
    assert!(
        peak - stays <= largest / 10,
        "{} bytes beyond those that stay, the largest tensor has {largest}",
        peak - stays
    );
}
