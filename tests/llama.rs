//! The model of `examples/llama` against what transformers and PEFT computed.

#![allow(
    dead_code,
    reason = "the modules of the example are shared, and not all of each is used here"
)]

#[path = "../examples/llama/adapter.rs"]
mod adapter;
#[path = "../examples/llama/attention.rs"]
mod attention;
#[path = "../examples/llama/backward.rs"]
mod backward;
#[path = "../examples/llama/bench.rs"]
mod bench;
#[path = "../examples/llama/cache.rs"]
mod cache;
#[path = "../examples/llama/chat.rs"]
mod chat;
#[path = "../examples/llama/cli.rs"]
mod cli;
#[path = "../examples/llama/commands.rs"]
mod commands;
#[path = "../examples/llama/config.rs"]
mod config;
#[path = "../examples/llama/data.rs"]
mod data;
#[path = "../examples/llama/device.rs"]
mod device;
#[path = "../examples/llama/error.rs"]
mod error;
#[path = "../examples/llama/fetch.rs"]
mod fetch;
#[path = "../examples/llama/fields.rs"]
mod fields;
#[path = "../examples/llama/files.rs"]
mod files;
#[path = "../examples/llama/finetune.rs"]
mod finetune;
#[path = "../examples/llama/generate.rs"]
mod generate;
#[path = "../examples/llama/jinja.rs"]
mod jinja;
#[path = "../examples/llama/load.rs"]
mod load;
#[path = "../examples/llama/message.rs"]
mod message;
#[path = "../examples/llama/model.rs"]
mod model;
#[path = "../examples/llama/optimizer.rs"]
mod optimizer;
#[path = "../examples/llama/pipeline.rs"]
mod pipeline;
#[path = "../examples/llama/plain_text.rs"]
mod plain_text;
#[path = "../examples/llama/progress.rs"]
mod progress;
#[path = "../examples/llama/projection.rs"]
mod projection;
#[path = "../examples/llama/python.rs"]
mod python;
#[path = "../examples/llama/records.rs"]
mod records;
#[path = "../examples/llama/rope.rs"]
mod rope;
#[path = "../examples/llama/rope_fields.rs"]
mod rope_fields;
#[path = "../examples/llama/rotation.rs"]
mod rotation;
#[path = "../examples/llama/sample.rs"]
mod sample;
#[path = "../examples/llama/schedule.rs"]
mod schedule;
#[path = "../examples/llama/special_tokens.rs"]
mod special_tokens;
#[path = "../examples/llama/text.rs"]
mod text;
#[path = "../examples/llama/train.rs"]
mod train;
#[path = "../examples/llama/watch.rs"]
mod watch;

mod peft_cases;

#[path = "llama/adapters.rs"]
mod adapters;
mod stored;

#[path = "llama/arguments.rs"]
mod arguments;
#[path = "llama/chats.rs"]
mod chats;
#[path = "llama/configs.rs"]
mod configs;
#[path = "llama/datasets.rs"]
mod datasets;
#[path = "llama/fixtures.rs"]
mod fixtures;
#[path = "llama/generation.rs"]
mod generation;
#[path = "llama/optimizers.rs"]
mod optimizers;
#[path = "llama/parity.rs"]
mod parity;
#[path = "llama/ropes.rs"]
mod ropes;
#[path = "llama/ties.rs"]
mod ties;
#[path = "llama/tokenizer_flags.rs"]
mod tokenizer_flags;
#[path = "llama/training.rs"]
mod training;
