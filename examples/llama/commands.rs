//! The command `generate`, and what it shares with `finetune`.

use std::io::{Write, stderr, stdout};
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::Device;
use burn_nf4::Nf4Error;
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
    /// The chat template: the name of one that the model has, or a file.
    #[arg(long, requires = "chat")]
    pub chat_template: Option<String>,
    /// The beginning of the answer, for the model to continue.
    #[arg(long, requires = "chat")]
    pub prefill: Option<String>,
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
    /// Apply an adapter even if it lacks layers that its settings name.
    #[arg(long, requires = "adapter")]
    pub allow_missing: bool,
    /// Rows: the prompts are repeated until there are this many. As many as prompts without it.
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
        if config.tie_word_embeddings && model.lm_head.is_some() {
            eprintln!(
                "warning: config.json ties the head to the embeddings (tie_word_embeddings), but the \
                 model holds two different ones: both are used"
            );
        }
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
    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.seed,
        }
    }

    /// Refuses what cannot be served, before a model is loaded.
    fn check(&self) -> Result<(), ModelError> {
        self.sampling().check()?;
        at_least(1, "--max-tokens", self.max_tokens)?;
        let prompts = self.prompt.len();
        match self.batch {
            Some(batch) if batch < prompts => Err(ModelError::Argument(format!(
                "--batch is {batch}, expected at least as many rows as prompts, which are {prompts}"
            ))),
            _ => Ok(()),
        }
    }

    pub fn run(&self) -> Result<(), ModelError> {
        self.check()?;
        let Opened {
            mut model,
            config,
            mut text,
        } = self.model.open(false)?;
        if let Some(name) = &self.chat_template {
            text.chat.choose(name)?;
        }
        if let Some(folder) = &self.adapter {
            model = self.adapted(model, folder)?;
        }
        let prompts: Vec<Vec<u32>> = self
            .prompt
            .iter()
            .map(|prompt| self.encode(&text, prompt))
            .collect::<Result<_, _>>()?;
        let rows = self.batch.unwrap_or(prompts.len());
        let request = Request {
            prompts: prompts.iter().cycle().take(rows).cloned().collect(),
            max_tokens: self.max_tokens,
            sampling: self.sampling(),
            eos: match self.ignore_eos {
                true => Vec::new(),
                false => config.eos_token_ids.clone(),
            },
        };
        let longest = request.longest_prompt();
        let of_prompt = config.warn_of_length("the longest prompt", longest);
        if let Some(warning) = &of_prompt {
            eprintln!("{warning}");
        }

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
            self.print_rows(&report, &text, prompts.len())?;
        }
        let texts = request.prompts.iter().zip(&report.tokens);
        let longest = texts
            .map(|(prompt, tokens)| prompt.len() + tokens.len())
            .max();
        let of_text = config.warn_of_length("the longest text", longest.unwrap_or(0));
        if let Some(warning) = of_text.filter(|_| of_prompt.is_none()) {
            eprintln!("{warning}");
        }
        print_report(&report, rows);
        Ok(())
    }

    fn adapted(&self, model: Llama, folder: &Path) -> Result<Llama, ModelError> {
        let device = model.device();
        let adapter = Adapter::open_partial(folder)?;
        if self.allow_missing {
            return adapter::apply_partial(model, &adapter, &device);
        }
        adapter::apply(model, &adapter, &device).map_err(|error| match error {
            ModelError::Nf4(error @ Nf4Error::AdapterLacks { .. }) => {
                ModelError::Argument(format!(
                    "{}: {error}; --allow-missing applies it without",
                    folder.display()
                ))
            }
            other => other,
        })
    }

    fn print_rows(&self, report: &Report, text: &Text, prompts: usize) -> Result<(), ModelError> {
        // Rows of the same prompt say the same when nothing is drawn.
        let shown = match self.temperature > 0.0 {
            true => report.tokens.len(),
            false => prompts,
        };
        for (row, tokens) in report.tokens.iter().take(shown).enumerate() {
            let decoded = text
                .tokenizer
                .decode(tokens, true)
                .map_err(|error| ModelError::Tokenizer(error.to_string()))?;
            println!("[{row}] {decoded}");
        }
        Ok(())
    }

    fn encode(&self, text: &Text, prompt: &str) -> Result<Vec<u32>, ModelError> {
        if !self.chat {
            return text.encode(prompt);
        }
        let system = self
            .system
            .iter()
            .map(|system| Message::new("system", system));
        let mut messages: Vec<Message> = system.collect();
        messages.push(Message::new("user", prompt));
        let mut ending = Ending::Prompt;
        if let Some(start) = &self.prefill {
            messages.push(Message::new("assistant", start));
            ending = Ending::Open;
        }
        let conversation = Conversation {
            messages,
            ..Conversation::default()
        };
        text.encode_chat(&conversation, ending)
    }
}

/// Refuses a number that is too small.
pub fn at_least(least: usize, name: &str, given: usize) -> Result<(), ModelError> {
    match given < least {
        true => Err(ModelError::Argument(format!(
            "{name} is {given}, expected at least {least}"
        ))),
        false => Ok(()),
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
