//! What a measurement of the ways to compute a product is kept under.

use std::fmt::{Display, Formatter};

use cubecl::tune::AutotuneKey;
use serde::{Deserialize, Serialize};

use super::product::Product;
use super::tile::TENSOR_CORE_ROWS;
use crate::format::{FloatType, QuantConfig, QuantType};

/// Products that the same way is fastest for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct MatmulKey {
    /// Rows of `x`, rounded up, see [`rounded_rows`].
    pub m: usize,
    n: usize,
    pub k: usize,
    pub dtype: FloatType,
    quant_type: QuantType,
    block_size: usize,
    nested: bool,
    bias: bool,
    /// Rank of the branch, rounded up to a power of two; zero without one.
    rank: usize,
    /// Whether the product with the decoded weight is cuBLASLt's.
    cublaslt: bool,
}

impl Display for MatmulKey {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

impl AutotuneKey for MatmulKey {}

impl MatmulKey {
    /// The key of a product, with a bias, with a branch of some rank (zero for none), and with the
    /// decoded weight multiplied by cuBLASLt or not.
    pub fn new(
        product: Product,
        config: QuantConfig,
        bias: bool,
        rank: usize,
        cublaslt: bool,
    ) -> Self {
        let Product { m, n, k, dtype } = product;
        Self {
            m: rounded_rows(m),
            n,
            k,
            dtype,
            quant_type: config.quant_type,
            block_size: config.block_size.elems(),
            nested: config.nested_block_size.is_some(),
            bias,
            rank: match rank {
                0 => 0,
                rank => rank.next_power_of_two(),
            },
            cublaslt,
        }
    }
}

/// Prompts have any length: all up to the next of these share a measurement.
fn rounded_rows(m: usize) -> usize {
    match m {
        0..=16 => m.next_power_of_two(),
        17..=64 => m.next_multiple_of(16),
        _ => m.next_multiple_of(TENSOR_CORE_ROWS),
    }
}
