//! Runs and fine-tunes a Llama-family model whose weights stay in NF4.
//!
//! ```text
//! cargo run --release --example llama -- generate --model FOLDER --prompt "Once upon a time"
//! cargo run --release --example llama -- generate --model org/name --chat --prompt "Hello"
//! cargo run --release --example llama -- finetune --model FOLDER --data text.txt --output OUT
//! cargo run --release --example llama -- bench --batch 1 --batch 16
//! ```

mod adapter;
mod attention;
mod backward;
mod bench;
mod cache;
mod chat;
mod cli;
mod commands;
mod config;
mod data;
mod device;
mod error;
mod fetch;
mod fields;
mod files;
mod finetune;
mod generate;
mod jinja;
mod load;
mod message;
mod model;
mod optimizer;
mod pipeline;
mod plain_text;
mod progress;
mod projection;
mod python;
mod records;
mod rope;
mod rope_fields;
mod rotation;
mod sample;
mod schedule;
mod special_tokens;
mod text;
mod train;
mod watch;

use clap::Parser;

fn main() {
    if let Err(error) = cli::Cli::parse().run() {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}
