//! Runs and fine-tunes a Llama-family model whose weights stay in NF4.
//!
//! ```text
//! cargo run --release --example llama -- generate --model FOLDER --prompt "Once upon a time"
//! cargo run --release --example llama -- generate --model org/name --chat --prompt "Hello"
//! cargo run --release --example llama -- finetune --model FOLDER --data text.txt --output OUT
//! cargo run --release --example llama -- decode --batch 1 --batch 16
//! ```

mod adapter;
mod attention;
mod backward;
mod cache;
mod chat;
mod commands;
mod config;
mod data;
mod decode;
mod device;
mod error;
mod fetch;
mod fields;
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

use clap::{Parser, Subcommand};

use commands::GenerateArgs;
use decode::DecodeArgs;
use finetune::FinetuneArgs;

/// Run and fine-tune Llama-family models in NF4.
#[derive(Parser, Debug)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Generate(GenerateArgs),
    Decode(DecodeArgs),
    Finetune(Box<FinetuneArgs>),
}

fn main() {
    let result = match Cli::parse().command {
        Command::Generate(args) => args.run(),
        Command::Decode(args) => args.run(),
        Command::Finetune(args) => args.run(),
    };
    if let Err(error) = result {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}
