//! The command line.

use clap::{Parser, Subcommand};

use crate::bench::BenchArgs;
use crate::commands::GenerateArgs;
use crate::error::ModelError;
use crate::finetune::FinetuneArgs;

/// Run and fine-tune Llama-family models in NF4.
#[derive(Parser, Debug)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Generate(Box<GenerateArgs>),
    Bench(BenchArgs),
    Finetune(Box<FinetuneArgs>),
}

impl Cli {
    /// Runs the command.
    pub fn run(&self) -> Result<(), ModelError> {
        match &self.command {
            Command::Generate(args) => args.run(),
            Command::Bench(args) => args.run(),
            Command::Finetune(args) => args.run(),
        }
    }
}
