//! Fine-tuning against PEFT's, and against itself.

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Device;
use burn_nf4::checkpoint::SafetensorsFile;
use burn_nf4::format::FloatType;
use burn_nf4::model::LinearLayers;
use burn_nf4::nn::AnyLinear;
use burn_nf4::peft::{Adapter, LoraConfig};
use burn_nf4_llm::error::ModelError;
use burn_nf4_llm::model::config::DecoderConfig;
use burn_nf4_llm::train::data::{Batch, Dataset};
use burn_nf4_llm::train::schedule::{Decay, Schedule};
use burn_nf4_llm::train::{Optim, Settings, Trainer, latest_checkpoint};
use rstest::rstest;
use serde::Deserialize;

use crate::fixtures::{fixture, ints, io, logits, max_difference, open, random_numbers, write_io};

#[derive(Deserialize)]
struct PeftRun {
    lr: f64,
    weight_decay: f32,
    losses: Vec<f32>,
}

const OPTIMIZER_FILE: &str = "optimizer.safetensors";

fn peft_run() -> PeftRun {
    serde_json::from_slice(&fs::read(fixture("hf/f32/train.json")).unwrap()).unwrap()
}

/// The batches of PEFT's run.
fn peft_batches() -> Vec<Batch> {
    let file = SafetensorsFile::open(fixture("hf/f32/train_batches.safetensors")).unwrap();
    let (values, shape) = ints(&file, "batches");
    let ids: Vec<u32> = values.iter().map(|&id| id as u32).collect();
    ids.chunks(shape[1] * shape[2])
        .map(|batch| Batch::new(&batch.chunks(shape[2]).collect::<Vec<_>>()))
        .collect()
}

fn settings(lr: f64, weight_decay: f32, total: usize) -> Settings {
    Settings {
        schedule: Schedule {
            peak: lr,
            decay: Decay::Constant,
            warmup: 0,
            total,
        },
        optim: Optim::AdamwTorch,
        weight_decay,
        // PEFT's run clips nothing.
        max_grad_norm: 0.0,
        batch_size: 4,
        grad_accum: 1,
        seq_len: 64,
        seed: 7,
        data: 0,
        model: 0,
        compute: None,
        lora: serde_json::Value::Null,
    }
}

/// A run from PEFT's first adapter.
fn from_init(settings: Settings, checkpointing: bool) -> (Trainer, DecoderConfig) {
    let device = Device::default().autodiff();
    let (model, config) = open("hf/f32/model", None, &device);
    let adapter = Adapter::open(fixture("hf/f32/adapter_init")).unwrap();
    let lora = adapter.config().clone();
    let model = model.apply_adapter(&adapter, &device).unwrap();
    let trainer = Trainer::new(model, &config, lora, settings, checkpointing).unwrap();
    (trainer, config)
}

fn final_logits() -> Vec<f32> {
    let file = SafetensorsFile::open(fixture("hf/f32/adapter_final_logits.safetensors")).unwrap();
    file.load_float::<f32>("logits").unwrap().0
}

#[test]
fn forty_steps_have_the_losses_of_peft_and_end_at_its_logits() {
    let run = peft_run();
    let (mut trainer, config) = from_init(settings(run.lr, run.weight_decay, 40), false);
    let batches = peft_batches();
    assert_eq!(batches.len(), run.losses.len());
    for (step, (batch, expected)) in batches.into_iter().zip(run.losses).enumerate() {
        let loss = trainer.step(&[batch]).unwrap().loss;
        let difference = (loss - expected).abs();
        assert!(difference < 1e-5, "step {step}: {loss} and {expected}");
    }

    let (ids, shape, _) = io("hf/f32/io.safetensors");
    let ours = logits(&trainer.model.valid(), &config, &ids, &shape);
    let difference = max_difference(&ours, &final_logits());
    // Forty updates of up to 2e-3 a weight, each from gradients that differ by a rounding.
    assert!(difference < 1e-4, "{difference:e}");

    // For `scripts/peer_load.py --adapter FOLDER/adapter --io FOLDER/io.safetensors` elsewhere.
    if let Some(folder) = std::env::var_os("NF4_EXPORT").map(PathBuf::from) {
        trainer.save_adapter(&folder.join("adapter")).unwrap();
        write_io(&folder.join("io.safetensors"), &ids, &shape, &ours);
    }
}

#[test]
fn the_last_adapter_of_peft_gives_its_logits() {
    let device = Device::default();
    let (model, config) = open("hf/f32/model", None, &device);
    let adapter = Adapter::open(fixture("hf/f32/adapter_final")).unwrap();
    let model = model.apply_adapter(&adapter, &device).unwrap();
    let (ids, shape, _) = io("hf/f32/io.safetensors");
    let ours = logits(&model, &config, &ids, &shape);
    let difference = max_difference(&ours, &final_logits());
    assert!(difference < 1e-4, "{difference:e}");
}

/// "Dynamic" checkpoints leave layers in 16 bit; PEFT adapts those too.
#[test]
fn layers_that_are_not_packed_are_adapted_alike() {
    let dense = |device: &Device| {
        let (model, config) = open("hf/f32/model", None, device);
        let model = model.try_map_linears(|_, layer| match layer {
            AnyLinear::Nf4(layer) => {
                Ok(AnyLinear::Dense(layer.to_dense(FloatType::F32)?.no_grad()))
            }
            other => Ok(other),
        });
        (model.unwrap(), config)
    };
    let adapter = |name: &str| Adapter::open(fixture(name)).unwrap();

    let device = Device::default();
    let (model, config) = dense(&device);
    let model = model
        .apply_adapter(&adapter("hf/f32/adapter_final"), &device)
        .unwrap();
    let (ids, shape, _) = io("hf/f32/io.safetensors");
    let ours = logits(&model, &config, &ids, &shape);
    assert!(max_difference(&ours, &final_logits()) < 1e-4);

    let device = device.autodiff();
    let (model, config) = dense(&device);
    let init = adapter("hf/f32/adapter_init");
    let lora = init.config().clone();
    let model = model.apply_adapter(&init, &device).unwrap();
    let run = peft_run();
    let mut trainer = Trainer::new(model, &config, lora, settings(run.lr, 0.0, 3), false).unwrap();
    for (batch, expected) in peft_batches().into_iter().zip(run.losses).take(3) {
        let loss = trainer.step(&[batch]).unwrap().loss;
        assert!((loss - expected).abs() < 1e-5, "{loss} and {expected}");
    }
    let output = tempfile::tempdir().unwrap();
    trainer.save_adapter(output.path()).unwrap();
    let saved = Adapter::open(output.path()).unwrap();
    assert_eq!(saved.modules().count(), init.modules().count());
}

/// Running layers twice changes no operation, so the losses are the same bits.
#[rstest]
fn gradient_checkpointing_changes_nothing(#[values(0.0, 0.3)] dropout: f64) {
    let _drawn = random_numbers();
    let losses = |checkpointing| {
        let mut trainer = with_dropout(dropout, checkpointing);
        let batches = peft_batches();
        (0..3)
            .map(|step| trainer.step(&batches[step..=step]).unwrap().loss.to_bits())
            .collect::<Vec<_>>()
    };
    assert_eq!(losses(true), losses(false));
}

/// The gradients of two batches add up to those of one with the rows of both.
#[test]
fn accumulated_gradients_are_those_of_the_batch_in_one() {
    let batches = peft_batches();
    let rows: Vec<Vec<u32>> = batches[0]
        .ids
        .chunks(64)
        .map(|row| row.iter().map(|&id| id as u32).collect())
        .collect();
    // Of unequal lengths, so that a mean of means would show.
    let rows: Vec<&[u32]> = vec![&rows[0], &rows[1][..20], &rows[2][..33], &rows[3]];
    let run = |parts: &[Batch]| {
        let (mut trainer, config) = from_init(settings(2e-3, 0.0, 3), false);
        let losses: Vec<f32> = (0..3).map(|_| trainer.step(parts).unwrap().loss).collect();
        let (ids, shape, _) = io("hf/f32/io.safetensors");
        (
            losses,
            logits(&trainer.model.valid(), &config, &ids, &shape),
        )
    };
    let (losses, logits) = run(&[Batch::new(&rows[..2]), Batch::new(&rows[2..])]);
    let (losses_in_one, logits_in_one) = run(&[Batch::new(&rows)]);
    // Sums in another order, in f32.
    assert!(max_difference(&losses, &losses_in_one) < 1e-5);
    assert!(max_difference(&logits, &logits_in_one) < 1e-4);
}

/// A run of fresh branches with dropout, which shows whether the random numbers are the same.
fn with_dropout(dropout: f64, checkpointing: bool) -> Trainer {
    let device = Device::default().autodiff();
    let (model, config) = open("hf/f32/model", None, &device);
    let adapter = Adapter::open(fixture("hf/f32/adapter_init")).unwrap();
    let lora = LoraConfig {
        lora_dropout: dropout,
        ..adapter.config().clone()
    };
    let mut with_dropout = Adapter::new(lora.clone()).unwrap();
    for (path, module) in adapter.modules() {
        with_dropout.insert(path, module.clone()).unwrap();
    }
    let model = model.apply_adapter(&with_dropout, &device).unwrap();
    let mut settings = settings(2e-3, 0.01, 4);
    settings.schedule.decay = Decay::Cosine;
    settings.lora = serde_json::from_str(&lora.to_json()).unwrap();
    Trainer::new(model, &config, lora, settings, checkpointing).unwrap()
}

#[rstest]
fn a_resumed_run_has_the_losses_of_an_uninterrupted_one(#[values(0.0, 0.3)] dropout: f64) {
    let _drawn = random_numbers();
    let batches = peft_batches();
    let mut whole = with_dropout(dropout, false);
    let expected: Vec<f32> = (0..4)
        .map(|step| whole.step(&batches[step..=step]).unwrap().loss)
        .collect();

    let output = tempfile::tempdir().unwrap();
    let mut first = with_dropout(dropout, false);
    for step in 0..2 {
        first.step(&batches[step..=step]).unwrap();
        first.save_checkpoint(output.path()).unwrap();
    }
    let folder = latest_checkpoint(output.path()).unwrap().unwrap();
    assert!(folder.ends_with("checkpoint-2"));
    let mut second = with_dropout(dropout, false).resume(&folder).unwrap();
    assert_eq!(second.step, 2);
    let resumed: Vec<f32> = (2..4)
        .map(|step| second.step(&batches[step..=step]).unwrap().loss)
        .collect();
    assert_eq!(resumed, expected[2..]);
}

#[test]
fn a_run_is_not_resumed_under_other_settings() {
    let output = tempfile::tempdir().unwrap();
    let mut first = with_dropout(0.0, false);
    first.step(&peft_batches()[..1]).unwrap();
    let folder = first.save_checkpoint(output.path()).unwrap();
    match with_dropout(0.1, false).resume(&folder) {
        Err(ModelError::Resume { message, .. }) => assert!(message.contains("lora"), "{message}"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("resumed"),
    }
}

/// A run with a rate of its own, of some steps in all.
fn of_length(decay: Decay, total: usize) -> Trainer {
    let mut settings = settings(2e-3, 0.01, total);
    settings.schedule.decay = decay;
    from_init(settings, false).0
}

/// Saves a run of `total` steps after two of them.
fn after_two_steps(decay: Decay, total: usize, output: &Path) -> PathBuf {
    let batches = peft_batches();
    let mut first = of_length(decay, total);
    for step in 0..2 {
        first.step(&batches[step..=step]).unwrap();
    }
    first.save_checkpoint(output).unwrap()
}

fn refused(result: Result<Trainer, ModelError>) -> String {
    match result {
        Err(ModelError::Resume { message, .. }) => message,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("resumed"),
    }
}

/// A constant rate does not know how long the run is.
#[test]
fn a_run_of_constant_rate_goes_on_for_more_steps() {
    let batches = peft_batches();
    let mut whole = of_length(Decay::Constant, 4);
    let expected: Vec<f32> = (0..4)
        .map(|step| whole.step(&batches[step..=step]).unwrap().loss)
        .collect();
    let output = tempfile::tempdir().unwrap();
    let folder = after_two_steps(Decay::Constant, 2, output.path());
    let mut second = of_length(Decay::Constant, 4).resume(&folder).unwrap();
    let resumed: Vec<f32> = (2..4)
        .map(|step| second.step(&batches[step..=step]).unwrap().loss)
        .collect();
    assert_eq!(resumed, expected[2..]);
}

#[rstest]
#[case::linear(Decay::Linear, 3, 4, "schedule.total was 3, now 4; a rate that falls")]
#[case::cosine(Decay::Cosine, 4, 3, "schedule.total was 4, now 3; a rate that falls")]
#[case::done(
    Decay::Constant,
    4,
    1,
    "has 2 steps already, more than the 1 asked for"
)]
#[case::done_falling(Decay::Linear, 4, 1, "has 2 steps already, more than the 1 asked for")]
fn a_length_that_does_not_fit_is_refused(
    #[case] decay: Decay,
    #[case] saved: usize,
    #[case] given: usize,
    #[case] expected: &str,
) {
    let output = tempfile::tempdir().unwrap();
    let folder = after_two_steps(decay, saved, output.path());
    let message = refused(of_length(decay, given).resume(&folder));
    assert!(message.contains(expected), "{message}");
}

#[test]
fn settings_that_differ_are_named() {
    let output = tempfile::tempdir().unwrap();
    let folder = after_two_steps(Decay::Constant, 4, output.path());
    let mut other = settings(1e-3, 0.01, 9);
    other.data = 1;
    other.lora = serde_json::json!({"r": 4});
    let message = refused(from_init(other, false).0.resume(&folder));
    for part in [
        "the training data differs",
        "schedule.peak was 0.002, now 0.001",
        "lora was null",
    ] {
        assert!(message.contains(part), "{message}");
    }
    assert!(!message.contains("schedule.total"), "{message}");
}

#[test]
fn a_run_does_not_go_on_without_the_state_of_its_optimizer() {
    let output = tempfile::tempdir().unwrap();
    let folder = after_two_steps(Decay::Constant, 4, output.path());
    let empty = of_length(Decay::Constant, 4)
        .save_checkpoint(output.path())
        .unwrap();
    let file = folder.join(OPTIMIZER_FILE);
    let whole = fs::read(&file).unwrap();
    fs::copy(empty.join(OPTIMIZER_FILE), &file).unwrap();
    let message = refused(of_length(Decay::Constant, 4).resume(&folder));
    assert!(
        message.contains("is of step 0, the checkpoint of step 2"),
        "{message}"
    );
    fs::write(&file, &whole[..whole.len() - 1]).unwrap();
    assert!(of_length(Decay::Constant, 4).resume(&folder).is_err());
    fs::remove_file(&file).unwrap();
    assert!(of_length(Decay::Constant, 4).resume(&folder).is_err());
    fs::write(folder.join("optimizer.bpk"), "of an earlier version").unwrap();
    let message = refused(of_length(Decay::Constant, 4).resume(&folder));
    assert!(
        message.contains("as an earlier version wrote it"),
        "{message}"
    );
}

#[rstest]
fn a_fresh_adapter_changes_nothing_learns_and_comes_back(#[values(false, true)] use_dora: bool) {
    let device = Device::default().autodiff();
    let (model, config) = open("hf/f32/model", None, &device);
    let init = Adapter::open(fixture("hf/f32/adapter_init")).unwrap();
    let lora = LoraConfig {
        use_dora,
        ..init.config().clone()
    };
    let (ids, shape, _) = io("hf/f32/io.safetensors");
    let before = logits(&model.valid(), &config, &ids, &shape);
    let drawn = random_numbers();
    let model = model.with_lora(&lora, &device).unwrap();
    drop(drawn);
    let after = logits(&model.valid(), &config, &ids, &shape);
    // DoRA divides a magnitude by the norm that it was set to.
    let bound = if use_dora { 2e-5 } else { 0.0 };
    assert!(max_difference(&before, &after) <= bound);

    let mut trainer = Trainer::new(model, &config, lora, settings(1e-2, 0.0, 4), false).unwrap();
    let batch = peft_batches().remove(0);
    let first = trainer.step(std::slice::from_ref(&batch)).unwrap().loss;
    let last = (0..3)
        .map(|_| trainer.step(std::slice::from_ref(&batch)).unwrap().loss)
        .last()
        .unwrap();
    assert!(last < first - 0.1, "{first} to {last}");

    let output = tempfile::tempdir().unwrap();
    trainer.save_adapter(output.path()).unwrap();
    let device = Device::default();
    let (model, config) = open("hf/f32/model", None, &device);
    let saved = Adapter::open(output.path()).unwrap();
    let model = model.apply_adapter(&saved, &device).unwrap();
    let ours = logits(&trainer.model.valid(), &config, &ids, &shape);
    let read = logits(&model, &config, &ids, &shape);
    assert_eq!(max_difference(&ours, &read), 0.0);
}

#[test]
fn only_the_branches_are_trained() {
    let (trainer, _) = from_init(settings(1e-3, 0.0, 1), false);
    let adapter = Adapter::open(fixture("hf/f32/adapter_init")).unwrap();
    let expected: usize = adapter
        .modules()
        .map(|(_, module)| module.lora_a.to_f32().len() + module.lora_b.to_f32().len())
        .sum();
    let mut counter = Trained(0);
    trainer.model.visit(&mut counter);
    assert_eq!(counter.0, expected);
}

struct Trained(usize);

impl burn::module::ModuleVisitor for Trained {
    fn visit_float<const D: usize>(
        &mut self,
        param: &burn::module::Param<burn::tensor::Tensor<D>>,
    ) {
        if param.is_require_grad() {
            self.0 += param.shape().num_elements();
        }
    }
}

#[test]
fn every_epoch_sees_every_example_once_in_its_own_order() {
    let examples: Vec<Vec<u32>> = (0..11).map(|id| vec![id, id]).collect();
    let data = Dataset::new(examples).unwrap();
    let steps = data.steps_per_epoch(2 * 2);
    assert_eq!(steps, 3);
    let epoch = |epoch: usize| -> Vec<i64> {
        (0..steps)
            .flat_map(|step| data.step(epoch * steps + step, 2, 2, 5))
            .flat_map(|batch| batch.ids.into_iter().step_by(2))
            .collect()
    };
    let mut seen = epoch(0);
    assert_ne!(seen, epoch(1));
    assert_eq!(seen, epoch(0));
    seen.sort_unstable();
    assert_eq!(seen, (0..11).collect::<Vec<_>>());
}

/// Values of transformers' `get_{constant,linear,cosine}_schedule_with_warmup`, 2 of 10 steps
/// warm-up.
#[rstest]
#[case(Decay::Constant, [0.0, 0.5, 1.0, 1.0, 1.0])]
#[case(Decay::Linear, [0.0, 0.5, 1.0, 0.5, 0.125])]
#[case(Decay::Cosine, [0.0, 0.5, 1.0, 0.5, 0.038_060_233_744_356_62])]
fn schedules_are_those_of_transformers(#[case] decay: Decay, #[case] expected: [f64; 5]) {
    let schedule = Schedule {
        peak: 2.0,
        decay,
        warmup: 2,
        total: 10,
    };
    for (step, expected) in [0, 1, 2, 6, 9].into_iter().zip(expected) {
        let given = schedule.rate(step);
        assert!((given - 2.0 * expected).abs() < 1e-12, "{step}: {given}");
    }
}
