//! LoRA adapters in the form that [PEFT](https://github.com/huggingface/peft) writes.
//!
//! A folder holds `adapter_config.json`, the settings ([`LoraConfig`]), and
//! `adapter_model.safetensors`, the tensors ([`Adapter`]):
//!
//! | key | shape |
//! |---|---|
//! | `base_model.model.M.lora_A.weight` | `[r, in_features]` |
//! | `base_model.model.M.lora_B.weight` | `[out_features, r]` |
//! | `base_model.model.M.lora_magnitude_vector`, with DoRA | `[out_features]` |
//! | `base_model.model.E.lora_embedding_A` | `[r, vocabulary]` |
//! | `base_model.model.E.lora_embedding_B` | `[embedding size, r]` |
//! | `base_model.model.M.base_layer.bias`, with `bias` other than `none` | `[out_features]` |
//! | `base_model.model.M.base_layer.weight`, of a head or an embedding | that of the weight |
//! | `base_model.model.P`, with `modules_to_save` or `bias` `all` | that of the parameter `P` |
//!
//! for each adapted module `M`, such as `model.layers.0.self_attn.q_proj`, and each adapted
//! embedding `E`. The settings mean what they mean in PEFT 0.21; one that changes the result and is
//! not supported is refused by name.
//!
//! Read, too, is every other spelling of the keys that PEFT 0.21 or transformers 5.24 reads: with
//! the adapter's name `default` (`lora_A.default.weight`), magnitudes with `.weight`,
//! `modules_to_save.P` and `modules_to_save.default.P`, keys without the prefix, and those with the
//! names of PyTorch's wrappers (`_orig_mod`, `_fsdp_wrapped_module`, `module`) in them. They are
//! written back as PEFT writes them.
//!
//! ```no_run
//! use burn::tensor::Device;
//! use burn_nf4::checkpoint::Checkpoint;
//! use burn_nf4::nn::QuantLinear;
//! use burn_nf4::peft::Adapter;
//!
//! let device = Device::default().autodiff();
//! let base = Checkpoint::open("tiny-llama-bnb-4bit")?;
//! let mut adapter = Adapter::open("tiny-llama-lora")?;
//! adapter.check_base(&base)?;
//! let module = "model.layers.0.self_attn.q_proj";
//! let weight = base.load_quantized(&format!("{module}.weight"))?;
//! let linear = QuantLinear::from_host(&weight, None, &device)?;
//! let layer = adapter.layer(module, linear, &device)?;
//! // ... train the layer ...
//! adapter.insert_layer(module, &layer)?;
//! adapter.save("tiny-llama-lora-2")?;
//! # Ok::<(), burn_nf4::Nf4Error>(())
//! ```
//!
//! An adapter can hold more than the branches of layers: [`Adapter::embeddings`] are branches of
//! embeddings, and [`Adapter::full_tensors`] take the place of parameters of the base model.
//! [`LinearLayers::apply_adapter`](crate::model::LinearLayers::apply_adapter) puts all of it on a whole
//! model; a program that goes layer by layer puts those there too. [`merge_16bit`] and [`merge_4bit`]
//! put all of an adapter into the weights of its base
//! model.

mod adapter;
mod base;
mod complete;
mod config;
mod keys;
mod layer;
mod matcher;
mod merge;
mod options;
mod parts;
mod read;
mod setting;
mod tensor;

pub use adapter::{ADAPTER_FILE, Adapter, CONFIG_FILE, LoraModule};
pub(crate) use base::is_tied_by_name;
pub use config::LoraConfig;
pub(crate) use keys::is_saved_unasked;
pub use matcher::ModuleMatcher;
pub use merge::{MergeLoss, MergeOptions, Merged, merge_4bit, merge_16bit};
pub use setting::{InitLoraWeights, LoraBias, ModuleNames, OneOrMany, PatternMap, TargetModules};
pub use tensor::DenseTensor;
