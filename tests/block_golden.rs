//! Weights in NVFP4, MXFP4 and FP8 through the readers, bit for bit as their reference libraries have them.
#![cfg(feature = "checkpoint")]

mod blocks;
mod stored;

use std::collections::BTreeSet;

use blocks::{CASES, Case, dequantized, open};
use burn_nf4::checkpoint::Checkpoint;
use burn_nf4::format::{BlockTensor, FloatType, QuantConfig};

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn each(check: impl Fn(&Case)) {
    CASES.iter().for_each(check);
}

/// Catches a golden file that no longer reaches the tests below.
#[test]
fn every_file_is_tested() {
    let files = std::fs::read_dir("tests/fixtures/fp4").unwrap();
    let files = files.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let found: BTreeSet<String> = files
        .filter(|name| name.ends_with(".safetensors"))
        .collect();
    let listed = CASES
        .iter()
        .map(|case| format!("{}.safetensors", case.file));
    assert_eq!(found, listed.collect());
}

/// Catches a weight that is taken for one of another format, and tensors beside it that are taken for one.
#[test]
fn a_weight_is_found_by_its_tensors() {
    each(|case| {
        let file = open(case.file);
        assert_eq!(file.quantized_weights(), [case.parameter], "{}", case.file);
        assert!(file.is_quantized(case.parameter));
        assert!(!file.is_quantized("dequantized"));
        assert!(!file.is_transposed(case.parameter).unwrap());
        let form = file.weight_form(case.parameter).unwrap();
        assert_eq!(form.shape, case.shape, "{}", case.file);
        assert_eq!(
            form.config,
            QuantConfig::of(case.quant_type),
            "{}",
            case.file
        );
        assert_eq!(form.dtype, FloatType::BF16);
        let checkpoint = Checkpoint::open(blocks::path(case.file)).unwrap();
        let mut parameters: Vec<&str> = file.keys().collect();
        parameters.retain(|key| ["dequantized", "library", "source"].contains(key));
        parameters.push(case.parameter);
        parameters.sort_unstable();
        assert_eq!(checkpoint.parameters(), parameters);
        assert_eq!(checkpoint.faults(), []);
        assert_eq!(checkpoint.quantized_weights(), [case.parameter]);
    });
}

/// Catches codes in another order, scales of another block, a second scale that is applied otherwise.
#[test]
fn values_are_those_of_the_libraries() {
    each(|case| {
        let tensor = open(case.file).load_quantized(case.parameter).unwrap();
        let values: Vec<f32> = tensor.dequantize();
        assert!(
            bits(&values) == bits(&dequantized(case.file)),
            "{}",
            case.file
        );
    });
}

/// Catches an image that differs from that of the tensor in host memory.
#[test]
fn the_image_is_that_of_the_tensor() {
    each(|case| {
        let tensor = open(case.file).load_quantized(case.parameter).unwrap();
        let words = tensor.to_packed();
        let back = BlockTensor::from_packed(&words, case.shape, tensor.config(), tensor.dtype());
        assert_eq!(back.unwrap(), tensor, "{}", case.file);
    });
}

#[cfg(feature = "flex")]
#[test]
fn weights_on_a_device_have_the_same_values() {
    use burn::tensor::Device;
    each(|case| {
        let weight = open(case.file)
            .load_weight(case.parameter, &Device::flex())
            .unwrap();
        assert_eq!(weight.shape(), case.shape);
        let data = match case.shape.len() {
            2 => weight.dequantize::<2>(FloatType::F32).unwrap().into_data(),
            _ => weight.dequantize::<3>(FloatType::F32).unwrap().into_data(),
        };
        let values: Vec<f32> = data.try_to_vec::<f32>().unwrap();
        assert!(
            bits(&values) == bits(&dequantized(case.file)),
            "{}",
            case.file
        );
    });
}
