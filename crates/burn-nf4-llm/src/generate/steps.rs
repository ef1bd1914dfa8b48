//! The steps of a generation: the prompts in one pass, then a token a row.

use burn::tensor::{Int, Tensor, TensorData};
use burn_nf4::Nf4Error;
use burn_nf4::op::has_graphs;

use crate::error::ModelError;
use crate::generate::Request;
use crate::generate::replay::{Replay, WARM_UP};
use crate::generate::sample::Sampler;
use crate::model::cache::KvCache;
use crate::model::config::DecoderConfig;
use crate::model::rope::RopeConfig;
use crate::model::{Decoder, RopeTables};

/// Recording takes about as long as five steps, so that fewer tokens are not worth it.
const LEAST_RECORDED: usize = 16;

/// How steps are made.
#[allow(clippy::large_enum_variant, reason = "a generation has one")]
pub(super) enum Steps<'a> {
    /// Launch by launch.
    Eager(Eager<'a>),
    /// Replays of a recorded step.
    Replayed(Replay<'a>),
}

/// Where a generation begins.
pub(super) struct Start<'a> {
    /// `[rows, tokens]`: what is left of the prompts to be processed.
    ids: Tensor<2, Int>,
    /// What was before, in case that its keys are needed anew.
    texts: Texts<'a>,
    /// The keys and values of what was before.
    cache: KvCache,
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
        }
    }

    /// With the tokens `ids` of one row, after those that the cache holds, which are `before`.
    pub fn after(
        before: Option<Tensor<2, Int>>,
        ids: Tensor<2, Int>,
        cache: KvCache,
        config: &'a DecoderConfig,
    ) -> Self {
        let mut texts = Texts::new(config);
        if let Some(before) = before {
            texts.push(&before);
        }
        Self { ids, texts, cache }
    }

    /// Positions that are processed already.
    pub fn held(&self) -> usize {
        self.cache.len()
    }
}

/// Steps that the host launches each time.
pub(super) struct Eager<'a> {
    model: &'a Decoder,
    config: &'a DecoderConfig,
    rope: RopeTables,
    cache: KvCache,
    texts: Texts<'a>,
    /// `[rows, tokens]`: what the next step reads.
    ids: Tensor<2, Int>,
    /// The last token of each row; none before the prompts are processed.
    chosen: Vec<u32>,
    /// Why no step is recorded, if it is not.
    why: Option<&'static str>,
}

impl<'a> Steps<'a> {
    /// The steps of a request, none of them made yet.
    pub fn new(
        model: &'a Decoder,
        config: &'a DecoderConfig,
        request: &Request,
        start: Start<'a>,
    ) -> Self {
        let Start {
            ids,
            texts,
            mut cache,
        } = start;
        let why = why_eager(model, config, request);
        if why.is_none() {
            // A recorded step writes to the buffers that it was recorded with.
            cache.reserve(request.longest_prompt() + request.max_tokens + WARM_UP);
        }
        Self::Eager(Eager {
            model,
            config,
            rope: model.rope_tables(config),
            cache,
            texts,
            ids,
            chosen: Vec::new(),
            why,
        })
    }

    /// Makes a step and chooses the next token of each row.
    ///
    /// # Errors
    /// [`Nf4Error::NonFinite`] for logits of a prompt that are not finite, [`ModelError::Device`] for a
    /// replay that went wrong.
    pub fn next(&mut self, sampler: &mut Sampler) -> Result<Vec<u32>, ModelError> {
        if let Self::Eager(eager) = self
            && eager.why.is_none()
            && !eager.chosen.is_empty()
        {
            match eager.record() {
                Some(replay) => *self = Self::Replayed(replay),
                None => eager.why = Some("the device could not record a step"),
            }
        }
        match self {
            Self::Eager(eager) => eager.next(sampler),
            Self::Replayed(replay) => replay.next(sampler),
        }
    }

    /// Why the host launches each step, if it does.
    pub fn why_eager(&self) -> Option<&'static str> {
        match self {
            Self::Eager(eager) => eager.why,
            Self::Replayed(_) => None,
        }
    }

    /// The cache, which holds all tokens but the last of each row.
    pub fn into_cache(self) -> KvCache {
        match self {
            Self::Eager(eager) => eager.cache,
            Self::Replayed(replay) => replay.into_cache(),
        }
    }
}

/// Why no step of a request can be recorded, or is worth it.
fn why_eager(model: &Decoder, config: &DecoderConfig, request: &Request) -> Option<&'static str> {
    let longest = request.longest_prompt();
    let end = longest + request.max_tokens;
    let changes = |rope: &RopeConfig| rope.regime(longest) != rope.regime(end);
    if !request.capture {
        Some("that was asked for")
    } else if request.max_tokens < LEAST_RECORDED {
        Some("there are few tokens")
    } else if !has_graphs(&model.device()) {
        Some("the device records no graphs")
    } else if config.layers.iter().any(|layer| layer.mixture.is_some()) {
        Some("the host sends tokens to experts")
    } else if config.ropes.iter().any(changes) {
        Some("the rotary embedding changes with the length of the text")
    } else {
        None
    }
}

impl<'a> Eager<'a> {
    fn next(&mut self, sampler: &mut Sampler) -> Result<Vec<u32>, ModelError> {
        let held = self.cache.len();
        let sequence = held + self.ids.dims()[1];
        self.texts.push(&self.ids);
        if self.texts.invalidates_keys(held, sequence) {
            self.ids = self.texts.all();
            self.cache.truncate(0);
        }
        let ids = self.ids.clone();
        let logits = self.model.next_logits(ids, &mut self.rope, &mut self.cache);
        if self.chosen.is_empty() {
            check_finite(&logits)?;
        }
        let (next, chosen) = sampler.next(logits);
        self.ids = next;
        self.chosen = chosen.clone();
        Ok(chosen)
    }

    /// Records the next step, and hands the cache to it.
    fn record(&mut self) -> Option<Replay<'a>> {
        let cache = std::mem::take(&mut self.cache);
        match Replay::record(self.model, self.config, cache, &self.chosen) {
            Ok(replay) => Some(replay),
            Err(cache) => {
                self.cache = cache;
                None
            }
        }
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
