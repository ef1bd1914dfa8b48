//! A step of decoding as one graph that the device replays.
//!
//! A step is hundreds of launches, and for one row they take the host longer than the device. Recorded
//! once, they are a single call. What changes from step to step lies in buffers on the device, which the
//! step itself carries on: the tokens, the position and the cache.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};

use burn::tensor::{Device, Graph, Int, Tensor, TensorData, capture};

use crate::error::ModelError;
use crate::generate::sample::Sampler;
use crate::model::Decoder;
use crate::model::cache::KvCache;
use crate::model::{RopeTables, row_starts};

/// Positions that [`Replay::record`] writes to, past those that the cache holds: [`capture`] runs a step three
/// times, and a fourth time to record it.
pub(super) const RUNS: usize = 4;

/// Held while a step is recorded: what another recording does before would break off one of CUDA.
static RECORDING: Mutex<()> = Mutex::new(());

/// What is recorded.
type Step<'a> = Box<dyn FnMut() -> Output + 'a>;

/// A recorded step.
pub(super) struct Replay<'a> {
    graph: Graph<Output, Step<'a>>,
    state: Rc<RefCell<State>>,
    device: Device,
    /// What the next replay is to read: the tokens of the rows, and the position.
    tokens: Vec<i64>,
    position: i64,
    /// Positions that the cache has room for.
    room: usize,
}

/// What became of a recording.
#[allow(clippy::large_enum_variant, reason = "there is one at a time")]
pub(super) enum Recorded<'a> {
    /// A step to replay.
    Step(Replay<'a>),
    /// The device records nothing: the cache, as it was.
    Nothing(KvCache),
}

/// What the device carries from step to step.
struct State {
    /// `[rows, 1]`.
    ids: Tensor<2, Int>,
    /// `[1]`: positions that the cache holds.
    position: Tensor<1, Int>,
    /// `[rows]`: the padding of each row, if there is any.
    starts: Option<Tensor<1, Int>>,
    cache: KvCache,
}

/// What a replay writes.
struct Output {
    /// `[rows, vocab_size]`.
    logits: Tensor<2>,
    /// `[2 rows + 1]`: the tokens and the position that were read, and the likeliest next tokens.
    trace: Tensor<1, Int>,
}

impl State {
    /// One step: every launch of it is recorded.
    fn step(&mut self, model: &Decoder, rope: &RopeTables) -> Output {
        let logits = model.next_logits_at(
            self.ids.clone(),
            self.position.clone(),
            self.starts.clone(),
            rope,
            &mut self.cache,
        );
        let [rows, _] = self.ids.dims();
        let next = logits.clone().argmax(1);
        let trace = Tensor::cat(
            vec![
                self.ids.clone().reshape([rows]),
                self.position.clone(),
                next.clone().reshape([rows]),
            ],
            0,
        );
        let after = self.position.clone() + 1;
        self.write_ids(next);
        self.write_position(after);
        Output { logits, trace }
    }

    /// Writes tokens into the buffer that the graph reads.
    fn write_ids(&mut self, ids: Tensor<2, Int>) {
        let [rows, _] = ids.dims();
        self.ids
            .inplace(|held| held.slice_assign([0..rows, 0..1], ids));
    }

    /// As [`write_ids`](Self::write_ids), the position.
    fn write_position(&mut self, position: Tensor<1, Int>) {
        #[allow(clippy::single_range_in_vec_init, reason = "one axis")]
        self.position
            .inplace(|held| held.slice_assign([0..1], position));
    }
}

impl<'a> Replay<'a> {
    /// Records a step that follows what the cache holds, and no step yet.
    ///
    /// - `cache`: with room for [`RUNS`] positions more than it holds
    /// - `tokens`: the next token of each row
    /// - `reruns`: whether a step that is run again, launch by launch, will do where the device records none
    ///
    /// # Errors
    /// [`ModelError::Replay`] if the recording was broken off.
    pub fn record(
        model: &'a Decoder,
        rope: &mut RopeTables,
        cache: KvCache,
        tokens: &[u32],
        reruns: bool,
    ) -> Result<Recorded<'a>, ModelError> {
        let device = model.device();
        let (rows, position, room) = (tokens.len(), cache.len(), cache.room());
        let tokens: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
        let ids = TensorData::new(tokens.clone(), [rows, 1]);
        let ids = Tensor::<2, Int>::from_data(ids, &device);
        let start = Tensor::<1, Int>::from_data([position as i64], &device);
        rope.reserve(room, position);
        let rope = rope.clone();
        let state = Rc::new(RefCell::new(State {
            // Buffers of their own: the graph writes to them.
            ids: ids.clone() + 0,
            position: start.clone() + 0,
            starts: row_starts(cache.padding(), &device),
            cache,
        }));
        let of_graph = state.clone();
        let step: Step = Box::new(move || of_graph.borrow_mut().step(model, &rope));
        let graph = {
            let _alone = RECORDING.lock().unwrap_or_else(PoisonError::into_inner);
            capture(&device, step)
        };
        if !graph.is_hardware() {
            check_last_run(graph.output(), position, &device)?;
            if !reruns {
                return Ok(Recorded::Nothing(cache_of(graph, state)));
            }
        }
        {
            let mut state = state.borrow_mut();
            state.write_ids(ids);
            state.write_position(start);
        }
        Ok(Recorded::Step(Self {
            graph,
            state,
            device,
            tokens,
            position: position as i64,
            room,
        }))
    }

    /// Whether the cache has no room for another step.
    pub fn is_full(&self) -> bool {
        self.position as usize >= self.room
    }

    /// Makes a step and chooses the next token of each row.
    ///
    /// # Errors
    /// [`ModelError::Replay`] if the step has not read what it should have, [`ModelError::Device`] if the device
    /// does not answer.
    ///
    /// # Panics
    /// If the cache is [full](Self::is_full), or the device does not take the step.
    pub fn next(&mut self, sampler: &mut Sampler) -> Result<Vec<u32>, ModelError> {
        // The step would write past the end of the cache.
        assert!(!self.is_full(), "the cache is full");
        // SAFETY: what `Graph::replay` asks for is there.
        // - What the launches touch is alive: the weights are those of the model, which is borrowed as long as
        //   this lives; the tables and the state belong to the closure, the output to the graph; the
        //   intermediates, which are read and written too and have no owner any more, lie on pages that cubecl
        //   keeps from others as long as the graph lives.
        // - Nobody else uses what is written, which is the state, the output and intermediates: they are this
        //   thread's alone, as this is not `Send`. Weights and tables can be shared with a clone of the model
        //   on another thread, but here they are only read, and there too: Burn writes in place only to what
        //   has one owner.
        // - Writes between replays, reads and replays are on the stream of this thread, which recorded.
        //
        // Replays follow each other rightly only if the assignments of the step ran in place; else each
        // would read the old buffers and write to new ones. Of tokens and position the trace tells. Of the
        // cache nothing does: `LayerCache::put` takes a tensor out of its slot, so that it is the only owner
        // when it assigns. A comparison with one launched step would not help, since the first replay is
        // right either way; `tests/replay.rs` compares whole texts.
        let output = unsafe { self.graph.replay() };
        let trace = read_trace(output, &self.device)?;
        let (read, next) = trace.split_at(self.tokens.len() + 1);
        let (position, tokens) = read.split_last().expect("the position is read");
        if (tokens, *position) != (&self.tokens[..], self.position) {
            let (expected, at) = (&self.tokens, self.position);
            let message = format!(
                "it read the tokens {tokens:?} at position {position}, expected {expected:?} at {at}"
            );
            return Err(ModelError::replay(&self.device, message));
        }
        self.position += 1;
        let mut state = self.state.borrow_mut();
        state.cache.advance(1);
        if sampler.is_greedy() {
            // The step has written them where the next one reads.
            self.tokens = next.to_vec();
            return Ok(next.iter().map(|&id| id as u32).collect());
        }
        let (ids, chosen) = sampler.next(output.logits.clone());
        self.tokens = chosen.iter().map(|&id| i64::from(id)).collect();
        state.write_ids(ids);
        Ok(chosen)
    }

    /// The cache.
    pub fn into_cache(self) -> KvCache {
        cache_of(self.graph, self.state)
    }
}

/// The cache of a step whose graph is not needed any more.
fn cache_of(graph: Graph<Output, Step<'_>>, state: Rc<RefCell<State>>) -> KvCache {
    // Its closure holds the state too.
    drop(graph);
    let state = Rc::into_inner(state).expect("nobody else holds it");
    state.into_inner().cache
}

/// Refuses a recording that was broken off. Where a device has no graphs, the last run of a step was made like
/// those before it; where the device could not close a recording, that run was not made, and cubecl lets
/// nobody read what it would have written, the cache included.
fn check_last_run(output: &Output, start: usize, device: &Device) -> Result<(), ModelError> {
    let broken = |cause: String| {
        let message = format!("the recording was broken off, as another thread can cause: {cause}");
        ModelError::replay(device, message)
    };
    let [rows, _] = output.logits.dims();
    let trace = output.trace.try_to_data();
    let trace = trace.map_err(|error| broken(error.to_string()))?;
    let read = trace.iter::<i64>().nth(rows);
    let expected = (start + RUNS - 1) as i64;
    match read == Some(expected) {
        true => Ok(()),
        false => Err(broken(format!(
            "the last run read the position {read:?}, expected {expected}"
        ))),
    }
}

/// What a step traced, on the host.
fn read_trace(output: &Output, device: &Device) -> Result<Vec<i64>, ModelError> {
    match output.trace.try_to_data() {
        Ok(trace) => Ok(trace.iter::<i64>().collect()),
        Err(error) => Err(ModelError::device(device, error)),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use burn_nf4::checkpoint::CheckpointStore;
    use rstest::rstest;

    use super::*;
    use crate::model::{DecoderConfig, load};

    /// A model of the fixtures of families, on the CPU.
    pub fn family(name: &str) -> (Decoder, DecoderConfig) {
        fixture_model(&format!("families/{name}"))
    }

    /// A model of the fixtures, on the CPU.
    pub fn fixture_model(path: &str) -> (Decoder, DecoderConfig) {
        let package = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = package.join("tests/fixtures").join(path).join("model");
        let config = DecoderConfig::from_folder(&folder).unwrap();
        let store = CheckpointStore::open(&folder).unwrap();
        let model = load(store, &config, config.dtype, &Device::default()).unwrap();
        (model, config)
    }

    /// Rows of 7, 3 and 4 tokens, padded to one length.
    fn prompts(device: &Device) -> (Tensor<2, Int>, Vec<usize>) {
        let ids = [
            [5, 9, 2, 7, 3, 11, 4],
            [0, 0, 0, 0, 8, 1, 6],
            [0, 0, 0, 12, 3, 9, 4],
        ];
        (Tensor::from_ints(ids, device), vec![0, 4, 3])
    }

    /// A cache that holds the prompts, with room for more.
    fn filled(model: &Decoder, config: &DecoderConfig, rope: &mut RopeTables) -> KvCache {
        let (ids, padding) = prompts(&model.device());
        let mut cache = KvCache::new(config.layers.len(), padding);
        cache.reserve(ids.dims()[1] + 20);
        model.next_logits(ids, rope, &mut cache);
        cache
    }

    fn column(tokens: &[i64], device: &Device) -> Tensor<2, Int> {
        Tensor::from_data(TensorData::new(tokens.to_vec(), [tokens.len(), 1]), device)
    }

    fn assert_close(ours: Tensor<2>, theirs: Tensor<2>, what: &str) {
        let difference = (ours - theirs).abs().max().into_scalar::<f32>();
        // The same products over keys in other groups.
        assert!(difference < 1e-4, "{what}: {difference:e}");
    }

    /// A step that reads its position from the device is a forward of one token, padded rows and windows
    /// included, and carries on what the next one reads.
    #[rstest]
    fn a_step_is_a_forward_of_one_token(
        #[values(
            "gemma2",
            "gemma3_text",
            "granite",
            "llama3_tied",
            "llama_biases",
            "mistral_window",
            "olmo2",
            "phi3",
            "qwen2",
            "qwen2_window",
            "qwen3",
            "smollm3"
        )]
        name: &str,
    ) {
        let (model, config) = family(name);
        let device = model.device();
        let mut rope = model.rope_tables(&config);
        let mut eager = filled(&model, &config, &mut rope);
        let cache = filled(&model, &config, &mut rope);
        rope.reserve(cache.room(), cache.len());
        let start = cache.len() as i64;
        let mut tokens = vec![3, 14, 7];
        let mut state = State {
            ids: column(&tokens, &device),
            position: Tensor::from_data([start], &device),
            starts: row_starts(cache.padding(), &device),
            cache,
        };
        for step in 0..4 {
            let output = state.step(&model, &rope);
            let ids = column(&tokens, &device);
            let expected = model.next_logits(ids, &mut rope, &mut eager);
            assert_close(output.logits, expected, &format!("{name}, step {step}"));
            let trace = output.trace.to_data();
            let trace: Vec<i64> = trace.iter::<i64>().collect();
            assert_eq!(trace[..3], tokens);
            assert_eq!(trace[3], start + step);
            tokens = trace[4..].to_vec();
        }
    }

    /// What the runs of a recording wrote is overwritten.
    #[test]
    fn a_cache_is_as_it_was_after_nothing_was_recorded() {
        let (model, config) = family("qwen3");
        let device = model.device();
        let mut rope = model.rope_tables(&config);
        let mut eager = filled(&model, &config, &mut rope);
        let cache = filled(&model, &config, &mut rope);
        let recorded = Replay::record(&model, &mut rope, cache, &[3, 14, 7], false).unwrap();
        let Recorded::Nothing(mut cache) = recorded else {
            panic!("a CPU has no graphs");
        };
        assert_eq!(cache.len(), eager.len());
        for tokens in [[3, 14, 7], [1, 2, 9], [30, 4, 5]] {
            let ids = column(&tokens, &device);
            let ours = model.next_logits(ids.clone(), &mut rope, &mut cache);
            let theirs = model.next_logits(ids, &mut rope, &mut eager);
            assert_eq!(ours.to_data(), theirs.to_data());
        }
    }

    #[test]
    fn a_step_that_read_something_else_is_an_error() {
        let (model, config) = family("qwen3");
        let mut rope = model.rope_tables(&config);
        let cache = filled(&model, &config, &mut rope);
        let recorded = Replay::record(&model, &mut rope, cache, &[3, 14, 7], true).unwrap();
        let Recorded::Step(mut replay) = recorded else {
            panic!("a step is run again");
        };
        let mut sampler = Sampler::new(crate::generate::Sampling::greedy(), 3);
        replay.next(&mut sampler).unwrap();
        let at = Tensor::from_data([5], &model.device());
        replay.state.borrow_mut().write_position(at);
        let error = replay.next(&mut sampler).unwrap_err();
        assert!(matches!(error, ModelError::Replay { .. }), "{error:?}");
    }

    #[test]
    fn a_recording_whose_last_run_was_not_made_is_an_error() {
        let device = Device::default();
        let output = |position: i64| Output {
            logits: Tensor::zeros([2, 5], &device),
            trace: Tensor::from_data([3, 4, position, 1, 1], &device),
        };
        assert!(check_last_run(&output(9 + RUNS as i64 - 1), 9, &device).is_ok());
        let error = check_last_run(&output(9 + RUNS as i64 - 2), 9, &device).unwrap_err();
        assert!(matches!(error, ModelError::Replay { .. }), "{error:?}");
    }
}
