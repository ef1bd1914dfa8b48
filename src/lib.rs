#![doc = include_str!("../README.md")]
#![deny(missing_docs)]
// Says in the docs which feature an item needs; docs.rs sets this.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod activation;
#[cfg(feature = "checkpoint")]
pub mod checkpoint;
mod cross_entropy;
pub mod error;
mod flat;
pub mod format;
pub mod host;
#[cfg(feature = "cube")]
mod kernel;
#[cfg(feature = "cube")]
pub mod launch;
#[cfg(feature = "peft")]
pub mod model;
pub mod nn;
mod norm_form;
#[cfg_attr(
    not(any(feature = "flex", feature = "cube")),
    allow(unused, reason = "there is no backend to implement the operations for")
)]
pub mod op;
pub mod parallel;
#[cfg(feature = "peft")]
pub mod peft;
mod routing;
mod sampling;
mod stack_layout;
mod unsigned_map;

pub use error::{IoError, Nf4Error, TensorForm, TensorMisfit};
pub use op::{BlockWeight, expert_linear, linear};
