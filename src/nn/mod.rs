//! Burn modules with packed weights.

mod embedding;
mod linear;
mod qlora;

pub use embedding::{Nf4Embedding, Nf4EmbeddingConfig};
pub use linear::{Nf4Linear, Nf4LinearConfig};
pub use qlora::{QLoraLinear, QLoraLinearConfig};
