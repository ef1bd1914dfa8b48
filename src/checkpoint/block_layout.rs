//! A weight in NVFP4, MXFP4 or FP8 taken apart into the tensors that a file holds.

use safetensors::Dtype;

use super::elements::le_bytes;
use super::layout::NewTensor;
use super::stored_form::StoredForm;
use crate::error::Nf4Error;
use crate::format::{
    BlockShape, Floats, QuantType, ScaleParts, TensorScale, WeightParts, check_finite, check_len,
};

/// The tensors of a weight under the name `prefix`. A scale of the tensor that multiplies is stored as its
/// reciprocal where the form has one that divides, and the other way round.
///
/// # Errors
/// [`Nf4Error::Config`] for a form that is not one of the type's, [`Nf4Error::Length`] for a weight of several scales
/// in a form of one, [`Nf4Error::NonFinite`] for a scale of the tensor that has no finite reciprocal where that is
/// stored.
pub(super) fn tensors<'a>(
    prefix: &str,
    weight: WeightParts<'a>,
    form: StoredForm,
) -> Result<Vec<NewTensor<'a>>, Nf4Error> {
    let quant_type = weight.config.quant_type;
    if !fits(quant_type, form) {
        return Err(Nf4Error::Config {
            field: "form",
            expected: "one that files have for this type",
            given: format!("{form:?} for `{prefix}` in {}", quant_type.name()),
        });
    }
    let [codes_part, scales_part, tensor_scale_part] = form.parts();
    let mut tensors = vec![NewTensor {
        key: format!("{prefix}{codes_part}"),
        dtype: match quant_type.bits() {
            4 => Dtype::U8,
            _ => Dtype::F8_E4M3,
        },
        shape: code_shape(&weight, form),
        bytes: weight.codes.into(),
    }];
    let shape = match form {
        StoredForm::OneScale { is_scalar, .. } => vec![1; usize::from(!is_scalar)],
        _ => scale_shape(&weight),
    };
    let key = format!("{prefix}{scales_part}");
    match weight.scales {
        ScaleParts::Coded {
            codes,
            tensor_scale,
        } => {
            tensors.push(NewTensor {
                key,
                dtype: match quant_type {
                    QuantType::Nvfp4 => Dtype::F8_E4M3,
                    _ => Dtype::U8,
                },
                shape,
                bytes: codes.into(),
            });
            let key = format!("{prefix}{tensor_scale_part}");
            tensors.extend(tensor_scale_of(key, tensor_scale, form)?);
        }
        ScaleParts::Flat(scales) => {
            let bytes = match scales {
                Floats::Values(values) => le_bytes(values),
                Floats::Stored(bytes) => bytes.into(),
            };
            check_len(&key, shape.iter().product(), bytes.len() / size_of::<f32>())?;
            tensors.push(NewTensor {
                key,
                dtype: Dtype::F32,
                shape,
                bytes,
            });
        }
        ScaleParts::Nested { .. } => unreachable!("of bitsandbytes' types alone"),
    }
    Ok(tensors)
}

/// Whether files have weights of a type in a form.
fn fits(quant_type: QuantType, form: StoredForm) -> bool {
    use StoredForm::{Blocks, Channels, ModelOpt, OneScale, Packed, ScaleInv};
    match quant_type {
        QuantType::Nf4 | QuantType::Fp4 => false,
        QuantType::Nvfp4 => matches!(form, Packed | ModelOpt),
        QuantType::Mxfp4 => matches!(form, Packed | Channels | Blocks),
        QuantType::Fp8Block => matches!(form, ScaleInv | Channels),
        QuantType::Fp8Channel => matches!(form, Channels | ScaleInv | OneScale { .. }),
    }
}

/// The shape of the codes, two in a byte where they have four bits.
fn code_shape(weight: &WeightParts<'_>, form: StoredForm) -> Vec<usize> {
    let mut shape = weight.shape.to_vec();
    let per_byte = 8 / weight.config.quant_type.bits();
    if let Some(columns) = shape.last_mut() {
        match form {
            StoredForm::Blocks => {
                let block = weight.config.block_size.elems();
                *columns /= block;
                shape.push(block / per_byte);
            }
            _ => *columns = columns.div_ceil(per_byte),
        }
    }
    shape
}

/// The shape of the scales.
fn scale_shape(weight: &WeightParts<'_>) -> Vec<usize> {
    let mut shape = weight.shape.to_vec();
    let [.., rows, columns] = shape.as_mut_slice() else {
        return shape;
    };
    match weight.config.format().block {
        BlockShape::Flat(size) | BlockShape::Row(size) => *columns = columns.div_ceil(size),
        BlockShape::Tile(high, wide) => {
            *rows = rows.div_ceil(high);
            *columns = columns.div_ceil(wide);
        }
        BlockShape::WholeRow => *columns = 1,
    }
    shape
}

/// The scale of a tensor: one that divides, of shape `[1]`, or ModelOpt's, which multiplies and has none.
fn tensor_scale_of(
    key: String,
    scale: TensorScale,
    form: StoredForm,
) -> Result<Option<NewTensor<'static>>, Nf4Error> {
    let (value, shape) = match (form, scale) {
        (_, TensorScale::None) => return Ok(None),
        (StoredForm::ModelOpt, TensorScale::Multiplies(value)) => (value, vec![]),
        (StoredForm::ModelOpt, TensorScale::Divides(value)) => (1.0 / value, vec![]),
        (_, TensorScale::Divides(value)) => (value, vec![1]),
        (_, TensorScale::Multiplies(value)) => (1.0 / value, vec![1]),
    };
    check_finite(&key, [value])?;
    Ok(Some(NewTensor {
        key,
        dtype: Dtype::F32,
        shape,
        bytes: value.to_le_bytes().to_vec().into(),
    }))
}
