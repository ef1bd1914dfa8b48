//! A product with a packed weight, by its sizes.

use cubecl::prelude::Client;

use super::check_dtype;
use crate::error::Nf4Error;
use crate::format::{FloatType, PackedLayout, check_len};

/// `y = x Wᵀ + b`, by its sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Product {
    /// Rows of `x` and `y`.
    pub m: usize,
    /// Rows of `W`, columns of `y`.
    pub n: usize,
    /// Columns of `x` and `W`.
    pub k: usize,
    /// Type of `x`, `b` and `y`.
    pub dtype: FloatType,
}

impl Product {
    /// Checks that a device can address it, and that it is one with a weight of this layout.
    pub(super) fn check(&self, client: &Client, layout: &PackedLayout) -> Result<(), Nf4Error> {
        let Self { m, n, k, dtype } = *self;
        check_dtype(client, dtype)?;
        for (tensor, rows, columns) in [("x", m, k), ("y", m, n), ("weight", n, k)] {
            let elems = rows.checked_mul(columns);
            let is_empty = tensor == "weight" && elems == Some(0);
            let most = isize::MAX as usize / dtype.size_bytes();
            if is_empty || elems.is_none_or(|elems| elems > most) {
                return Err(Nf4Error::ElementCount {
                    tensor: tensor.into(),
                    shape: vec![rows, columns],
                });
            }
        }
        check_len("weight", layout.elems(), n * k)?;
        layout.check_columns(k)?;
        check_len("x", m.max(1), m)
    }
}
