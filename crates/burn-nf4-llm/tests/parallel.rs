//! Training on several devices makes the steps of one: on the CPU, where several threads stand for several devices, on
//! wgpu (feature `wgpu`), where they share one, and on two CUDA cards (`BURN_NF4_TEST_CUDA=1`).

#[allow(dead_code, reason = "shared with the other tests")]
#[path = "models/fixtures.rs"]
mod fixtures;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Int, Tensor};
use burn_nf4::checkpoint::{CheckpointStore, ShardPlan};
use burn_nf4::format::FloatType;
use burn_nf4::model::LinearLayers;
use burn_nf4::op::set_reproducible;
use burn_nf4::parallel::{self, Rank};
use burn_nf4::peft::{LoraConfig, TargetModules};
use burn_nf4_llm::error::ModelError;
use burn_nf4_llm::model::{DecoderConfig, load};
use burn_nf4_llm::train::data::Batch;
use burn_nf4_llm::train::schedule::{Decay, Schedule};
use burn_nf4_llm::train::{Evaluation, Passes, Settings, Shards, Trainer};
use rstest::rstest;
use tempfile::TempDir;

use fixtures::{fixture, open};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// While CUDA records, nobody else may use a device; and random numbers are one row for all devices.
fn alone() -> MutexGuard<'static, ()> {
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    set_reproducible(true);
    guard
}

fn devices(count: usize) -> Vec<Device> {
    #[cfg(feature = "cuda")]
    if std::env::var_os("BURN_NF4_TEST_CUDA").is_some() {
        let all: Vec<Device> = Device::enumerate(burn::tensor::DeviceType::Cuda)
            .into_iter()
            .collect();
        assert!(all.len() >= 2, "two CUDA devices are needed");
        return all.into_iter().take(count).collect();
    }
    #[cfg(feature = "wgpu")]
    let device = Device::wgpu(Default::default());
    #[cfg(not(feature = "wgpu"))]
    let device = Device::default();
    vec![device; count]
}

/// How the ranks of a run hold its weights.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Weights {
    /// All of them.
    Whole,
    /// In parts of weights that were whole.
    Cut,
    /// In parts, as they were loaded.
    Loaded,
}

/// A run to be made.
#[derive(Clone)]
struct Job {
    family: String,
    /// The type to compute in, if not the model's.
    dtype: Option<FloatType>,
    weights: Weights,
    checkpointing: bool,
    rate: f64,
    /// Passes of a step.
    batches: usize,
    steps: usize,
    resume: Option<PathBuf>,
    save: Option<PathBuf>,
}

impl Job {
    fn new(family: &str, weights: Weights) -> Self {
        Self {
            family: family.into(),
            dtype: None,
            weights,
            checkpointing: true,
            rate: 1e-2,
            batches: 4,
            steps: 6,
            resume: None,
            save: None,
        }
    }

    fn trainer(&self, device: &Device, rank: Option<&Arc<Rank>>) -> Result<Trainer, ModelError> {
        let device = device.clone().autodiff();
        let folder = format!("families/{}/model", self.family);
        let (model, config, shards) = match (self.weights, rank) {
            (Weights::Whole, _) | (_, None) => {
                let (model, config) = open(&folder, self.dtype, &device);
                (model, config, None)
            }
            (Weights::Cut, Some(rank)) => {
                let (model, config) = open(&folder, self.dtype, &device);
                let (model, shards) = Shards::of(model, rank)?;
                (model, config, Some(shards))
            }
            (Weights::Loaded, Some(rank)) => {
                let folder = fixture(&folder);
                let config = DecoderConfig::from_folder(&folder)?;
                let store = CheckpointStore::open(&folder)?;
                let dtype = self.dtype.unwrap_or(config.dtype);
                let (model, shards) = Shards::load(store, &config, dtype, &device, rank)?;
                (model, config, Some(shards))
            }
        };
        let lora = LoraConfig {
            r: 4,
            ..LoraConfig::new(TargetModules::AllLinear)
        };
        let with_lora = || {
            device.seed(5);
            let model = model.with_lora(&lora, &device);
            device.sync().expect("it answers");
            model
        };
        let model = match rank {
            Some(rank) => rank.in_turn(with_lora)?,
            None => with_lora(),
        }?;
        let schedule = Schedule {
            peak: self.rate,
            decay: Decay::Constant,
            warmup: 0,
            total: 100,
        };
        let settings = Settings::new(schedule, &lora)?;
        let mut trainer = Trainer::new(model, &config, lora, settings, self.checkpointing)?;
        if let Some(rank) = rank {
            trainer = trainer.in_group(rank.clone(), shards)?;
        }
        match &self.resume {
            Some(folder) => trainer.resume(folder),
            None => Ok(trainer),
        }
    }

    fn make(&self, device: &Device, rank: Option<Arc<Rank>>) -> Result<Made, ModelError> {
        let mut trainer = self.trainer(device, rank.as_ref())?;
        let mut steps = Vec::new();
        while trainer.step < self.steps {
            let first = trainer.step * self.batches;
            let batches: Vec<Batch> = (first..first + self.batches).map(rows).collect();
            let step = trainer.step(&batches)?;
            assert!(!step.skipped);
            steps.push([step.loss, step.grad_norm]);
        }
        if let Some(folder) = &self.save
            && rank.is_none_or(|rank| rank.index() == 0)
        {
            trainer.save_checkpoint(folder)?;
        }
        let evaluation = trainer.evaluate((100..105).map(rows))?;
        Ok(Made {
            steps,
            evaluation,
            passes: trainer.passes(),
        })
    }

    fn on_one(&self) -> Made {
        self.make(&devices(1)[0], None).expect("no step fails")
    }

    fn on(&self, count: usize) -> Vec<Made> {
        let job = self.clone();
        let made = parallel::run(devices(count), move |rank| {
            let rank = Arc::new(rank);
            job.make(&rank.device().clone(), Some(rank))
        });
        made.expect("no rank fails")
    }
}

#[derive(Debug)]
struct Made {
    /// Losses and norms.
    steps: Vec<[f32; 2]>,
    evaluation: Evaluation,
    passes: Passes,
}

/// Two rows of up to 12 tokens; how many are predicted differs from batch to batch.
fn rows(number: usize) -> Batch {
    let row = |row: usize, length: usize| -> Vec<u32> {
        (0..length)
            .map(|i| ((number * 31 + row * 17 + i * 7) % 50) as u32)
            .collect()
    };
    Batch::new(&[&row(0, 12), &row(1, 4 + number % 5)])
}

fn assert_alike(given: &Made, expected: &Made) {
    let [mut all, mut others] = [given, expected].map(|made| made.steps.concat());
    all.push(given.evaluation.loss as f32);
    others.push(expected.evaluation.loss as f32);
    for (at, (ours, theirs)) in all.iter().zip(&others).enumerate() {
        let difference = (ours - theirs).abs();
        assert!(
            difference <= 1e-5 * theirs.abs().max(1.0),
            "{at}: {ours} {theirs}"
        );
    }
    assert_eq!(all.len(), others.len());
    assert_eq!(given.evaluation.targets, expected.evaluation.targets);
    // A run that stands still would be alike too.
    let moved = expected.steps[0][0] - expected.steps[expected.steps.len() - 1][0];
    assert!(moved.abs() > 1e-3, "{:?}", expected.steps);
}

#[rstest]
fn several_devices_make_the_steps_of_one(
    #[values("llama3_tied", "gemma3_text")] family: &str,
    #[values(2, 3)] count: usize,
    #[values(Weights::Whole, Weights::Cut, Weights::Loaded)] weights: Weights,
    // With three some rank has no batch in the last round, with one all but the first have none.
    #[values(1, 3, 4)] batches: usize,
) {
    let _alone = alone();
    let job = Job {
        batches,
        steps: 4,
        ..Job::new(family, weights)
    };
    let expected = job.on_one();
    let all = job.on(count);
    for made in &all {
        assert_alike(made, &expected);
        // The same numbers on each, or parameters would drift apart.
        assert_eq!(made.steps, all[0].steps);
        assert_eq!(made.evaluation, all[0].evaluation);
    }
}

/// The same passes by the same kernels, at the rate of `finetune`. In bf16 a difference in the last bit of a gradient
/// grows with the rate: at 1e-2 the losses of 20 steps of this model differ by 2.6e-3.
#[rstest]
#[case(FloatType::F32, 1e-5)]
#[case(FloatType::BF16, 1e-4)]
fn twenty_steps_are_those_of_one_device(
    #[case] dtype: FloatType,
    #[case] tolerance: f32,
    #[values(Weights::Whole, Weights::Loaded)] weights: Weights,
) {
    let _alone = alone();
    if !burn_nf4::op::supports_dtype(&devices(1)[0], burn::tensor::DType::from(dtype)) {
        return;
    }
    let job = Job {
        dtype: Some(dtype),
        rate: 2e-4,
        steps: 20,
        ..Job::new("qwen3", weights)
    };
    let expected = job.on_one();
    for made in job.on(2) {
        let losses = made.steps.iter().zip(&expected.steps);
        let difference = losses.map(|([a, _], [b, _])| (a - b).abs());
        let largest = difference.fold(0.0, f32::max);
        println!("{dtype:?} {weights:?}: losses differ by {largest:e} at most");
        assert!(largest <= tolerance, "{largest:e}");
    }
}

#[test]
fn nothing_need_be_computed_twice_where_weights_are_whole() {
    let _alone = alone();
    let job = Job {
        checkpointing: false,
        ..Job::new("qwen3", Weights::Whole)
    };
    assert_alike(&job.on(2)[0], &job.on_one());
}

#[test]
fn experts_are_in_parts_too() {
    let _alone = alone();
    for weights in [Weights::Whole, Weights::Loaded] {
        let job = Job::new("qwen3_moe", weights);
        assert_alike(&job.on(2)[0], &job.on_one());
    }
}

/// A run that is continued on another number of devices makes the steps that it would have made.
#[rstest]
fn a_run_goes_on_on_other_devices(#[values(1, 3)] then: usize) {
    let _alone = alone();
    let folder = TempDir::new().unwrap();
    let job = Job::new("llama3_tied", Weights::Loaded);
    let whole = job.on_one();
    let first = Job {
        steps: 3,
        save: Some(folder.path().into()),
        ..job.clone()
    };
    first.on(2);
    let rest = Job {
        resume: Some(folder.path().join("checkpoint-3")),
        ..job
    };
    let rest = rest.on(then).swap_remove(0);
    let expected = Made {
        steps: whole.steps[3..].to_vec(),
        ..whole
    };
    assert_alike(&rest, &expected);
}

/// Where the device has graphs each rank records its pass, one after the other.
#[test]
fn passes_of_each_rank_are_replayed() {
    let _alone = alone();
    let job = Job {
        batches: 2,
        ..Job::new("llama3_tied", Weights::Whole)
    };
    let expected = job.on_one();
    let all = job.on(2);
    let has_graphs = burn_nf4::op::has_graphs(&devices(1)[0]);
    for made in &all {
        let passes = match has_graphs {
            true => Passes::Replayed,
            false => Passes::Launched,
        };
        // Rows of 12 tokens each: all passes are of one size.
        assert_eq!(made.passes, passes);
    }
    assert_alike(&all[0], &expected);
}

/// Words of packed weights on the device.
#[derive(Default)]
struct Words(usize);

impl ModuleVisitor for Words {
    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.0 += param.val().shape().num_elements();
    }
}

#[test]
fn of_weights_that_are_loaded_in_parts_no_more_is_on_the_device() {
    let _alone = alone();
    let all = parallel::run(devices(2), |rank| {
        let rank = Arc::new(rank);
        let device = rank.device().clone();
        let folder = fixture("families/llama3_tied/model");
        let config = DecoderConfig::from_folder(&folder)?;
        let words = |plan: Option<_>| -> Result<usize, ModelError> {
            let mut store = CheckpointStore::open(&folder)?;
            if let Some(plan) = plan {
                store = store.shard(plan);
            }
            let mut words = Words::default();
            load(store, &config, config.dtype, &device)?.visit(&mut words);
            Ok(words.0)
        };
        let unknown = ShardPlan::new(&rank, ["layers.99".to_string()]);
        let unknown = words(Some(unknown)).map_err(|error| error.to_string());
        Ok::<_, ModelError>((
            words(None)?,
            words(Some(Shards::plan(&config, &rank)))?,
            unknown,
        ))
    });
    for (whole, part, unknown) in all.expect("no rank fails") {
        assert!(part <= whole / 2 + 512, "{part} of {whole}");
        let text = unknown.expect_err("there is no such layer");
        assert!(text.contains("`layers.99`"), "{text}");
    }
}

fn error(
    count: usize,
    job: impl Fn(Arc<Rank>) -> Result<(), ModelError> + Send + Sync + 'static,
) -> String {
    let made = parallel::run(devices(count), move |rank| job(Arc::new(rank)));
    made.expect_err("a rank fails").to_string()
}

#[test]
fn parts_need_checkpointing() {
    let _alone = alone();
    let job = Job {
        checkpointing: false,
        ..Job::new("llama3_tied", Weights::Cut)
    };
    let text = error(2, move |rank| {
        job.trainer(&rank.device().clone(), Some(&rank)).map(drop)
    });
    assert!(
        text.starts_with("gradient checkpointing is false, expected true"),
        "{text}"
    );
}

#[test]
fn ranks_with_other_settings_are_refused() {
    let _alone = alone();
    let text = error(2, |rank| {
        let device = rank.device().clone().autodiff();
        let (model, config) = open("families/llama3_tied/model", None, &device);
        let lora = LoraConfig::new(TargetModules::AllLinear);
        let model = model.with_lora(&lora, &device)?;
        let schedule = Schedule {
            peak: 1e-2 * (rank.index() + 1) as f64,
            decay: Decay::Constant,
            warmup: 0,
            total: 100,
        };
        let settings = Settings::new(schedule, &lora)?;
        let trainer = Trainer::new(model, &config, lora, settings, true)?;
        trainer.in_group(rank, None).map(drop)
    });
    assert!(text.contains("expected those of rank"), "{text}");
}

/// What one rank meets is what the caller is told.
#[test]
fn a_failing_rank_ends_the_run() {
    if std::env::var_os("BURN_NF4_TEST_CUDA").is_some() {
        // The other card would wait for ever, and with it every other test.
        return;
    }
    let _alone = alone();
    let job = Job::new("llama3_tied", Weights::Loaded);
    let text = error(2, move |rank| {
        let mut trainer = job.trainer(&rank.device().clone(), Some(&rank))?;
        if rank.index() == 1 {
            return Err(ModelError::Template("has no end".into()));
        }
        loop {
            trainer.step(&[rows(0)])?;
        }
    });
    assert_eq!(text, "the chat template: has no end");
}

#[test]
fn ranks_with_other_batches_are_refused() {
    let _alone = alone();
    let job = Job::new("llama3_tied", Weights::Whole);
    let text = error(2, move |rank| {
        let mut trainer = job.trainer(&rank.device().clone(), Some(&rank))?;
        let batches: Vec<Batch> = (0..=rank.index()).map(rows).collect();
        trainer.step(&batches).map(drop)
    });
    assert!(text.contains("expected the same on all ranks"), "{text}");
}
