//! The steps of a generation: the prompts in one pass, then a token a row.

use std::ops::ControlFlow;

use burn::tensor::{Int, Tensor, TensorData};
use burn_nf4::Nf4Error;
use burn_nf4::op::has_graphs;

use crate::error::ModelError;
use crate::generate::memory::GROWTH;
use crate::generate::replay::{RUNS, Recorded, Replay};
use crate::generate::sample::Sampler;
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
pub(super) struct Start<'a> {
    /// `[rows, tokens]`: what is left of the prompts to be processed.
    ids: Tensor<2, Int>,
    /// What was before, in case that its keys are needed anew.
    texts: Texts<'a>,
    /// The keys and values of what was before.
    cache: KvCache,
    rope: RopeTables,
}

impl<'a> Start<'a> {
    /// With prompts of which nothing is processed, padded on the left to one length.
    pub fn of_prompts(model: &Decoder, config: &'a DecoderConfig, request: &Request) -> Self {
        let longest = request.longest_prompt();
        let padding = request.prompts.iter().map(|p| longest - p.len());
        let padding: Vec<usize> = padding.collect();
        let rows = request.prompts.iter().zip(&padding);
        let ids = rows.flat_map(|(prompt, &pad)| {
            let prompt = prompt.iter().map(|&id| i64::from(id));
            std::iter::repeat_n(0, pad).chain(prompt)
        });
        let ids = TensorData::new(ids.collect(), [padding.len(), longest]);
        Self {
            ids: Tensor::from_data(ids, &model.device()),
            texts: Texts::new(config),
            cache: KvCache::new(config.layers.len(), padding),
            rope: model.rope_tables(config),
        }
    }

    /// With the tokens `ids` of one row, after those that the cache holds, which are `before`.
    pub fn after(
        before: Option<Tensor<2, Int>>,
        ids: Tensor<2, Int>,
        cache: KvCache,
        rope: RopeTables,
        config: &'a DecoderConfig,
    ) -> Self {
        let mut texts = Texts::new(config);
        if let Some(before) = before {
            texts.push(&before);
        }
        Self {
            ids,
            texts,
            cache,
            rope,
        }
    }

    /// Positions that are processed already.
    pub fn held(&self) -> usize {
        self.cache.len()
    }
}

/// The steps of a generation: each is launched, or a replay of a recorded one.
pub(super) struct Steps<'a> {
    model: &'a Decoder,
    rope: RopeTables,
    texts: Texts<'a>,
    /// Of no layers while `replay` has it.
    cache: KvCache,
    /// `[rows, tokens]`: what the next step that is launched reads.
    ids: Tensor<2, Int>,
    /// The last token of each row; none before the prompts are processed.
    chosen: Vec<u32>,
    /// Tokens of a row that are still wanted.
    left: usize,
    cancel: Cancellation,
    recording: Recording,
    replay: Option<Replay<'a>>,
    /// Why no step is recorded, if it is not.
    why: Option<EagerReason>,
}

impl<'a> Steps<'a> {
    /// The steps of a request, none of them made yet.
    pub fn new(
        model: &'a Decoder,
        config: &DecoderConfig,
        request: &Request,
        start: Start<'a>,
    ) -> Self {
        Self::with_recording(model, config, request, start, RECORDING)
    }

    fn with_recording(
        model: &'a Decoder,
        config: &DecoderConfig,
        request: &Request,
        start: Start<'a>,
        recording: Recording,
    ) -> Self {
        let Start {
            ids,
            texts,
            mut cache,
            rope,
        } = start;
        // The cache does not grow before, so that it is never copied.
        cache.reserve(request.reserved_positions(config, recording.growth));
        Self {
            model,
            rope,
            texts,
            cache,
            ids,
            chosen: Vec::new(),
            left: request.max_tokens,
            cancel: request.cancel.clone(),
            recording,
            replay: None,
            why: why_eager(model, config, request, recording),
        }
    }

    /// Makes a step and chooses the next token of each row; none if it was cancelled within the prompts.
    ///
    /// # Errors
    /// [`Nf4Error::NonFinite`] for logits of a prompt that are not finite, [`ModelError::Replay`] and
    /// [`ModelError::Device`] for a recording or a replay that went wrong.
    pub fn next(&mut self, sampler: &mut Sampler) -> Result<Option<Vec<u32>>, ModelError> {
        if self.replay.as_ref().is_some_and(Replay::is_full) {
            self.stop_replays();
        }
        if self.replay.is_none() && self.is_worth_recording() {
            let held = self.cache.len();
            match self.cache.room() >= held + LEAST_REPLAYS {
                true => self.record()?,
                // The next step that is launched makes the room.
                false => self.reserve(held + 1),
            }
        }
        let chosen = match &mut self.replay {
            Some(replay) => Some(replay.next(sampler)?),
            None => self.launch(sampler)?,
        };
        if let Some(chosen) = &chosen {
            self.chosen.clone_from(chosen);
            self.left = self.left.saturating_sub(1);
        }
        Ok(chosen)
    }

    /// The cache, which holds all tokens but the last of each row, the tables, and why the host launched
    /// each step, if it did.
    pub fn finish(mut self) -> (KvCache, RopeTables, Option<EagerReason>) {
        self.stop_replays();
        (self.cache, self.rope, self.why)
    }

    /// Has room made for the tokens after so many positions, up to those that the cache grows by.
    fn reserve(&mut self, positions: usize) {
        let ahead = self.left.min(self.recording.growth).max(LEAST_REPLAYS);
        self.cache.reserve(positions.saturating_add(ahead));
    }

    fn is_worth_recording(&self) -> bool {
        self.why.is_none() && !self.chosen.is_empty() && self.left >= LEAST_REPLAYS
    }

    /// Records the next step, and hands the cache to it.
    fn record(&mut self) -> Result<(), ModelError> {
        let cache = std::mem::take(&mut self.cache);
        let rope = &mut self.rope;
        let reruns = self.recording.reruns;
        match Replay::record(self.model, rope, cache, &self.chosen, reruns)? {
            Recorded::Step(replay) => self.replay = Some(replay),
            Recorded::Nothing(cache) => {
                self.cache = cache;
                self.why = Some(EagerReason::NotRecorded);
            }
        }
        Ok(())
    }

    /// Takes the cache back from the recorded step, if there is one.
    fn stop_replays(&mut self) {
        if let Some(replay) = self.replay.take() {
            self.cache = replay.into_cache();
            let ids: Vec<i64> = self.chosen.iter().map(|&id| i64::from(id)).collect();
            let ids = TensorData::new(ids, [self.chosen.len(), 1]);
            self.ids = Tensor::from_data(ids, &self.model.device());
        }
    }

    /// Makes a step launch by launch, of a long prompt in several passes.
    fn launch(&mut self, sampler: &mut Sampler) -> Result<Option<Vec<u32>>, ModelError> {
        let held = self.cache.len();
        let sequence = held + self.ids.dims()[1];
        self.texts.push(&self.ids);
        if self.texts.invalidates_keys(held, sequence) {
            self.ids = self.texts.all();
            self.cache.truncate(0);
        }
        let device = self.model.device();
        let ids = self.ids.clone();
        // The device is waited for, so that a generation can be cancelled while it works.
        let between = |_| match device.sync() {
            Err(error) => ControlFlow::Break(Err(ModelError::device(&device, error))),
            Ok(()) if self.cancel.is_cancelled() => ControlFlow::Break(Ok(None)),
            Ok(()) => ControlFlow::Continue(()),
        };
        let (rope, cache) = (&mut self.rope, &mut self.cache);
        let logits = self
            .model
            .next_logits_unless(ids, PROMPT_CHUNK, rope, cache, between);
        let logits = match logits {
            ControlFlow::Continue(logits) => logits,
            ControlFlow::Break(given) => return given,
        };
        if self.chosen.is_empty() {
            check_finite(&logits)?;
        }
        let (next, chosen) = sampler.next(logits);
        self.ids = next;
        Ok(Some(chosen))
    }
}

/// Why no step of a request can be recorded, or is worth it.
fn why_eager(
    model: &Decoder,
    config: &DecoderConfig,
    request: &Request,
    recording: Recording,
) -> Option<EagerReason> {
    let longest = request.longest_prompt();
    let end = longest.saturating_add(request.max_tokens);
    let changes = |rope: &RopeConfig| rope.regime(longest) != rope.regime(end);
    if !request.capture {
        Some(EagerReason::Asked)
    } else if request.max_tokens <= LEAST_REPLAYS {
        Some(EagerReason::FewTokens)
    } else if !recording.reruns && !has_graphs(&model.device()) {
        Some(EagerReason::NoGraphs)
    } else if config.layers.iter().any(|layer| layer.mixture.is_some()) {
        Some(EagerReason::Mixture)
    } else if config.ropes.iter().any(changes) {
        Some(EagerReason::RopeChanges)
    } else {
        None
    }
}

/// All tokens so far, for models whose keys are to be computed again when a text gets long. None are kept
/// for others.
struct Texts<'a> {
    ropes: Vec<&'a RopeConfig>,
    parts: Vec<Tensor<2, Int>>,
}

impl<'a> Texts<'a> {
    fn new(config: &'a DecoderConfig) -> Self {
        let ropes = config.ropes.iter();
        Self {
            ropes: ropes.filter(|rope| rope.recomputes_keys()).collect(),
            parts: Vec::new(),
        }
    }

    fn push(&mut self, ids: &Tensor<2, Int>) {
        if !self.ropes.is_empty() {
            self.parts.push(ids.clone());
        }
    }

    /// Whether the keys of the first `held` tokens are not those of a text of `sequence` tokens.
    fn invalidates_keys(&self, held: usize, sequence: usize) -> bool {
        let mut ropes = self.ropes.iter();
        held > 0 && ropes.any(|rope| rope.regime(held) != rope.regime(sequence))
    }

    fn all(&mut self) -> Tensor<2, Int> {
        let all = Tensor::cat(std::mem::take(&mut self.parts), 1);
        self.parts.push(all.clone());
        all
    }
}

/// Refuses logits that are not finite: some token would be chosen by them all the same.
fn check_finite(logits: &Tensor<2>) -> Result<(), ModelError> {
    let finite = logits.clone().is_finite().all();
    match finite.into_scalar::<bool>() {
        true => Ok(()),
        false => {
            // Which comes of damaged weights, or of a dtype that is too small for them.
            let name = format!("logits of the model in {:?}", logits.dtype());
            let values = logits.to_data();
            let mut values = values.iter::<f32>().enumerate();
            let (index, given) = values
                .find(|(_, value)| !value.is_finite())
                .unwrap_or((0, f32::NAN));
            Err(Nf4Error::NonFinite {
                tensor: name,
                index,
                given,
            }
            .into())
        }
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
        let start = Start::of_prompts(&model, &config, request);
        let recording = Recording {
            growth,
            reruns: true,
        };
        let mut all = Steps::with_recording(&model, &config, request, start, recording);
        let mut sampler = Sampler::new(request.sampling, request.prompts.len());
        let (mut tokens, mut recorded, mut was_replay) = (Vec::new(), 0, false);
        for _ in 0..steps {
            tokens.push(all.next(&mut sampler).unwrap().unwrap());
            recorded += usize::from(all.replay.is_some() && !was_replay);
            was_replay = all.replay.is_some();
        }
        let (cache, _, why) = all.finish();
        assert_eq!(why.is_none(), request.capture);
        assert_eq!(cache.len(), request.longest_prompt() + steps - 1);
        (tokens, recorded, cache.room())
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
        let start = Start::of_prompts(&model, &config, &request);
        let mut steps = Steps::new(&model, &config, &request, start);
        let mut sampler = Sampler::new(request.sampling, 1);
        assert_eq!(steps.next(&mut sampler).unwrap(), None);
        let (cache, ..) = steps.finish();
        assert_eq!(cache.len(), PROMPT_CHUNK);
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
