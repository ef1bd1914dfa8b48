//! Burn modules with packed weights.

mod any_linear;
mod linear;
mod lora;
mod qlora;

pub use any_linear::AnyLinear;
pub(crate) use any_linear::with_stable_id;
pub use linear::{Nf4Linear, Nf4LinearConfig};
pub use lora::LoraLinear;
pub use qlora::{QLoraLinear, QLoraLinearConfig};
