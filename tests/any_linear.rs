//! Linear layers in any form, and whole models of them: quantized, loaded, adapted, merged, saved.

#[path = "any_linear/adapters.rs"]
mod adapters;
#[path = "any_linear/folders.rs"]
mod folders;
#[path = "any_linear/layer.rs"]
mod layer;
#[path = "any_linear/models.rs"]
mod models;
#[path = "any_linear/names.rs"]
mod names;
mod peft_cases;
mod random;
mod stored;
#[path = "any_linear/toy.rs"]
mod toy;
