//! The steps of a generation: the prompts in passes, then a token a row.

use std::cell::RefCell;
use std::ops::ControlFlow;
use std::rc::Rc;

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_nf4::op::has_graphs;

use crate::error::ModelError;
use crate::generate::memory::{CacheSize, GROWTH};
use crate::generate::replay::{RUNS, Replay, State};
use crate::generate::sample::{Sampler, Sampling};
use crate::generate::{Cancellation, EagerReason, Request};
use crate::model::cache::KvCache;
use crate::model::config::DecoderConfig;
use crate::model::rope::RopeConfig;
use crate::model::{Decoder, PROMPT_CHUNK, RopeTables};

/// Recording takes about as long as five steps, so that fewer replays are not worth it.
const LEAST_REPLAYS: usize = 15;

// A recording needs room for its own runs.
const _: () = assert!(LEAST_REPLAYS >= RUNS);

/// How steps are recorded.
#[derive(Debug, Clone, Copy)]
struct Recording {
    /// Positions that the cache grows by, in a text that goes on beyond what was reserved for it. A recorded
    /// step writes to the buffers that it was recorded with: when they are full, another is recorded.
    growth: usize,
    /// Whether a step that is run again will do in place of a graph: what tests have on a CPU.
    reruns: bool,
}

const RECORDING: Recording = Recording {
    growth: GROWTH,
    reruns: false,
};

/// Where a generation begins.
pub(super) struct Start {
    /// The text of each row.
    texts: Vec<Vec<u32>>,
    /// The keys and values of what is processed of it.
    cache: KvCache,
    rope: RopeTables,
}

impl Start {
    /// With prompts of which nothing is processed.
    pub fn of_prompts(model: &Decoder, config: &DecoderConfig, prompts: &[Vec<u32>]) -> Self {
        Self {
            texts: prompts.to_vec(),
            cache: KvCache::new(config.layers.len(), vec![0; prompts.len()]),
            rope: model.rope_tables(config),
        }
    }

    /// With one prompt, the beginning of which a cache holds.
    pub fn after(prompt: &[u32], cache: KvCache, rope: RopeTables) -> Self {
        Self {
            texts: vec![prompt.to_vec()],
            cache,
            rope,
        }
    }

    /// Positions that are processed already.
    pub fn held(&self) -> usize {
        self.cache.len()
    }
}

/// What is left of a generation's steps.
pub(super) struct Finished {
    /// It holds all tokens but the last of each row.
    pub cache: KvCache,
    pub rope: RopeTables,
    /// Why the host launched each step, if it did.
    pub eager: Option<EagerReason>,
    /// Tokens of prompts that were processed.
    pub prompt_tokens: usize,
}

/// The steps of a generation: each is launched, or a replay of a recorded one.
///
/// Each row has a slot of the cache, which its text fills from the first position on.
pub(super) struct Steps<'a> {
    model: &'a Decoder,
    config: &'a DecoderConfig,
    rope: RopeTables,
    state: Rc<RefCell<State>>,
    replay: Option<Replay<'a>>,
    /// The text of each slot. All but its last token is processed, once `started`.
    texts: Vec<Vec<u32>>,
    started: bool,
    /// Whether the texts are other ones than those that the state reads.
    stale: bool,
    /// Where a prompt is processed that takes a slot.
    scratch: KvCache,
    longest_prompt: usize,
    /// Positions that no text exceeds.
    limit: usize,
    max_cache_bytes: Option<u64>,
    cancel: Cancellation,
    recording: Recording,
    /// Why no step is recorded, if it is not.
    why: Option<EagerReason>,
    /// Whether one was.
    recorded: bool,
    prompt_tokens: usize,
}

impl<'a> Steps<'a> {
    /// The steps of a request, none of them made yet.
    pub fn new(
        model: &'a Decoder,
        config: &'a DecoderConfig,
        request: &Request,
        start: Start,
    ) -> Self {
        Self::with_recording(model, config, request, start, RECORDING)
    }

    fn with_recording(
        model: &'a Decoder,
        config: &'a DecoderConfig,
        request: &Request,
        start: Start,
        recording: Recording,
    ) -> Self {
        let Start {
            texts,
            mut cache,
            rope,
        } = start;
        // The cache does not grow before, so that it is never copied.
        cache.reserve(request.reserved_positions(config, recording.growth));
        let state = State::new(texts.len(), cache, &model.device());
        Self {
            model,
            config,
            rope,
            state: Rc::new(RefCell::new(state)),
            replay: None,
            texts,
            started: false,
            stale: true,
            scratch: KvCache::new(config.layers.len(), vec![0]),
            longest_prompt: request.longest_prompt(),
            limit: request.limit(),
            max_cache_bytes: request.max_cache_bytes,
            cancel: request.cancel.clone(),
            recording,
            why: why_eager(model, config, request, recording),
            recorded: false,
            prompt_tokens: 0,
        }
    }

    /// Rows that are continued together.
    pub fn rows(&self) -> usize {
        self.texts.len()
    }

    /// What chooses the tokens of rows whose prompts are `prompts`, of which the first is the request's
    /// `first`-th.
    ///
    /// # Errors
    /// Those of [`Sampler::new`].
    pub fn sampler(
        &self,
        sampling: Sampling,
        first: usize,
        prompts: &[Vec<u32>],
    ) -> Result<Sampler, ModelError> {
        let vocabulary = self.config.vocab_size;
        Sampler::new(sampling, first, prompts, vocabulary, &self.model.device())
    }

    /// Chooses the next token of each row; none if it was cancelled within the prompts.
    ///
    /// - `left`: steps that are wanted with this one, as far as is known
    ///
    /// # Errors
    /// [`Nf4Error::NonFinite`](burn_nf4::Nf4Error::NonFinite) for logits that are not finite, [`ModelError::Memory`] if there is no
    /// room for another position of the [full](Self::is_full) rows, [`ModelError::Replay`] and
    /// [`ModelError::Device`] for a recording or a replay that went wrong.
    pub fn next(
        &mut self,
        sampler: &mut Sampler,
        left: usize,
    ) -> Result<Option<Vec<u32>>, ModelError> {
        let chosen = if self.started && !self.invalidates_keys() {
            self.step(sampler, left)?
        } else {
            let Some(logits) = self.process()? else {
                return Ok(None);
            };
            self.started = true;
            self.stale = true;
            sampler.next(logits)?
        };
        for (text, &id) in self.texts.iter_mut().zip(&chosen) {
            text.push(id);
        }
        Ok(Some(chosen))
    }

    /// Gives a slot to another prompt, all of which but the last token is processed here; the next step chooses
    /// its first token. False if it was cancelled meanwhile.
    ///
    /// # Errors
    /// [`ModelError::Device`] if the device does not answer.
    pub fn fill(&mut self, slot: usize, prompt: &[u32]) -> Result<bool, ModelError> {
        let (_, before) = prompt.split_last().expect("a prompt has a token");
        if !before.is_empty() && !self.process_alone(slot, before)? {
            return Ok(false);
        }
        self.prompt_tokens += 1;
        self.texts[slot] = prompt.to_vec();
        self.stale = true;
        Ok(true)
    }

    /// Processes tokens of one row beside the others, and writes what comes of them to its slot.
    fn process_alone(&mut self, slot: usize, tokens: &[u32]) -> Result<bool, ModelError> {
        self.scratch.truncate(0);
        self.scratch.reserve(self.longest_prompt);
        let device = self.model.device();
        let ids = padded(&[tokens], &device);
        let (cancel, rope) = (&self.cancel, &mut self.rope);
        let flow =
            self.model
                .hidden_in_chunks(&ids, PROMPT_CHUNK, rope, &mut self.scratch, |_, _| {
                    between(&device, cancel)
                });
        self.prompt_tokens += self.scratch.len();
        if let ControlFlow::Break(broken) = flow {
            return broken.map(|()| false);
        }
        let mut state = self.state.borrow_mut();
        state.cache.put_row(slot, &self.scratch);
        Ok(true)
    }

    /// Leaves a slot without a text: it goes on with tokens that nobody reads, from the first position on.
    pub fn vacate(&mut self, slot: usize) {
        self.texts[slot] = vec![0];
        self.stale = true;
    }

    /// Whether the cache has no room for the last token of a slot's text.
    pub fn is_full(&self, slot: usize) -> bool {
        self.texts[slot].len() > self.state.borrow().cache.room()
    }

    /// What is left.
    pub fn finish(mut self) -> Finished {
        // Its closure holds the state too.
        self.replay = None;
        let longest = self.longest();
        let state = Rc::into_inner(self.state).expect("nobody else holds it");
        let mut cache = state.into_inner().cache;
        if self.started {
            cache.advance((longest - 1).saturating_sub(cache.len()));
        }
        Finished {
            cache,
            rope: self.rope,
            eager: self
                .why
                .or((!self.recorded).then_some(EagerReason::FewTokens)),
            prompt_tokens: self.prompt_tokens,
        }
    }

    /// Tokens of the longest text.
    fn longest(&self) -> usize {
        self.texts.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// The last token of each row and its position.
    fn read_next(&self) -> (Vec<i64>, Vec<i64>) {
        let of_row = |text: &Vec<u32>| {
            let last = text.last().copied().unwrap_or(0);
            (i64::from(last), text.len() as i64 - 1)
        };
        self.texts.iter().map(of_row).unzip()
    }

    /// Whether the keys that are held are not those of texts with one token more.
    fn invalidates_keys(&self) -> bool {
        let longest = self.longest();
        let ropes = self.config.ropes.iter();
        ropes
            .filter(|rope| rope.recomputes_keys())
            .any(|rope| rope.regime(longest - 1) != rope.regime(longest))
    }

    /// Processes what the cache does not hold of the texts, padded on the right to one length, in passes; all of
    /// them if keys were held. The logits of the last token of each, none if it was cancelled.
    fn process(&mut self) -> Result<Option<Tensor<2>>, ModelError> {
        let device = self.model.device();
        let mut state = self.state.borrow_mut();
        let cache = &mut state.cache;
        let again = std::mem::take(&mut self.started);
        if again {
            cache.truncate(0);
        }
        let held = cache.len();
        let rest: Vec<&[u32]> = self.texts.iter().map(|text| &text[held..]).collect();
        let ids = padded(&rest, &device);
        let [_, length] = ids.dims();
        let mut last = LastStates::new(rest.iter().map(|row| row.len() - 1).collect());
        let (cancel, rope) = (&self.cancel, &mut self.rope);
        let visit = |start, x: Tensor<3>| {
            let end = start + x.dims()[1];
            last.take(start, x);
            match end < length {
                true => between(&device, cancel),
                false => ControlFlow::Continue(()),
            }
        };
        let flow = self
            .model
            .hidden_in_chunks(&ids, PROMPT_CHUNK, rope, cache, visit);
        if !again {
            let processed = cache.len() - held;
            let of_rows = rest.iter().map(|row| row.len().min(processed));
            self.prompt_tokens += of_rows.sum::<usize>();
        }
        match flow {
            ControlFlow::Break(broken) => broken.map(|()| None),
            ControlFlow::Continue(()) => {
                let x = last.into_tensor(&device);
                Ok(Some(self.model.head(x).squeeze_dim(1)))
            }
        }
    }

    /// Makes a step.
    fn step(&mut self, sampler: &mut Sampler, left: usize) -> Result<Vec<u32>, ModelError> {
        let longest = self.longest();
        if longest > self.room() {
            self.grow(left)?;
        }
        if self.replay.is_none() && self.why.is_none() && left >= LEAST_REPLAYS {
            let needed = longest - 1 + LEAST_REPLAYS;
            if needed > self.room() && needed <= self.limit {
                // What it cannot grow by now, it may not need: texts end.
                let _ = self.grow(left);
            }
            if needed <= self.room() {
                self.record(sampler)?;
            }
        }
        let (tokens, positions) = self.read_next();
        if std::mem::take(&mut self.stale) {
            self.state.borrow_mut().write(&tokens, &positions);
        }
        let launched;
        let output = match &mut self.replay {
            // SAFETY: `longest` positions fit into the cache, which is of each row one more than it holds.
            Some(replay) => unsafe { replay.run() },
            None => {
                self.rope.reserve(longest, longest);
                let choosing = sampler.choosing();
                launched = self
                    .state
                    .borrow_mut()
                    .step(self.model, &self.rope, &choosing);
                &launched
            }
        };
        let (ids, numbers) = output.chosen(&tokens, &positions)?;
        // The step has written them where the next one reads.
        sampler.accept(&ids, &numbers, &output.logits)
    }

    /// Positions that the cache has room for.
    fn room(&self) -> usize {
        self.state.borrow().cache.room()
    }

    /// Makes room for the tokens that are wanted, up to those that the cache grows by.
    fn grow(&mut self, left: usize) -> Result<(), ModelError> {
        let ahead = left.min(self.recording.growth).max(LEAST_REPLAYS);
        let positions = self.longest().saturating_add(ahead);
        let mut state = self.state.borrow_mut();
        let held = state.cache.size_bytes() as u64;
        CacheSize::new(self.model, self.config, self.texts.len(), positions).check(
            self.max_cache_bytes,
            held,
            &self.model.device(),
        )?;
        // It is of the buffers that are given up.
        self.replay = None;
        state.cache.grow(positions);
        Ok(())
    }

    /// Records the next step.
    fn record(&mut self, sampler: &Sampler) -> Result<(), ModelError> {
        let (tokens, positions) = self.read_next();
        self.state.borrow_mut().write(&tokens, &positions);
        let (rope, state) = (&mut self.rope, &self.state);
        let reruns = self.recording.reruns;
        let choosing = sampler.choosing();
        self.replay = Replay::record(self.model, rope, state, &positions, choosing, reruns)?;
        match self.replay {
            Some(_) => self.recorded = true,
            None => self.why = Some(EagerReason::NotRecorded),
        }
        // The runs of the recording have carried it on.
        self.stale = true;
        Ok(())
    }
}

/// The hidden states of the last tokens of rows, as passes over them come.
struct LastStates {
    /// The place of the last token of each row.
    ends: Vec<usize>,
    /// Rows in the order of `parts`.
    rows: Vec<usize>,
    /// `[rows, hidden_size]` each.
    parts: Vec<Tensor<2>>,
}

impl LastStates {
    fn new(ends: Vec<usize>) -> Self {
        Self {
            ends,
            rows: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// Takes what there is in a pass of all rows, `[rows, length, hidden_size]`, from the place `start` on.
    fn take(&mut self, start: usize, x: Tensor<3>) {
        let [rows, length, hidden_size] = x.dims();
        let ends = self.ends.iter().enumerate();
        let here = ends.filter(|(_, end)| (start..start + length).contains(end));
        let (of_rows, at): (Vec<usize>, Vec<i64>) = here
            .map(|(row, end)| (row, (row * length + end - start) as i64))
            .unzip();
        if at.is_empty() {
            return;
        }
        let at = Tensor::<1, Int>::from_data(at.as_slice(), &x.device());
        self.parts
            .push(x.reshape([rows * length, hidden_size]).select(0, at));
        self.rows.extend(of_rows);
    }

    /// Those of all rows, `[rows, 1, hidden_size]`.
    fn into_tensor(self, device: &Device) -> Tensor<3> {
        let all = Tensor::cat(self.parts, 0);
        if self.rows.is_sorted() {
            return all.unsqueeze_dim(1);
        }
        let mut at = vec![0; self.rows.len()];
        for (place, row) in self.rows.into_iter().enumerate() {
            at[row] = place as i64;
        }
        let at = Tensor::<1, Int>::from_data(at.as_slice(), device);
        all.select(0, at).unsqueeze_dim(1)
    }
}

/// Between two passes over a prompt: whether it is to go on. The device is waited for, so that it can be
/// cancelled while the device works.
fn between(device: &Device, cancel: &Cancellation) -> ControlFlow<Result<(), ModelError>> {
    match device.sync() {
        Err(error) => ControlFlow::Break(Err(ModelError::device(device, error))),
        Ok(()) if cancel.is_cancelled() => ControlFlow::Break(Ok(())),
        Ok(()) => ControlFlow::Continue(()),
    }
}

/// Rows padded on the right to the longest, `[rows, tokens]`.
fn padded(rows: &[&[u32]], device: &Device) -> Tensor<2, Int> {
    let longest = rows.iter().map(|row| row.len()).max().unwrap_or(0);
    let ids = rows.iter().flat_map(|row| {
        let padding = std::iter::repeat_n(0, longest - row.len());
        row.iter().map(|&id| i64::from(id)).chain(padding)
    });
    let ids = TensorData::new(ids.collect(), [rows.len(), longest]);
    Tensor::from_data(ids, device)
}

/// Why no step of a request can be recorded, or is worth it.
fn why_eager(
    model: &Decoder,
    config: &DecoderConfig,
    request: &Request,
    recording: Recording,
) -> Option<EagerReason> {
    let changes =
        |rope: &RopeConfig| rope.regime(request.longest_prompt()) != rope.regime(request.limit());
    let turns = request.prompts.len().div_ceil(request.rows());
    if !request.capture {
        Some(EagerReason::Asked)
    } else if request.max_tokens.saturating_mul(turns) <= LEAST_REPLAYS {
        Some(EagerReason::FewTokens)
    } else if !recording.reruns && !has_graphs(&model.device()) {
        Some(EagerReason::NoGraphs)
    } else if !model.chooses_experts(request.rows()) {
        Some(EagerReason::Mixture)
    } else if config.ropes.iter().any(changes) {
        Some(EagerReason::RopeChanges)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::generate::Sampling;
    use crate::generate::replay::tests::family;

    const DRAWN: Sampling = Sampling {
        temperature: 0.9,
        top_k: 20,
        top_p: 0.95,
        seed: 7,
        ..Sampling::greedy()
    };

    fn request(max_tokens: usize, sampling: Sampling, capture: bool) -> Request {
        Request {
            prompts: vec![vec![5, 9, 2, 7, 3, 11, 4], vec![8, 1, 6], vec![12, 3, 9, 4]],
            max_tokens,
            sampling,
            capture,
            ..Request::default()
        }
    }

    /// So many tokens of each row, how often a step was recorded, and the most room that there was.
    fn made(
        name: &str,
        request: &Request,
        growth: usize,
        steps: usize,
    ) -> (Vec<Vec<u32>>, usize, usize) {
        let (model, config) = family(name);
        let start = Start::of_prompts(&model, &config, &request.prompts);
        let recording = Recording {
            growth,
            reruns: true,
        };
        let mut all = Steps::with_recording(&model, &config, request, start, recording);
        let sampler = all.sampler(request.sampling, 0, &request.prompts);
        let mut sampler = sampler.unwrap();
        let (mut tokens, mut recorded, mut room) = (Vec::new(), 0, None);
        for step in 0..steps {
            let left = request.max_tokens - step;
            tokens.push(all.next(&mut sampler, left).unwrap().unwrap());
            // A step is recorded for the buffers that there are.
            let room_of_replay = all.replay.is_some().then(|| all.room());
            recorded += usize::from(room_of_replay.is_some() && room_of_replay != room);
            room = room_of_replay;
        }
        let finished = all.finish();
        assert_eq!(finished.eager.is_none(), request.capture);
        assert_eq!(finished.cache.len(), request.longest_prompt() + steps - 1);
        (tokens, recorded, finished.cache.room())
    }

    /// The cache grows by 256 positions at least: there is one border, and a second recording.
    #[rstest]
    #[case::greedy(Sampling::greedy())]
    #[case::drawn(DRAWN)]
    fn a_text_goes_on_across_the_border_of_a_cache(#[case] sampling: Sampling) {
        let of = |capture| made("qwen3", &request(300, sampling, capture), 20, 300);
        let ((replayed, recorded, room), (launched, none, _)) = (of(true), of(false));
        assert_eq!(replayed, launched);
        assert_eq!((recorded, none), (2, 0));
        assert_eq!(room, 512);
    }

    /// Near the end of a text no other step is recorded.
    #[test]
    fn a_border_before_the_last_tokens() {
        let of = |capture| made("qwen3", &request(255, DRAWN, capture), 20, 255);
        let ((replayed, recorded, _), (launched, ..)) = (of(true), of(false));
        assert_eq!(replayed, launched);
        assert_eq!(recorded, 1);
    }

    /// Between the passes over a long prompt; what was processed is held.
    #[test]
    fn a_generation_is_cancelled_within_a_prompt() {
        let (model, config) = family("llama3_tied");
        let request = Request {
            prompts: vec![vec![5; 2 * PROMPT_CHUNK + 1]],
            ..Request::default()
        };
        request.cancel.cancel();
        let start = Start::of_prompts(&model, &config, &request.prompts);
        let mut steps = Steps::new(&model, &config, &request, start);
        let sampler = steps.sampler(request.sampling, 0, &request.prompts[..1]);
        let mut sampler = sampler.unwrap();
        assert_eq!(steps.next(&mut sampler, 1).unwrap(), None);
        let finished = steps.finish();
        assert_eq!(finished.cache.len(), PROMPT_CHUNK);
        assert_eq!(finished.prompt_tokens, PROMPT_CHUNK);
    }

    /// Beyond the positions that the model was made for, room is made as a text grows.
    #[test]
    fn no_more_room_is_made_than_a_text_can_fill() {
        let endless = request(usize::MAX, Sampling::greedy(), true);
        let (_, recorded, room) = made("llama3_tied", &endless, GROWTH, 20);
        assert_eq!(recorded, 1);
        let most = endless.longest_prompt() + GROWTH;
        assert_eq!(room, most.next_multiple_of(256));
    }
}
