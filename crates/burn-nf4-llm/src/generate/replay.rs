//! A step of decoding as one graph that the device replays.
//!
//! A step is hundreds of launches, and for one row they take the host longer than the device. Recorded
//! once, they are a single call. What changes from step to step lies in buffers on the device, which the
//! step itself carries on: the tokens, the position and the cache.

use std::cell::RefCell;
use std::rc::Rc;

use burn::tensor::{Device, Graph, Int, Tensor, TensorData, capture};

use crate::error::ModelError;
use crate::generate::sample::Sampler;
use crate::model::Decoder;
use crate::model::cache::KvCache;
use crate::model::config::DecoderConfig;
use crate::model::{RopeTables, row_starts};

/// Positions that the runs before the recording write to, past those that the cache holds.
pub(super) const WARM_UP: usize = 4;

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
        self.write(next, after);
        Output { logits, trace }
    }

    /// Writes tokens and position into the buffers that the graph reads.
    fn write(&mut self, ids: Tensor<2, Int>, position: Tensor<1, Int>) {
        let [rows, _] = ids.dims();
        self.ids
            .inplace(|held| held.slice_assign([0..rows, 0..1], ids));
        #[allow(clippy::single_range_in_vec_init, reason = "one axis")]
        self.position
            .inplace(|held| held.slice_assign([0..1], position));
    }
}

impl<'a> Replay<'a> {
    /// Records a step that follows what the cache holds, and no step yet.
    ///
    /// - `tokens`: the next token of each row
    ///
    /// Gives the cache back if the device has recorded nothing. It needs room for [`WARM_UP`] positions
    /// more than it is to hold.
    pub fn record(
        model: &'a Decoder,
        config: &DecoderConfig,
        cache: KvCache,
        tokens: &[u32],
    ) -> Result<Self, KvCache> {
        let device = model.device();
        let (rows, position) = (tokens.len(), cache.len());
        let tokens: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
        let ids = TensorData::new(tokens.clone(), [rows, 1]);
        let ids = Tensor::<2, Int>::from_data(ids, &device);
        let start = Tensor::<1, Int>::from_data([position as i64], &device);
        let mut rope = model.rope_tables(config);
        rope.reserve(cache.room(), position);
        let state = Rc::new(RefCell::new(State {
            // Buffers of their own: the graph writes to them.
            ids: ids.clone() + 0,
            position: start.clone() + 0,
            starts: row_starts(cache.padding(), &device),
            cache,
        }));
        let of_graph = state.clone();
        let step: Step = Box::new(move || of_graph.borrow_mut().step(model, &rope));
        let graph = capture(&device, step);
        if !graph.is_hardware() {
            return Err(cache_of(graph, state));
        }
        state.borrow_mut().write(ids, start);
        Ok(Self {
            graph,
            state,
            device,
            tokens,
            position: position as i64,
        })
    }

    /// Makes a step and chooses the next token of each row.
    ///
    /// # Errors
    /// [`ModelError::Device`] if the device has not read what it should have.
    pub fn next(&mut self, sampler: &mut Sampler) -> Result<Vec<u32>, ModelError> {
        // SAFETY: the graph reads the weights of the model, which is borrowed as long as this lives, tables
        // that its closure owns, and the state, which is here; it writes to the state and to its output,
        // which it holds. Both are used by this thread alone, which recorded: this is not `Send`.
        let output = unsafe { self.graph.replay() };
        let trace = output.trace.to_data();
        let trace: Vec<i64> = trace.iter::<i64>().collect();
        let (read, next) = trace.split_at(self.tokens.len() + 1);
        let (position, tokens) = read.split_last().expect("the position is read");
        if (tokens, *position) != (&self.tokens[..], self.position) {
            let Self {
                tokens: expected,
                position: at,
                ..
            } = self;
            return Err(ModelError::Device {
                device: format!("{:?}", self.device),
                message: format!(
                    "a replayed step read the tokens {tokens:?} at position {position}, expected \
                     {expected:?} at {at}"
                ),
            });
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
        state.write(ids, Tensor::from_data([self.position], &self.device));
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
