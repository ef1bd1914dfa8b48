//! Checkpoints that tests write: the tensors that bitsandbytes stores for a weight, put together
//! here apart from the library. Shared by several tests, each of which uses a part of it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn_nf4::checkpoint::Dtype;
use burn_nf4::format::{Absmax, Nf4Tensor};
use safetensors::tensor::TensorView;

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
pub fn weight(prefix: &str, weight: &Nf4Tensor) -> Tensors {
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
            floats(weight.quant_type().codebook().as_slice(), &[16]),
        ),
    ]);
    match weight.absmax() {
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

/// Writes a folder with one file.
pub fn write(folder: &Path, tensors: &Tensors) {
    let path = folder.join("model.safetensors");
    fs::write(path, to_bytes(tensors)).expect("a folder to write to");
}
