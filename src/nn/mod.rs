//! Burn modules with packed weights.

mod linear;
mod params;
mod qlora;
mod reparameterization;
mod traversal;

pub use linear::{Nf4Linear, Nf4LinearConfig};
pub use params::lora_params;
pub use qlora::{QLoraLinear, QLoraLinearConfig};
pub use reparameterization::{Nf4Reparameterization, reparameterize_linears};
