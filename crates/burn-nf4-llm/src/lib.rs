#![doc = include_str!("../README.md")]
#![deny(missing_docs)]

pub mod error;
#[cfg(feature = "fetch")]
pub mod fetch;
pub mod generate;
pub mod json;
pub mod model;
pub mod text;
pub mod train;

pub use error::ModelError;
