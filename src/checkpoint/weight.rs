//! From the tensors of one weight to an [`BlockTensor`] or an [`BlockWeight`], wherever they lie.

use burn::tensor::Device;
use safetensors::Dtype;

use super::quant_state::QuantState;
use super::stored::{StoredTensor, TensorSource};
use crate::error::Nf4Error;
use crate::format::{
    BlockTensor, Floats, PackedLayout, QuantType, ScaleParts, WeightForm, WeightParts, check_len,
    stored_floats,
};
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

/// The parameters that have a `quant_state` among `keys`, sorted.
pub(super) fn quantized_weights<'a>(keys: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut prefixes: Vec<&str> = keys.filter_map(prefix_of_quant_state).collect();
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

/// Whether codes are stored `[1, k]` instead of `[k, 1]`.
pub(super) fn is_transposed(codes: &StoredTensor<'_>, prefix: &str) -> Result<bool, Nf4Error> {
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

/// A quantized weight in its files, checked, with nothing of any size copied.
#[derive(Debug)]
pub(super) struct StoredWeight<'a> {
    pub state: QuantState,
    /// Whether the parameter is the transpose of what is stored.
    pub transposed: bool,
    codes: &'a [u8],
    absmax: &'a [u8],
    /// Scales and map of the 8-bit codes that `absmax` then is.
    nested: Option<(&'a [u8], Box<[f32; 256]>)>,
}

impl StoredWeight<'_> {
    /// The parts, in the files.
    pub fn parts(&self) -> WeightParts<'_> {
        let scales = match (&self.nested, self.state.nested) {
            (Some((absmax, map)), Some(nested)) => ScaleParts::Nested {
                codes: self.absmax,
                absmax: Floats::Stored(absmax),
                map,
                offset: nested.offset,
                block_size: nested.block_size,
            },
            _ => ScaleParts::Flat(Floats::Stored(self.absmax)),
        };
        WeightParts {
            codes: self.codes,
            scales,
            shape: &self.state.shape,
            dtype: self.state.dtype,
            config: self.state.config(),
        }
    }

    /// What the parameter is that the weight is stored for.
    pub fn form(&self, prefix: &str) -> Result<WeightForm, Nf4Error> {
        let mut shape = self.state.shape.clone();
        // The transpose of a vector is itself, and bitsandbytes has none for more dimensions.
        let transposed = self.transposed && shape.len() > 1;
        if transposed {
            if shape.len() > 2 {
                return Err(Nf4Error::NotAMatrix {
                    tensor: prefix.into(),
                    shape,
                });
            }
            shape.reverse();
        }
        Ok(WeightForm {
            shape,
            dtype: self.state.dtype,
            config: self.state.config(),
            transposed,
        })
    }

    /// The device image, in the one allocation that it needs.
    pub fn to_packed(&self, form: &WeightForm) -> Result<Vec<u32>, Nf4Error> {
        let layout = PackedLayout::for_shape(&form.shape, form.config)?;
        let mut words = self.parts().to_packed(&layout);
        words[layout.header_start()..].copy_from_slice(&layout.form_header(form));
        Ok(words)
    }
}

/// Finds and checks the parts of the weight `prefix`.
pub(super) fn find_weight<'a>(
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
    let transposed = is_transposed(&codes, prefix)?;
    check_quant_map(source, &format!("{prefix}.quant_map"), state.quant_type)?;

    let absmax_key = format!("{prefix}.absmax");
    let nested_key = format!("{prefix}.nested_absmax");
    let absmax = source.stored(&absmax_key)?;
    let nested = match state.nested {
        None => {
            if source.find(&nested_key).is_some() {
                return Err(contradiction(format!(
                    "has no nested_offset, but `{nested_key}` is there"
                )));
            }
            absmax.check_finite_f32(&absmax_key)?;
            None
        }
        Some(_) => {
            absmax.check_dtype(&absmax_key, &[Dtype::U8])?;
            let nested = source.stored(&nested_key)?;
            nested.check_finite_f32(&nested_key)?;
            let map = nested_map(source, &format!("{prefix}.nested_quant_map"))?;
            Some((nested.bytes, map))
        }
    };
    let weight = StoredWeight {
        state,
        transposed,
        codes: codes.bytes,
        absmax: absmax.bytes,
        nested,
    };
    weight
        .parts()
        .check()
        .map_err(|error| error.with_key(prefix))?;
    Ok(weight)
}

/// Copies the weight `prefix` to host memory.
pub(super) fn load_nf4(source: &impl TensorSource, prefix: &str) -> Result<BlockTensor, Nf4Error> {
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
