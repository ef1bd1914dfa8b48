//! From the tensors of one weight to an [`Nf4Tensor`], wherever the tensors lie.

use std::path::Path;

use safetensors::Dtype;

use super::file::TensorInfo;
use super::quant_state::QuantState;
use crate::error::Nf4Error;
use crate::format::{Absmax, FloatElement, FloatType, NestedAbsmax, Nf4Tensor, QuantType};

/// Somewhere that tensors can be looked up by key.
pub(super) trait TensorSource {
    /// The file or folder to name in errors.
    fn path(&self) -> &Path;

    /// The tensor, if it is there.
    fn find(&self, key: &str) -> Option<StoredTensor<'_>>;

    /// The tensor, or [`Nf4Error::MissingKey`].
    fn stored(&self, key: &str) -> Result<StoredTensor<'_>, Nf4Error> {
        self.find(key).ok_or_else(|| Nf4Error::MissingKey {
            path: self.path().into(),
            key: key.into(),
        })
    }
}

/// A tensor in a mapped file. The number of bytes is what dtype and shape ask for.
#[derive(Debug, Clone, Copy)]
pub(super) struct StoredTensor<'a> {
    pub info: TensorInfo<'a>,
    pub bytes: &'a [u8],
}

impl StoredTensor<'_> {
    pub fn check_dtype(&self, key: &str, allowed: &[Dtype]) -> Result<(), Nf4Error> {
        if allowed.contains(&self.info.dtype) {
            return Ok(());
        }
        let names: Vec<String> = allowed.iter().map(Dtype::to_string).collect();
        Err(Nf4Error::Dtype {
            tensor: key.into(),
            expected: names.join(", "),
            given: self.info.dtype.to_string(),
        })
    }

    /// The elements, once the dtype is known to be that of `T`. Bits are kept, NaNs included.
    pub fn elements<T: FloatElement>(&self) -> Vec<T> {
        let size = T::FLOAT_TYPE.size_bytes();
        let mut elements = vec![T::zeroed(); self.bytes.len() / size];
        let target = bytemuck::cast_slice_mut::<T, u8>(&mut elements);
        // A mapped tensor need not be aligned, so its bytes are copied, not cast.
        for (to, from) in target.iter_mut().zip(self.bytes) {
            *to = *from;
        }
        if cfg!(target_endian = "big") {
            target.chunks_exact_mut(size).for_each(<[u8]>::reverse);
        }
        elements
    }

    /// The elements of an F32 tensor, all finite.
    fn finite_f32(&self, key: &str) -> Result<Vec<f32>, Nf4Error> {
        self.check_dtype(key, &[Dtype::F32])?;
        let values: Vec<f32> = self.elements();
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(index) => Err(Nf4Error::NonFinite {
                tensor: key.into(),
                index,
                given: values[index],
            }),
        }
    }
}

pub(super) const QUANT_TYPES: [QuantType; 2] = [QuantType::Nf4, QuantType::Fp4];

pub(super) fn quant_state_key(prefix: &str, quant_type: QuantType) -> String {
    format!("{prefix}.quant_state.bitsandbytes__{}", quant_type.name())
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
    QUANT_TYPES
        .into_iter()
        .find_map(|quant_type| {
            let key = quant_state_key(prefix, quant_type);
            source.find(&key).map(|stored| (quant_type, key, stored))
        })
        .ok_or_else(|| Nf4Error::MissingKey {
            path: source.path().into(),
            key: quant_state_key(prefix, QuantType::Nf4),
        })
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

/// Reads a plain tensor that is stored as `T`.
pub(super) fn load_float<T: FloatElement>(
    source: &impl TensorSource,
    key: &str,
) -> Result<(Vec<T>, Vec<usize>), Nf4Error> {
    let stored = source.stored(key)?;
    let expected = match T::FLOAT_TYPE {
        FloatType::F16 => Dtype::F16,
        FloatType::BF16 => Dtype::BF16,
        FloatType::F32 => Dtype::F32,
    };
    stored.check_dtype(key, &[expected])?;
    Ok((stored.elements(), stored.info.shape.to_vec()))
}

/// Puts the weight `prefix` together.
pub(super) fn load_nf4(source: &impl TensorSource, prefix: &str) -> Result<Nf4Tensor, Nf4Error> {
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
    is_transposed(&codes, prefix)?;
    check_quant_map(source, &format!("{prefix}.quant_map"), state.quant_type)?;

    let absmax_key = format!("{prefix}.absmax");
    let nested_key = format!("{prefix}.nested_absmax");
    let stored_absmax = source.stored(&absmax_key)?;
    let absmax = match state.nested {
        None => {
            if source.find(&nested_key).is_some() {
                return Err(contradiction(format!(
                    "has no nested_offset, but `{nested_key}` is there"
                )));
            }
            Absmax::Flat(stored_absmax.finite_f32(&absmax_key)?)
        }
        Some(nested) => {
            stored_absmax.check_dtype(&absmax_key, &[Dtype::U8])?;
            Absmax::Nested(NestedAbsmax {
                codes: stored_absmax.bytes.to_vec(),
                absmax: source.stored(&nested_key)?.finite_f32(&nested_key)?,
                map: nested_map(source, &format!("{prefix}.nested_quant_map"))?,
                offset: nested.offset,
                block_size: nested.block_size,
            })
        }
    };
    Nf4Tensor::from_parts(
        codes.bytes.to_vec(),
        absmax,
        state.shape,
        state.block_size,
        state.dtype,
        state.quant_type,
    )
    .map_err(|error| with_full_key(error, prefix))
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
    let values: Vec<f32> = stored.elements();
    let table = quant_type.codebook();
    check_len(key, table.len(), values.len())?;
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
    let values = source.stored(key)?.finite_f32(key)?;
    let given = values.len();
    values
        .into_boxed_slice()
        .try_into()
        .map_err(|_| Nf4Error::Length {
            tensor: key.into(),
            expected: 256,
            given,
        })
}

fn check_len(key: &str, expected: usize, given: usize) -> Result<(), Nf4Error> {
    if expected == given {
        return Ok(());
    }
    Err(Nf4Error::Length {
        tensor: key.into(),
        expected,
        given,
    })
}

/// [`Nf4Tensor::from_parts`] names the part at fault; in a file that is a key.
fn with_full_key(error: Nf4Error, prefix: &str) -> Nf4Error {
    match error {
        Nf4Error::Length {
            tensor,
            expected,
            given,
        } => Nf4Error::Length {
            tensor: match tensor.as_str() {
                "weight" => prefix.into(),
                part => format!("{prefix}.{part}"),
            },
            expected,
            given,
        },
        // Everything else was checked, and named in full, before.
        other => other,
    }
}
