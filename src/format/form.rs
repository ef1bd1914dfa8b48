//! What a quantized weight is, apart from its values.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::spec::{FloatType, QuantConfig};

/// What a quantized weight is, apart from its values: two weights of the same form can stand in
/// for each other in a module and its records.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
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
}

/// Everything but the shape.
impl fmt::Display for WeightForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let QuantConfig {
            quant_type,
            block_size,
            nested_block_size,
        } = self.config;
        write!(f, "{} of {}", quant_type.name(), self.dtype.name())?;
        write!(f, " in blocks of {}", block_size.elems())?;
        if let Some(nested) = nested_block_size {
            write!(f, ", scales in blocks of {}", nested.elems())?;
        }
        if self.transposed {
            write!(f, ", transposed")?;
        }
        Ok(())
    }
}
