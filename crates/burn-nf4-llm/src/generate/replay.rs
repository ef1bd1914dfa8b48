//! A step of decoding, launched or as one graph that the device replays.
//!
//! A step is hundreds of launches, and for one row they take the host longer than the device. Recorded
//! once, they are a single call. What changes from step to step lies in buffers on the device, which the
//! step itself carries on: the tokens, the positions, the cache, and what the next tokens are chosen by. A row
//! whose text ends is given another by writing to them: the recorded step is the same.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};

use burn::tensor::{Device, Graph, Int, Tensor, TensorData, capture};
use burn_nf4::op::Sampled;

use crate::error::ModelError;
use crate::generate::sample::Choosing;
use crate::model::cache::KvCache;
use crate::model::{Decoder, RopeTables};

/// Positions that [`Replay::record`] writes to, past those that the cache holds: [`capture`] runs a step three
/// times, and a fourth time to record it.
pub(super) const RUNS: usize = 4;

/// Held while a step is recorded: what another recording does before would break off one of CUDA.
pub(crate) static RECORDING: Mutex<()> = Mutex::new(());

/// What is recorded.
type Step<'a> = Box<dyn FnMut() -> Output + 'a>;

/// What the device carries from step to step.
pub(super) struct State {
    /// `[rows, 1]`: the tokens that the next step reads.
    ids: Tensor<2, Int>,
    /// `[rows]`: the positions that the cache holds of each row.
    positions: Tensor<1, Int>,
    /// The keys and values; its own length is not carried on.
    pub cache: KvCache,
}

/// What a step gives.
pub(super) struct Output {
    /// `[rows, vocab_size]`.
    pub logits: Tensor<2>,
    /// `[4 rows]`: the tokens and the positions that were read, the next tokens, and how many of each row were
    /// chosen before.
    trace: Tensor<1, Int>,
}

impl State {
    /// Of so many rows, with nothing to read yet.
    pub fn new(rows: usize, cache: KvCache, device: &Device) -> Self {
        Self {
            ids: Tensor::zeros([rows, 1], device),
            positions: Tensor::zeros([rows], device),
            cache,
        }
    }

    /// One step: every launch of it is recorded.
    ///
    /// # Panics
    /// If the choosing is not of as many rows.
    pub fn step(&mut self, model: &Decoder, rope: &RopeTables, choosing: &Choosing) -> Output {
        let logits = model.next_logits_at(
            self.ids.clone(),
            self.positions.clone(),
            rope,
            &mut self.cache,
        );
        let [rows, _] = self.ids.dims();
        let sampled = choosing.choose(logits.clone());
        let Sampled { ids: next, numbers } = sampled.expect("the sampler is of these rows");
        let trace = Tensor::cat(
            vec![
                self.ids.clone().reshape([rows]),
                self.positions.clone(),
                next.clone(),
                numbers,
            ],
            0,
        );
        let after = self.positions.clone() + 1;
        self.write_ids(next.reshape([rows, 1]));
        self.write_positions(after);
        Output { logits, trace }
    }

    /// Writes what the next step is to read.
    pub fn write(&mut self, tokens: &[i64], positions: &[i64]) {
        let rows = tokens.len();
        let device = self.ids.device();
        let ids = TensorData::new(tokens.to_vec(), [rows, 1]);
        self.write_ids(Tensor::from_data(ids, &device));
        let positions = TensorData::new(positions.to_vec(), [rows]);
        self.write_positions(Tensor::from_data(positions, &device));
    }

    /// Writes tokens into the buffer that the graph reads.
    fn write_ids(&mut self, ids: Tensor<2, Int>) {
        let [rows, _] = ids.dims();
        self.ids
            .inplace(|held| held.slice_assign([0..rows, 0..1], ids));
    }

    /// As [`write_ids`](Self::write_ids), the positions.
    fn write_positions(&mut self, positions: Tensor<1, Int>) {
        let [rows] = positions.dims();
        #[allow(clippy::single_range_in_vec_init, reason = "one axis")]
        self.positions
            .inplace(|held| held.slice_assign([0..rows], positions));
    }
}

impl Output {
    /// The next token of each row, and how many were chosen before, if the step has read these tokens at these
    /// positions.
    ///
    /// # Errors
    /// [`ModelError::Replay`] if it has read something else, [`ModelError::Device`] if the device does not
    /// answer.
    pub fn chosen(
        &self,
        tokens: &[i64],
        positions: &[i64],
    ) -> Result<(Vec<i64>, Vec<i64>), ModelError> {
        let device = self.trace.device();
        let trace = self.trace.try_to_data();
        let trace = trace.map_err(|error| ModelError::device(&device, error))?;
        let trace: Vec<i64> = trace.iter::<i64>().collect();
        let (read, next) = trace.split_at(2 * tokens.len());
        let (read, at) = read.split_at(tokens.len());
        if (read, at) != (tokens, positions) {
            let message = format!(
                "it read the tokens {read:?} at the positions {at:?}, expected {tokens:?} at {positions:?}"
            );
            return Err(ModelError::replay(&device, message));
        }
        let (next, numbers) = next.split_at(tokens.len());
        Ok((next.to_vec(), numbers.to_vec()))
    }
}

/// A recorded step.
pub(super) struct Replay<'a>(Graph<Output, Step<'a>>);

impl<'a> Replay<'a> {
    /// Records a step of a state, if the device records any. What the next step reads is to be
    /// [written](State::write) anew after that, as the step is run.
    ///
    /// - `state`: with room for [`RUNS`] positions more than each row holds
    /// - `positions`: those that the state reads
    /// - `choosing`: what tokens are chosen by; it is afterwards as it was
    /// - `reruns`: whether a step that is run again, launch by launch, will do where the device records none
    ///
    /// # Errors
    /// [`ModelError::Replay`] if the recording was broken off.
    pub fn record(
        model: &'a Decoder,
        rope: &mut RopeTables,
        state: &Rc<RefCell<State>>,
        positions: &[i64],
        choosing: Choosing,
        reruns: bool,
    ) -> Result<Option<Self>, ModelError> {
        let device = model.device();
        let longest = positions.iter().copied().max().unwrap_or(0);
        rope.reserve(state.borrow().cache.room(), longest as usize + 1);
        let rope = rope.clone();
        let before = choosing.snapshot();
        let (of_graph, chooses) = (state.clone(), choosing.clone());
        let step: Step = Box::new(move || of_graph.borrow_mut().step(model, &rope, &chooses));
        let graph = {
            let _alone = RECORDING.lock().unwrap_or_else(PoisonError::into_inner);
            capture(&device, step)
        };
        choosing.restore(&before)?;
        if !graph.is_hardware() {
            check_last_run(graph.output(), positions, &device)?;
            if !reruns {
                return Ok(None);
            }
        }
        Ok(Some(Self(graph)))
    }

    /// Makes a step.
    ///
    /// # Panics
    /// If the device does not take it.
    ///
    /// # Safety
    /// The cache has room for a position more than each row holds.
    pub unsafe fn run(&mut self) -> &Output {
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
        // - No launch writes past the end of the cache, says the caller.
        //
        // Replays follow each other rightly only if the assignments of the step, and those between steps, ran
        // in place; else each would read the old buffers and write to new ones. Of tokens, positions and what
        // chooses the trace tells. Of the cache nothing does: `LayerCache::put` and `KvCache::put_row` take a tensor out of
        // its slot, so that it is the only owner when it assigns. A comparison with one launched step would
        // not help, since the first replay is right either way; `tests/replay.rs` compares whole texts.
        unsafe { self.0.replay() }
    }
}

/// Refuses a recording that was broken off. Where a device has no graphs, the last run of a step was made like
/// those before it; where the device could not close a recording, that run was not made, and cubecl lets
/// nobody read what it would have written, the cache included.
fn check_last_run(output: &Output, positions: &[i64], device: &Device) -> Result<(), ModelError> {
    let broken = |cause: String| {
        let message = format!("the recording was broken off, as another thread can cause: {cause}");
        ModelError::replay(device, message)
    };
    let rows = positions.len();
    let trace = output.trace.try_to_data();
    let trace = trace.map_err(|error| broken(error.to_string()))?;
    let read: Vec<i64> = trace.iter::<i64>().skip(rows).take(rows).collect();
    let after = positions.iter().map(|at| at + RUNS as i64 - 1);
    let expected: Vec<i64> = after.collect();
    match read == expected {
        true => Ok(()),
        false => Err(broken(format!(
            "the last run read the positions {read:?}, expected {expected:?}"
        ))),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::{Path, PathBuf};

    use burn_nf4::checkpoint::CheckpointStore;
    use burn_nf4::format::FloatType;
    use burn_nf4::op::has_graphs;
    use rstest::rstest;

    use super::*;
    use crate::generate::sample::{Sampler, Sampling};
    use crate::model::{DecoderConfig, load};

    /// For three rows.
    fn greedy(model: &Decoder, config: &DecoderConfig) -> Sampler {
        let (texts, vocabulary) = ([[0]; 3], config.vocab_size);
        Sampler::new(Sampling::greedy(), 0, &texts, vocabulary, &model.device()).unwrap()
    }

    /// A model of the fixtures of families, on the CPU.
    pub fn family(name: &str) -> (Decoder, DecoderConfig) {
        fixture_model(&format!("families/{name}"))
    }

    /// A model of the fixtures, on the CPU.
    pub fn fixture_model(path: &str) -> (Decoder, DecoderConfig) {
        model_on(path, &Device::default())
    }

    fn model_on(path: &str, device: &Device) -> (Decoder, DecoderConfig) {
        let package = Path::new(env!("CARGO_MANIFEST_DIR"));
        model_in(
            &package.join("tests/fixtures").join(path).join("model"),
            device,
        )
    }

    /// The model of a folder in f32, so that two ways to one result differ little.
    pub fn model_in(folder: &Path, device: &Device) -> (Decoder, DecoderConfig) {
        let config = DecoderConfig::from_folder(folder).unwrap();
        let store = CheckpointStore::open(folder).unwrap();
        let model = load(store, &config, FloatType::F32, device).unwrap();
        (model, config)
    }

    const TEXTS: [&[i64]; 3] = [&[5, 9, 2, 7, 3, 11, 4], &[8, 1, 6], &[12, 3, 9, 4]];
    const NEXT: [i64; 3] = [3, 14, 7];

    fn tokens(ids: &[i64], device: &Device) -> Tensor<2, Int> {
        Tensor::from_data(TensorData::new(ids.to_vec(), [1, ids.len()]), device)
    }

    fn positions() -> Vec<i64> {
        TEXTS.iter().map(|text| text.len() as i64).collect()
    }

    /// A cache of one row that holds a text.
    fn alone(
        model: &Decoder,
        config: &DecoderConfig,
        rope: &mut RopeTables,
        text: &[i64],
    ) -> KvCache {
        let mut cache = KvCache::new(config.layers.len(), vec![0]);
        model.next_logits(tokens(text, &model.device()), rope, &mut cache);
        cache
    }

    /// The texts in a cache of three rows, each of which begins at the first position, with room for more.
    fn filled(
        model: &Decoder,
        config: &DecoderConfig,
        rope: &mut RopeTables,
        room: usize,
    ) -> State {
        let device = model.device();
        let mut cache = KvCache::new(config.layers.len(), vec![0; 3]);
        cache.reserve(room);
        let zeros = Tensor::zeros([3, 7], &device);
        model.next_logits(zeros, rope, &mut cache);
        for (row, text) in TEXTS.iter().enumerate() {
            cache.put_row(row, &alone(model, config, rope, text));
        }
        rope.reserve(cache.room(), 7);
        let mut state = State::new(3, cache, &device);
        state.write(&NEXT, &positions());
        state
    }

    fn assert_close(ours: Tensor<2>, theirs: Tensor<2>, what: &str) {
        let difference = (ours - theirs).abs().max().into_scalar::<f32>();
        // The same products over keys in other groups.
        assert!(difference < 1e-4, "{what}: {difference:e}");
    }

    /// A step that reads its positions from the device is a forward of one token of each row alone, windows
    /// included, and carries on what the next one reads.
    #[rstest]
    fn a_step_is_a_forward_of_one_token_of_each_row(
        #[files("tests/fixtures/families/*/model")]
        #[dirs]
        folder: PathBuf,
    ) {
        let (model, config) = model_in(&folder, &Device::default());
        let device = model.device();
        let mut rope = model.rope_tables(&config);
        let mut rows = TEXTS.map(|text| alone(&model, &config, &mut rope, text));
        let mut state = filled(&model, &config, &mut rope, 27);
        let (mut read, mut at) = (NEXT.to_vec(), positions());
        for step in 0..12 {
            let output = state.step(&model, &rope, &greedy(&model, &config).choosing());
            let expected = rows
                .iter_mut()
                .zip(&read)
                .map(|(cache, &id)| model.next_logits(tokens(&[id], &device), &mut rope, cache));
            let expected = Tensor::cat(expected.collect(), 0);
            assert_close(
                output.logits.clone(),
                expected,
                &format!("{folder:?}, step {step}"),
            );
            read = output.chosen(&read, &at).unwrap().0;
            at.iter_mut().for_each(|at| *at += 1);
        }
    }

    /// Where the engine is held to launches: on the CPU, and where this build has it on wgpu, which records.
    fn devices() -> Vec<Device> {
        vec![
            Device::flex(),
            #[cfg(feature = "wgpu")]
            Device::wgpu(Default::default()),
        ]
    }

    /// The logits of a recorded step are at every one of 200 steps those of launches over a batch that is padded
    /// on the left, whose positions the host knows: past windows, and beyond the positions of a table.
    #[rstest]
    fn recorded_steps_have_the_logits_of_launches(
        #[values(
            "gemma2",
            "gemma3_text",
            "llama3_tied",
            "mistral_window",
            "phi3",
            "qwen2_window",
            "smollm3"
        )]
        name: &str,
    ) {
        for device in devices() {
            let (model, config) = model_on(&format!("families/{name}"), &device);
            let mut rope = model.rope_tables(&config);
            let padded: Vec<i64> = TEXTS
                .iter()
                .flat_map(|text| std::iter::repeat_n(0, 7 - text.len()).chain(text.iter().copied()))
                .collect();
            let padded = Tensor::from_data(TensorData::new(padded, [3, 7]), &device);
            let mut cache = KvCache::new(config.layers.len(), vec![0, 4, 3]);
            model.next_logits(padded, &mut rope, &mut cache);
            let state = filled(&model, &config, &mut rope, 7 + 200 + RUNS);
            let state = Rc::new(RefCell::new(state));
            let reruns = !has_graphs(&device);
            let replay = Replay::record(
                &model,
                &mut rope,
                &state,
                &positions(),
                greedy(&model, &config).choosing(),
                reruns,
            );
            let mut replay = replay.unwrap().expect("it is recorded");
            state.borrow_mut().write(&NEXT, &positions());
            let (mut read, mut at) = (NEXT.to_vec(), positions());
            for step in 0..200 {
                // SAFETY: the room was reserved.
                let output = unsafe { replay.run() };
                let ids = Tensor::from_data(TensorData::new(read.clone(), [3, 1]), &device);
                let expected = model.next_logits(ids, &mut rope, &mut cache);
                let ours = output.logits.clone();
                assert_close(ours, expected, &format!("{name}, step {step}, {device:?}"));
                read = output.chosen(&read, &at).unwrap().0;
                at.iter_mut().for_each(|at| *at += 1);
            }
        }
    }

    /// Nothing is recorded on a CPU; what the runs of a recording wrote is overwritten.
    #[test]
    fn a_state_is_as_it_was_after_nothing_was_recorded() {
        let (model, config) = family("qwen3");
        let mut rope = model.rope_tables(&config);
        let mut eager = filled(&model, &config, &mut rope, 27);
        let state = Rc::new(RefCell::new(filled(&model, &config, &mut rope, 27)));
        let recorded = Replay::record(
            &model,
            &mut rope,
            &state,
            &positions(),
            greedy(&model, &config).choosing(),
            false,
        );
        assert!(recorded.unwrap().is_none());
        let mut state = Rc::into_inner(state).unwrap().into_inner();
        state.write(&NEXT, &positions());
        for _ in 0..3 {
            let [ours, theirs] = [&mut state, &mut eager]
                .map(|state| state.step(&model, &rope, &greedy(&model, &config).choosing()));
            assert_eq!(ours.logits.to_data(), theirs.logits.to_data());
            assert_eq!(ours.trace.to_data(), theirs.trace.to_data());
        }
    }

    #[test]
    fn a_step_that_read_something_else_is_an_error() {
        let (model, config) = family("qwen3");
        let mut rope = model.rope_tables(&config);
        let state = Rc::new(RefCell::new(filled(&model, &config, &mut rope, 27)));
        let replay = Replay::record(
            &model,
            &mut rope,
            &state,
            &positions(),
            greedy(&model, &config).choosing(),
            true,
        );
        let mut replay = replay.unwrap().unwrap();
        state.borrow_mut().write(&NEXT, &positions());
        // SAFETY: there is room for 27 positions.
        let output = unsafe { replay.run() };
        let (likeliest, _) = output.chosen(&NEXT, &positions()).unwrap();
        let mut after: Vec<i64> = positions().iter().map(|at| at + 1).collect();
        after[1] = 9;
        // SAFETY: as before.
        let output = unsafe { replay.run() };
        let error = output.chosen(&likeliest, &after).unwrap_err();
        assert!(matches!(error, ModelError::Replay { .. }), "{error:?}");
    }

    #[test]
    fn a_recording_whose_last_run_was_not_made_is_an_error() {
        let device = Device::default();
        let output = |ran: i64| Output {
            logits: Tensor::zeros([2, 5], &device),
            trace: Tensor::from_data([3, 4, 9 + ran, 2 + ran, 1, 1], &device),
        };
        let runs = RUNS as i64;
        assert!(check_last_run(&output(runs - 1), &[9, 2], &device).is_ok());
        let error = check_last_run(&output(runs - 2), &[9, 2], &device).unwrap_err();
        assert!(matches!(error, ModelError::Replay { .. }), "{error:?}");
    }
}
