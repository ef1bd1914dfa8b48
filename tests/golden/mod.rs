//! The golden files: weights quantized and dequantized by bitsandbytes 0.50.2 on an H100.
//!
//! Shared by the integration tests, each of which uses a part of it.
#![allow(dead_code)]

use std::path::PathBuf;

use burn_nf4::checkpoint::SafetensorsFile;
use burn_nf4::format::{BlockTensor, FloatElement, FloatType};

/// One golden file.
pub struct Golden {
    pub name: String,
    pub file: SafetensorsFile,
    /// The weight as bitsandbytes quantized it, through the crate's loader.
    pub tensor: BlockTensor,
}

/// What `manifest.json` says about a golden file.
#[derive(serde::Deserialize)]
pub struct Case {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: String,
    pub blocksize: usize,
    pub nested: bool,
    pub quant_type: String,
    pub quant_storage: String,
}

#[derive(serde::Deserialize)]
struct Manifest {
    cases: Vec<Case>,
}

/// Where a golden file lies, relative to the package, where cargo runs tests.
pub fn path(file_name: &str) -> PathBuf {
    PathBuf::from("tests/fixtures/golden").join(file_name)
}

/// All 29 cases.
pub fn cases() -> Vec<Case> {
    let json = std::fs::read(path("manifest.json")).unwrap();
    serde_json::from_slice::<Manifest>(&json).unwrap().cases
}

/// The names of all 29 files, without extension.
pub fn names() -> Vec<String> {
    cases().into_iter().map(|case| case.name).collect()
}

pub fn load(name: &str) -> Golden {
    let file = SafetensorsFile::open(path(&format!("{name}.safetensors"))).unwrap();
    let tensor = file.load_quantized("weight").unwrap();
    Golden {
        name: name.into(),
        file,
        tensor,
    }
}

impl Golden {
    /// The float weight that was quantized.
    pub fn source<T: FloatElement>(&self) -> Vec<T> {
        self.file.load_float("source").unwrap().0
    }

    /// The float weight that was quantized, widened.
    pub fn source_f32(&self) -> Vec<f32> {
        match self.tensor.dtype() {
            FloatType::F16 => widen(self.source::<half::f16>()),
            FloatType::BF16 => widen(self.source::<half::bf16>()),
            FloatType::F32 => self.source(),
        }
    }

    /// The bytes of bitsandbytes' dequantized weight, in the weight's dtype.
    pub fn dequantized_bytes(&self) -> &[u8] {
        self.file.tensor_bytes("dequantized").unwrap()
    }

    /// bitsandbytes' dequantized weight.
    pub fn dequantized<T: FloatElement>(&self) -> Vec<T> {
        self.file.load_float("dequantized").unwrap().0
    }
}

pub fn widen<T: FloatElement>(values: Vec<T>) -> Vec<f32> {
    values.into_iter().map(T::to_f32).collect()
}
