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

pub(crate) mod convert;
pub(crate) mod elements;
mod file;
mod folder;
mod layout;
mod progress;
mod python_json;
mod quant_state;
mod staging;
mod verify;
mod weight;
mod writer;

pub use convert::{
    Converted, DequantizeOptions, QuantizeOptions, dequantize_checkpoint, quantize_checkpoint,
};
pub use file::{SafetensorsFile, TensorInfo};
pub use folder::{Checkpoint, INDEX_FILE, SINGLE_FILE};
pub use progress::Progress;
pub use quant_state::{NestedState, QuantState};
pub use safetensors::Dtype;
pub use verify::{ComparedParameter, Difference, VerifyReport, verify};
pub use writer::{CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, Written};
