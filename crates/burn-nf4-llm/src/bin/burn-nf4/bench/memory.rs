//! The memory that measurements need, and what there is.

use burn::tensor::Device;
use burn_nf4::format::{FloatType, PackedLayout, QuantConfig};
use burn_nf4::model::LinearLayers;
use burn_nf4::nn::AnyLinear;
use burn_nf4::op::{LinearCrossEntropyOptions, device_memory};
use burn_nf4_llm::ModelError;
use burn_nf4_llm::model::config::LayerConfig;
use burn_nf4_llm::model::{DecoderConfig, HEAD, PROMPT_CHUNK};

use super::report::LeftOut;
use super::train::{Kept, TrainShape};
use crate::device::DeviceName;
use crate::progress::{available_memory_bytes, mebibytes};

/// What no device has: the bound where a system tells nothing. Nearly all that is asked for by mistake, such as
/// a context of millions of tokens for a batch of 64, is beyond it.
const NO_DEVICE_HAS: u64 = 1 << 42;

/// Of each element of a branch: its value, its gradient and two moments, in f32.
const BRANCH_ELEMENT_BYTES: usize = 4 * size_of::<f32>();

/// Inputs of layers that are on the device at a time where they wait on the host: two on their way there, that of
/// the layer at work, and the next.
const NOT_YET_OFFLOADED: usize = 4;

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

    /// The weights of a model as they are made here: linear layers packed, embeddings and head in floats.
    pub fn weights(
        config: &DecoderConfig,
        quant: QuantConfig,
        dtype: FloatType,
        device: &Device,
    ) -> Self {
        let model = config.init(device);
        let bytes = |(name, layer): (String, &AnyLinear)| {
            let dims = layer.dims();
            let is_head = name == HEAD;
            let bytes = match is_head {
                true => dims[0] * dims[1] * dtype.size_bytes(),
                // Sizes that the type does not have are an error once it is quantized.
                false => {
                    PackedLayout::for_shape(&dims, quant).map_or(0, |layout| layout.words() * 4)
                }
            };
            bytes as u64
        };
        let linears: u64 = model.linears().into_iter().map(bytes).sum();
        let table = (config.vocab_size * config.hidden_size * dtype.size_bytes()) as u64;
        Self {
            what: "the weights".into(),
            bytes: linears + table,
        }
    }

    /// A step of training: the input of each layer, or of those that are not on the host, and what one layer keeps
    /// for its gradients, or what all keep; gradients in one layer; a part of the logits; and the branches with what
    /// the optimizer has of them.
    pub fn training(
        config: &DecoderConfig,
        dtype: FloatType,
        shape: TrainShape,
        rank: usize,
    ) -> Self {
        let tokens = shape.rows.saturating_mul(shape.tokens);
        let kept = config
            .layers
            .iter()
            .map(|layer| kept_elements(config, layer));
        let inputs = |count: usize| count * config.hidden_size;
        let layers = config.layers.len();
        let kept = match shape.kept {
            Kept::All => kept.sum(),
            Kept::Inputs => inputs(layers) + kept.max().unwrap_or(0),
            Kept::OffloadedInputs => {
                inputs(layers.min(NOT_YET_OFFLOADED)) + kept.max().unwrap_or(0)
            }
        };
        let inner = config
            .layers
            .iter()
            .map(|layer| inner_elements(config, layer));
        let gradients = config.hidden_size + 2 * inner.max().unwrap_or(0);
        let branches = config
            .layers
            .iter()
            .map(|layer| branch_elements(config, layer));
        let bytes = [
            times(tokens, (kept + gradients) * dtype.size_bytes()),
            of_logits(config, dtype, tokens),
            times(rank, branches.sum::<usize>() * BRANCH_ELEMENT_BYTES),
        ];
        Self {
            what: format!("training on {shape}"),
            bytes: bytes.into_iter().fold(0, u64::saturating_add),
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

/// What a layer keeps of a token for its gradients: its input, the sum behind attention and both normalised,
/// queries, keys, values and the output of attention, gate, up and their product.
fn kept_elements(config: &DecoderConfig, layer: &LayerConfig) -> usize {
    let heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads;
    4 * config.hidden_size + heads * config.head_dim + 3 * inner_elements(config, layer)
}

/// Elements of a token inside of the MLP, or of those that it is sent to.
fn inner_elements(config: &DecoderConfig, layer: &LayerConfig) -> usize {
    layer.mixture.map_or(config.intermediate_size, |mixture| {
        mixture.experts_per_token * mixture.intermediate_size
    })
}

/// Elements that each rank of the branches of a layer has: inputs and outputs of its matrices.
fn branch_elements(config: &DecoderConfig, layer: &LayerConfig) -> usize {
    let (mlps, inner) = layer
        .mixture
        .map_or((1, config.intermediate_size), |mixture| {
            (mixture.experts, mixture.intermediate_size)
        });
    let heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads;
    4 * config.hidden_size + heads * config.head_dim + 3 * mlps * (config.hidden_size + inner)
}

/// The logits that are held at a time, and as many in f32 beside them.
fn of_logits(config: &DecoderConfig, dtype: FloatType, tokens: usize) -> u64 {
    let part = LinearCrossEntropyOptions::DEFAULT_CHUNK_BYTES / dtype.size_bytes();
    let logits = times(tokens, config.vocab_size).min(part as u64);
    logits * (dtype.size_bytes() + size_of::<f32>()) as u64
}

fn times(count: usize, bytes: usize) -> u64 {
    (count as u64).saturating_mul(bytes as u64)
}
