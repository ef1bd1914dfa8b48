//! What a quantized weight is, apart from its values.

use std::fmt;

use super::description::BlockShape;
use super::spec::{BlockSize, FloatType, QuantConfig, QuantType};

/// How the name of a packed tensor begins in the paths of a module.
const PACKED: &str = "packed";

/// What a quantized weight is, apart from its values: two weights of the same form can stand in
/// for each other in a module and its records.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WeightForm {
    /// The shape in use; `[out_features, in_features]` for a linear layer.
    pub shape: Vec<usize>,
    /// The dtype that the weight had before it was quantized.
    pub dtype: FloatType,
    /// How it is quantized.
    pub config: QuantConfig,
    /// Whether the transpose of the weight is what was quantized and is stored.
    pub transposed: bool,
}

impl WeightForm {
    /// The shape that is stored: reversed if the weight is transposed.
    pub fn stored_shape(&self) -> Vec<usize> {
        match self.transposed {
            false => self.shape.clone(),
            true => self.shape.iter().rev().copied().collect(),
        }
    }

    /// The name that a packed tensor of this form has in a module, such as
    /// `packed_nf4_64_256_float32_512x256`: two weights of different forms have different paths in a
    /// record, so that one is never loaded into the other.
    pub fn packed_name(&self) -> String {
        let Self {
            shape,
            dtype,
            config,
            transposed,
        } = self;
        let dims: Vec<String> = shape.iter().map(usize::to_string).collect();
        format!(
            "{PACKED}_{}_{}_{}_{}_{}{}",
            config.quant_type.name(),
            config.block_size.elems(),
            config.nested_block_size.map_or(0, BlockSize::elems),
            dtype.name(),
            dims.join("x"),
            if *transposed { "_transposed" } else { "" },
        )
    }

    /// The form that a name tells; `None` for any other name.
    pub fn from_packed_name(name: &str) -> Option<Self> {
        let mut parts = name.split('_');
        let mut next = || parts.next();
        if next()? != PACKED {
            return None;
        }
        let block_size = |elems: &str| BlockSize::try_from(elems.parse::<usize>().ok()?).ok();
        let form = Self {
            config: QuantConfig {
                quant_type: {
                    let name = next()?;
                    QuantType::ALL
                        .into_iter()
                        .find(|kind| kind.name() == name)?
                },
                block_size: block_size(next()?)?,
                nested_block_size: match next()? {
                    "0" => None,
                    elems => Some(block_size(elems)?),
                },
            },
            dtype: FloatType::from_name(next()?, PACKED).ok()?,
            shape: {
                let dims = next()?.split('x').map(str::parse);
                dims.collect::<Result<_, _>>().ok()?
            },
            transposed: next() == Some("transposed"),
        };
        (form.packed_name() == name).then_some(form)
    }
}

/// Everything but the shape.
impl fmt::Display for WeightForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = self.config;
        write!(f, "{} of {}", config.quant_type.name(), self.dtype.name())?;
        match config.format().block {
            BlockShape::Flat(size) | BlockShape::Row(size) => write!(f, " in blocks of {size}")?,
            BlockShape::Tile(high, wide) => write!(f, " in blocks of {high} by {wide}")?,
            BlockShape::WholeRow => write!(f, " with a scale a row")?,
        }
        if let Some(nested) = config.nested_block_size {
            write!(f, ", scales in blocks of {}", nested.elems())?;
        }
        if self.transposed {
            write!(f, ", transposed")?;
        }
        Ok(())
    }
}
