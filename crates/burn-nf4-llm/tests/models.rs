//! Models of all families: held to what transformers and PEFT give for tiny ones.

#[path = "../../../tests/peft_cases/mod.rs"]
mod peft_cases;
#[path = "../../../tests/stored/mod.rs"]
mod stored;

#[path = "models/adapters.rs"]
mod adapters;
#[path = "models/chats.rs"]
mod chats;
#[path = "models/configs.rs"]
mod configs;
#[path = "models/datasets.rs"]
mod datasets;
#[path = "models/families.rs"]
mod families;
#[path = "models/fixtures.rs"]
mod fixtures;
#[path = "models/generation.rs"]
mod generation;
#[path = "models/heads.rs"]
mod heads;
#[path = "models/mixtures.rs"]
mod mixtures;
#[path = "models/optimizers.rs"]
mod optimizers;
#[path = "models/packed_experts.rs"]
mod packed_experts;
#[path = "models/packing.rs"]
mod packing;
#[path = "models/parity.rs"]
mod parity;
#[path = "models/ropes.rs"]
mod ropes;
#[path = "models/sessions.rs"]
mod sessions;
#[path = "models/streams.rs"]
mod streams;
#[path = "models/ties.rs"]
mod ties;
#[path = "models/tokenizer_flags.rs"]
mod tokenizer_flags;
#[path = "models/training.rs"]
mod training;
#[path = "models/visions.rs"]
mod visions;
