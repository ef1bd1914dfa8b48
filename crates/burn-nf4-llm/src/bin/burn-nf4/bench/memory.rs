//! The memory that measurements need, and what there is.

use burn::tensor::Device;
use burn_nf4::format::FloatType;
use burn_nf4::op::device_memory;
use burn_nf4_llm::ModelError;
use burn_nf4_llm::model::{DecoderConfig, PROMPT_CHUNK};

use super::report::LeftOut;
use crate::device::DeviceName;
use crate::progress::{available_memory_bytes, mebibytes};

/// What no device has: the bound where a system tells nothing. Nearly all that is asked for by mistake, such as
/// a context of millions of tokens for a batch of 64, is beyond it.
const NO_DEVICE_HAS: u64 = 1 << 42;

/// A measurement and about how many bytes it takes beside the weights.
pub struct Need {
    what: String,
    bytes: u64,
}

impl Need {
    /// Decoding: the cache, and what the pass over the prompts holds at a time.
    pub fn decoding(
        config: &DecoderConfig,
        dtype: FloatType,
        [rows, context, tokens]: [usize; 3],
    ) -> Self {
        let positions = context.saturating_add(tokens).saturating_add(1);
        let all = rows.saturating_mul(positions);
        Self {
            what: format!("batch {rows} at context {context}"),
            bytes: of_cache(config, dtype, all).saturating_add(of_pass(
                config,
                dtype,
                all.min(PROMPT_CHUNK.max(rows)),
            )),
        }
    }

    /// A prompt: as [`decoding`](Self::decoding).
    pub fn prompt(config: &DecoderConfig, dtype: FloatType, tokens: usize) -> Self {
        Self {
            what: format!("a prompt of {tokens}"),
            bytes: of_cache(config, dtype, tokens).saturating_add(of_pass(
                config,
                dtype,
                tokens.min(PROMPT_CHUNK),
            )),
        }
    }

    /// A step of training: the input of each layer, which is kept, and what a layer holds.
    pub fn training(config: &DecoderConfig, dtype: FloatType, [rows, tokens]: [usize; 2]) -> Self {
        let all = rows.saturating_mul(tokens);
        let inputs = config.layers.len() * config.hidden_size * dtype.size_bytes();
        Self {
            what: format!("training on {rows} x {tokens}"),
            bytes: times(all, inputs).saturating_add(of_pass(config, dtype, all)),
        }
    }

    /// Why it does not fit into what there is beside all that is held now, if it does not.
    pub fn does_not_fit(self, name: DeviceName, device: &Device) -> Option<DoesNotFit> {
        let of_device = device_memory(device).map(|memory| memory.left());
        let of_machine = || {
            (name == DeviceName::Cpu)
                .then(available_memory_bytes)
                .flatten()
        };
        let (there, whose) = match (of_device, of_machine()) {
            (Some(bytes), _) => (bytes, "the device has"),
            (None, Some(bytes)) => (bytes, "the machine has free"),
            (None, None) => (NO_DEVICE_HAS, "any device has"),
        };
        (self.bytes > there).then_some(DoesNotFit {
            need: self,
            there,
            whose,
        })
    }
}

/// A measurement for which there is not enough memory.
pub struct DoesNotFit {
    need: Need,
    there: u64,
    whose: &'static str,
}

impl DoesNotFit {
    /// To refuse it.
    pub fn error(&self) -> ModelError {
        let Self { need, there, whose } = self;
        ModelError::setting(
            format!("the memory of {}", need.what),
            format!("about {}", mebibytes(need.bytes)),
            format!("at most the {} that {whose}", mebibytes(*there)),
        )
    }

    /// To go on without it.
    pub fn left_out(self) -> LeftOut {
        let Self { need, there, whose } = self;
        LeftOut {
            what: need.what,
            why: format!(
                "it needs about {}, {whose} {}",
                mebibytes(need.bytes),
                mebibytes(there)
            ),
        }
    }
}

/// Bytes of the keys and values of one position of one row, in all layers.
pub fn position_bytes(config: &DecoderConfig, dtype: FloatType) -> usize {
    config.layers.len() * 2 * config.num_key_value_heads * config.head_dim * dtype.size_bytes()
}

fn of_cache(config: &DecoderConfig, dtype: FloatType, positions: usize) -> u64 {
    times(positions, position_bytes(config, dtype))
}

/// What a pass over so many tokens holds at a time.
fn of_pass(config: &DecoderConfig, dtype: FloatType, tokens: usize) -> u64 {
    let elements = 6 * config.hidden_size + 3 * config.intermediate_size;
    times(tokens, elements * dtype.size_bytes())
}

fn times(count: usize, bytes: usize) -> u64 {
    (count as u64).saturating_mul(bytes as u64)
}
