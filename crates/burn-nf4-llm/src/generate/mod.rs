//! Continuing texts token by token.

mod batch;
mod cancel;
mod memory;
pub(crate) mod replay;
pub mod sample;
pub mod session;
mod steps;
pub mod text;

pub use cancel::Cancellation;
pub use memory::CacheSize;
pub use sample::Sampling;
pub use session::Session;
pub use text::{TextReport, generate_text};

use std::fmt;
use std::ops::ControlFlow;
use std::time::Duration;

use burn_nf4::Nf4Error;

use crate::error::ModelError;
use crate::generate::batch::run;
use crate::generate::steps::Start;
use crate::model::Decoder;
use crate::model::config::DecoderConfig;

/// What to generate.
#[derive(Debug, Clone)]
pub struct Request {
    /// The tokens of each prompt.
    pub prompts: Vec<Vec<u32>>,
    /// Most rows that are continued at a time. Further prompts wait; each takes the place of a row that
    /// ends, while the others go on.
    pub max_batch: usize,
    /// Most tokens to generate for each prompt.
    pub max_tokens: usize,
    /// How a token is chosen.
    pub sampling: Sampling,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// Whether a step may be recorded in a graph that the device replays, where that is faster.
    ///
    /// On CUDA, as long as a recording lasts, no other thread of the process may allocate or wait on any
    /// device: it would break the recording off, which is [`ModelError::Replay`], or fail itself. Generations
    /// wait for each other's recordings, but not for the rest of what others do. So set it where one thread
    /// uses the device.
    pub capture: bool,
    /// Most bytes that the keys and values of all rows may take: [`ModelError::Memory`] before the first pass
    /// if they need more. What the device has bounds them too, where its runtime tells.
    pub max_cache_bytes: Option<u64>,
    /// Ends the generation from a callback or another thread.
    pub cancel: Cancellation,
}

/// No prompts, 64 rows, 128 tokens, the likeliest each time; each step launched anew.
impl Default for Request {
    fn default() -> Self {
        Self {
            prompts: Vec::new(),
            max_batch: 64,
            max_tokens: 128,
            sampling: Sampling::greedy(),
            eos: Vec::new(),
            capture: false,
            max_cache_bytes: None,
            cancel: Cancellation::new(),
        }
    }
}

impl Request {
    /// Tokens of the longest prompt.
    pub fn longest_prompt(&self) -> usize {
        self.prompts.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Rows that are continued at a time.
    pub fn rows(&self) -> usize {
        self.max_batch.min(self.prompts.len())
    }

    /// Tokens that no text has more of.
    pub(crate) fn limit(&self) -> usize {
        self.longest_prompt().saturating_add(self.max_tokens)
    }

    /// Refuses what a model of this vocabulary cannot continue.
    fn check(&self, vocabulary: usize) -> Result<(), ModelError> {
        self.sampling.check()?;
        let rows = self.prompts.len();
        for (name, count) in [
            ("the number of prompts", rows),
            ("max_tokens", self.max_tokens),
            ("max_batch", self.max_batch),
        ] {
            if count == 0 {
                return Err(ModelError::setting(name, count, "at least 1"));
            }
        }
        for (row, prompt) in self.prompts.iter().enumerate() {
            let name = format!("prompt {row}");
            if prompt.is_empty() {
                return Err(ModelError::setting(name, "empty", "at least one token"));
            }
            check_ids(&name, prompt, vocabulary)?;
        }
        Ok(())
    }
}

/// How it went.
#[derive(Debug, Clone)]
pub struct Report {
    /// The tokens generated for each prompt, without the one of [`Request::eos`] that ended it.
    pub tokens: Vec<Vec<u32>>,
    /// What ended each text.
    pub ends: Vec<RowEnd>,
    /// Tokens of all prompts that were processed.
    pub prompt_tokens: usize,
    /// Tokens of the prompt that a [`Session`] held and that were not processed again.
    pub reused_tokens: usize,
    /// Time of the prompts: up to the first token, and of those that took the place of a row later.
    pub prompt_time: Duration,
    /// Tokens that steps gave after the first prompts, of all rows.
    pub decoded_tokens: usize,
    /// Time of these steps, and of the callback.
    pub decode_time: Duration,
    /// The median time of a step after the first: on a GPU the first steps compile and tune.
    pub step_time: Duration,
    /// Bytes of the keys and values held at the end.
    pub cache_bytes: usize,
    /// Why the host launched each step anew, if the device did not replay a recorded one.
    pub eager: Option<EagerReason>,
}

/// What ended a text.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowEnd {
    /// One of [`Request::eos`].
    Eos,
    /// The callback, with the last token.
    Callback,
    /// [`Request::max_tokens`] are there.
    MaxTokens,
    /// [`Request::cancel`]. Prompts that were waiting have no tokens.
    Cancelled,
    /// The cache could not grow: only beyond [`Request::cache_size`].
    Memory,
}

/// Why the host launches each step of a generation anew.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EagerReason {
    /// [`Request::capture`] is false.
    Asked,
    /// Recording would take longer than it saves.
    FewTokens,
    /// The device records no graphs.
    NoGraphs,
    /// The model has mixtures of experts that are not
    /// [stacked](crate::model::Decoder::stack_experts), and the host sends tokens to them.
    Mixture,
    /// A rotary embedding changes within the text.
    RopeChanges,
    /// The device recorded nothing, against what it promised.
    NotRecorded,
}

impl fmt::Display for EagerReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Asked => "that was asked for",
            Self::FewTokens => "there are few tokens",
            Self::NoGraphs => "the device records no graphs",
            Self::Mixture => "the host sends tokens to experts",
            Self::RopeChanges => "the rotary embedding changes with the length of the text",
            Self::NotRecorded => "the device could not record a step",
        })
    }
}

/// What a callback wants of a row: `()` goes on, a [`ControlFlow`] may end it.
pub trait RowFlow {
    /// Whether the row ends with this token.
    fn ends_row(&self) -> bool;
}

impl RowFlow for () {
    fn ends_row(&self) -> bool {
        false
    }
}

impl RowFlow for ControlFlow<()> {
    fn ends_row(&self) -> bool {
        self.is_break()
    }
}

/// Continues every prompt until its row ends or `max_tokens` are there.
///
/// The first [`Request::rows`] prompts are processed together, padded to one length, in passes of at most
/// [`PROMPT_CHUNK`](crate::model::PROMPT_CHUNK) tokens; each further one by itself when a row has ended. With a
/// rotary embedding that changes with the length of a text (dynamic, longrope) within the lengths that
/// there can be, it changes for all rows with the longest, as in transformers: there the next rows begin when
/// all have ended. `on_token` gets each token as it comes, with the index of its prompt; where it returns [`ControlFlow::Break`] the row ends with this
/// token.
///
/// # Errors
/// - [`ModelError::Setting`] for a request for nothing, or [`Sampling`] that cannot be
/// - [`Nf4Error::IdRange`] for tokens that the model does not know
/// - [`Nf4Error::NonFinite`] if logits are NaN or infinite, or those of a row are all minus infinity
/// - [`ModelError::Memory`] if the cache is known not to fit: see [`Request::cache_size`]
/// - [`ModelError::Replay`] if a step was not recorded or replayed rightly: see [`Request::capture`]
/// - [`ModelError::Device`] if the device does not answer after a replay, or between passes over a prompt
/// - those of `on_token`
///
/// # Panics
/// If `config` is not that of the model, or the device fails in a step that is launched.
pub fn generate<F: RowFlow>(
    model: &Decoder,
    config: &DecoderConfig,
    request: &Request,
    on_token: impl FnMut(usize, u32) -> Result<F, ModelError>,
) -> Result<Report, ModelError> {
    request.check(config.vocab_size)?;
    request
        .cache_size(model, config)
        .check(request.max_cache_bytes, 0, &model.device())?;
    let start = Start::of_prompts(model, config, &request.prompts[..request.rows()]);
    let (report, ..) = run(model, config, request, start, on_token)?;
    Ok(report)
}

/// Refuses tokens that a model does not know.
///
/// # Errors
/// [`Nf4Error::IdRange`].
pub(crate) fn check_ids(name: &str, ids: &[u32], vocabulary: usize) -> Result<(), ModelError> {
    match ids.iter().position(|&id| id as usize >= vocabulary) {
        None => Ok(()),
        Some(index) => Err(Nf4Error::IdRange {
            tensor: name.into(),
            index,
            given: ids[index].into(),
            rows: vocabulary,
        }
        .into()),
    }
}

impl Report {
    /// Tokens of the prompts a second.
    pub fn prompt_rate(&self) -> f64 {
        rate(self.prompt_tokens, self.prompt_time)
    }

    /// Tokens generated a second, of all rows together.
    pub fn decode_rate(&self) -> f64 {
        rate(self.decoded_tokens, self.decode_time)
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    tokens as f64 / time.as_secs_f64().max(1e-9)
}
