//! Several devices of one process that work on one step: sums over devices, and packed weights of which each device
//! keeps a part, as FSDP2 (`fully_shard` of PyTorch) does it.
//!
//! A thread is a [`Rank`]: it has a device of its own, and [`run`] starts one for each. On NVIDIA cards sums are
//! NCCL's, through CubeCL; the library is loaded at run time. Other devices of a process exchange data through
//! its memory, so that all of this runs, and is tested, on a CPU.
//!
//! ```
//! use burn::tensor::{Device, Tensor};
//! use burn_nf4::Nf4Error;
//! use burn_nf4::parallel;
//!
//! let devices = vec![Device::default(), Device::default()];
//! let sums = parallel::run(devices, |rank| -> Result<Vec<f32>, Nf4Error> {
//!     let own = Tensor::<1>::full([2], 1.0 + rank.index() as f32, rank.device());
//!     let sum = rank.all_reduce(own)?;
//!     Ok(sum.into_data().iter::<f32>().collect())
//! })?;
//! assert_eq!(sums, [[3.0, 3.0], [3.0, 3.0]]);
//! # Ok::<(), Nf4Error>(())
//! ```

mod adamw;
#[cfg(feature = "cube")]
mod collective;
mod meeting;
#[cfg(feature = "cuda")]
mod nccl;
mod rank;
mod run;
mod shard;

pub use rank::{GatheredWords, Gathering, Rank};
pub use run::run;
#[cfg(feature = "peft")]
pub(crate) use shard::Row;
pub use shard::ShardedWeights;
