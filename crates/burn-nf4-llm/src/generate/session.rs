//! A text or conversation that is continued several times.

use crate::error::ModelError;
use crate::generate::batch::run;
use crate::generate::steps::Start;
use crate::generate::{Report, Request, RowFlow};
use crate::model::cache::KvCache;
use crate::model::config::DecoderConfig;
use crate::model::{Decoder, RopeTables};

/// Keeps the keys and values of one text, so that a longer prompt costs only what is new in it.
///
/// Each prompt is given whole. The tokens that it begins with like the text before, answer included, are not
/// processed again; the others are, also where a template shows earlier turns in another way than they were
/// said. The logits are those of the whole prompt.
#[derive(Debug)]
pub struct Session<'a> {
    model: &'a Decoder,
    config: &'a DecoderConfig,
    cache: KvCache,
    rope: RopeTables,
    /// Those that the cache holds.
    tokens: Vec<u32>,
    /// Of the sequences for which keys in the cache were rotated, the longest.
    longest: usize,
}

impl<'a> Session<'a> {
    /// Of this model, with nothing said yet.
    pub fn new(model: &'a Decoder, config: &'a DecoderConfig) -> Self {
        Self {
            model,
            config,
            cache: empty_cache(config),
            rope: model.rope_tables(config),
            tokens: Vec::new(),
            longest: 0,
        }
    }

    /// The tokens whose keys and values are held.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Continues a prompt as [`generate`](crate::generate::generate) does.
    ///
    /// # Errors
    /// Those of [`generate`](crate::generate::generate), and [`ModelError::Setting`] for several prompts.
    /// After one that comes of a step or of `on_token` nothing is held, and the next prompt is processed
    /// whole. What a generation that is cancelled has processed is held.
    ///
    /// # Panics
    /// As [`generate`](crate::generate::generate).
    pub fn generate<F: RowFlow>(
        &mut self,
        request: &Request,
        on_token: impl FnMut(usize, u32) -> Result<F, ModelError>,
    ) -> Result<Report, ModelError> {
        request.check(self.config.vocab_size)?;
        let [prompt] = request.prompts.as_slice() else {
            let prompts = request.prompts.len();
            let name = "the number of prompts of a session";
            return Err(ModelError::setting(name, prompts, "1"));
        };
        let held = self.cache.size_bytes() as u64;
        request.cache_size(self.model, self.config).check(
            request.max_cache_bytes,
            held,
            &self.model.device(),
        )?;
        self.keep(prompt);
        // Nothing is held if this fails half way.
        let cache = std::mem::replace(&mut self.cache, empty_cache(self.config));
        self.tokens.clear();
        let longest = std::mem::take(&mut self.longest);
        let rope = self.rope.clone();
        let start = Start::after(prompt, cache, rope);
        let (report, cache, rope) = run(self.model, self.config, request, start, on_token)?;
        self.cache = cache;
        self.rope = rope;
        let all = prompt.iter().chain(&report.tokens[0]);
        self.tokens = all.take(self.cache.len()).copied().collect();
        // The angles are those of the whole prompt, also where only a part of it was processed.
        self.longest = longest.max(prompt.len() + report.tokens[0].len());
        Ok(report)
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.cache.truncate(0);
        self.tokens.clear();
        self.longest = 0;
    }

    /// Cuts the cache to what a prompt begins with. At least one token is left to be processed, for its logits.
    fn keep(&mut self, prompt: &[u32]) {
        let same = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b);
        let mut kept = same.count().min(prompt.len() - 1);
        // The angles of keys can depend on the length of the sequence.
        let changes = self.config.ropes.iter().any(|rope| {
            let regime = rope.regime(prompt.len());
            [kept, self.longest]
                .iter()
                .any(|&length| rope.regime(length) != regime)
        });
        if changes {
            kept = 0;
        }
        self.cache.truncate(kept);
        self.tokens.truncate(kept);
        if kept == 0 {
            self.longest = 0;
        }
    }
}

/// Of one row.
fn empty_cache(config: &DecoderConfig) -> KvCache {
    KvCache::new(config.layers.len(), vec![0])
}
