//! Burn modules with packed weights.

mod linear;
mod qlora;

pub use linear::{Nf4Linear, Nf4LinearConfig};
pub use qlora::{QLoraLinear, QLoraLinearConfig};
