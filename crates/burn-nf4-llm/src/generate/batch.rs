//! Rows, and prompts that wait for one.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::error::ModelError;
use crate::generate::sample::Sampler;
use crate::generate::steps::{Finished, Start, Steps};
use crate::generate::{EagerReason, Report, Request, RowEnd, RowFlow};
use crate::model::cache::KvCache;
use crate::model::config::DecoderConfig;
use crate::model::{Decoder, RopeTables};

/// Continues the prompts of a checked request, and gives back the cache and the tables.
///
/// - `start`: of the first [`Request::rows`] prompts
pub(super) fn run<F: RowFlow>(
    model: &Decoder,
    config: &DecoderConfig,
    request: &Request,
    start: Start,
    mut on_token: impl FnMut(usize, u32) -> Result<F, ModelError>,
) -> Result<(Report, KvCache, RopeTables), ModelError> {
    let mut batch = Batch::new(request, start.held());
    let prompts = request.prompts.len();
    let takes_over = request.takes_over_slots(config);
    let group = match takes_over {
        true => prompts,
        false => request.rows(),
    };
    let mut finished = batch.continue_group(
        Steps::new(model, config, request, start),
        0..group.min(prompts),
        takes_over,
        &mut on_token,
    )?;
    for first in (group..prompts).step_by(group) {
        let group = first..(first + group).min(prompts);
        // Not two caches at a time.
        drop(finished);
        let start = Start::of_prompts(model, config, &request.prompts[group.clone()]);
        let steps = Steps::new(model, config, request, start);
        finished = batch.continue_group(steps, group, takes_over, &mut on_token)?;
    }
    let report = batch.report(finished.cache.size_bytes());
    Ok((report, finished.cache, finished.rope))
}

impl Request {
    /// Whether a prompt can take the slot of a row that has ended beside others that go on: not where the
    /// angles of all rows depend on the longest of them. There the rows of a group end together.
    pub(super) fn takes_over_slots(&self, config: &DecoderConfig) -> bool {
        let mut ropes = config.ropes.iter();
        ropes.all(|rope| rope.regime(1) == rope.regime(self.limit()))
    }
}

/// A generation as it goes.
struct Batch<'a> {
    request: &'a Request,
    start: Instant,
    /// Of each prompt.
    tokens: Vec<Vec<u32>>,
    ends: Vec<Option<RowEnd>>,
    held: usize,
    prompt_tokens: usize,
    prompt_time: Duration,
    decoded_tokens: usize,
    step_times: Vec<Duration>,
    eager: Option<EagerReason>,
}

/// The prompts whose rows are continued together.
struct Group {
    /// The prompt in each slot.
    slots: Vec<Option<usize>>,
    queue: VecDeque<usize>,
    /// See [`Request::takes_over_slots`].
    takes_over: bool,
}

impl Group {
    /// The slots with the prompts in them.
    fn rows(&self) -> impl Iterator<Item = (usize, usize)> {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(slot, prompt)| prompt.map(|prompt| (slot, prompt)))
    }
}

impl<'a> Batch<'a> {
    fn new(request: &'a Request, held: usize) -> Self {
        let prompts = request.prompts.len();
        Self {
            request,
            start: Instant::now(),
            tokens: vec![Vec::new(); prompts],
            ends: vec![None; prompts],
            held,
            prompt_tokens: 0,
            prompt_time: Duration::ZERO,
            decoded_tokens: 0,
            step_times: Vec::new(),
            eager: None,
        }
    }

    /// Continues some of the prompts until all of them have ended, the first of them in the rows of `steps`.
    fn continue_group<F: RowFlow>(
        &mut self,
        mut steps: Steps<'_>,
        prompts: Range<usize>,
        takes_over: bool,
        on_token: &mut impl FnMut(usize, u32) -> Result<F, ModelError>,
    ) -> Result<Finished, ModelError> {
        let rows = steps.rows();
        let of_rows = &self.request.prompts[prompts.clone()][..rows];
        let mut sampler = steps.sampler(self.request.sampling, prompts.start, of_rows)?;
        let mut queue: VecDeque<usize> = prompts.collect();
        let slots = queue.drain(..rows).map(Some).collect();
        let mut group = Group {
            slots,
            queue,
            takes_over,
        };
        let mut processed = false;
        while group.rows().next().is_some() && !self.request.cancel.is_cancelled() {
            let start = Instant::now();
            let left = self.steps_left(&group);
            let chosen = match steps.next(&mut sampler, left) {
                Ok(Some(chosen)) => chosen,
                Ok(None) => break,
                Err(ModelError::Memory { .. }) if processed => {
                    self.end_full_rows(&steps, &group);
                    self.free_slots(&mut group, &mut steps, &mut sampler)?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            match processed {
                true => {
                    self.decoded_tokens += group.rows().count();
                    self.step_times.push(start.elapsed());
                }
                false => self.prompt_time += start.elapsed(),
            }
            processed = true;
            for (slot, prompt) in group.rows() {
                self.ends[prompt] = self.take(prompt, chosen[slot], on_token)?;
            }
            self.free_slots(&mut group, &mut steps, &mut sampler)?;
        }
        let finished = steps.finish();
        self.prompt_tokens += finished.prompt_tokens;
        self.eager = self.eager.or(finished.eager);
        Ok(finished)
    }

    /// Adds a token to a text, and says whether the text ends.
    fn take<F: RowFlow>(
        &mut self,
        prompt: usize,
        id: u32,
        on_token: &mut impl FnMut(usize, u32) -> Result<F, ModelError>,
    ) -> Result<Option<RowEnd>, ModelError> {
        if self.request.eos.contains(&id) {
            return Ok(Some(RowEnd::Eos));
        }
        self.tokens[prompt].push(id);
        Ok(if on_token(prompt, id)?.ends_row() {
            Some(RowEnd::Callback)
        } else if self.tokens[prompt].len() == self.request.max_tokens {
            Some(RowEnd::MaxTokens)
        } else {
            None
        })
    }

    /// Gives the slots of texts that have ended to prompts that wait. Without any they are left to themselves
    /// while others go on.
    fn free_slots(
        &mut self,
        group: &mut Group,
        steps: &mut Steps<'_>,
        sampler: &mut Sampler,
    ) -> Result<(), ModelError> {
        let ended = group
            .rows()
            .filter(|&(_, prompt)| self.ends[prompt].is_some());
        let ended: Vec<usize> = ended.map(|(slot, _)| slot).collect();
        let mut vacant = Vec::new();
        for slot in ended {
            group.slots[slot] = group.queue.pop_front();
            let Some(prompt) = group.slots[slot] else {
                vacant.push(slot);
                continue;
            };
            let start = Instant::now();
            if !steps.fill(slot, &self.request.prompts[prompt])? {
                break;
            }
            sampler.begin_row(slot, prompt, &self.request.prompts[prompt])?;
            self.prompt_time += start.elapsed();
        }
        // Elsewhere the angles of the others are those of the longest text, also if it has ended; and the
        // cache of a session is of the text that was last there.
        if group.takes_over && group.rows().next().is_some() {
            vacant.into_iter().for_each(|slot| steps.vacate(slot));
        }
        Ok(())
    }

    /// Steps that the rows of a group want yet, at most, and those of the prompts that wait with them.
    fn steps_left(&self, group: &Group) -> usize {
        let most = self.request.max_tokens;
        let of_rows = group
            .rows()
            .map(|(_, prompt)| most - self.tokens[prompt].len());
        let of_queue = group.queue.len().div_ceil(group.slots.len());
        let of_queue = most.saturating_mul(of_queue);
        of_rows.max().unwrap_or(0).saturating_add(of_queue)
    }

    /// Ends the texts for which the cache cannot grow, and those that depend on them.
    fn end_full_rows(&mut self, steps: &Steps<'_>, group: &Group) {
        for (slot, prompt) in group.rows() {
            if steps.is_full(slot) || !group.takes_over {
                self.ends[prompt] = Some(RowEnd::Memory);
            }
        }
    }

    fn report(mut self, cache_bytes: usize) -> Report {
        self.step_times.sort_unstable();
        let median = self.step_times.get(self.step_times.len() / 2);
        let ends = self.ends.into_iter();
        Report {
            tokens: self.tokens,
            ends: ends.map(|end| end.unwrap_or(RowEnd::Cancelled)).collect(),
            prompt_tokens: self.prompt_tokens,
            reused_tokens: self.held,
            prompt_time: self.prompt_time,
            decoded_tokens: self.decoded_tokens,
            decode_time: self.start.elapsed().saturating_sub(self.prompt_time),
            step_time: median.copied().unwrap_or_default(),
            cache_bytes,
            eager: self.eager,
        }
    }
}
