//! The JSON text that bitsandbytes stores beside each quantized weight.

use std::fmt::Write;

use serde::Deserialize;

use super::json::shape;
use super::python_json::{self, Float, float_repr};
use crate::error::Nf4Error;
use crate::format::{
    BlockSize, BlockTensor, FloatType, QuantConfig, QuantType, ScaleParts, WeightParts,
    check_finite, checked_elems,
};

/// What the `quant_state` of a weight says, checked.
///
/// ```
/// use burn_nf4::checkpoint::QuantState;
///
/// let json = br#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 256]}"#;
/// let state = QuantState::parse(json, "lm_head.weight.quant_state.bitsandbytes__nf4")?;
/// assert_eq!(state.shape, [128, 256]);
/// assert_eq!(state.nested, None);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct QuantState {
    /// The 4-bit data type.
    pub quant_type: QuantType,
    /// Weights per scale.
    pub block_size: BlockSize,
    /// The dtype that the weight had before it was quantized.
    pub dtype: FloatType,
    /// The shape of the weight. It is authoritative: the stored codes are flat.
    pub shape: Vec<usize>,
    /// How the scales are quantized; `None` where they are plain f32.
    pub nested: Option<NestedState>,
}

/// The part of a [`QuantState`] that double quantization adds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NestedState {
    /// Scales per nested scale.
    pub block_size: BlockSize,
    /// The mean of the scales, taken off before they were quantized.
    pub offset: f32,
}

/// The fields as they are written; one that is there twice is an error of serde's. Others are
/// ignored: newer versions may add some.
#[derive(Deserialize)]
struct Fields {
    quant_type: String,
    blocksize: u64,
    dtype: String,
    #[serde(deserialize_with = "shape")]
    shape: Vec<usize>,
    nested_blocksize: Option<u64>,
    nested_dtype: Option<String>,
    nested_offset: Option<Float>,
}

impl QuantState {
    /// Reads the text; `key` is the name of the tensor that holds it, for errors.
    ///
    /// # Errors
    /// [`Nf4Error::QuantState`] for text that is not the expected JSON or has only some of the
    /// `nested_*` fields, [`Nf4Error::QuantType`], [`Nf4Error::BlockSize`], [`Nf4Error::Dtype`]
    /// and [`Nf4Error::ElementCount`] for values that are not allowed, [`Nf4Error::NonFinite`]
    /// for an offset that no f32 can hold.
    pub fn parse(json: &[u8], key: &str) -> Result<Self, Nf4Error> {
        let malformed = |message: String| Nf4Error::QuantState {
            key: key.into(),
            message,
        };
        let fields: Fields =
            python_json::from_slice(json).map_err(|error| malformed(error.to_string()))?;

        let nested = match (
            fields.nested_blocksize,
            fields.nested_dtype,
            fields.nested_offset,
        ) {
            (None, None, None) => None,
            (Some(block_size), Some(dtype), Some(Float(offset))) => {
                if FloatType::from_name(&dtype, key) != Ok(FloatType::F32) {
                    return Err(Nf4Error::Dtype {
                        tensor: key.into(),
                        expected: "nested_dtype float32".into(),
                        given: dtype,
                    });
                }
                let offset = offset as f32;
                check_finite(key, [offset])?;
                Some(NestedState {
                    block_size: BlockSize::new(block_size, key)?,
                    offset,
                })
            }
            _ => {
                return Err(malformed(
                    "has some of nested_blocksize, nested_dtype, nested_offset, but not all".into(),
                ));
            }
        };
        let state = Self {
            quant_type: QuantType::from_name(&fields.quant_type, key)?,
            block_size: BlockSize::new(fields.blocksize, key)?,
            dtype: FloatType::from_name(&fields.dtype, key)?,
            shape: fields.shape,
            nested,
        };
        checked_elems(key, &state.shape)?;
        Ok(state)
    }

    /// What is stored beside a weight.
    pub fn of(weight: &BlockTensor) -> Self {
        Self::of_parts(&weight.parts())
    }

    /// What is stored beside a weight of these parts.
    pub(super) fn of_parts(weight: &WeightParts<'_>) -> Self {
        Self {
            quant_type: weight.config.quant_type,
            block_size: weight.config.block_size,
            dtype: weight.dtype,
            shape: weight.shape.to_vec(),
            nested: match weight.scales {
                ScaleParts::Flat(_) | ScaleParts::Coded { .. } => None,
                ScaleParts::Nested {
                    block_size, offset, ..
                } => Some(NestedState { block_size, offset }),
            },
        }
    }

    /// The text that bitsandbytes writes, to the byte: `json.dumps` of Python, with the fields in
    /// its order.
    pub fn to_json(&self) -> String {
        let shape: Vec<String> = self.shape.iter().map(usize::to_string).collect();
        let mut json = format!(
            r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{}", "shape": [{}]"#,
            self.quant_type.name(),
            self.block_size.elems(),
            self.dtype.name(),
            shape.join(", "),
        );
        if let Some(nested) = &self.nested {
            // Writing to a string cannot fail.
            let _ = write!(
                json,
                r#", "nested_blocksize": {}, "nested_dtype": "float32", "nested_offset": {}"#,
                nested.block_size.elems(),
                float_repr(f64::from(nested.offset)),
            );
        }
        json.push('}');
        json
    }

    /// The settings that quantize a weight to this form.
    pub fn config(&self) -> QuantConfig {
        QuantConfig {
            quant_type: self.quant_type,
            block_size: self.block_size,
            nested_block_size: self.nested.map(|nested| nested.block_size),
        }
    }
}
