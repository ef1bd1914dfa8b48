//! The operations as functions over Burn's tensors: arguments are validated here.

mod check;
mod dense;
mod embedding;
mod empty;
mod linear;
mod spec;
mod stack;
mod weight;

pub(super) use check::{check_device, check_dtype};
pub use dense::{
    DenseProvider, MatmulOptions, dense_provider, matmul, reads_tables, set_dense_provider,
    uses_cublaslt,
};
pub use embedding::embedding;
pub(crate) use empty::connect_empty;
pub(super) use empty::tracked_zero;
#[cfg(feature = "cube")]
pub(super) use linear::checked_operands;
pub(crate) use linear::effective_weight;
pub(super) use linear::linear_at;
pub use linear::{LowRank, expert_linear, linear, linear_with, lora_linear};
pub use stack::ExpertStack;
pub use weight::BlockWeight;
pub(crate) use weight::PACKED_CONTAINER;
