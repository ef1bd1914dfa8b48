//! Finding and checking the tensors of a weight in NVFP4, MXFP4 or FP8.

use std::borrow::Cow;

use safetensors::Dtype;

use super::elements::{FLOATS, dtype_error, elements, expect_float, with_float_type};
use super::naming::{
    GLOBAL_SCALE, Naming, PACKED, SCALE, SCALE_2, SCALE_INV, SCALES, SHAPE, ZERO_POINT,
    check_single, is_integers,
};
use super::stored::{StoredTensor, TensorSource};
use super::stored_weight::{StoredScales, StoredWeight};
use crate::error::Nf4Error;
use crate::format::{
    FloatElement, PackedLayout, QuantConfig, QuantType, TensorScale, check_finite, check_shape,
    checked_elems,
};

/// The method of weights in integers that are packed as these are.
pub(super) const PACKED_INTEGERS: &str = "integers, as compressed-tensors packs them";
const ASYMMETRIC: &str = "a format with zero points";

/// Rows and columns of a tile of FP8 weights that has one scale.
pub(super) const TILE: [usize; 2] = [128, 128];

/// Finds and checks the parts of a weight.
///
/// # Errors
/// Those of [`SafetensorsFile::load_quantized`](super::SafetensorsFile::load_quantized).
pub(super) fn find_block<'a>(
    source: &'a impl TensorSource,
    prefix: &str,
    naming: Naming,
) -> Result<StoredWeight<'a>, Nf4Error> {
    let weight = locate_block(source, prefix, naming)?;
    weight.check_scales(&scale_key(source, prefix, naming))?;
    Ok(weight)
}

/// As [`find_block`], but only the scale of the whole tensor is looked at.
pub(super) fn locate_block<'a>(
    source: &'a impl TensorSource,
    prefix: &str,
    naming: Naming,
) -> Result<StoredWeight<'a>, Nf4Error> {
    check_single(source, prefix)?;
    let zero_point = format!("{prefix}{ZERO_POINT}");
    if source.find(&zero_point).is_some() {
        return Err(Nf4Error::OtherQuantization {
            tensor: zero_point,
            method: ASYMMETRIC,
        });
    }
    let codes_key = format!("{prefix}{}", naming.codes());
    let codes = source.stored(&codes_key)?;
    let weight = match naming {
        Naming::Packed | Naming::Bytes => pairs(source, prefix, naming, codes)?,
        Naming::Blocks => blocks(source, prefix, codes)?,
        Naming::Fp8 => fp8(source, prefix, codes)?,
    };
    check_stored_shape(source, &format!("{prefix}{SHAPE}"), &weight.shape)?;
    weight
        .parts()
        .check()
        .map_err(|error| error.with_key(prefix))?;
    Ok(weight)
}

/// The error for a parameter that is none of these: compressed-tensors' name of packed codes also stands for
/// integers.
pub(super) fn check_not_integers(source: &impl TensorSource, prefix: &str) -> Result<(), Nf4Error> {
    let tensor = format!("{prefix}{PACKED}");
    match source.find(&tensor) {
        Some(packed) if is_integers(packed.info.dtype) => Err(Nf4Error::OtherQuantization {
            tensor,
            method: PACKED_INTEGERS,
        }),
        _ => Ok(()),
    }
}

/// The key of the scales of blocks.
fn scale_key(source: &impl TensorSource, prefix: &str, naming: Naming) -> String {
    let inverse = format!("{prefix}{SCALE_INV}");
    match naming {
        Naming::Blocks => format!("{prefix}{SCALES}"),
        Naming::Fp8 if source.find(&inverse).is_some() => inverse,
        _ => format!("{prefix}{SCALE}"),
    }
}

/// A weight of two codes a byte, whose rows are those of the tensor: NVFP4, or MXFP4, which has no scale of
/// the whole tensor and exponents for the others.
fn pairs<'a>(
    source: &'a impl TensorSource,
    prefix: &str,
    naming: Naming,
    codes: StoredTensor<'a>,
) -> Result<StoredWeight<'a>, Nf4Error> {
    let key = |part: &str| format!("{prefix}{part}");
    codes.check_dtype(&key(naming.codes()), &[Dtype::U8])?;
    let shape = with_columns(prefix, codes.info.shape, |bytes| bytes.checked_mul(2))?;
    let scale_key = key(SCALE);
    let scales = source.stored(&scale_key)?;
    let global = match naming {
        Naming::Packed => GLOBAL_SCALE,
        _ => SCALE_2,
    };
    // ModelOpt has this naming for NVFP4 alone.
    let is_nvfp4 = naming == Naming::Bytes
        || scales.info.dtype == Dtype::F8_E4M3
        || source.find(&key(global)).is_some();
    let (quant_type, is_scale): (_, fn(Dtype) -> bool) = match is_nvfp4 {
        true => (QuantType::Nvfp4, |dtype| dtype == Dtype::F8_E4M3),
        false => (QuantType::Mxfp4, |dtype| {
            matches!(dtype, Dtype::U8 | Dtype::F8_E8M0)
        }),
    };
    if !is_scale(scales.info.dtype) {
        // Without a scale of the tensor both formats are possible.
        let allowed: &[Dtype] = match is_nvfp4 {
            true => &[Dtype::F8_E4M3],
            false => &[Dtype::F8_E4M3, Dtype::U8, Dtype::F8_E8M0],
        };
        return Err(dtype_error(&scale_key, allowed, scales.info.dtype));
    }
    let config = QuantConfig::of(quant_type);
    check_layout(prefix, &shape, config)?;
    let blocks = with_columns(prefix, &shape, |columns| {
        Some(columns / config.block_size.elems())
    })?;
    check_shape(&scale_key, &blocks, scales.info.shape)?;
    let tensor_scale = match (is_nvfp4, naming) {
        (false, _) => TensorScale::None,
        (true, Naming::Packed) => TensorScale::Divides(tensor_scale(source, &key(global))?),
        (true, _) => TensorScale::Multiplies(tensor_scale(source, &key(global))?),
    };
    if let TensorScale::Divides(by) = tensor_scale
        && !(1.0 / by).is_finite()
    {
        return Err(Nf4Error::Divisor {
            tensor: key(global),
            given: by,
        });
    }
    Ok(StoredWeight {
        shape,
        dtype: source.block_dtype()?,
        config,
        transposed: false,
        codes: codes.bytes.into(),
        scales: StoredScales::Coded {
            codes: scales.bytes.into(),
            tensor_scale,
        },
    })
}

/// MXFP4 with the bytes of each block in a dimension of their own.
fn blocks<'a>(
    source: &'a impl TensorSource,
    prefix: &str,
    codes: StoredTensor<'a>,
) -> Result<StoredWeight<'a>, Nf4Error> {
    let config = QuantConfig::of(QuantType::Mxfp4);
    let block_bytes = config.quant_type.code_bytes(config.block_size.elems());
    let codes_key = format!("{prefix}{}", Naming::Blocks.codes());
    codes.check_dtype(&codes_key, &[Dtype::U8])?;
    let by_block = match codes.info.shape {
        [by_block @ .., bytes] if *bytes == block_bytes && by_block.len() > 1 => by_block,
        shape => {
            return Err(Nf4Error::Blocks {
                tensor: codes_key,
                format: config.quant_type.name(),
                shape: shape.to_vec(),
                expected: format!("[…, rows, blocks, {block_bytes}]"),
            });
        }
    };
    let scale_key = format!("{prefix}{SCALES}");
    let scales = source.stored(&scale_key)?;
    scales.check_dtype(&scale_key, &[Dtype::U8, Dtype::F8_E8M0])?;
    check_shape(&scale_key, by_block, scales.info.shape)?;
    let shape = with_columns(prefix, by_block, |blocks| {
        blocks.checked_mul(config.block_size.elems())
    })?;
    check_layout(prefix, &shape, config)?;
    Ok(StoredWeight {
        shape,
        dtype: source.block_dtype()?,
        config,
        transposed: false,
        codes: codes.bytes.into(),
        scales: StoredScales::Coded {
            codes: scales.bytes.into(),
            tensor_scale: TensorScale::None,
        },
    })
}

/// FP8, with a scale for each tile, for each row or for all of it.
fn fp8<'a>(
    source: &'a impl TensorSource,
    prefix: &str,
    codes: StoredTensor<'a>,
) -> Result<StoredWeight<'a>, Nf4Error> {
    codes.check_dtype(prefix, &[Dtype::F8_E4M3])?;
    let shape = codes.info.shape.to_vec();
    checked_elems(prefix, &shape)?;
    let scale_key = scale_key(source, prefix, Naming::Fp8);
    let scales = source.stored(&scale_key)?;
    scales.check_dtype(&scale_key, &FLOATS)?;
    let [stack @ .., rows, columns] = shape.as_slice() else {
        return Err(layout_error(prefix, &shape, QuantType::Fp8Channel));
    };
    let of_matrix = |ends: &[usize]| [stack, ends].concat();
    let tiles = of_matrix(&[rows.div_ceil(TILE[0]), columns.div_ceil(TILE[1])]);
    let channels = of_matrix(&[*rows, 1]);
    let given = scales.info.shape;
    let is_channels = given == channels || given == of_matrix(&[*rows]);
    let by_tile = scale_key.ends_with(SCALE_INV);
    // Where a tile is a row both have the same values.
    let quant_type = match given == tiles && (by_tile || !is_channels) {
        true => QuantType::Fp8Block,
        false => QuantType::Fp8Channel,
    };
    let scales = match quant_type {
        QuantType::Fp8Block => f32_bytes(&scales, &scale_key, 1)?,
        _ if is_channels => f32_bytes(&scales, &scale_key, 1)?,
        _ if matches!(given, [] | [1]) => {
            let all_rows = stack.iter().product::<usize>() * rows;
            f32_bytes(&scales, &scale_key, all_rows)?
        }
        _ => {
            return Err(Nf4Error::Shape {
                tensor: scale_key,
                expected: if by_tile { tiles } else { channels },
                given: given.to_vec(),
            });
        }
    };
    if quant_type == QuantType::Fp8Block {
        source.check_tile()?;
    }
    let config = QuantConfig::of(quant_type);
    check_layout(prefix, &shape, config)?;
    Ok(StoredWeight {
        shape,
        dtype: source.block_dtype()?,
        config,
        transposed: false,
        codes: codes.bytes.into(),
        scales: StoredScales::Flat(scales),
    })
}

/// Float values as f32, all of them so many times; in place where they are so already.
fn f32_bytes<'a>(
    stored: &StoredTensor<'a>,
    key: &str,
    times: usize,
) -> Result<Cow<'a, [u8]>, Nf4Error> {
    if stored.info.dtype == Dtype::F32 && times == 1 {
        return Ok(stored.bytes.into());
    }
    let values: Vec<f32> = with_float_type!(expect_float(stored.info.dtype, key)?, T => {
        elements::<T>(stored.bytes).iter().map(|value| value.to_f32()).collect()
    });
    let bytes = values.iter().flat_map(|value| value.to_le_bytes());
    Ok(Cow::Owned(bytes.collect::<Vec<_>>().repeat(times)))
}

/// The one f32 number of a tensor.
fn tensor_scale(source: &impl TensorSource, key: &str) -> Result<f32, Nf4Error> {
    let stored = source.stored(key)?;
    stored.check_dtype(key, &[Dtype::F32])?;
    if !stored.info.shape.is_empty() {
        check_shape(key, &[1], stored.info.shape)?;
    }
    let bytes = stored.bytes.first_chunk().copied().unwrap_or_default();
    let value = f32::from_le_bytes(bytes);
    check_finite(key, [value])?;
    Ok(value)
}

/// A shape with another last dimension.
fn with_columns(
    prefix: &str,
    shape: &[usize],
    columns: impl Fn(usize) -> Option<usize>,
) -> Result<Vec<usize>, Nf4Error> {
    let [rows @ .., last] = shape else {
        return Err(layout_error(prefix, shape, QuantType::Nvfp4));
    };
    match columns(*last) {
        Some(columns) => Ok([rows, &[columns]].concat()),
        None => Err(Nf4Error::ElementCount {
            tensor: prefix.into(),
            shape: shape.to_vec(),
        }),
    }
}

/// Checks that a format has weights of a shape.
fn check_layout(prefix: &str, shape: &[usize], config: QuantConfig) -> Result<(), Nf4Error> {
    let layout = PackedLayout::for_shape(shape, config);
    layout.map(drop).map_err(|error| error.with_key(prefix))
}

fn layout_error(prefix: &str, shape: &[usize], quant_type: QuantType) -> Nf4Error {
    Nf4Error::Blocks {
        tensor: prefix.into(),
        format: quant_type.name(),
        shape: shape.to_vec(),
        expected: "a matrix, or a stack of matrices".into(),
    }
}

/// Compares a shape that is stored beside the codes, if one is.
fn check_stored_shape(
    source: &impl TensorSource,
    key: &str,
    expected: &[usize],
) -> Result<(), Nf4Error> {
    if source.find(key).is_none() {
        return Ok(());
    }
    let stored = source.stored(key)?;
    stored.check_dtype(key, &[Dtype::I64, Dtype::I32])?;
    let size = stored.info.dtype.bitsize() / 8;
    let dims = stored.bytes.chunks_exact(size).map(|bytes| {
        // A negative one is larger than any.
        let mut wide = [0; 8];
        wide[..size].copy_from_slice(bytes);
        usize::try_from(u64::from_le_bytes(wide)).unwrap_or(usize::MAX)
    });
    let count = stored.bytes.len() / size;
    let dims: Vec<usize> = dims.take(expected.len() + 1).collect();
    match count == expected.len() {
        true => check_shape(key, expected, &dims),
        false => Err(Nf4Error::Length {
            tensor: key.into(),
            expected: expected.len(),
            given: count,
        }),
    }
}
