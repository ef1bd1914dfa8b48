//! The command `chat`.

use std::io::{BufRead, IsTerminal, stdin};

use burn_nf4::op::keep_threads_awake;
use burn_nf4_llm::ModelError;
use burn_nf4_llm::generate::{Request, Session};
use burn_nf4_llm::text::chat::Ending;
use burn_nf4_llm::text::{Conversation, Message};
use clap::Args;

use crate::interrupt::Interrupts;
use crate::model_args::{AdapterArgs, ModelArgs, Opened, SamplingArgs};
use crate::output::show;

#[derive(Args, Debug)]
pub struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    adapter: AdapterArgs,
    /// The system message.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// The chat template: the name of one that the model has, or a file.
    #[arg(long, value_name = "NAME|FILE")]
    chat_template: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

impl ChatArgs {
    /// Answers each line of stdin, until it ends. Ctrl-C ends an answer; where there is none, the program.
    pub fn run(&self) -> Result<(), ModelError> {
        let (sampling, stop) = self.sampling.check()?;
        let adapter = self.adapter.read()?;
        self.model.device.use_this_thread();
        let mut prepared = self.model.prepare(false)?;
        let sampling = self.sampling.of_model(sampling, &prepared.generation);
        if let Some(name) = &self.chat_template {
            prepared.text.chat.choose(name)?;
        }
        let stop = stop.and(prepared.generation.stop_strings.clone())?;
        let Opened {
            model,
            config,
            text,
        } = prepared.load()?;
        let model = self.adapter.apply(adapter, model, &config)?;
        let model = model.with_exact_tables();
        let system = self
            .system
            .iter()
            .map(|system| Message::new("system", system));
        let mut conversation = Conversation {
            messages: system.collect(),
            ..Conversation::default()
        };
        let ends = text.ends(&config, true);
        let device = model.device();
        let mut session = Session::new(&model, &config);
        let interrupts = Interrupts::new()?;
        let prompts = stdin().is_terminal();
        let mut warned = false;
        loop {
            if prompts {
                show("> ")?;
            }
            let mut line = String::new();
            let read = stdin().lock().read_line(&mut line);
            if read.map_err(ModelError::io("stdin"))? == 0 {
                return Ok(());
            }
            let line = line.trim_end_matches(['\n', '\r']);
            if line.is_empty() {
                continue;
            }
            conversation.messages.push(Message::new("user", line));
            let prompt = text.encode_chat(&conversation, Ending::Prompt)?;
            let longest = prompt.len().saturating_add(self.sampling.max_tokens);
            let warning = config.warn_of_length("the conversation with an answer", longest);
            if let Some(warning) = warning.filter(|_| !warned) {
                eprintln!("{warning}");
                warned = true;
            }
            let given = interrupts.during(|cancel| {
                let request = Request {
                    prompts: vec![prompt],
                    max_tokens: self.sampling.max_tokens,
                    sampling,
                    eos: ends.clone(),
                    capture: !self.sampling.eager,
                    max_cache_bytes: self.sampling.max_cache_bytes(),
                    cancel,
                    ..Request::default()
                };
                let _awake = keep_threads_awake(&device);
                session.generate_text(&text, &request, &stop, |_, piece| show(piece))
            })?;
            show("\n")?;
            let answer = &given.texts[0];
            let answer = Message::new("assistant", answer);
            conversation.messages.push(answer);
        }
    }
}
