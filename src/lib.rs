//! bitsandbytes-compatible 4-bit NormalFloat (NF4) for Burn.
#![deny(missing_docs)]

pub mod error;
pub mod format;

pub use error::Nf4Error;
