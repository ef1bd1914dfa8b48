//! What a merge writes.

use crate::format::FloatType;

/// The form of the result.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target {
    /// Float weights, of a dtype of their own if none is asked for.
    Float(Option<FloatType>),
    /// What the base model has: 4 bit where its weights are in 4 bit.
    AsBase,
}
