//! Quantized weights in the files that bitsandbytes, and transformers with it, write.
//!
//! # The tensors of one weight
//!
//! A quantized parameter `P`, such as `model.layers.0.mlp.up_proj.weight`, is stored as
//!
//! | key | dtype | shape |
//! |---|---|---|
//! | `P` | U8, or BF16, F16, F32 holding the same bytes | `[k, 1]` |
//! | `P.absmax` | F32; U8 with double quantization | `[blocks]` |
//! | `P.quant_map` | F32 | `[16]` |
//! | `P.nested_absmax` | F32 | `[nested blocks]` |
//! | `P.nested_quant_map` | F32 | `[256]` |
//! | `P.quant_state.bitsandbytes__nf4` or `…__fp4` | U8, JSON text | `[length]` |
//!
//! Whether a parameter is quantized is decided by the presence of its `quant_state`, never by a
//! list of names: a checkpoint may leave any layer in 16 bit.
//!
//! # Ways to load
//!
//! - [`CheckpointStore`] loads a whole module by path, after comparing all of it;
//! - [`Checkpoint`] opens a folder or a file and loads single parameters: to a device with
//!   [`load_weight`](Checkpoint::load_weight) and [`load_tensor`](Checkpoint::load_tensor), to
//!   host memory with [`load_nf4`](Checkpoint::load_nf4) and
//!   [`load_float`](Checkpoint::load_float);
//! - [`SafetensorsFile`] does the same with one file.
//!
//! Files are not trusted: whatever they hold, opening and loading gives a typed error that names
//! file and key. No length is believed before it was compared with the bytes that are there, so
//! that nothing is allocated for data that a file only claims to have. But they are mapped, and
//! must not change while they are open: see [`SafetensorsFile::open`] for what that means, and
//! [`SafetensorsFile::read`] and [`Checkpoint::read`] for the way without a map.
//!
//! Of a folder those files are read that transformers 5.24 reads, see [`Checkpoint::open`], and
//! their JSON is what Python's is, see [`python_json`]. [`Checkpoint::faults`] tells where a
//! folder does not hold what its `config.json` claims; conversions and merges refuse such a source.
//!
//! # Example
//!
//! ```no_run
//! use burn_nf4::checkpoint::SafetensorsFile;
//!
//! let file = SafetensorsFile::open("model.safetensors")?;
//! for prefix in file.quantized_weights() {
//!     let weight = file.load_nf4(prefix)?;
//!     println!("{prefix}: {:?} in {} bytes", weight.shape(), weight.size_bytes());
//! }
//! # Ok::<(), burn_nf4::Nf4Error>(())
//! ```

mod block_layout;
pub(crate) mod convert;
pub(crate) mod elements;
mod faults;
mod file;
mod float;
mod folder;
mod header;
mod json;
mod layout;
mod matching;
mod names;
pub(crate) mod parameters;
mod progress;
pub mod python_json;
mod quant_state;
mod resolve;
#[cfg(feature = "peft")]
mod shard_plan;
pub(crate) mod source;
mod staging;
mod store;
mod stored;
pub(crate) mod stored_form;
mod unstack;
mod values;
mod verify;
mod weight;
mod writer;

pub use convert::{
    Converted, DequantizeOptions, QuantizeOptions, dequantize_checkpoint, is_expert,
    quantize_checkpoint,
};
pub use file::SafetensorsFile;
#[cfg(feature = "peft")]
pub(crate) use file::read_text;
pub use folder::Checkpoint;
#[cfg(feature = "peft")]
pub(crate) use names::last_part;
pub use names::{INDEX_FILE, SINGLE_FILE};
pub use progress::Progress;
pub use quant_state::{NestedState, QuantState};
pub use safetensors::Dtype;
#[cfg(feature = "peft")]
pub use shard_plan::ShardPlan;
pub use store::CheckpointStore;
pub use stored::TensorInfo;
pub use values::WeightLoss;
pub use verify::{ComparedParameter, Difference, VerifyReport, verify};
pub use writer::{CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, Written};
