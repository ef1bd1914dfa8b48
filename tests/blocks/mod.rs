//! The golden files of `tests/fixtures/fp4`: weights in NVFP4, MXFP4 and FP8 by their reference libraries.
//!
//! Shared by the integration tests, each of which uses a part of it.
#![allow(dead_code)]

use std::path::PathBuf;

use crate::stored::{self, Tensors};
use burn_nf4::checkpoint::SafetensorsFile;
use burn_nf4::format::QuantType;

/// A file, the parameter in it, and what that is.
pub struct Case {
    pub file: &'static str,
    pub parameter: &'static str,
    pub quant_type: QuantType,
    pub shape: &'static [usize],
}

macro_rules! cases {
    ($($file:literal, $parameter:literal, $quant_type:ident, $shape:expr;)*) => {
        [$(Case { file: $file, parameter: $parameter, quant_type: QuantType::$quant_type, shape: &$shape }),*]
    };
}

pub const CASES: [Case; 17] = cases! {
    "nvfp4_ct_1x32", "weight", Nvfp4, [1, 32];
    "nvfp4_ct_17x64", "weight", Nvfp4, [17, 64];
    "nvfp4_ct_96x160", "weight", Nvfp4, [96, 160];
    "nvfp4_ct_128x256", "weight", Nvfp4, [128, 256];
    "nvfp4_modelopt_1x32", "weight", Nvfp4, [1, 32];
    "nvfp4_modelopt_17x64", "weight", Nvfp4, [17, 64];
    "nvfp4_modelopt_96x160", "weight", Nvfp4, [96, 160];
    "nvfp4_modelopt_128x256", "weight", Nvfp4, [128, 256];
    "mxfp4_ct_1x32", "weight", Mxfp4, [1, 32];
    "mxfp4_ct_17x64", "weight", Mxfp4, [17, 64];
    "mxfp4_ct_96x160", "weight", Mxfp4, [96, 160];
    "mxfp4_ct_128x256", "weight", Mxfp4, [128, 256];
    "mxfp4_gpt_oss", "gate_up_proj", Mxfp4, [3, 24, 128];
    "fp8_block128_200x300", "weight", Fp8Block, [200, 300];
    "fp8_block128_256x384", "weight", Fp8Block, [256, 384];
    "fp8_channel_200x300", "weight", Fp8Channel, [200, 300];
    "fp8_channel_256x384", "weight", Fp8Channel, [256, 384];
};

pub fn path(file: &str) -> PathBuf {
    PathBuf::from("tests/fixtures/fp4").join(format!("{file}.safetensors"))
}

pub fn open(file: &str) -> SafetensorsFile {
    SafetensorsFile::open(path(file)).expect("a golden file")
}

/// The values that the weight of a file has.
pub fn dequantized(file: &str) -> Vec<f32> {
    open(file).load_float("dequantized").expect("f32 values").0
}

/// The tensors of the weight of a file, with a name before theirs: `X.` makes `X.weight_packed` of
/// `weight_packed`.
pub fn tensors(file: &str, before: &str) -> Tensors {
    let of_weight = |key: &String| !["dequantized", "source", "library"].contains(&key.as_str());
    stored::read(&open(file))
        .into_iter()
        .filter(|(key, _)| of_weight(key))
        .map(|(key, tensor)| (format!("{before}{key}"), tensor))
        .collect()
}
