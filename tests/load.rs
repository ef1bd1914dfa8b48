//! Loads from the map to the device: the same weights that the way over host memory gives, those
//! stored transposed and those of more than two dimensions included.
#![cfg(feature = "checkpoint")]

mod golden;
mod stored;
mod tensors;

use std::path::PathBuf;

use burn::module::Module;
use burn::store::ModuleRecord;
use burn::tensor::{DType, Device, Tensor};
use burn_nf4::checkpoint::{Checkpoint, Dtype, SafetensorsFile};
use burn_nf4::format::{BlockTensor, FloatType, QuantConfig, WeightForm};
use burn_nf4::nn::{QLoraLinearConfig, QuantLinear, QuantLinearConfig};
use burn_nf4::{BlockWeight, Nf4Error, expert_linear, linear};
use rstest::rstest;
use stored::Tensors;
use tempfile::TempDir;
use tensors::*;

const D_INPUT: usize = 40;
const D_OUTPUT: usize = 24;
const KEY: &str = "proj.weight";

/// A matrix product in TF32 (CUDA) keeps 11 bits of each factor. Its error over sums of at most
/// 40 terms, a second product after it included, stays well below 2^-8 of the largest value.
const PRODUCT_TOLERANCE: f64 = 1.0 / 256.0;

fn hf(name: &str) -> PathBuf {
    PathBuf::from("tests/fixtures/hf").join(name).join("model")
}

fn opened(tensors: &Tensors) -> (TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    stored::write(folder.path(), tensors);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    (folder, checkpoint)
}

fn quantized(shape: &[usize], config: QuantConfig) -> BlockTensor {
    let values = uniform(shape.iter().product(), shape.len() as u64);
    BlockTensor::quantize(&values, shape, config).unwrap()
}

/// A layer whose file holds `[D_INPUT, D_OUTPUT]`, the transpose of its weight.
fn transposed(config: QuantConfig, device: &Device) -> (BlockTensor, QuantLinear) {
    let weight = quantized(&[D_INPUT, D_OUTPUT], config);
    let mut tensors = stored::weight(KEY, &weight);
    stored::transpose(&mut tensors, KEY);
    let (_folder, checkpoint) = opened(&tensors);
    assert!(checkpoint.is_transposed(KEY).unwrap());
    assert_eq!(checkpoint.load_quantized(KEY).unwrap(), weight);
    let loaded = checkpoint.load_weight(KEY, device).unwrap();
    let bias = tensor(&uniform(D_OUTPUT, 9), [D_OUTPUT], FloatType::F32, device);
    (weight, QuantLinear::new(loaded, Some(bias)).unwrap())
}

/// The parameter's values: the transpose of what is stored.
fn transposed_values(weight: &BlockTensor) -> Vec<f64> {
    let stored: Vec<f32> = weight.dequantize();
    let stored: Vec<f64> = stored.into_iter().map(f64::from).collect();
    tensors::transposed(&stored, D_INPUT, D_OUTPUT)
}

#[track_caller]
fn assert_near(got: &[f64], expected: &[f64], what: &str) {
    tensors::assert_near(got, expected, PRODUCT_TOLERANCE, what);
}

#[rstest]
#[case("f32")]
#[case("bf16")]
#[case("f32_sharded")]
fn real_weights_load_to_the_device_as_to_the_host(#[case] name: &str) {
    let checkpoint = Checkpoint::open(hf(name)).unwrap();
    let device = Device::default();
    let prefixes = checkpoint.quantized_weights();
    assert_eq!(prefixes.len(), 14);
    for prefix in prefixes {
        let host = checkpoint.load_quantized(prefix).unwrap();
        let weight = checkpoint.load_weight(prefix, &device).unwrap();
        assert_eq!(weight.to_host().unwrap(), host, "{prefix}");
        let words: Vec<u32> = weight.packed().into_data().iter::<u32>().collect();
        assert_eq!(words, host.to_packed(), "{prefix}");
    }
}

#[test]
fn shards_hold_what_the_single_file_holds() {
    let single = Checkpoint::open(hf("f32")).unwrap();
    let sharded = Checkpoint::open(hf("f32_sharded")).unwrap();
    assert_eq!(sharded.files().len(), 4);
    assert_eq!(single.parameters(), sharded.parameters());
    for key in single.keys() {
        let [a, b] = [&single, &sharded].map(|from| from.tensor_info(key).unwrap());
        assert_eq!(a, b, "{key}");
        let [a, b] = [&single, &sharded].map(|from| from.tensor_bytes(key).unwrap());
        assert_eq!(a, b, "{key}");
    }
}

#[test]
fn golden_weights_load_to_the_device_as_to_the_host() {
    let names = golden::names();
    assert_eq!(names.len(), 29);
    for name in names {
        let path = golden::path(&format!("{name}.safetensors"));
        let device = Device::default();
        for weight in [
            SafetensorsFile::open(&path)
                .unwrap()
                .load_weight("weight", &device),
            Checkpoint::open(&path)
                .unwrap()
                .load_weight("weight", &device),
        ] {
            assert_eq!(
                weight.unwrap().to_host().unwrap(),
                golden::load(&name).tensor,
                "{name}"
            );
        }
    }
}

#[rstest]
#[case::nested(QuantConfig::default())]
#[case::flat(QuantConfig::flat())]
fn transposed_weight_decodes_to_the_transpose(#[case] config: QuantConfig) {
    let (host, layer) = transposed(config, &Device::default());
    let expected = transposed_values(&host);
    let weight = &layer.weight;
    assert!(weight.is_transposed());
    assert_eq!(layer.dims(), [D_OUTPUT, D_INPUT]);
    assert_eq!(weight.shape(), [D_OUTPUT, D_INPUT]);
    assert_eq!(weight.to_host().unwrap(), host);

    let whole: Tensor<2> = weight.dequantize(FloatType::F32).unwrap();
    assert_eq!(whole.dims(), [D_OUTPUT, D_INPUT]);
    assert_eq!(values(&whole), expected);
    let rows = weight.dequantize_rows(3..8, FloatType::F32).unwrap();
    assert_eq!(rows.dims(), [5, D_INPUT]);
    assert_eq!(values(&rows), expected[3 * D_INPUT..8 * D_INPUT]);
    let row: Tensor<1> = weight.dequantize_index(7, FloatType::F32).unwrap();
    assert_eq!(values(&row), expected[7 * D_INPUT..8 * D_INPUT]);
    assert!(layer.to_string().contains("transposed: true"), "{layer}");
}

#[test]
fn transposed_layer_computes_what_the_dense_layer_computes() {
    let device = Device::default();
    let (host, layer) = transposed(QuantConfig::default(), &device);
    let dense = layer.to_dense(FloatType::F32).unwrap();
    assert_eq!(
        values(&dense.weight.val().transpose()),
        transposed_values(&host)
    );
    let x: Tensor<3> = tensor(
        &uniform(6 * D_INPUT, 1),
        [2, 3, D_INPUT],
        FloatType::F32,
        &device,
    );
    let y = layer.forward(x.clone());
    assert_eq!(y.dims(), [2, 3, D_OUTPUT]);
    assert_near(&values(&y), &values(&dense.forward(x)), "y");
}

#[test]
fn gradients_flow_through_a_transposed_layer_as_through_the_dense_one() {
    let device = Device::default().autodiff();
    let (_, layer) = transposed(QuantConfig::default(), &device);
    let dense = layer.to_dense(FloatType::F32).unwrap();
    let x: Tensor<2> = tensor(
        &uniform(5 * D_INPUT, 2),
        [5, D_INPUT],
        FloatType::F32,
        &device,
    );
    let gradient = |forward: &dyn Fn(Tensor<2>) -> Tensor<2>| {
        let x = x.clone().require_grad();
        let y = forward(x.clone());
        let grads = (y.clone() * y).sum().backward();
        values(&x.grad(&grads).unwrap())
    };
    assert_near(
        &gradient(&|x| layer.forward(x)),
        &gradient(&|x| dense.forward(x)),
        "dx",
    );
}

#[test]
fn a_branch_merges_into_a_transposed_layer() {
    let device = Device::default();
    let (_, base) = transposed(QuantConfig::default(), &device);
    let a = tensor(
        &uniform(D_INPUT * 4, 3),
        [D_INPUT, 4],
        FloatType::F32,
        &device,
    );
    let b = tensor(
        &uniform(4 * D_OUTPUT, 4),
        [4, D_OUTPUT],
        FloatType::F32,
        &device,
    );
    let layer = QLoraLinearConfig::new(4).init_with(base, a, b).unwrap();
    let merged = layer.merge(FloatType::F32).unwrap();
    let x: Tensor<2> = tensor(
        &uniform(5 * D_INPUT, 5),
        [5, D_INPUT],
        FloatType::F32,
        &device,
    );
    assert_near(
        &values(&layer.forward(x.clone())),
        &values(&merged.forward(x)),
        "y",
    );
}

#[test]
fn records_tell_a_transposed_weight_from_a_plain_one() {
    let device = Device::default();
    let (host, layer) = transposed(QuantConfig::default(), &device);
    let blank = QuantLinearConfig::new(D_INPUT, D_OUTPUT).with_transposed(true);
    let bytes = layer.clone().into_record().into_bytes().unwrap();
    let loaded = blank
        .init(&device)
        .unwrap()
        .load_record(ModuleRecord::from_bytes(bytes).unwrap());
    assert_eq!(loaded.weight.to_host().unwrap(), host);
    assert_eq!(loaded.dims(), [D_OUTPUT, D_INPUT]);

    // Square matrices of either form have the same tensor but for its header.
    let square = QuantLinearConfig::new(32, 32);
    for transposed in [false, true] {
        let of = |transposed| square.clone().with_transposed(transposed).init(&device);
        let record = || of(transposed).unwrap().into_record();
        assert!(of(transposed).unwrap().try_load_record(record()).is_ok());
        let other = of(!transposed).unwrap();
        let error = other.try_load_record(record()).unwrap_err();
        let missing = "weight.packed_nf4_64_256_float32_32x32";
        assert!(error.to_string().contains(missing), "{error}");
    }
}

#[test]
fn zeros_stored_transposed_decode_to_zeros() {
    let device = Device::default();
    let form = |shape: &[usize]| WeightForm {
        shape: shape.to_vec(),
        dtype: FloatType::F32,
        config: QuantConfig::default(),
        transposed: true,
    };
    let zeros = BlockWeight::zeros_of(form(&[6, 4]), &device).unwrap();
    assert_eq!(zeros.shape(), [6, 4]);
    assert_eq!(zeros.to_host().unwrap().shape(), [4, 6]);
    let dense: Tensor<2> = zeros.dequantize(FloatType::F32).unwrap();
    assert_eq!(values(&dense), [0.0; 24]);
    let error = BlockWeight::zeros_of(form(&[2, 6, 4]), &device);
    assert!(matches!(error, Err(Nf4Error::NotAMatrix { .. })));
}

#[test]
fn transposed_stacks_are_refused_and_vectors_are_their_own_transpose() {
    let device = Device::default();
    let load = |shape: &[usize]| {
        let mut tensors = stored::weight(KEY, &quantized(shape, QuantConfig::default()));
        stored::transpose(&mut tensors, KEY);
        let (_folder, checkpoint) = opened(&tensors);
        checkpoint.load_weight(KEY, &device)
    };
    let expected = Nf4Error::NotAMatrix {
        tensor: KEY.into(),
        shape: vec![2, 8, 16],
    };
    assert_eq!(load(&[2, 8, 16]).unwrap_err(), expected);
    let vector = load(&[96]).unwrap();
    assert!(!vector.is_transposed());
    assert_eq!(vector.shape(), [96]);
}

/// 33 columns: the experts begin inside of blocks and bytes.
#[rstest]
#[case::nested(QuantConfig::default())]
#[case::flat(QuantConfig::flat())]
fn experts_of_a_stack_are_decoded_and_multiplied_one_by_one(#[case] config: QuantConfig) {
    let device = Device::default();
    let shape = [3, 17, 33];
    let host = quantized(&shape, config);
    let (_folder, checkpoint) = opened(&stored::weight(KEY, &host));
    let weight = checkpoint.load_weight(KEY, &device).unwrap();
    assert_eq!(weight.shape(), shape);
    let whole: Tensor<3> = weight.dequantize(FloatType::F32).unwrap();
    let decoded: Vec<f32> = host.dequantize();
    assert_eq!(
        values(&whole),
        decoded.iter().map(|&v| f64::from(v)).collect::<Vec<_>>()
    );

    let x: Tensor<2> = tensor(&uniform(4 * 33, 6), [4, 33], FloatType::F32, &device);
    for expert in 0..3 {
        let matrix: Tensor<2> = weight.dequantize_index(expert, FloatType::F32).unwrap();
        let slice = whole.clone().slice(expert..expert + 1);
        assert_eq!(values(&matrix), values(&slice), "expert {expert}");
        let y = expert_linear(x.clone(), &weight, expert, None).unwrap();
        let expected = x.clone().matmul(matrix.transpose());
        assert_near(&values(&y), &values(&expected), "y");
    }

    let no_expert = Nf4Error::RowRange {
        start: 3,
        end: 4,
        rows: 3,
    };
    let rank = |expected| Nf4Error::Rank {
        tensor: "weight".into(),
        expected,
        shape: shape.to_vec(),
    };
    let index = |index| weight.dequantize_index::<2>(index, FloatType::F32);
    assert_eq!(index(3).unwrap_err(), no_expert);
    assert_eq!(
        expert_linear(x.clone(), &weight, 3, None).unwrap_err(),
        no_expert
    );
    let vector = weight.dequantize_index::<1>(0, FloatType::F32);
    assert_eq!(vector.unwrap_err(), rank(2));
    assert!(matches!(
        linear(x.clone(), &weight, None),
        Err(Nf4Error::NotAMatrix { .. })
    ));
    let matrix = BlockWeight::from_host(&quantized(&[4, 33], config), &device);
    let error = expert_linear(x, &matrix, 0, None).unwrap_err();
    assert!(matches!(error, Nf4Error::Rank { shape, expected: 3, .. } if shape == [4, 33]));
}

fn float_file() -> (Vec<f32>, Tensors) {
    let values = vec![0.1, -2.5, 65280.0, 1e-8, f32::INFINITY, -0.0];
    let mut tensors = Tensors::from([("f32".into(), stored::floats(&values, &[2, 3]))]);
    for (key, dtype, of) in [
        ("f16", Dtype::F16, FloatType::F16),
        ("bf16", Dtype::BF16, FloatType::BF16),
    ] {
        let tensor = stored::Stored {
            dtype,
            shape: vec![2, 3],
            bytes: bytes(&values, of),
        };
        tensors.insert(key.into(), tensor);
    }
    let ints = stored::Stored {
        dtype: Dtype::I32,
        shape: vec![2, 3],
        bytes: vec![0; 24],
    };
    tensors.insert("i32".into(), ints);
    (values, tensors)
}

#[rstest]
fn floats_load_as_stored_or_rounded_once(
    #[values(FloatType::F16, FloatType::BF16, FloatType::F32)] from: FloatType,
    #[values(
        None,
        Some(FloatType::F16),
        Some(FloatType::BF16),
        Some(FloatType::F32)
    )]
    to: Option<FloatType>,
) {
    let (values, tensors) = float_file();
    let (_folder, checkpoint) = opened(&tensors);
    let key = match from {
        FloatType::F16 => "f16",
        FloatType::BF16 => "bf16",
        FloatType::F32 => "f32",
    };
    let stored: Vec<f32> = match from {
        FloatType::F16 => golden::widen(checkpoint.load_float::<half::f16>(key).unwrap().0),
        FloatType::BF16 => golden::widen(checkpoint.load_float::<half::bf16>(key).unwrap().0),
        FloatType::F32 => values,
    };
    let tensor: Tensor<2> = checkpoint.load_tensor(key, to, &Device::default()).unwrap();
    assert_eq!(tensor.dims(), [2, 3]);
    let to = to.unwrap_or(from);
    assert_same_bits(&bits(tensor, to), &bytes(&stored, to), key);
}

/// A finite value never becomes an infinity; one that is stored stays one.
#[rstest]
#[case(FloatType::F16, 65520.0, f32::INFINITY)]
#[case(FloatType::F16, -1e5, f32::NEG_INFINITY)]
#[case(FloatType::BF16, f32::MAX, f32::INFINITY)]
fn floats_beyond_the_type_asked_for_are_refused(
    #[case] to: FloatType,
    #[case] value: f32,
    #[case] given: f32,
) {
    let values = [f32::INFINITY, 1.0, value, f32::NAN];
    let tensors = Tensors::from([("w".into(), stored::floats(&values, &[2, 2]))]);
    let (_folder, checkpoint) = opened(&tensors);
    let tensor = checkpoint.load_tensor::<2>("w", Some(to), &Device::default());
    let expected = Nf4Error::NonFinite {
        tensor: "w".into(),
        index: 2,
        given,
    };
    assert_eq!(tensor.unwrap_err(), expected);
    assert!(
        checkpoint
            .load_tensor::<2>("w", None, &Device::default())
            .is_ok()
    );
}

#[test]
fn floats_that_do_not_fit_are_refused() {
    let (_, tensors) = float_file();
    let (_folder, checkpoint) = opened(&tensors);
    let device = Device::default();
    let rank = |expected| Nf4Error::Rank {
        tensor: "f32".into(),
        expected,
        shape: vec![2, 3],
    };
    let vector = checkpoint.load_tensor::<1>("f32", None, &device);
    assert_eq!(vector.unwrap_err(), rank(1));
    let stack = checkpoint.load_tensor::<3>("f32", None, &device);
    assert_eq!(stack.unwrap_err(), rank(3));
    let ints = checkpoint.load_tensor::<2>("i32", None, &device);
    let expected = Nf4Error::Dtype {
        tensor: "i32".into(),
        expected: "F16, BF16, F32".into(),
        given: "I32".into(),
    };
    assert_eq!(ints.unwrap_err(), expected);
    let missing = checkpoint.load_tensor::<2>("f64", None, &device);
    assert!(matches!(missing, Err(Nf4Error::MissingKey { key, .. }) if key == "f64"));
    assert_eq!(
        checkpoint
            .load_tensor::<2>("bf16", None, &device)
            .unwrap()
            .dtype(),
        DType::BF16
    );
}
