//! Whole models: any Burn model in 4 bit, with adapters, from and to Hugging Face folders.
//!
//! A model takes part once its linear layers are [`AnyLinear`](crate::nn::AnyLinear) and it says where
//! they are: [`LinearLayers`], one line a struct with [`linear_layers!`](crate::linear_layers).
//! `examples/own_model.rs` is such a model from beginning to end.

mod apply;
mod check;
mod count;
mod extract;
mod fields;
mod fresh;
mod layers;
mod load;
mod names;
mod peft_model;
mod quantize;
mod save;
mod stack;

pub use count::ParameterCount;
pub use fields::join_path;
pub use layers::{LinearLayers, MapLinear, TiedHead};
pub use peft_model::PeftModel;
pub use quantize::QuantizeLayers;
pub use save::SaveFolder;
pub use stack::StackPlace;
