//! Language models and checkpoints in 4 bit from the command line.
//!
//! Exits with 0 on success, 1 if `verify` finds a difference, 2 on an error.

mod args;
mod bench;
mod chat;
mod convert;
mod converted;
mod device;
mod finetune;
mod generate;
mod inspect;
mod interrupt;
mod merge;
mod model_args;
mod output;
mod progress;
mod svg;
mod verify;
mod watch;

use std::io::{Write, stderr};
use std::process::ExitCode;

use burn_nf4_llm::ModelError;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

/// Work with language models in 4 bit (NF4, FP4, NVFP4, MXFP4): Hugging Face folders and safetensors files.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List the parameters of a checkpoint and how each is stored
    Inspect(convert::InspectArgs),
    /// Quantize the linear layers of a checkpoint, from float weights or from another type
    Quantize(Box<convert::QuantizeArgs>),
    /// Decode the quantized weights of a checkpoint
    Dequantize(convert::DequantizeArgs),
    /// Compare two checkpoints parameter by parameter; exit with 1 if they differ
    Verify(convert::VerifyArgs),
    /// Merge a PEFT adapter into a model
    Merge(merge::MergeArgs),
    /// Continue a text
    Generate(Box<generate::GenerateArgs>),
    /// Talk with a model: reads messages from stdin, line by line
    Chat(Box<chat::ChatArgs>),
    /// Train a LoRA adapter beside the frozen 4-bit weights (QLoRA)
    Finetune(Box<finetune::FinetuneArgs>),
    /// Time decoding, prompts and training steps with random weights: needs no checkpoint
    Bench(bench::BenchArgs),
}

fn main() -> ExitCode {
    // Nobody has read the configuration before.
    burn_nf4::op::keep_compiled_kernels();
    match run(parse().command) {
        Ok(code) => code,
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing to be done if stderr is gone.
            let _ = writeln!(stderr(), "error: {error}");
            ExitCode::from(2)
        }
    }
}

/// The arguments. A number below zero is the value of the one before it, to be refused by its name, and no other.
fn parse() -> Cli {
    let command = Cli::command().mut_subcommands(|command| {
        command.mut_args(|argument| match argument.get_action().takes_values() {
            true => argument.allow_negative_numbers(true),
            false => argument,
        })
    });
    let matches = command.get_matches();
    Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

fn run(command: Command) -> Result<ExitCode, ModelError> {
    match command {
        Command::Inspect(args) => args.run()?,
        Command::Quantize(args) => args.run()?,
        Command::Dequantize(args) => args.run()?,
        Command::Verify(args) => return args.run(),
        Command::Merge(args) => args.run()?,
        Command::Generate(args) => args.run()?,
        Command::Chat(args) => args.run()?,
        Command::Finetune(args) => args.run()?,
        Command::Bench(args) => args.run()?,
    }
    Ok(ExitCode::SUCCESS)
}
