//! From the tensors of one weight to a [`BlockTensor`] or a [`BlockWeight`], wherever they lie.

use burn::tensor::Device;
use safetensors::Dtype;

use super::block_weight::{check_not_integers, find_block, locate_block};
use super::naming::{Naming, block_weights};
use super::quant_state::QuantState;
use super::stored::{StoredTensor, TensorSource};
use super::stored_weight::{StoredScales, StoredWeight};
use crate::error::Nf4Error;
use crate::format::{BlockTensor, QuantType, check_len, stored_floats};
use crate::op::BlockWeight;

pub(super) const QUANT_TYPES: [QuantType; 2] = [QuantType::Nf4, QuantType::Fp4];

/// What follows the name of a quantized parameter in the names of its other tensors; the last two
/// only with double quantization.
pub(super) const PARTS: [&str; 4] = [
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
];

pub(super) fn quant_state_key(prefix: &str, quant_type: QuantType) -> String {
    format!("{prefix}.quant_state.bitsandbytes__{}", quant_type.name())
}

/// The quantized parameters among `keys`, sorted.
pub(super) fn quantized_weights<'a, I: Iterator<Item = &'a str>>(
    source: &impl TensorSource,
    keys: impl Fn() -> I,
) -> Vec<&'a str> {
    let mut prefixes: Vec<&str> = keys().filter_map(prefix_of_quant_state).collect();
    prefixes.extend(block_weights(source, keys()));
    prefixes.sort_unstable();
    prefixes.dedup();
    prefixes
}

/// The parameter that a key is the `quant_state` of, if it is one.
pub(super) fn prefix_of_quant_state(key: &str) -> Option<&str> {
    let (prefix, name) = key.rsplit_once(".quant_state.bitsandbytes__")?;
    QUANT_TYPES
        .iter()
        .any(|quant_type| quant_type.name() == name)
        .then_some(prefix)
}

/// The `quant_state` of a parameter, its key, and the type that the key names.
pub(super) fn find_quant_state<'a>(
    source: &'a impl TensorSource,
    prefix: &str,
) -> Result<(QuantType, String, StoredTensor<'a>), Nf4Error> {
    let quant_type = QUANT_TYPES
        .into_iter()
        .find(|&quant_type| source.find(&quant_state_key(prefix, quant_type)).is_some())
        // If there is none, the error names this one.
        .unwrap_or(QuantType::Nf4);
    let key = quant_state_key(prefix, quant_type);
    let stored = source.stored(&key)?;
    Ok((quant_type, key, stored))
}

/// Whether a parameter has a `quant_state`.
pub(super) fn has_quant_state(source: &impl TensorSource, prefix: &str) -> bool {
    QUANT_TYPES
        .into_iter()
        .any(|quant_type| source.find(&quant_state_key(prefix, quant_type)).is_some())
}

/// Whether a parameter is quantized.
pub(super) fn is_quantized(source: &impl TensorSource, prefix: &str) -> bool {
    has_quant_state(source, prefix) || Naming::of(source, prefix).is_some()
}

/// Whether a parameter is stored transposed: of bitsandbytes' formats only.
pub(super) fn is_transposed(source: &impl TensorSource, prefix: &str) -> Result<bool, Nf4Error> {
    match Naming::of(source, prefix) {
        Some(_) => Ok(false),
        None => has_transposed_codes(&source.stored(prefix)?, prefix),
    }
}

/// Whether codes are stored `[1, k]` instead of `[k, 1]`.
fn has_transposed_codes(codes: &StoredTensor<'_>, prefix: &str) -> Result<bool, Nf4Error> {
    match codes.info.shape {
        [_, 1] => Ok(false),
        [1, _] => Ok(true),
        shape => Err(Nf4Error::Shape {
            tensor: prefix.into(),
            expected: vec![shape.iter().product(), 1],
            given: shape.to_vec(),
        }),
    }
}

/// Finds and checks the parts of the weight `prefix`.
pub(super) fn find_weight<'a>(
    source: &'a impl TensorSource,
    prefix: &str,
) -> Result<StoredWeight<'a>, Nf4Error> {
    match Naming::of(source, prefix) {
        Some(naming) => find_block(source, prefix, naming),
        None => {
            check_not_integers(source, prefix)?;
            find_bitsandbytes(source, prefix)
        }
    }
}

/// As [`find_weight`], but scales that make up tensors of their own may be NaN: for a weight whose parts are
/// read one after the other.
pub(super) fn locate_weight<'a>(
    source: &'a impl TensorSource,
    prefix: &str,
) -> Result<StoredWeight<'a>, Nf4Error> {
    match Naming::of(source, prefix) {
        Some(naming) => locate_block(source, prefix, naming),
        None => find_bitsandbytes(source, prefix),
    }
}

fn find_bitsandbytes<'a>(
    source: &'a impl TensorSource,
    prefix: &str,
) -> Result<StoredWeight<'a>, Nf4Error> {
    let (named, state_key, stored_state) = find_quant_state(source, prefix)?;
    let contradiction = |message: String| Nf4Error::QuantState {
        key: state_key.clone(),
        message,
    };
    stored_state.check_dtype(&state_key, &[Dtype::U8])?;
    let state = QuantState::parse(stored_state.bytes, &state_key)?;
    if state.quant_type != named {
        return Err(contradiction(format!(
            "quant_type is `{}`, the key says `{}`",
            state.quant_type.name(),
            named.name()
        )));
    }
    if named == QuantType::Nf4 {
        let other = quant_state_key(prefix, QuantType::Fp4);
        if source.find(&other).is_some() {
            return Err(contradiction(format!("`{other}` is there too")));
        }
    }

    let codes = source.stored(prefix)?;
    codes.check_dtype(prefix, &[Dtype::U8, Dtype::BF16, Dtype::F16, Dtype::F32])?;
    // Both forms hold the same flat codes.
    let transposed = has_transposed_codes(&codes, prefix)?;
    check_quant_map(source, &format!("{prefix}.quant_map"), state.quant_type)?;

    let absmax_key = format!("{prefix}.absmax");
    let nested_key = format!("{prefix}.nested_absmax");
    let absmax = source.stored(&absmax_key)?;
    let scales = match state.nested {
        None => {
            if source.find(&nested_key).is_some() {
                return Err(contradiction(format!(
                    "has no nested_offset, but `{nested_key}` is there"
                )));
            }
            absmax.check_finite_f32(&absmax_key)?;
            StoredScales::Flat(absmax.bytes.into())
        }
        Some(of_scales) => {
            absmax.check_dtype(&absmax_key, &[Dtype::U8])?;
            let nested = source.stored(&nested_key)?;
            nested.check_finite_f32(&nested_key)?;
            StoredScales::Nested {
                codes: absmax.bytes,
                absmax: nested.bytes,
                map: nested_map(source, &format!("{prefix}.nested_quant_map"))?,
                offset: of_scales.offset,
                block_size: of_scales.block_size,
            }
        }
    };
    let weight = StoredWeight {
        config: state.config(),
        shape: state.shape,
        dtype: state.dtype,
        transposed,
        codes: codes.bytes.into(),
        scales,
    };
    weight
        .parts()
        .check()
        .map_err(|error| error.with_key(prefix))?;
    Ok(weight)
}

/// Copies the weight `prefix` to host memory.
pub(super) fn load_quantized(
    source: &impl TensorSource,
    prefix: &str,
) -> Result<BlockTensor, Nf4Error> {
    BlockTensor::copy_of(&find_weight(source, prefix)?.parts())
}

/// Copies the weight `prefix` to a device.
pub(super) fn load_weight(
    source: &impl TensorSource,
    prefix: &str,
    device: &Device,
) -> Result<BlockWeight, Nf4Error> {
    let weight = find_weight(source, prefix)?;
    let form = weight.form(prefix)?;
    BlockWeight::from_image(weight.to_packed(&form)?, form, device)
}

/// bitsandbytes' kernels ignore the stored map and use their own table, so a file with another
/// map would decode to other values here and there.
fn check_quant_map(
    source: &impl TensorSource,
    key: &str,
    quant_type: QuantType,
) -> Result<(), Nf4Error> {
    let stored = source.stored(key)?;
    stored.check_dtype(key, &[Dtype::F32])?;
    let table = quant_type.codebook();
    check_len(key, table.len(), stored.bytes.len() / 4)?;
    let values: Vec<f32> = stored_floats(stored.bytes).collect();
    let differs = |&index: &usize| {
        // bitsandbytes stores FP4's second zero as +0.0 and decodes it to -0.0.
        let second_zero = quant_type == QuantType::Fp4 && index == 8 && values[index] == 0.0;
        values[index].to_bits() != table[index].to_bits() && !second_zero
    };
    match (0..table.len()).find(differs) {
        None => Ok(()),
        Some(index) => Err(Nf4Error::Codebook {
            tensor: key.into(),
            index,
            expected: table[index],
            given: values[index],
        }),
    }
}

/// The file's own map of the scales; unlike the codebook it is used, by bitsandbytes too.
fn nested_map(source: &impl TensorSource, key: &str) -> Result<Box<[f32; 256]>, Nf4Error> {
    let stored = source.stored(key)?;
    stored.check_finite_f32(key)?;
    check_len(key, 256, stored.bytes.len() / 4)?;
    let mut map = Box::new([0.0; 256]);
    map.iter_mut()
        .zip(stored_floats(stored.bytes))
        .for_each(|(to, from)| *to = from);
    Ok(map)
}
