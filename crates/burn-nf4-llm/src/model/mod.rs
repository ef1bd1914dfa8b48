//! Decoder-only language models that a `config.json` describes.
//!
//! One [`Decoder`] serves all families: [`DecoderConfig`] says which parts a model has. One file for each
//! family under [`family`] reads its `config.json`.

pub mod attention;
pub mod cache;
pub mod config;
mod decoder;
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
mod variants;

pub use config::DecoderConfig;
pub use decoder::{Decoder, EMBEDDING, HEAD};
pub use init::random;
pub use layer::{DecoderLayer, LayerNorms, Mlp, PostNorms, PreNorms, SandwichNorms};
pub use load::{left_out, load};
pub use mixture::MixtureMlp;
pub use mlp::{Activation, FusedGateUp, GateUpProjections, GatedMlp, SeparateGateUp};
pub use norm::{NormForm, RmsNorm};
pub use pass::Pass;
pub use rotation::{RopeTables, Rotation};
pub use scale::EmbeddingScale;
