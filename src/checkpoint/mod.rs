//! Quantized weights in safetensors files, as bitsandbytes, transformers, compressed-tensors and ModelOpt
//! write them.
//!
//! # The tensors of one weight
//!
//! A parameter `P`, such as `model.layers.0.mlp.up_proj.weight`, that bitsandbytes quantized is stored as
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
//! and a matrix `[n, k]` in another format, or a stack of matrices, as
//!
//! | format | key | dtype | shape |
//! |---|---|---|---|
//! | NVFP4 of compressed-tensors | `P_packed` | U8 | `[n, k / 2]` |
//! | | `P_scale` | F8_E4M3 | `[n, k / 16]` |
//! | | `P_global_scale`, which divides | F32 | `[1]` |
//! | NVFP4 of ModelOpt | `P` | U8 | `[n, k / 2]` |
//! | | `P_scale` | F8_E4M3 | `[n, k / 16]` |
//! | | `P_scale_2`, which multiplies | F32 | `[1]` or `[]` |
//! | MXFP4 of compressed-tensors | `P_packed` | U8 | `[n, k / 2]` |
//! | | `P_scale` | U8, the exponents | `[n, k / 32]` |
//! | MXFP4 of gpt-oss | `P_blocks` | U8 | `[experts, n, k / 32, 16]` |
//! | | `P_scales` | U8, the exponents | `[experts, n, k / 32]` |
//! | FP8 in tiles | `P` | F8_E4M3 | `[n, k]` |
//! | | `P_scale_inv` or `P_scale`, which multiply | F32, BF16, F16 | `[ceil(n / 128), ceil(k / 128)]` |
//! | FP8 by rows | `P` | F8_E4M3 | `[n, k]` |
//! | | `P_scale` | F32, BF16, F16 | `[n, 1]` or `[n]`; of one for all `[1]` or `[]` |
//!
//! where `P_scale` of `up_proj.weight` is `up_proj.weight_scale`. gpt-oss' experts are loaded as they are
//! stored, `[experts, n, k]` with `n` outputs; transformers has them the other way round.
//!
//! Whether a parameter is quantized is decided by the presence of these tensors, never by a
//! list of names: a checkpoint may leave any layer in 16 bit. Such a parameter has the name `P` everywhere,
//! also where no tensor has.
//!
//! Scales by which other programs quantize activations (`input_scale`, `input_global_scale`, `k_scale`, …)
//! are [listed](Checkpoint::activation_scales), and nothing is computed with them. [`QuantClaim`] is what
//! the configuration says of formats, groups and modules to be ignored.
//!
//! # Ways to load
//!
//! - [`CheckpointStore`] loads a whole module by path, after comparing all of it;
//! - [`Checkpoint`] opens a folder or a file and loads single parameters: to a device with
//!   [`load_weight`](Checkpoint::load_weight) and [`load_tensor`](Checkpoint::load_tensor), to
//!   host memory with [`load_quantized`](Checkpoint::load_quantized) and
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
//!     let weight = file.load_quantized(prefix)?;
//!     println!("{prefix}: {:?} in {} bytes", weight.shape(), weight.size_bytes());
//! }
//! # Ok::<(), burn_nf4::Nf4Error>(())
//! ```

mod block_layout;
mod block_settings;
mod block_weight;
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
pub(crate) mod names;
mod naming;
pub(crate) mod orientation;
pub(crate) mod parameters;
mod progress;
pub mod python_json;
mod quant_claim;
mod quant_state;
mod resolve;
#[cfg(feature = "peft")]
mod shard_plan;
pub(crate) mod source;
mod staging;
mod store;
mod stored;
pub(crate) mod stored_form;
mod stored_weight;
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
pub use quant_claim::{GroupWeights, QuantClaim, QuantGroup, QuantMethod};
pub use quant_state::{NestedState, QuantState};
pub use safetensors::Dtype;
#[cfg(feature = "peft")]
pub use shard_plan::ShardPlan;
pub use store::CheckpointStore;
pub use stored::TensorInfo;
pub use values::WeightLoss;
pub use verify::{ComparedParameter, Difference, VerifyReport, verify};
pub use writer::{CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, Written};
