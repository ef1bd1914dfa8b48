//! A quantized weight taken apart into the tensors that a file holds.

use std::borrow::Cow;

use safetensors::Dtype;

use super::elements::le_bytes;
use super::quant_state::QuantState;
use super::stored_form::StoredForm;
use crate::error::Nf4Error;
use crate::format::{FP4_CODEBOOK, Floats, QuantType, ScaleParts, WeightParts};

/// A tensor to be written; its bytes are little-endian.
#[derive(Debug, Clone)]
pub(super) struct NewTensor<'a> {
    pub key: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Cow<'a, [u8]>,
}

impl<'a> NewTensor<'a> {
    fn floats(key: String, values: Floats<'a>) -> Self {
        Self {
            key,
            dtype: Dtype::F32,
            shape: vec![values.len()],
            bytes: match values {
                Floats::Values(values) => le_bytes(values),
                Floats::Stored(bytes) => bytes.into(),
            },
        }
    }

    fn codes(key: String, codes: impl Into<Cow<'a, [u8]>>) -> Self {
        let bytes = codes.into();
        Self {
            key,
            dtype: Dtype::U8,
            shape: vec![bytes.len()],
            bytes,
        }
    }
}

/// The tensors of a weight under the name `prefix`.
///
/// # Errors
/// [`Nf4Error::Dtype`] for a storage of bitsandbytes' codes that is none, or whose elements they do not fill,
/// and those of [`block_layout::tensors`](super::block_layout::tensors).
pub(super) fn tensors<'a>(
    prefix: &str,
    weight: WeightParts<'a>,
    form: StoredForm,
) -> Result<Vec<NewTensor<'a>>, Nf4Error> {
    match form {
        StoredForm::Bitsandbytes {
            storage,
            transposed,
        } if weight.config.quant_type.is_bitsandbytes() => {
            bitsandbytes(prefix, weight, storage, transposed)
        }
        _ => super::block_layout::tensors(prefix, weight, form),
    }
}

/// The tensors of a weight as bitsandbytes stores them.
fn bitsandbytes<'a>(
    prefix: &str,
    weight: WeightParts<'a>,
    storage: Dtype,
    transposed: bool,
) -> Result<Vec<NewTensor<'a>>, Nf4Error> {
    let codes = weight.codes;
    let elem_bytes = match storage {
        Dtype::U8 => 1,
        Dtype::BF16 | Dtype::F16 => 2,
        Dtype::F32 => 4,
        _ => 0,
    };
    if elem_bytes == 0 || !codes.len().is_multiple_of(elem_bytes) {
        return Err(Nf4Error::Dtype {
            tensor: prefix.into(),
            expected: format!(
                "U8, BF16, F16 or F32 of a size that divides {}, the bytes of its codes",
                codes.len()
            ),
            given: storage.to_string(),
        });
    }
    let stored_elems = codes.len() / elem_bytes;
    let part = |name: &str| format!("{prefix}.{name}");
    let mut tensors = vec![NewTensor {
        key: prefix.into(),
        dtype: storage,
        shape: if transposed {
            vec![1, stored_elems]
        } else {
            vec![stored_elems, 1]
        },
        bytes: codes.into(),
    }];
    match weight.scales {
        ScaleParts::Coded { .. } => unreachable!("not of bitsandbytes' types"),
        ScaleParts::Flat(scales) => tensors.push(NewTensor::floats(part("absmax"), scales)),
        ScaleParts::Nested {
            codes, absmax, map, ..
        } => {
            tensors.push(NewTensor::codes(part("absmax"), codes));
            tensors.push(NewTensor::floats(part("nested_absmax"), absmax));
            let map = Floats::Values(map.as_slice());
            tensors.push(NewTensor::floats(part("nested_quant_map"), map));
        }
    }
    let codebook = stored_codebook(weight.config.quant_type);
    let codebook = Floats::Values(codebook);
    tensors.push(NewTensor::floats(part("quant_map"), codebook));
    let state = QuantState::of_parts(&weight);
    let key = part(&format!(
        "quant_state.bitsandbytes__{}",
        state.quant_type.name()
    ));
    tensors.push(NewTensor::codes(key, state.to_json().into_bytes()));
    Ok(tensors)
}

/// The codebook as bitsandbytes stores it: FP4's second zero has no sign there.
fn stored_codebook(quant_type: QuantType) -> &'static [f32] {
    const FP4: [f32; 16] = {
        let mut table = FP4_CODEBOOK;
        table[8] = 0.0;
        table
    };
    match quant_type {
        QuantType::Fp4 => &FP4,
        _ => quant_type.codebook(),
    }
}
