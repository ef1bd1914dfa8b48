//! Decoder-only language models that a `config.json` describes.
//!
//! One [`Decoder`] serves all families: [`DecoderConfig`] says which parts a model has. One file for each
//! family under [`family`] reads its `config.json`.
//!
//! Any of them is built by three lines, and is then a model like any other of
//! [`burn_nf4::model`]: to be quantized, adapted, merged, saved.
//!
//! ```no_run
//! # use burn_nf4::{checkpoint::CheckpointStore, format::FloatType};
//! # use burn_nf4_llm::model::{DecoderConfig, load};
//! # let (folder, device) = ("folder".as_ref(), burn::tensor::Device::default());
//! let config = DecoderConfig::from_folder(folder)?;
//! let store = CheckpointStore::open(folder)?;
//! let model = load(store, &config, FloatType::F32, &device)?;
//! # Ok::<(), burn_nf4_llm::ModelError>(())
//! ```
//!
//! Without a checkpoint [`DecoderConfig::init`] makes fresh weights:
//!
//! ```
//! use burn::tensor::{Device, Int, Tensor};
//! use burn_nf4::model::{LinearLayers, QuantizeLayers};
//! use burn_nf4_llm::model::DecoderConfig;
//!
//! let text = br#"{
//!     "model_type": "qwen3_moe", "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2,
//!     "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
//!     "moe_intermediate_size": 64
//! }"#;
//! let config = DecoderConfig::from_json(text, "config.json".as_ref())?;
//! let model = config.init(&Device::default()).quantize(&QuantizeLayers::default())?;
//! let ids = Tensor::<2, Int>::from_ints([[5, 6, 7]], &model.device());
//! let hidden = model.hidden(ids, &mut model.rope_tables(&config), None);
//! assert_eq!(model.head(hidden).dims(), [1, 3, 100]);
//! # Ok::<(), burn_nf4_llm::ModelError>(())
//! ```

pub mod attention;
pub mod cache;
pub mod config;
mod decoder;
mod expert_stacks;
pub mod family;
mod init;
mod layer;
mod load;
mod mixture;
mod mlp;
mod norm;
mod pass;
pub mod rope;
mod rotation;
mod scale;
mod stacks;
mod variants;

pub use burn_nf4::op::{Activation, NormForm};
pub use config::DecoderConfig;
pub use decoder::{Decoder, EMBEDDING, HEAD, PROMPT_CHUNK};
pub use init::{random, random_by_layers};
pub(crate) use layer::Residual;
pub use layer::{DecoderLayer, LayerNorms, Mlp, PostNorms, PreNorms, SandwichNorms};
pub use load::{left_out, load};
pub use mixture::{GateRouter, MixtureMlp, NamedRouter, Router};
pub use mlp::{FusedGateUp, GateUpProjections, GatedMlp, SeparateGateUp};
pub use norm::RmsNorm;
pub use pass::Pass;
pub(crate) use pass::PassSizes;
pub use rotation::{RopeTables, Rotation};
pub use scale::EmbeddingScale;
