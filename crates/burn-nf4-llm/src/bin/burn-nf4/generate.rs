//! The command `generate`.

use std::io::{Write, stderr};

use burn_nf4::op::keep_threads_awake;
use burn_nf4_llm::ModelError;
use burn_nf4_llm::generate::{
    CacheSize, Report, Request, RowEnd, Sampling, TextReport, generate_text,
};
use burn_nf4_llm::text::chat::Ending;
use burn_nf4_llm::text::{Conversation, Message, StopStrings, Text};
use clap::Args;
use serde::Serialize;

use crate::model_args::{AdapterArgs, ModelArgs, Opened, SamplingArgs, at_least, check_rows};
use crate::output::{say, show};
use crate::progress::{mebibytes, peak_memory_bytes, seconds};

/// Continue a text.
#[derive(Args, Debug)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The text to continue. May be given several times: the texts are continued together.
    #[arg(long, value_name = "TEXT", required = true)]
    pub prompt: Vec<String>,
    /// Put each prompt into the model's chat template, as the user's message.
    #[arg(long)]
    pub chat: bool,
    /// The system message of the chat.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,
    /// The chat template: the name of one that the model has, or a file.
    #[arg(long, value_name = "NAME|FILE", requires = "chat")]
    pub chat_template: Option<String>,
    /// The beginning of the answer, for the model to continue.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub prefill: Option<String>,
    #[command(flatten)]
    pub adapter: AdapterArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Texts in all, at least as many as prompts: the prompts are repeated until there are so many [default: one
    /// for each prompt].
    #[arg(long, value_name = "ROWS")]
    pub batch: Option<usize>,
    /// Texts that are continued at the same time. Further ones wait, and each takes the place of one that has
    /// ended: less memory, more time.
    #[arg(long, value_name = "ROWS", default_value_t = 64)]
    pub max_batch: usize,
    /// Go on up to --max-tokens where the model, or a stop string of its own, would end the text: for timing.
    #[arg(long)]
    pub ignore_eos: bool,
    /// Print a line of JSON for each row in place of its text: `prompt`, `text`, `tokens`, which is how many
    /// were generated, and `ended_by`.
    #[arg(long)]
    pub json: bool,
}

/// A row of the output in JSON.
#[derive(Serialize)]
struct JsonRow<'a> {
    prompt: &'a str,
    text: &'a str,
    tokens: usize,
    ended_by: &'static str,
}

impl GenerateArgs {
    /// Refuses what cannot be served, before a model is loaded.
    fn check(&self) -> Result<(Sampling, StopStrings), ModelError> {
        let checked = self.sampling.check()?;
        let prompts = self.prompt.len();
        at_least(1, "--max-batch", self.max_batch)?;
        check_rows("--batch", self.batch.unwrap_or(1).max(1))?;
        match self.batch {
            Some(batch) if batch < prompts => Err(ModelError::setting(
                "--batch",
                batch,
                format!("at least as many rows as prompts, which are {prompts}"),
            )),
            _ => Ok(checked),
        }
    }

    /// Prints the texts.
    pub fn run(&self) -> Result<(), ModelError> {
        let (sampling, stop) = self.check()?;
        let adapter = self.adapter.read()?;
        self.model.device.use_this_thread();
        let mut prepared = self.model.prepare(false)?;
        let sampling = self.sampling.of_model(sampling, &prepared.generation);
        if let Some(name) = &self.chat_template {
            prepared.text.chat.choose(name)?;
        }
        let stop = match self.ignore_eos {
            true => stop,
            false => stop.and(prepared.generation.stop_strings.clone())?,
        };
        let prompts: Vec<Vec<u32>> = self
            .prompt
            .iter()
            .map(|prompt| self.encode(&prepared.text, prompt))
            .collect::<Result<_, _>>()?;
        let Opened {
            model,
            config,
            text,
        } = prepared.load()?;
        let model = self.adapter.apply(adapter, model, &config)?;
        let model = model.with_exact_tables();
        let rows = self.batch.unwrap_or(prompts.len());
        let request = Request {
            prompts: prompts.iter().cycle().take(rows).cloned().collect(),
            max_tokens: self.sampling.max_tokens,
            sampling,
            eos: match self.ignore_eos {
                true => Vec::new(),
                false => text.ends(&config, self.chat),
            },
            max_batch: self.max_batch,
            capture: !self.sampling.eager,
            max_cache_bytes: self.sampling.max_cache_bytes(),
            ..Request::default()
        };
        let longest = request.longest_prompt();
        let of_prompt = config.warn_of_length("the longest prompt", longest);
        if let Some(warning) = &of_prompt {
            eprintln!("{warning}");
        }

        let CacheSize {
            rows: at_a_time,
            positions,
            bytes,
        } = request.cache_size(&model, &config);
        eprintln!(
            "KV cache: {} for {at_a_time} rows of {positions} positions",
            mebibytes(bytes)
        );

        // More rows would mix.
        let is_shown_as_it_comes = rows == 1 && !self.json;
        let _awake = keep_threads_awake(&model.device());
        let given = generate_text(&model, &config, &text, &request, &stop, |_, piece| {
            if is_shown_as_it_comes {
                show(piece)?;
            }
            Ok(())
        })?;
        let TextReport { texts, report } = given;
        match (self.json, rows) {
            (true, _) => self.print_json(&texts, &report)?,
            (false, 1) => show("\n")?,
            (false, _) => self.print_rows(&texts)?,
        }
        let rows_of_tokens = request.prompts.iter().zip(&report.tokens);
        let longest = rows_of_tokens
            .map(|(prompt, tokens)| prompt.len() + tokens.len())
            .max();
        let of_text = config.warn_of_length("the longest text", longest.unwrap_or(0));
        if let Some(warning) = of_text.filter(|_| of_prompt.is_none()) {
            eprintln!("{warning}");
        }
        print_report(&report, at_a_time);
        Ok(())
    }

    /// The texts, each below a line with its prompt as Rust spells it: one line, whatever is in it.
    fn print_rows(&self, texts: &[String]) -> Result<(), ModelError> {
        let prompts = self.prompt.len();
        // Rows of the same prompt say the same when nothing is drawn.
        let shown = match self.sampling.temperature > 0.0 {
            true => texts.len(),
            false => prompts,
        };
        for (row, text) in texts.iter().take(shown).enumerate() {
            let space = if row > 0 { "\n" } else { "" };
            let prompt = &self.prompt[row % prompts];
            say!("{space}==> {} of {shown}: {prompt:?}\n{text}", row + 1)?;
        }
        Ok(())
    }

    fn print_json(&self, texts: &[String], report: &Report) -> Result<(), ModelError> {
        let rows = texts.iter().zip(&report.tokens).zip(&report.ends);
        for (((text, tokens), end), prompt) in rows.zip(self.prompt.iter().cycle()) {
            let row = JsonRow {
                prompt,
                text,
                tokens: tokens.len(),
                ended_by: match end {
                    RowEnd::Eos => "end_of_text",
                    RowEnd::Callback => "stop_string",
                    RowEnd::MaxTokens => "max_tokens",
                    RowEnd::Memory => "memory",
                    _ => "cancelled",
                },
            };
            let line = serde_json::to_string(&row).map_err(ModelError::json("stdout"))?;
            say!("{line}")?;
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

/// For people.
pub fn how_steps_were_made(report: &Report) -> String {
    match report.eager {
        None => "replayed".into(),
        Some(why) => format!("launched each time: {why}"),
    }
}

fn print_report(report: &Report, rows: usize) {
    let mut err = stderr().lock();
    // Nothing to be done if stderr is gone.
    let _ = writeln!(
        err,
        "prompt: {} tokens in {}, {:.1} tokens/s\n\
         decode: {} tokens in {}, {:.1} tokens/s ({rows} rows), median {:.2} ms a step, {}\n\
         KV cache: {}; peak memory of the process: {}",
        report.prompt_tokens,
        seconds(report.prompt_time),
        report.prompt_rate(),
        report.decoded_tokens,
        seconds(report.decode_time),
        report.decode_rate(),
        report.step_time.as_secs_f64() * 1e3,
        how_steps_were_made(report),
        mebibytes(report.cache_bytes as u64),
        peak_memory_bytes().map_or_else(|| "unknown".into(), mebibytes),
    );
}
