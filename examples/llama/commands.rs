//! The command `generate`, and what it shares with `finetune`.

use std::io::{Write, stderr, stdout};
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::Device;
use burn_nf4::checkpoint::Checkpoint;
use burn_nf4::peft::Adapter;
use clap::Args;

use crate::adapter;
use crate::chat::{Conversation, Ending};
use crate::config::LlamaConfig;
use crate::device::{DTypeName, DeviceName};
use crate::error::ModelError;
use crate::fetch;
use crate::generate::{Report, Request, generate};
use crate::load;
use crate::message::Message;
use crate::model::Llama;
use crate::progress::{LoadBar, mebibytes, peak_memory_bytes, seconds};
use crate::sample::Sampling;
use crate::text::Text;

/// Which model, where, and in which type.
#[derive(Args, Debug)]
pub struct ModelArgs {
    /// A folder, or a repository `org/name` to fetch from the Hugging Face hub.
    #[arg(long)]
    pub model: String,
    /// Where to run.
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// The type to compute in: f32 on the CPU, elsewhere the model's own.
    #[arg(long, value_enum)]
    pub dtype: Option<DTypeName>,
}

/// Continue a text.
#[derive(Args, Debug)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The text to continue; several make a batch.
    #[arg(long, required = true)]
    pub prompt: Vec<String>,
    /// Put the prompt into the model's chat template, as the user's message.
    #[arg(long)]
    pub chat: bool,
    /// The system message of the chat.
    #[arg(long, requires = "chat")]
    pub system: Option<String>,
    /// Most tokens to generate.
    #[arg(long, default_value_t = 128)]
    pub max_tokens: usize,
    /// 0 takes the likeliest token each time.
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Draw among this many of the likeliest tokens only; 0 for all.
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Draw among the likeliest tokens that reach this probability together.
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    /// Seed of the draws.
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// A PEFT LoRA folder to put on the model.
    #[arg(long)]
    pub adapter: Option<PathBuf>,
    /// Rows: the prompts are repeated until there are this many.
    #[arg(long)]
    pub batch: Option<usize>,
    /// Go on to the last token even where the model ends its text: for timing.
    #[arg(long)]
    pub ignore_eos: bool,
}

/// A model with all that belongs to it.
pub struct Opened {
    pub model: Llama,
    pub config: LlamaConfig,
    pub text: Text,
}

impl ModelArgs {
    /// Fetches the model if need be and loads it, to an autodiff device if it is to be trained.
    pub fn open(&self, train: bool) -> Result<Opened, ModelError> {
        let device = self.device.open()?;
        let folder = fetch::folder(&self.model)?;
        let config = LlamaConfig::from_folder(&folder)?;
        let text = Text::from_folder(&folder)?;
        let dtype = self.device.dtype(self.dtype, config.dtype, &device)?;
        let device = if train { device.autodiff() } else { device };

        let start = Instant::now();
        let model = load_model(&folder, &config, dtype, &device)?;
        device
            .sync()
            .map_err(|error| ModelError::Argument(format!("{device:?}: {error}")))?;
        let (packed, dense) = model.size_bytes();
        eprintln!(
            "loaded in {} on {:?} ({}): {} of packed weights, {} of float weights",
            seconds(start.elapsed()),
            self.device,
            dtype.name(),
            mebibytes(packed as u64),
            mebibytes(dense as u64),
        );
        Ok(Opened {
            model,
            config,
            text,
        })
    }
}

fn load_model(
    folder: &Path,
    config: &LlamaConfig,
    dtype: burn_nf4::format::FloatType,
    device: &Device,
) -> Result<Llama, ModelError> {
    let checkpoint = Checkpoint::open(folder)?;
    let bar = LoadBar::new();
    let model = load::load(&checkpoint, config, dtype, device, |progress| {
        bar.update(progress);
    });
    bar.finish();
    model
}

impl GenerateArgs {
    pub fn run(&self) -> Result<(), ModelError> {
        let Opened {
            mut model,
            config,
            text,
        } = self.model.open(false)?;
        if let Some(folder) = &self.adapter {
            let device = model.device();
            model = adapter::apply(model, &Adapter::open(folder)?, &device)?;
        }
        let prompts: Vec<Vec<u32>> = self
            .prompt
            .iter()
            .map(|prompt| self.encode(&text, prompt))
            .collect::<Result<_, _>>()?;
        let rows = self.batch.unwrap_or(prompts.len()).max(1);
        let request = Request {
            prompts: prompts.iter().cycle().take(rows).cloned().collect(),
            max_tokens: self.max_tokens,
            sampling: Sampling {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                seed: self.seed,
            },
            eos: match self.ignore_eos {
                true => Vec::new(),
                false => config.eos_token_ids.clone(),
            },
        };

        // One row is shown as it comes; more would mix.
        let mut stream = text.tokenizer.decode_stream(true);
        let report = generate(&model, &config, &request, |_, id| {
            if rows > 1 {
                return Ok(());
            }
            let piece = stream
                .step(id)
                .map_err(|error| ModelError::Tokenizer(error.to_string()))?;
            if let Some(piece) = piece {
                print!("{piece}");
                stdout().flush().map_err(ModelError::io("stdout"))?;
            }
            Ok(())
        })?;
        println!();
        if rows > 1 {
            // Rows of the same prompt say the same when nothing is drawn.
            let shown = if self.temperature > 0.0 {
                rows
            } else {
                prompts.len().min(rows)
            };
            for (row, tokens) in report.tokens.iter().take(shown).enumerate() {
                let decoded = text
                    .tokenizer
                    .decode(tokens, true)
                    .map_err(|error| ModelError::Tokenizer(error.to_string()))?;
                println!("[{row}] {decoded}");
            }
        }
        print_report(&report, rows);
        Ok(())
    }

    fn encode(&self, text: &Text, prompt: &str) -> Result<Vec<u32>, ModelError> {
        if !self.chat {
            return text.encode(prompt);
        }
        let system = self.system.iter();
        let mut messages: Vec<Message> = system
            .map(|system| Message::new("system", system))
            .collect();
        messages.push(Message::new("user", prompt));
        let conversation = Conversation {
            messages,
            ..Conversation::default()
        };
        text.encode_chat(&conversation, Ending::Prompt)
    }
}

fn print_report(report: &Report, rows: usize) {
    let mut err = stderr().lock();
    // Nothing to be done if stderr is gone.
    let _ = writeln!(
        err,
        "prompt: {} tokens in {}, {:.1} tokens/s\n\
         decode: {} tokens in {}, {:.1} tokens/s ({rows} rows), median {:.2} ms a step\n\
         KV cache: {}; peak memory of the process: {}",
        report.prompt_tokens,
        seconds(report.prompt_time),
        report.prompt_rate(),
        report.decoded_tokens,
        seconds(report.decode_time),
        report.decode_rate(),
        report.step_time.as_secs_f64() * 1e3,
        mebibytes(report.cache_bytes as u64),
        peak_memory_bytes().map_or_else(|| "unknown".into(), mebibytes),
    );
}
