//! The operations on each backend. Fusion's are made by Burn's macro.

mod adamw;
mod attention;
mod autodiff;
mod cross_entropy;
#[cfg(feature = "cube")]
pub(super) mod cube;
#[cfg(feature = "flex")]
pub(super) mod flex;
mod gated;
mod grouped;
#[cfg(feature = "cube")]
pub(super) mod joined;
mod lora;
#[cfg(feature = "flex")]
mod products;
mod rms_norm;
mod rotary;
mod route;
mod sample;
mod shared_gradient;
#[cfg(feature = "flex")]
mod table;
