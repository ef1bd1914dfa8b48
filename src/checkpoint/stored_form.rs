//! How the tensors of a quantized weight are named and shaped in files.

use safetensors::Dtype;

#[cfg(feature = "peft")]
use super::folder::Checkpoint;
use crate::error::Nf4Error;
use crate::format::QuantType;

/// How a quantized weight `P` is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    not(feature = "peft"),
    allow(
        dead_code,
        reason = "merges alone write the forms that conversions do not"
    )
)]
pub(crate) enum StoredForm {
    /// As bitsandbytes does it: NF4 and FP4.
    Bitsandbytes {
        /// The dtype of the codes.
        storage: Dtype,
        /// Whether the parameter is the transpose of what is stored.
        transposed: bool,
    },
    /// compressed-tensors: `P_packed`, `P_scale`, and of NVFP4 `P_global_scale`, which divides.
    Packed,
    /// ModelOpt: `P`, `P_scale`, and of NVFP4 `P_scale_2`, which multiplies.
    ModelOpt,
    /// FP8 in tiles, as DeepSeek's models have it: `P`, `P_scale_inv`.
    ScaleInv,
    /// FP8 with a scale a row: `P`, `P_scale`.
    Channels,
    /// FP8 with one scale: `P`, and `P_scale` or `P_scale_inv`, which is `[1]` or has no dimensions.
    OneScale {
        scale: &'static str,
        is_scalar: bool,
    },
    /// The experts of gpt-oss: `P_blocks`, `P_scales`.
    Blocks,
}

impl StoredForm {
    /// How a checkpoint stores weights of a type unless it is made after another.
    pub fn of_type(quant_type: QuantType) -> Self {
        match quant_type {
            QuantType::Nf4 | QuantType::Fp4 => Self::Bitsandbytes {
                storage: Dtype::U8,
                transposed: false,
            },
            QuantType::Nvfp4 | QuantType::Mxfp4 => Self::Packed,
            QuantType::Fp8Block => Self::ScaleInv,
            QuantType::Fp8Channel => Self::Channels,
        }
    }

    /// The form of a weight that is written by itself: `storage` and `transposed` are of bitsandbytes' types.
    ///
    /// # Errors
    /// [`Nf4Error::Dtype`] for another storage than bytes, [`Nf4Error::Config`] for a transposed weight, of
    /// the other types.
    pub fn new(
        prefix: &str,
        quant_type: QuantType,
        storage: Dtype,
        transposed: bool,
    ) -> Result<Self, Nf4Error> {
        if quant_type.is_bitsandbytes() {
            return Ok(Self::Bitsandbytes {
                storage,
                transposed,
            });
        }
        if storage != Dtype::U8 {
            return Err(Nf4Error::Dtype {
                tensor: prefix.into(),
                expected: format!("U8, as {} has no other storage", quant_type.name()),
                given: storage.to_string(),
            });
        }
        if transposed {
            return Err(Nf4Error::Config {
                field: "transposed",
                expected: "false for types that bitsandbytes does not have",
                given: format!("true for `{prefix}` in {}", quant_type.name()),
            });
        }
        Ok(Self::of_type(quant_type))
    }

    /// How a checkpoint stores a quantized parameter of a type.
    ///
    /// # Errors
    /// Those of [`Checkpoint::is_transposed`].
    #[cfg(feature = "peft")]
    pub fn of(
        source: &Checkpoint,
        parameter: &str,
        quant_type: QuantType,
    ) -> Result<Self, Nf4Error> {
        if quant_type.is_bitsandbytes() {
            return Ok(Self::Bitsandbytes {
                storage: source.tensor_info(parameter)?.dtype,
                transposed: source.is_transposed(parameter)?,
            });
        }
        let forms = [
            Self::Packed,
            Self::Blocks,
            Self::ScaleInv,
            Self::ModelOpt,
            Self::Channels,
        ];
        let is_there = |form: &Self| {
            let [codes, scales, tensor_scale] = form.parts();
            let has = |part: &str| source.contains(&format!("{parameter}{part}"));
            has(codes) && has(scales) && (*form != Self::ModelOpt || has(tensor_scale))
        };
        let found = forms.into_iter().find(is_there);
        let found = found.unwrap_or(Self::of_type(quant_type));
        if quant_type != QuantType::Fp8Channel {
            return Ok(found);
        }
        let [_, scale, _] = found.parts();
        let info = source.tensor_info(&format!("{parameter}{scale}"))?;
        Ok(match info.shape {
            [] | [1] => Self::OneScale {
                scale,
                is_scalar: info.shape.is_empty(),
            },
            _ => found,
        })
    }

    /// What follows the name of the parameter in the names of its codes, its scales and the scale of the
    /// tensor.
    pub fn parts(self) -> [&'static str; 3] {
        match self {
            Self::Bitsandbytes { .. } => ["", ".absmax", ""],
            Self::Packed => ["_packed", "_scale", "_global_scale"],
            Self::ModelOpt => ["", "_scale", "_scale_2"],
            Self::ScaleInv => ["", "_scale_inv", ""],
            Self::Channels => ["", "_scale", ""],
            Self::OneScale { scale, .. } => ["", scale, ""],
            Self::Blocks => ["_blocks", "_scales", ""],
        }
    }
}
