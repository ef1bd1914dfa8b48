#![doc = include_str!("../README.md")]
#![deny(missing_docs)]

pub mod checkpoint;
pub mod error;
pub mod format;
pub mod host;
#[cfg(feature = "cube")]
mod kernel;
#[cfg(feature = "cube")]
pub mod launch;
pub mod model;
pub mod nn;
#[cfg_attr(
    not(any(feature = "flex", feature = "cube")),
    allow(unused, reason = "there is no backend to implement the operations for")
)]
pub mod op;
pub mod peft;

pub use error::{IoError, Nf4Error, TensorForm, TensorMisfit};
pub use op::{Nf4Weight, expert_linear, linear};
