//! The operations on CubeCL runtimes.

#[cfg(feature = "cublaslt")]
mod cublaslt;
mod ops;
mod tune;

pub(in crate::op) use ops::check_strategy;
