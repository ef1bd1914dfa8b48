//! The model of `examples/llama` against what transformers and PEFT computed.

#![allow(dead_code, reason = "the modules of the example are shared, not all of each is used")]

#[path = "../examples/llama/attention.rs"]
mod attention;
#[path = "../examples/llama/cache.rs"]
mod cache;
#[path = "../examples/llama/config.rs"]
mod config;
#[path = "../examples/llama/error.rs"]
mod error;
#[path = "../examples/llama/load.rs"]
mod load;
#[path = "../examples/llama/model.rs"]
mod model;
#[path = "../examples/llama/projection.rs"]
mod projection;
#[path = "../examples/llama/rope.rs"]
mod rope;

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_nf4::checkpoint::{Checkpoint, SafetensorsFile};
use burn_nf4::format::FloatType;
use rstest::rstest;

use config::LlamaConfig;
use model::Llama;

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/hf")
        .join(path)
}

fn open(folder: &str, dtype: Option<FloatType>, device: &Device) -> (Llama, LlamaConfig) {
    let folder = fixture(folder);
    let config = LlamaConfig::from_folder(&folder).unwrap();
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let dtype = dtype.unwrap_or(config.dtype);
    let model = load::load(&checkpoint, &config, dtype, device, |_| ()).unwrap();
    (model, config)
}

/// An I64 tensor of a safetensors file.
fn ints(file: &SafetensorsFile, key: &str) -> (Vec<i64>, Vec<usize>) {
    let shape = file.tensor_info(key).unwrap().shape.to_vec();
    let values = file
        .tensor_bytes(key)
        .unwrap()
        .chunks_exact(8)
        .map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap()))
        .collect();
    (values, shape)
}

fn input_ids(file: &SafetensorsFile, device: &Device) -> Tensor<2, Int> {
    let (values, shape) = ints(file, "input_ids");
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn max_difference(ours: Vec<f32>, theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter()
        .zip(theirs)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |max, d| if d.is_nan() { f32::NAN } else { max.max(d) })
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

#[rstest]
#[case::single("f32/model")]
#[case::sharded("f32_sharded/model")]
fn logits_match_transformers(#[case] folder: &str) {
    let device = Device::default();
    let (model, config) = open(folder, None, &device);
    let io = SafetensorsFile::open(fixture("f32/io.safetensors")).unwrap();
    let (theirs, _) = io.load_float::<f32>("logits").unwrap();
    let mut rope = model.rope_tables(&config);
    let ours = floats(model.logits(input_ids(&io, &device), &mut rope));
    let difference = max_difference(ours, &theirs);
    println!("{folder}: {difference:e}");
    assert!(difference < 2e-5, "{difference:e}");
}

#[test]
fn bf16_logits_match_transformers_within_their_rounding() {
    let device = Device::default();
    let io = SafetensorsFile::open(fixture("bf16/io.safetensors")).unwrap();
    let (theirs, _) = io.load_float::<f32>("logits").unwrap();
    for dtype in [FloatType::BF16, FloatType::F32] {
        let (model, config) = open("bf16/model", Some(dtype), &device);
        let mut rope = model.rope_tables(&config);
        let ours = floats(model.logits(input_ids(&io, &device), &mut rope));
        let size = theirs.iter().fold(0f32, |max, x| max.max(x.abs()));
        println!("{dtype:?}: {:e} of {size}", max_difference(ours, &theirs));
    }
}
