//! Burn modules with packed weights.
//!
//! # Burn's own mappers on these layers
//!
//! [`QuantLinear`], [`QLoraLinear`] and [`LoraLinear`] are Burn modules, and Burn's functions over modules
//! reach into them. What comes of it (the weight of a `LoraLinear`, and all of an [`AnyLinear`] of floats,
//! is a `Linear` of Burn's to them, is adapted and quantized as one, and computes as one does):
//!
//! | Burn's | on a packed weight | on a bias | on `lora_a`, `lora_b`, `lora_magnitude` |
//! |---|---|---|---|
//! | `apply_lora`, any group | nothing | frozen | frozen, never adapted |
//! | `apply_qlora`, any group | nothing | frozen, never quantized | frozen, neither adapted nor quantized |
//! | `quantize_weights` | nothing | nothing | nothing |
//! | `unfreeze`, `set_require_grad(true)` | nothing | **trained** | trained |
//! | `no_grad`, `freeze` | nothing | frozen | frozen |
//! | records, stores, optimizers, casts | as an integer tensor | as any float | as any float |
//!
//! A packed weight is an integer parameter, which none of these functions touches. `apply_lora` and
//! quantizers take whatever float parameter they meet; the layers put their own back as it was.
//!
//! A whole model whose layers have such an adapter or a packed weight of [`reparameterize_linears`] is
//! refused by name where [`LinearLayers`](crate::model::LinearLayers) quantizes, adapts, loads or saves it:
//! `materialize` makes plain weights of them.
//!
//! Two calls need a group, as they do in Burn's own LoRA. [`lora_params`] is it:
//!
//! - `apply_lora` freezes all but its adapters. To train the branches of [`QLoraLinear`] beside them,
//!   unfreeze these afterwards: `model.apply_lora(lora).unfreeze_group(lora_params())`.
//! - `unfreeze` makes everything trainable, biases of frozen layers, embeddings and norms included. To
//!   go back to training the branches: `model.no_grad().unfreeze_group(lora_params())`.
//!
//! # NF4 on unchanged modules
//!
//! [`reparameterize_linears`] packs the weights of Burn's own [`Linear`](burn::nn::Linear)s in any
//! module by way of a [`Reparameterization`](burn::module::Reparameterization): no type changes, so it
//! works on modules that know nothing of this crate. Burn's `apply_lora` and `apply_qlora` on top add a
//! low-rank branch to the packed weight; `materialize` merges it.
//!
//! What one has to know:
//!
//! - A `Linear` multiplies with a dense weight. At inference it is decoded for each product and dropped
//!   after it; the kernels that read packed weights are not used.
//! - In training, a weight with a trained branch is decoded again in the backward pass. Another is kept
//!   dense from forward to backward, unless the device has
//!   [`gradient_checkpointing`](burn::tensor::Device::gradient_checkpointing): then it is decoded again
//!   too. Batches `[n, rows, d]` that Burn does not fold into rows (with `n = 1`, or `rows` a multiple of
//!   32 or large beside the width) need checkpointing in any case: Burn reshapes the weight for
//!   them and keeps the result (burn-backend 0.22.1, `backend/ops/modules/linear.rs:46`).
//! - Burn's product computes a gradient with the shape of the weight wherever one is recomputed, and all
//!   these gradients live until the end of the backward pass: Burn runs steps by their depth in the
//!   graph (burn-autodiff 0.22.1, `runtime/server.rs:167`), and a parameter is at the bottom of it. So
//!   the most memory that a training step takes is that of the dense model, for Burn's own LoRA and
//!   QLoRA as for this. Only [`QuantLinear`] and [`QLoraLinear`] avoid it.
//! - [`Param::base`](burn::module::Param::base) of a packed parameter, which `shape`, `dims`,
//!   `num_params` and the display of a module see too, is `[d_input, 1]`, and is what records hold
//!   beside the packed weight.
//! - The group of a `Lora` must match the path `….weight.nf4.lora_host` too, or the id of the weight: a
//!   predicate such as `"query"` does, the exact path `….weight` alone reaches nothing. A second
//!   `apply_lora` leaves the first adapter: Burn nests no reparameterizations.
//!
//! # Burn's LoRA or the layers of this crate
//!
//! | | take |
//! |---|---|
//! | a model that trains in memory, weights dense | Burn's `apply_lora`: exact, and nothing to change |
//! | a model of types that cannot be changed, to run in 4 bit or to train where memory is not short | [`reparameterize_linears`], with `apply_lora` |
//! | 2 or 8 bits, or another scheme of Burn's | Burn's `apply_qlora`, `quantize_weights` |
//! | training in 4 bit because memory is short; fast answers to single rows; checkpoints and adapters of bitsandbytes and PEFT; DoRA, dropout | [`QLoraLinear`], [`QuantLinear`] |
//!
//! What each takes in memory and time is measured in `docs/benchmarks.md` (Burn's LoRA and the layers of
//! this crate).

mod any_linear;
mod cross_entropy;
mod embedding;
mod joined;
mod linear;
mod lora;
mod params;
mod qlora;
mod reparameterization;
mod traversal;

/// What Burn's visitors are told that the parts of a reparameterization lie in.
pub(crate) const REPARAMETERIZATION: &str = "Reparameterization";

pub use any_linear::AnyLinear;
#[cfg(feature = "peft")]
pub(crate) use any_linear::with_stable_id;
pub use cross_entropy::linear_cross_entropy;
pub use embedding::{QuantEmbedding, QuantEmbeddingConfig};
pub use joined::{gated_forward, joined_forward};
pub use linear::{QuantLinear, QuantLinearConfig};
pub use lora::LoraLinear;
#[cfg(feature = "peft")]
pub(crate) use params::in_floats;
pub use params::lora_params;
pub use qlora::{LoraInit, QLoraLinear, QLoraLinearConfig};
pub use reparameterization::{QuantReparameterization, reparameterize_linears};
