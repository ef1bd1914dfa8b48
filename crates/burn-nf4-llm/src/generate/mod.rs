//! Continuing texts token by token.

mod replay;
pub mod sample;
pub mod session;
mod steps;
pub mod text;

pub use sample::Sampling;
pub use session::Session;
pub use text::{TextReport, generate_text};

use std::fmt;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use burn_nf4::Nf4Error;
use burn_nf4::op::keep_threads_awake;

use crate::error::ModelError;
use crate::generate::sample::Sampler;
use crate::generate::steps::{Start, Steps};
use crate::model::cache::KvCache;
use crate::model::config::DecoderConfig;
use crate::model::{Decoder, RopeTables};

/// What to generate.
#[derive(Debug, Clone)]
pub struct Request {
    /// The tokens of each row.
    pub prompts: Vec<Vec<u32>>,
    /// Most tokens to generate for a row.
    pub max_tokens: usize,
    /// How a token is chosen.
    pub sampling: Sampling,
    /// Tokens that end a row.
    pub eos: Vec<u32>,
    /// Whether a step may be recorded in a graph that the device replays, where that is faster.
    ///
    /// On CUDA, as long as a recording lasts, no other thread of the process may allocate or wait on any
    /// device: it would break the recording off, which is [`ModelError::Replay`], or fail itself. Generations
    /// wait for each other's recordings, but not for the rest of what others do. So set it where one thread
    /// uses the device.
    pub capture: bool,
}

impl Request {
    /// Tokens of the longest prompt.
    pub fn longest_prompt(&self) -> usize {
        self.prompts.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Refuses what a model of this vocabulary cannot continue.
    fn check(&self, vocabulary: usize) -> Result<(), ModelError> {
        self.sampling.check()?;
        let rows = self.prompts.len();
        for (name, count) in [
            ("the number of prompts", rows),
            ("max_tokens", self.max_tokens),
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
    /// The tokens generated for each row, without the one of [`Request::eos`] that ended it.
    pub tokens: Vec<Vec<u32>>,
    /// Tokens of all prompts that were processed.
    pub prompt_tokens: usize,
    /// Tokens of the prompt that a [`Session`] held and that were not processed again.
    pub reused_tokens: usize,
    /// Time up to the first token.
    pub prompt_time: Duration,
    /// Tokens after the first of each row, of all rows.
    pub decoded_tokens: usize,
    /// Time of all further tokens.
    pub decode_time: Duration,
    /// The median time of a step after the first: on a GPU the first steps compile and tune.
    pub step_time: Duration,
    /// Bytes of the keys and values held at the end.
    pub cache_bytes: usize,
    /// Why the host launched each step anew, if the device did not replay a recorded one.
    pub eager: Option<EagerReason>,
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
    /// The model has mixtures of experts, and the host sends tokens to them.
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
/// The prompts are padded on the left to one length and processed in one forward pass. `on_token`
/// gets each token as it comes, with its row; where it returns [`ControlFlow::Break`] the row ends with this
/// token.
///
/// # Errors
/// - [`ModelError::Setting`] for a request for nothing, or [`Sampling`] that cannot be
/// - [`Nf4Error::IdRange`] for tokens that the model does not know
/// - [`Nf4Error::NonFinite`] if the logits of the prompts are not finite; those of later tokens are not checked
/// - [`ModelError::Replay`] if a step was not recorded or replayed rightly: see [`Request::capture`]
/// - [`ModelError::Device`] if the device does not answer after a replay
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
    let start = Start::of_prompts(model, config, request);
    let (report, ..) = run(model, config, request, start, on_token)?;
    Ok(report)
}

/// Continues the prompts of a checked request, and gives back the cache and the tables.
fn run<F: RowFlow>(
    model: &Decoder,
    config: &DecoderConfig,
    request: &Request,
    prompts: Start,
    mut on_token: impl FnMut(usize, u32) -> Result<F, ModelError>,
) -> Result<(Report, KvCache, RopeTables), ModelError> {
    let start = Instant::now();
    let _awake = keep_threads_awake(&model.device());
    let rows = request.prompts.len();
    let reused_tokens = prompts.held();
    let mut steps = Steps::new(model, config, request, prompts);
    let mut sampler = Sampler::new(request.sampling, rows);

    let mut tokens = vec![Vec::new(); rows];
    let mut open = vec![true; rows];
    let mut prompt_time = None;
    let mut decoded_tokens = 0;
    let mut step_times = Vec::new();
    let mut step_start = start;
    for _ in 0..request.max_tokens {
        let chosen = steps.next(&mut sampler)?;
        if prompt_time.is_some() {
            decoded_tokens += open.iter().filter(|&&open| open).count();
            step_times.push(step_start.elapsed());
        }
        prompt_time.get_or_insert_with(|| start.elapsed());
        step_start = Instant::now();
        for (row, &id) in chosen.iter().enumerate() {
            if !open[row] {
                continue;
            }
            if request.eos.contains(&id) {
                open[row] = false;
                continue;
            }
            tokens[row].push(id);
            open[row] = !on_token(row, id)?.ends_row();
        }
        if !open.contains(&true) {
            break;
        }
    }
    let prompt_time = prompt_time.unwrap_or_default();
    step_times.sort_unstable();
    let (cache, rope, eager) = steps.finish();
    let report = Report {
        tokens,
        prompt_tokens: request.prompts.iter().map(Vec::len).sum::<usize>() - reused_tokens,
        reused_tokens,
        prompt_time,
        decoded_tokens,
        decode_time: start.elapsed().saturating_sub(prompt_time),
        step_time: step_times
            .get(step_times.len() / 2)
            .copied()
            .unwrap_or_default(),
        cache_bytes: cache.size_bytes(),
        eager,
    };
    Ok((report, cache, rope))
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
