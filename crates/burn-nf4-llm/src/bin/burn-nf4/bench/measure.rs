//! What is timed: decoding, prompts, the first token, and the memory's speed.

use std::time::{Duration, Instant};

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_nf4::format::FloatType;
use burn_nf4::model::LinearLayers;
use burn_nf4::nn::AnyLinear;
use burn_nf4::op::keep_threads_awake;
use burn_nf4_llm::ModelError;
use burn_nf4_llm::generate::{Report, Request, Sampling, generate};
use burn_nf4_llm::model::cache::KvCache;
use burn_nf4_llm::model::{Decoder, DecoderConfig, DecoderLayer, Mlp};

use super::memory::position_bytes;
use super::report::{Copy, DecodeRow, FirstToken, Memory, PrefillRow};
use crate::device::{DeviceName, fault, sync};
use crate::progress::peak_memory_bytes;

/// Tokens of the prompt whose first token is waited for.
const FIRST_PROMPT: usize = 128;
/// Passes over a prompt that are timed, after two that compile and tune.
const PASSES: usize = 5;
/// Bytes that are copied to see how fast memory is: several times a card's second cache.
const COPY_BYTES: usize = 256 << 20;
/// Copies that a device is given at once.
const COPY_ROW: usize = 16;
/// Measurements of it, of which the best counts.
const COPY_TIMES: usize = 6;

/// Tokens that differ.
pub fn tokens(count: usize, config: &DecoderConfig) -> Vec<u32> {
    let vocabulary = config.vocab_size;
    let token = |index: usize| (index * 7919 + 13) % vocabulary;
    (0..count).map(|index| token(index) as u32).collect()
}

pub fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn request(config: &DecoderConfig, rows: usize, context: usize, max_tokens: usize) -> Request {
    Request {
        prompts: vec![tokens(context, config); rows],
        max_tokens,
        sampling: Sampling::greedy(),
        eos: Vec::new(),
        capture: false,
        max_batch: rows,
        ..Request::default()
    }
}

/// The bytes that a step reads, and what reading them takes at the speed of a copy.
pub struct Floor {
    /// Packed weights and the head: once a step.
    pub weight_bytes: usize,
    /// Of those the experts of mixtures, by layer.
    experts: Vec<ExpertBytes>,
    /// Keys and values of one position of one row.
    pub position_bytes: usize,
    pub copy: Copy,
}

/// What the experts of a layer weigh.
struct ExpertBytes {
    each: usize,
    count: usize,
    /// How many a token is sent to.
    per_token: usize,
}

impl ExpertBytes {
    fn of(layer: &DecoderLayer) -> Option<Self> {
        let Mlp::Mixture(mixture) = &layer.mlp else {
            return None;
        };
        let linears = mixture.experts.first()?.linears();
        let bytes = |layer: &AnyLinear| layer.packed_bytes() + layer.float_bytes();
        Some(Self {
            each: linears.into_iter().map(|(_, layer)| bytes(layer)).sum(),
            count: mixture.experts.len(),
            per_token: mixture.experts_per_token,
        })
    }

    /// The bytes of experts to which so many tokens are not sent, where each goes to others.
    fn unread(&self, tokens: usize) -> usize {
        self.each * self.count.saturating_sub(tokens * self.per_token)
    }
}

impl Floor {
    /// Of a model.
    pub fn new(model: &Decoder, config: &DecoderConfig, dtype: FloatType, copy: Copy) -> Self {
        let (packed, floats) = model.size_bytes();
        let table = model.embed_tokens.val();
        let table_bytes = table.shape().num_elements() * table.dtype().size();
        // A table that is no head gives a row a token.
        let unread = match model.lm_head {
            Some(_) => table_bytes,
            None => 0,
        };
        Self {
            weight_bytes: packed + floats - unread,
            experts: model.layers.iter().filter_map(ExpertBytes::of).collect(),
            position_bytes: position_bytes(config, dtype),
            copy,
        }
    }

    /// The bytes of the middle one of so many steps.
    fn read_bytes(&self, rows: usize, context: usize, steps: usize) -> usize {
        let unread: usize = self
            .experts
            .iter()
            .map(|experts| experts.unread(rows))
            .sum();
        self.weight_bytes - unread + rows * (context + steps / 2) * self.position_bytes
    }
}

/// Times the first token of a prompt, twice: a device that has computed nothing yet compiles and tunes
/// first. To be called before anything else.
pub fn first_token(model: &Decoder, config: &DecoderConfig) -> Result<FirstToken, ModelError> {
    let _awake = keep_threads_awake(&model.device());
    let request = request(config, 1, FIRST_PROMPT, 1);
    let mut times = [0.0; 2];
    for time in &mut times {
        let start = Instant::now();
        generate(model, config, &request, |_, _| Ok(()))?;
        *time = milliseconds(start.elapsed());
    }
    Ok(FirstToken {
        prompt_tokens: FIRST_PROMPT,
        first_ms: times[0],
        second_ms: times[1],
    })
}

/// Times steps of decoding behind a prompt of `context` tokens.
pub fn decode(
    model: &Decoder,
    config: &DecoderConfig,
    floor: &Floor,
    [batch, context, tokens]: [usize; 3],
    eager: bool,
) -> Result<DecodeRow, ModelError> {
    let request = Request {
        capture: !eager,
        // The first token is that of the prompt.
        ..request(config, batch, context, tokens + 1)
    };
    // The first time a graphics card compiles kernels and measures which are fastest.
    let start = Instant::now();
    let device = model.device();
    let _awake = keep_threads_awake(&device);
    let (mut left, mut memory) = (batch * (tokens + 1), None);
    generate(model, config, &request, |_, _| {
        left -= 1;
        // Asking waits for the device, so not in the run that is timed.
        if left == 0 {
            memory = Some(Memory::of(&device));
        }
        Ok(())
    })?;
    let first_s = start.elapsed().as_secs_f64();
    let report = generate(model, config, &request, |_, _| Ok(()))?;
    let step_ms = milliseconds(report.step_time);
    let read_bytes = floor.read_bytes(batch, context, tokens);
    let floor_ms = read_bytes as f64 / floor.copy.bytes_s * 1e3;
    Ok(DecodeRow {
        batch,
        context,
        tokens,
        tokens_s: report.decode_rate(),
        step_ms,
        first_s,
        launched_because: launched_because(&report),
        cache_bytes: report.cache_bytes,
        memory: memory.unwrap_or_default(),
        read_bytes,
        floor_ms,
        share_of_floor: floor_ms / step_ms,
    })
}

fn launched_because(report: &Report) -> Option<String> {
    report.eager.map(|why| why.to_string())
}

/// Times the pass over a prompt, up to the logits of its last token on the host.
pub fn prefill(
    model: &Decoder,
    config: &DecoderConfig,
    length: usize,
) -> Result<PrefillRow, ModelError> {
    let mut rope = model.rope_tables(config);
    let mut times = Vec::new();
    for pass in 0..PASSES + 2 {
        let ids = tokens(length, config).into_iter().map(i64::from);
        let ids = TensorData::new(ids.collect(), [1, length]);
        let ids = Tensor::<2, Int>::from_data(ids, &model.device());
        let mut cache = KvCache::new(config.layers.len(), vec![0]);
        let start = Instant::now();
        let logits = model.next_logits(ids, &mut rope, &mut cache);
        let logits = logits.try_into_data();
        let logits = logits.map_err(|error| fault(&model.device(), error))?;
        if pass >= 2 {
            times.push(start.elapsed());
        }
        debug_assert_eq!(logits.shape()[1], config.vocab_size);
    }
    let time = median(times);
    Ok(PrefillRow {
        tokens: length,
        ms: milliseconds(time),
        tokens_s: length as f64 / time.as_secs_f64(),
    })
}

/// Times copies of much memory: on the CPU by all its threads, elsewhere by a kernel of Burn that multiplies
/// a tensor by a number.
pub fn copy(name: DeviceName, device: &Device) -> Result<Copy, ModelError> {
    let (how, seconds) = match name {
        DeviceName::Cpu => copy_by_threads(),
        _ => ("x * 1.5 of Burn, in f32".into(), copy_by_device(device)?),
    };
    Ok(Copy {
        bytes: COPY_BYTES,
        how,
        // Each byte is read and written.
        bytes_s: 2.0 * COPY_BYTES as f64 / seconds,
    })
}

/// How it is done, and the seconds of the best copy.
fn copy_by_threads() -> (String, f64) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (from, mut to) = (vec![1u8; COPY_BYTES], vec![0u8; COPY_BYTES]);
    let part = COPY_BYTES.div_ceil(threads);
    let times = (0..COPY_TIMES).map(|_| {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for (from, to) in from.chunks(part).zip(to.chunks_mut(part)) {
                scope.spawn(|| to.copy_from_slice(from));
            }
        });
        std::hint::black_box(&mut to);
        start.elapsed().as_secs_f64()
    });
    let best = times.fold(f64::INFINITY, f64::min);
    (format!("memcpy by {threads} threads"), best)
}

/// The seconds of a copy in the best row of them.
fn copy_by_device(device: &Device) -> Result<f64, ModelError> {
    let from = Tensor::<1>::ones([COPY_BYTES / size_of::<f32>()], device);
    let mut best = f64::INFINITY;
    for _ in 0..COPY_TIMES {
        sync(device)?;
        let start = Instant::now();
        for _ in 0..COPY_ROW {
            let to = from.clone() * 1.5;
            // Else fusion would make one kernel of all of them.
            device.flush().map_err(|error| fault(device, error))?;
            drop(to);
        }
        sync(device)?;
        best = best.min(start.elapsed().as_secs_f64() / COPY_ROW as f64);
    }
    Ok(best)
}

impl Memory {
    /// What a device and the process hold now.
    pub fn of(device: &Device) -> Self {
        let usage = device.memory_pool_usage();
        Self {
            in_use_bytes: usage.map(|usage| usage.bytes_in_use),
            reserved_bytes: usage.map(|usage| usage.bytes_reserved),
            process_peak_bytes: peak_memory_bytes(),
        }
    }
}
