//! Checkpoints that tests write: the tensors that bitsandbytes stores for a weight, put together
//! here apart from the library. Shared by several tests, each of which uses a part of it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn_nf4::checkpoint::{Dtype, Progress, SafetensorsFile};
use burn_nf4::format::{Absmax, BlockTensor};
use safetensors::tensor::TensorView;
use serde_json::Value;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// The tensors of a file, by key.
pub type Tensors = BTreeMap<String, Stored>;

pub fn floats(values: &[f32], shape: &[usize]) -> Stored {
    Stored {
        dtype: Dtype::F32,
        shape: shape.to_vec(),
        bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

fn raw(bytes: Vec<u8>, shape: Vec<usize>) -> Stored {
    Stored {
        dtype: Dtype::U8,
        shape,
        bytes,
    }
}

/// The tensors of a quantized weight.
pub fn weight(prefix: &str, weight: &BlockTensor) -> Tensors {
    let mut state = serde_json::json!({
        "quant_type": weight.quant_type().name(),
        "blocksize": weight.block_size().elems(),
        "dtype": weight.dtype().name(),
        "shape": weight.shape(),
    });
    let key = |part: &str| format!("{prefix}.{part}");
    let mut tensors = Tensors::from([
        (
            prefix.into(),
            raw(weight.codes().to_vec(), vec![weight.codes().len(), 1]),
        ),
        (
            key("quant_map"),
            floats(weight.quant_type().codebook(), &[16]),
        ),
    ]);
    match weight.absmax() {
        Absmax::Coded(_) => panic!("bitsandbytes has no such scales"),
        Absmax::Flat(scales) => {
            tensors.insert(key("absmax"), floats(scales, &[scales.len()]));
        }
        Absmax::Nested(nested) => {
            let codes = nested.codes.clone();
            let blocks = codes.len();
            tensors.insert(key("absmax"), raw(codes, vec![blocks]));
            let absmax = floats(&nested.absmax, &[nested.absmax.len()]);
            tensors.insert(key("nested_absmax"), absmax);
            let map = floats(nested.map.as_slice(), &[256]);
            tensors.insert(key("nested_quant_map"), map);
            state["nested_blocksize"] = nested.block_size.elems().into();
            state["nested_dtype"] = "float32".into();
            state["nested_offset"] = f64::from(nested.offset).into();
        }
    }
    let json = state.to_string().into_bytes();
    let length = json.len();
    let name = weight.quant_type().name();
    let state_key = key(&format!("quant_state.bitsandbytes__{name}"));
    tensors.insert(state_key, raw(json, vec![length]));
    tensors
}

/// Marks a weight as transposed, as bitsandbytes does.
pub fn transpose(tensors: &mut Tensors, prefix: &str) {
    let codes = tensors.get_mut(prefix).expect("it is there");
    codes.shape.reverse();
}

pub fn to_bytes(tensors: &Tensors) -> Vec<u8> {
    let views = tensors.iter().map(|(name, tensor)| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
        (name, view.expect("consistent"))
    });
    safetensors::serialize(views, None).expect("consistent")
}

/// The tensors of a file.
pub fn read(file: &SafetensorsFile) -> Tensors {
    let tensor = |key: &str| {
        let info = file.tensor_info(key).expect("it is there");
        let stored = Stored {
            dtype: info.dtype,
            shape: info.shape.to_vec(),
            bytes: file.tensor_bytes(key).expect("it is there").to_vec(),
        };
        (key.to_string(), stored)
    };
    file.keys().map(tensor).collect()
}

/// Values of a sine.
pub fn sine(elems: usize) -> Vec<f32> {
    (0..elems).map(|i| (i as f32 * 0.37).sin()).collect()
}

/// Writes a folder of f32 tensors with values of a sine, and a `config.json`.
pub fn write_model(folder: &Path, config: &Value, shapes: &[(&str, &[usize])]) {
    let tensor = |&(key, shape): &(&str, &[usize])| {
        let values = sine(shape.iter().product());
        (key.to_string(), floats(&values, shape))
    };
    fs::create_dir_all(folder).expect("a folder");
    write(folder, &shapes.iter().map(tensor).collect());
    let path = folder.join("config.json");
    fs::write(path, config.to_string()).expect("a folder to write to");
}

/// The `config.json` of a folder.
pub fn config_of(folder: &Path) -> Value {
    let text = fs::read(folder.join("config.json")).expect("it is there");
    serde_json::from_slice(&text).expect("it is JSON")
}

/// The names of what a folder holds, sorted.
pub fn file_names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("a file").file_name();
    let names = entries.map(|entry| name(entry).into_string().expect("UTF-8"));
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

/// A progress callback that does nothing.
pub fn quiet(_: Progress<'_>) {}

/// Writes a folder with one file.
pub fn write(folder: &Path, tensors: &Tensors) {
    let path = folder.join("model.safetensors");
    fs::write(path, to_bytes(tensors)).expect("a folder to write to");
}
