//! The memory that a generation needs, before it is asked for.

use burn::tensor::Device;
use burn_nf4::op::device_memory;

use crate::error::{MemoryLimit, ModelError};
use crate::generate::Request;
use crate::model::Decoder;
use crate::model::cache::{KvCache, element_bytes};
use crate::model::config::DecoderConfig;

/// Positions that a text which may go on beyond the model's own gets room for at a time.
pub(super) const GROWTH: usize = 2048;

/// Rows and positions that the cache of a generation has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheSize {
    /// Rows.
    pub rows: usize,
    /// Positions of each row.
    pub positions: usize,
    /// Bytes of the keys and values of all layers.
    pub bytes: u64,
}

impl CacheSize {
    /// What so many rows and positions take in a model.
    pub(super) fn new(
        model: &Decoder,
        config: &DecoderConfig,
        rows: usize,
        positions: usize,
    ) -> Self {
        let positions = KvCache::rounded(positions);
        let element = element_bytes(model.dtype());
        let row = config.num_key_value_heads as u64 * config.head_dim as u64 * element as u64;
        let of_position = row.saturating_mul(2 * config.layers.len() as u64);
        Self {
            rows,
            positions,
            bytes: of_position
                .saturating_mul(rows as u64)
                .saturating_mul(positions as u64),
        }
    }

    /// Refuses what is known not to fit.
    ///
    /// - `limit`: most bytes that the cache may have, if that was given
    /// - `held`: bytes that a cache to be used again has already
    ///
    /// # Errors
    /// [`ModelError::Memory`].
    pub(super) fn check(
        &self,
        limit: Option<u64>,
        held: u64,
        device: &Device,
    ) -> Result<(), ModelError> {
        let of_device = device_memory(device);
        let bounds = [
            limit.map(|bytes| (bytes, MemoryLimit::Request)),
            of_device.map(|memory| {
                let available = memory.left().saturating_add(held);
                (available, MemoryLimit::Device)
            }),
        ];
        let exceeded = bounds.into_iter().flatten();
        match exceeded.into_iter().find(|&(bytes, _)| self.bytes > bytes) {
            None => Ok(()),
            Some((available, limit)) => Err(ModelError::Memory {
                rows: self.rows,
                positions: self.positions,
                needed: self.bytes,
                available,
                limit,
            }),
        }
    }
}

impl Request {
    /// The room that the cache gets before the first pass: for the longest prompt and all tokens after it. A
    /// text that is longer than the model was made for grows beyond that when it gets there. Where prompts
    /// wait, the bytes are also of the longest of them, which is processed beside the others.
    ///
    /// The device needs more than these bytes: for the weights, which it has already, and for a pass
    /// over [`PROMPT_CHUNK`](crate::model::PROMPT_CHUNK) tokens.
    pub fn cache_size(&self, model: &Decoder, config: &DecoderConfig) -> CacheSize {
        let positions = self.reserved_positions(config, GROWTH);
        let mut size = CacheSize::new(model, config, self.rows(), positions);
        if self.prompts.len() > self.rows() {
            let waiting = CacheSize::new(model, config, 1, self.longest_prompt());
            size.bytes = size.bytes.saturating_add(waiting.bytes);
        }
        size
    }

    /// Positions of each row that are reserved, where a longer text grows by so many at a time.
    pub(super) fn reserved_positions(&self, config: &DecoderConfig, growth: usize) -> usize {
        let longest = self.longest_prompt();
        let most = longest.saturating_add(growth).max(config.max_positions);
        self.limit().min(most)
    }
}
