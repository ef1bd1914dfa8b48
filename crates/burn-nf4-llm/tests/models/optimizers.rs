//! The optimizer of a run: what it does with parameters of several types, with numbers that are not finite, and
//! over an interruption.

use std::fs;

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor};
use burn_nf4::model::LinearLayers;
use burn_nf4::op::{AdamWMoments, AdamWSettings};
use burn_nf4::peft::{ADAPTER_FILE, Adapter};
use burn_nf4_llm::error::ModelError;
use burn_nf4_llm::train::data::Batch;
use burn_nf4_llm::train::optimizer::Optimizer;
use burn_nf4_llm::train::schedule::{Decay, Schedule};
use burn_nf4_llm::train::{MAX_SKIPPED, Optim, Settings, Trainer};
use rstest::rstest;

use crate::fixtures::{fixture, floats, open};

/// Parameters of several ranks and types, as magnitudes, factors and stacked experts are.
#[derive(Module, Debug)]
struct Weights {
    magnitude: Param<Tensor<1>>,
    factor: Param<Tensor<2>>,
    stacked: Param<Tensor<3>>,
    /// Gets no gradient.
    idle: Param<Tensor<2>>,
    frozen: Param<Tensor<1>>,
}

impl Weights {
    fn new(device: &Device) -> Self {
        let ones = |len| Tensor::<1>::ones([len], (device, DType::F32));
        let in_16_bit = |len| ones(len).cast(DType::BF16);
        Self {
            magnitude: Param::from_tensor(ones(3)),
            factor: Param::from_tensor(in_16_bit(256).reshape([16, 16])),
            stacked: Param::from_tensor(ones(512).reshape([2, 16, 16])),
            idle: Param::from_tensor(ones(4).reshape([2, 2])),
            frozen: Param::from_tensor(ones(2)).set_require_grad(false),
        }
    }

    fn loss(&self) -> Tensor<1> {
        let factor = self.factor.val().cast(DType::F32);
        self.magnitude.val().sum()
            + factor.sum()
            + self.stacked.val().square().sum()
            + self.frozen.val().sum()
    }
}

/// A step; returns the loss before it.
fn step(optimizer: &mut Optimizer, model: &mut Weights, rate: f64) -> f32 {
    let loss = model.loss();
    let gradients = GradientsParams::from_grads(loss.backward(), model);
    optimizer.accumulate(gradients);
    optimizer.step(rate, model, loss).unwrap();
    optimizer.report().unwrap().unwrap().loss
}

fn without_decay() -> AdamWSettings {
    AdamWSettings {
        weight_decay: 0.0,
        ..AdamWSettings::default()
    }
}

fn new(model: Weights) -> Result<(Optimizer, Weights), ModelError> {
    Optimizer::new(model, without_decay(), AdamWMoments::F32, None)
}

/// In bf16 a step of 1/1024 is lost on a parameter of 1, were it not for the values in f32.
#[test]
fn parameters_of_all_types_and_ranks_are_trained() {
    let device = Device::default().autodiff();
    let (mut optimizer, mut model) = new(Weights::new(&device)).unwrap();
    for _ in 0..8 {
        step(&mut optimizer, &mut model, 1.0 / 1024.0);
    }
    assert_eq!(model.factor.val().dtype(), DType::BF16);
    assert!(model.factor.is_require_grad() && !model.frozen.is_require_grad());
    let trained = 1.0 - 8.0 / 1024.0;
    for (values, expected) in [
        (floats(model.magnitude.val()), trained),
        (floats(model.factor.val().cast(DType::F32)), trained),
        (floats(model.stacked.val()), trained),
        (floats(model.idle.val()), 1.0),
        (floats(model.frozen.val()), 1.0),
    ] {
        assert!(
            values.iter().all(|value| (value - expected).abs() < 1e-5),
            "{values:?}"
        );
    }
}

#[test]
fn a_model_that_trains_nothing_has_no_optimizer() {
    let device = Device::default().autodiff();
    let model = Weights::new(&device).no_grad();
    assert!(matches!(new(model), Err(ModelError::Nf4(_))));
}

/// Values in 16 bit are not all there is of a parameter.
#[test]
fn an_optimizer_goes_on_with_the_values_it_had() {
    let device = Device::default().autodiff();
    let folder = tempfile::tempdir().unwrap();
    let (mut first, mut model) = new(Weights::new(&device)).unwrap();
    step(&mut first, &mut model, 1.0 / 1024.0);
    first.save(folder.path(), 1).unwrap();
    let (mut second, again) = new(model.clone()).unwrap();
    let mut again = second.load(folder.path(), 1, again).unwrap();
    for _ in 0..3 {
        let expected = step(&mut first, &mut model, 1.0 / 1024.0);
        assert_eq!(
            step(&mut second, &mut again, 1.0 / 1024.0).to_bits(),
            expected.to_bits()
        );
    }
    let factor = |model: &Weights| floats(model.factor.val().cast(DType::F32));
    assert_eq!(factor(&again), factor(&model));
    for (step, expected) in [(2, "is of step 1, the checkpoint of step 2"), (1, "")] {
        let (mut other, model) = new(model.clone()).unwrap();
        let error = other.load(folder.path(), step, model).map(drop);
        let message = error.map_or_else(|error| error.to_string(), |()| String::new());
        assert!(
            message.contains(expected) && message.is_empty() == expected.is_empty(),
            "{message}"
        );
    }
}

/// What is saved must be of the parameters that the model trains.
#[rstest]
#[case::more(true, "`idle.exp_avg`, which the model does not train")]
#[case::fewer(false, "has no state for `idle.exp_avg`")]
fn a_state_of_other_parameters_is_refused(#[case] more: bool, #[case] expected: &str) {
    let device = Device::default().autodiff();
    let folder = tempfile::tempdir().unwrap();
    let all = Weights::new(&device);
    let mut fewer = Weights::new(&device);
    fewer.idle = fewer.idle.set_require_grad(false);
    let (saved, given) = if more { (all, fewer) } else { (fewer, all) };
    let (mut first, _) = new(saved).unwrap();
    first.save(folder.path(), 0).unwrap();
    let (mut second, given) = new(given).unwrap();
    match second.load(folder.path(), 0, given) {
        Err(ModelError::Resume { message, .. }) => assert!(message.contains(expected), "{message}"),
        other => panic!("{:?}", other.map(drop)),
    }
}

/// A run of the tiny Llama, and what it is trained on.
fn run(max_grad_norm: f32, optim: Optim) -> (Trainer, Batch) {
    let device = Device::default().autodiff();
    let (model, config) = open("hf/f32/model", None, &device);
    let adapter = Adapter::open(fixture("hf/f32/adapter_init")).unwrap();
    let lora = adapter.config().clone();
    let model = model.apply_adapter(&adapter, &device).unwrap();
    let schedule = Schedule {
        peak: 1e-2,
        decay: Decay::Cosine,
        warmup: 1,
        total: 6,
    };
    let settings = Settings {
        optim,
        weight_decay: 0.01,
        max_grad_norm,
        ..Settings::new(schedule, &lora).unwrap()
    };
    let trainer = Trainer::new(model, &config, lora, settings, false).unwrap();
    (trainer, Batch::new(&[&[1, 5, 9, 2, 7, 7, 3, 4]]))
}

#[rstest]
fn six_steps_are_three_and_three_bit_for_bit(
    #[values(Optim::AdamwTorch, Optim::Adamw8bit)] optim: Optim,
) {
    burn_nf4::op::set_reproducible(true);
    let [whole, parts] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let (mut trainer, batch) = run(1.0, optim);
    let batch = [batch];
    for _ in 0..6 {
        trainer.step(&batch).unwrap();
    }
    let expected = trainer.save_checkpoint(whole.path()).unwrap();
    let (mut trainer, _) = run(1.0, optim);
    for _ in 0..3 {
        trainer.step(&batch).unwrap();
    }
    let folder = trainer.save_checkpoint(parts.path()).unwrap();
    let mut trainer = run(1.0, optim).0.resume(&folder).unwrap();
    for _ in 0..3 {
        trainer.step(&batch).unwrap();
    }
    let given = trainer.save_checkpoint(parts.path()).unwrap();
    for file in [ADAPTER_FILE, "optimizer.safetensors"] {
        let [given, expected] =
            [&given, &expected].map(|folder| fs::read(folder.join(file)).unwrap());
        assert!(given == expected, "{file}");
    }
}

#[test]
fn a_step_that_is_not_finite_is_left_out_and_the_third_in_a_row_ends_the_run() {
    let (mut trainer, batch) = run(1.0, Optim::AdamwTorch);
    let batch = [batch];
    let first = trainer.step(&batch).unwrap();
    assert!(first.grad_norm > 0.0 && !first.skipped, "{first:?}");
    let eps = trainer.model.norm.eps;
    let saved = |trainer: &mut Trainer| {
        let folder = tempfile::tempdir().unwrap();
        trainer.save_adapter(folder.path()).unwrap();
        fs::read(folder.path().join(ADAPTER_FILE)).unwrap()
    };
    let before = saved(&mut trainer);
    for count in 1..=2 * MAX_SKIPPED {
        trainer.model.norm.eps = f64::NAN;
        let step = trainer.step(&batch);
        if count < MAX_SKIPPED {
            let step = step.unwrap();
            assert!(step.skipped && step.loss.is_nan(), "{step:?}");
            assert_eq!(step.number, trainer.step);
            continue;
        }
        match step {
            Err(ModelError::NotFinite { step, skipped, .. }) => {
                assert_eq!((step, skipped), (trainer.step, MAX_SKIPPED));
            }
            other => panic!("{other:?}"),
        }
        break;
    }
    assert!(saved(&mut trainer) == before);
    trainer.model.norm.eps = eps;
    assert!(!trainer.step(&batch).unwrap().skipped);
    // Two in a row, after one that was made.
    trainer.model.norm.eps = f64::NAN;
    for _ in 1..MAX_SKIPPED {
        assert!(trainer.step(&batch).unwrap().skipped);
    }
}

/// Gradients below the epsilon of AdamW move nothing.
#[test]
fn the_largest_norm_of_a_run_is_that_of_its_settings() {
    let change = |max_grad_norm| {
        let (mut trainer, batch) = run(max_grad_norm, Optim::AdamwTorch);
        let losses = [(); 3].map(|()| trainer.step(std::slice::from_ref(&batch)).unwrap());
        // The rate of the first step is nothing.
        assert_eq!(losses[1].loss, losses[0].loss);
        assert!(losses[0].grad_norm > 1e-3, "{losses:?}");
        (losses[2].loss - losses[1].loss).abs()
    };
    let [clipped, free] = [1e-12, 0.0].map(change);
    assert!(clipped < 1e-2 * free, "{clipped} {free}");
}

#[test]
fn a_step_needs_a_batch() {
    let (mut trainer, _) = run(1.0, Optim::AdamwTorch);
    let error = trainer.step(&[]).unwrap_err();
    assert!(matches!(error, ModelError::Setting { .. }), "{error}");
}

/// Tensors of the tiny model are too small for 8 bit but for some, whose moments are rounded.
#[test]
fn an_optimizer_in_8_bit_learns_as_the_other_does() {
    let losses = |optim| {
        let (mut trainer, batch) = run(1.0, optim);
        [(); 6].map(|()| trainer.step(std::slice::from_ref(&batch)).unwrap().loss)
    };
    let [torch, bits8] = [Optim::AdamwTorch, Optim::Adamw8bit].map(losses);
    assert!(torch[5] < torch[0] - 0.1, "{torch:?}");
    for (torch, bits8) in torch.iter().zip(bits8) {
        assert!((torch - bits8).abs() < 0.02 * torch, "{torch} {bits8}");
    }
}

#[test]
fn a_run_is_not_resumed_with_another_optimizer() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = run(1.0, Optim::AdamwTorch).0;
    let saved = first.save_checkpoint(folder.path()).unwrap();
    match run(1.0, Optim::Adamw8bit).0.resume(&saved) {
        Err(ModelError::Resume { message, .. }) => {
            assert!(
                message.contains("optim was \"adamw_torch\", now \"adamw_8bit\""),
                "{message}"
            );
        }
        other => panic!("{:?}", other.map(drop)),
    }
}
