//! AdamW over a flat buffer against PyTorch's numbers and a plain loop in f64, on every device.
#![cfg(feature = "flex")]

use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_nf4::Nf4Error;
use burn_nf4::op::{AdamWMoments, AdamWSettings, FlatAdamW, MomentState, StepReport};
use serde::Deserialize;

/// See `tests/fixtures/make_adamw.py`.
#[derive(Deserialize)]
struct Fixture {
    runs: Vec<Run>,
    bits8: Bits8Run,
}

/// Of two tensors, the first too small for 8 bit.
#[derive(Deserialize)]
struct Bits8Run {
    weight_decay: f64,
    parameters: Vec<Vec<f32>>,
    steps: Vec<Bits8Step>,
    values: Vec<Vec<f32>>,
    small: [Vec<f32>; 2],
    codes: [Vec<u8>; 2],
    maxima: [Vec<f32>; 2],
}

#[derive(Deserialize)]
struct Bits8Step {
    rate: f64,
    gradients: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct Run {
    weight_decay: f64,
    max_norm: Option<f64>,
    parameters: Vec<Vec<f32>>,
    steps: Vec<Step>,
    values: Vec<Vec<f32>>,
    first: Vec<Vec<f32>>,
    second: Vec<Vec<f32>>,
    counts: Vec<u32>,
}

#[derive(Deserialize)]
struct Step {
    rate: f64,
    gradients: Vec<Option<Vec<f32>>>,
    norm: f32,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("fixtures/adamw.json")).expect("a fixture")
}

fn tensor(values: &[f32], device: &Device) -> Tensor<1> {
    Tensor::<1>::from_floats(values, device)
}

fn loss(device: &Device) -> Tensor<1> {
    tensor(&[1.5], device)
}

/// The gradients that there are, with their numbers.
fn given(step: &Step, device: &Device) -> Vec<(usize, Tensor<1>)> {
    let gradients = step.gradients.iter().enumerate();
    gradients
        .filter_map(|(number, gradient)| Some((number, tensor(gradient.as_ref()?, device))))
        .collect()
}

fn optimizer(parameters: &[Vec<f32>], device: &Device) -> FlatAdamW {
    let parameters = parameters.iter().map(|values| tensor(values, device));
    FlatAdamW::new(parameters.collect(), AdamWMoments::F32).expect("parameters")
}

impl Run {
    fn settings(&self) -> AdamWSettings {
        AdamWSettings {
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_norm,
            ..AdamWSettings::default()
        }
    }
}

fn assert_near(given: &[f32], expected: &[f32], [relative, absolute]: [f32; 2], what: &str) {
    assert_eq!(given.len(), expected.len());
    for (i, (given, expected)) in given.iter().zip(expected).enumerate() {
        let bound = relative * expected.abs() + absolute;
        assert!(
            (given - expected).abs() <= bound,
            "{what} {i}: {given} {expected}"
        );
    }
}

fn the_numbers_are_those_of_pytorch(device: &Device) {
    for run in fixture().runs {
        let mut optimizer = optimizer(&run.parameters, device);
        for step in &run.steps {
            optimizer.accumulate(given(step, device)).expect("fits");
            let settings = run.settings();
            optimizer
                .step(step.rate, &settings, loss(device))
                .expect("a step");
            let report = optimizer.report().unwrap().expect("a step was made");
            assert_eq!(report.loss, 1.5);
            assert!((report.grad_norm - step.norm).abs() <= 1e-6 * step.norm);
        }
        for (number, state) in optimizer.state().unwrap().into_iter().enumerate() {
            assert_eq!(state.steps, run.counts[number]);
            let MomentState::F32 { first, second } = state.moments else {
                panic!("moments in 8 bit");
            };
            // Roundings of f32, a few a step: of sums of about 1, and of squares, which do not cancel.
            for (name, given, expected, tolerance) in [
                ("value", &state.values, &run.values, [1e-6, 3e-7]),
                ("first", &first, &run.first, [1e-6, 1e-7]),
                ("second", &second, &run.second, [2e-6, 0.0]),
            ] {
                assert_near(given, &expected[number], tolerance, name);
            }
        }
    }
}

/// In f32 without fused products, as on the CPU, moments are those of the fixture bit for bit. Elsewhere one can fall
/// on the other side of a midpoint.
fn moments_in_8_bit_are_those_of_bitsandbytes(device: &Device) {
    let run = fixture().bits8;
    let is_exact = *device == Device::flex();
    let parameters = run.parameters.iter().map(|values| tensor(values, device));
    let mut optimizer =
        FlatAdamW::new(parameters.collect(), AdamWMoments::Bits8).expect("parameters");
    let settings = AdamWSettings {
        weight_decay: run.weight_decay,
        ..AdamWSettings::default()
    };
    for step in &run.steps {
        let gradients = step.gradients.iter().map(|values| tensor(values, device));
        optimizer
            .accumulate(gradients.enumerate().collect())
            .expect("fits");
        optimizer
            .step(step.rate, &settings, loss(device))
            .expect("a step");
    }
    let [small, large]: [_; 2] = optimizer.state().unwrap().try_into().expect("two tensors");
    assert_near(&small.values, &run.values[0], [1e-6, 3e-7], "small value");
    let MomentState::F32 { first, second } = small.moments else {
        panic!("a small tensor in 8 bit");
    };
    assert_near(&first, &run.small[0], [1e-6, 1e-7], "small first");
    assert_near(&second, &run.small[1], [2e-6, 0.0], "small second");
    let MomentState::Bits8 {
        first,
        second,
        first_max,
        second_max,
    } = large.moments
    else {
        panic!("a large tensor in f32");
    };
    for (name, given, expected) in [
        ("first", first, &run.codes[0]),
        ("second", second, &run.codes[1]),
    ] {
        let differing = given
            .iter()
            .zip(expected)
            .filter(|(given, expected)| given != expected);
        let far = differing
            .clone()
            .filter(|(given, expected)| given.abs_diff(**expected) > 1);
        assert_eq!(far.count(), 0, "{name}");
        let most = if is_exact { 0 } else { 8 };
        assert!(
            differing.clone().count() <= most,
            "{name}: {}",
            differing.count()
        );
    }
    // A code apart is at most a part of 50 of the block's largest.
    let tolerance = |near| if is_exact { [0.0, 0.0] } else { near };
    assert_near(
        &first_max,
        &run.maxima[0],
        tolerance([1e-5, 0.0]),
        "first maximum",
    );
    assert_near(
        &second_max,
        &run.maxima[1],
        tolerance([1e-5, 0.0]),
        "second maximum",
    );
    let outside = |(given, expected): &(&f32, &f32)| (**given - **expected).abs() > 1e-6;
    let outside = large.values.iter().zip(&run.values[1]).filter(outside);
    assert!(outside.count() <= if is_exact { 0 } else { 8 });
}

/// Sizes that end within a tile, at one and past many; together more than a launch takes.
const LENS: [usize; 19] = [
    1,
    255,
    256,
    257,
    4096,
    70_000,
    3,
    512,
    640,
    9,
    10,
    11,
    12,
    13,
    14,
    15,
    16,
    17,
    1 << 18,
];

/// What is added to all types is added in f32, and the norm is that of the sums.
fn gradients_of_all_types_add_up(device: &Device) {
    let zeros = LENS.map(|len| Tensor::<1>::zeros([len], device)).to_vec();
    let mut optimizer = FlatAdamW::new(zeros, AdamWMoments::F32).expect("parameters");
    let mut sums: Vec<Vec<f64>> = LENS.map(|len| vec![0.0; len]).to_vec();
    for pass in 0..2 {
        let mut gradients = Vec::new();
        for (number, len) in LENS.into_iter().enumerate() {
            let dtype = match (number + pass) % 3 {
                0 => DType::F32,
                1 => DType::BF16,
                _ => DType::F16,
            };
            let dtype = match burn_nf4::op::supports_dtype(device, dtype) {
                true => dtype,
                false => DType::F32,
            };
            let gradient =
                Tensor::<1>::random([len], Distribution::Uniform(-1.0, 1.0), device).cast(dtype);
            for (sum, value) in sums[number]
                .iter_mut()
                .zip(gradient.to_data().iter::<f64>())
            {
                *sum += value;
            }
            gradients.push((number, gradient));
        }
        optimizer.accumulate(gradients).expect("fits");
    }
    // The rate is nothing; what is left of a gradient is a tenth of it.
    let settings = AdamWSettings::default();
    optimizer
        .step(0.0, &settings, loss(device))
        .expect("a step");
    let report = optimizer.report().unwrap().expect("a step was made");
    let norm = sums.iter().flatten().map(|x| x * x).sum::<f64>().sqrt();
    let difference = (f64::from(report.grad_norm) - norm).abs();
    assert!(difference <= 2e-6 * norm, "{} {norm}", report.grad_norm);
    for (state, sums) in optimizer.state().unwrap().into_iter().zip(&sums) {
        let tenth: Vec<f32> = sums.iter().map(|&sum| (0.1 * sum) as f32).collect();
        let MomentState::F32 { first, .. } = state.moments else {
            panic!("moments in 8 bit");
        };
        assert_near(&first, &tenth, [1e-6, 1e-7], "sum");
        assert!(state.values.iter().all(|&value| value == 0.0));
    }
}

/// As if the step had not been asked for.
fn a_step_that_is_not_finite_changes_nothing(device: &Device) {
    for kind in [AdamWMoments::F32, AdamWMoments::Bits8] {
        let new = || {
            let parameters = [5000, 5].map(|len| tensor(&vec![0.25; len], device));
            FlatAdamW::new(parameters.to_vec(), kind).expect("parameters")
        };
        let settings = AdamWSettings::default();
        let step = |optimizer: &mut FlatAdamW, value: f32, loss: f32| -> StepReport {
            let mut gradient = vec![0.5; 5000];
            gradient[4999] = value;
            let small = tensor(&[1.0; 5], device);
            let gradients = vec![(0, tensor(&gradient, device)), (1, small)];
            optimizer.accumulate(gradients).expect("fits");
            optimizer
                .step(0.1, &settings, tensor(&[loss], device))
                .expect("a step");
            optimizer.report().unwrap().expect("a step was made")
        };
        let (mut plain, mut other) = (new(), new());
        for optimizer in [&mut plain, &mut other] {
            assert!(step(optimizer, 2.0, 1.0).is_applied());
        }
        for (value, loss) in [
            (f32::NAN, 1.0),
            (f32::INFINITY, 1.0),
            (f32::NEG_INFINITY, 1.0),
            (1.0, f32::NAN),
            (1.0, f32::INFINITY),
        ] {
            let report = step(&mut other, value, loss);
            assert!(!report.is_applied(), "{value} {loss}: {report:?}");
        }
        for optimizer in [&mut plain, &mut other] {
            assert!(step(optimizer, 3.0, 1.0).is_applied());
        }
        assert_eq!(plain.state(), other.state());
    }
}

/// A parameter that somebody has kept is not written to.
fn views_are_values_of_their_time(device: &Device) {
    let mut optimizer = optimizer(&[vec![1.0; 512], vec![2.0; 6]], device);
    let views = |optimizer: &FlatAdamW| -> Vec<f32> {
        let flat = optimizer.values(DType::F32);
        let large = optimizer.view(&flat, 0, [16, 32]);
        let small = optimizer.view(&flat, 1, [2, 3]);
        assert_eq!((large.dims(), small.dims()), ([16, 32], [2, 3]));
        let [large, small] = [large.into_data(), small.into_data()];
        large.iter::<f32>().chain(small.iter::<f32>()).collect()
    };
    let kept = {
        let flat = optimizer.values(DType::F32);
        optimizer.view(&flat, 0, [512])
    };
    let settings = AdamWSettings {
        weight_decay: 0.0,
        ..AdamWSettings::default()
    };
    for step in 1..4 {
        let ones = [512, 6].map(|len| tensor(&vec![1.0; len], device));
        let gradients = ones.into_iter().enumerate().collect();
        optimizer.accumulate(gradients).expect("fits");
        optimizer
            .step(0.25, &settings, loss(device))
            .expect("a step");
        let expected: Vec<f32> = [1.0; 512].into_iter().chain([2.0; 6]).collect();
        let expected: Vec<f32> = expected.iter().map(|x| x - 0.25 * step as f32).collect();
        assert_near(&views(&optimizer), &expected, [1e-5, 0.0], "view");
    }
    assert!(kept.into_data().iter::<f32>().all(|value| value == 1.0));
}

/// The buffers are written in place: a copy of one takes new memory from the device, as where somebody keeps a
/// view of the values.
#[cfg(feature = "cube")]
fn steps_reserve_no_more_memory(device: &Device) {
    use burn::backend::DispatchDevice;

    const LEN: usize = 1 << 22;
    const BYTES: u64 = 4 * LEN as u64;
    let DispatchDevice::Cube(cube) = device.as_dispatch() else {
        panic!("not a CubeCL device");
    };
    let reserved = || {
        device.sync().expect("the device works");
        let scope = cubecl::MemoryScope::CurrentStream;
        cube.client().memory_report(scope).usage().bytes_reserved
    };
    let parameters = vec![Tensor::zeros([LEN], device)];
    let mut optimizer = FlatAdamW::new(parameters, AdamWMoments::F32).expect("parameters");
    let gradient = Tensor::<1>::ones([LEN], device);
    let mut views = Vec::new();
    let mut step = |keeps: bool| {
        let gradients = vec![(0, gradient.clone())];
        optimizer.accumulate(gradients).expect("fits");
        if !keeps {
            views.clear();
        }
        let settings = AdamWSettings::default();
        optimizer
            .step(0.1, &settings, loss(device))
            .expect("a step");
        let values = optimizer.values(DType::F32);
        views.push(optimizer.view(&values, 0, [LEN / 2, 2]));
        assert!(
            optimizer
                .report()
                .unwrap()
                .expect("a step was made")
                .is_applied()
        );
    };
    step(false);
    let before = reserved();
    assert!(before >= 4 * BYTES, "the buffers are not seen: {before}");
    for _ in 0..3 {
        step(false);
    }
    let more = reserved() - before;
    assert!(more < BYTES / 2, "{more} bytes more");
    for _ in 0..6 {
        step(true);
    }
    let more = reserved() - before;
    assert!(more >= 2 * BYTES, "only {more} bytes more");
}

fn a_state_goes_on_bit_for_bit(device: &Device) {
    for kind in [AdamWMoments::F32, AdamWMoments::Bits8] {
        let run = fixture().bits8;
        let new = || {
            let parameters = run.parameters.iter().map(|values| tensor(values, device));
            FlatAdamW::new(parameters.collect(), kind).expect("parameters")
        };
        let steps = |optimizer: &mut FlatAdamW, steps: &[Bits8Step]| {
            for step in steps {
                let gradients = step.gradients.iter().map(|values| tensor(values, device));
                optimizer
                    .accumulate(gradients.enumerate().collect())
                    .expect("fits");
                let settings = AdamWSettings::default();
                optimizer
                    .step(step.rate, &settings, loss(device))
                    .expect("a step");
            }
        };
        let mut whole = new();
        steps(&mut whole, &run.steps);
        let mut first = new();
        steps(&mut first, &run.steps[..2]);
        let mut second = new();
        second.load_state(&first.state().unwrap()).expect("fits");
        steps(&mut second, &run.steps[2..]);
        assert_eq!(second.state(), whole.state());

        let other = match kind {
            AdamWMoments::F32 => AdamWMoments::Bits8,
            AdamWMoments::Bits8 => AdamWMoments::F32,
        };
        let parameters = run.parameters.iter().map(|values| tensor(values, device));
        let mut other = FlatAdamW::new(parameters.collect(), other).expect("parameters");
        let error = other
            .load_state(&first.state().unwrap())
            .expect_err("other moments");
        assert!(matches!(error, Nf4Error::Dtype { .. }), "{error}");
    }
}

fn what_does_not_fit_is_named(device: &Device) {
    let mut optimizer = optimizer(&[vec![1.0; 4]], device);
    let zeros = |len| Tensor::<1>::zeros([len], device);
    let mut refused = |number, gradient| {
        let error = optimizer.accumulate(vec![(number, gradient)]);
        error.expect_err("does not fit").to_string()
    };
    assert!(refused(0, zeros(5)).contains("`gradient` holds 5 elements, expected 4"));
    assert!(refused(1, zeros(4)).contains("`layout` holds 1 elements, expected 2"));
    let new = |parameters| FlatAdamW::new(parameters, AdamWMoments::F32).map(drop);
    let none = new(Vec::new()).expect_err("no parameter");
    assert!(matches!(none, Nf4Error::ElementCount { .. }), "{none}");
    let empty = new(vec![zeros(3), zeros(0)]).expect_err("an empty one");
    assert!(matches!(empty, Nf4Error::ElementCount { .. }), "{empty}");
    let good = AdamWSettings::default();
    for (rate, settings, name) in [
        (f64::NAN, good, "rate"),
        (-1.0, good, "rate"),
        (0.1, AdamWSettings { beta1: 1.0, ..good }, "beta1"),
        (
            0.1,
            AdamWSettings {
                beta2: -0.1,
                ..good
            },
            "beta2",
        ),
        (
            0.1,
            AdamWSettings {
                eps: f64::INFINITY,
                ..good
            },
            "eps",
        ),
        (
            0.1,
            AdamWSettings {
                weight_decay: -1.0,
                ..good
            },
            "weight_decay",
        ),
        (
            0.1,
            AdamWSettings {
                max_grad_norm: Some(0.0),
                ..good
            },
            "max_grad_norm",
        ),
    ] {
        let error = optimizer.step(rate, &settings, loss(device));
        let error = error.expect_err(name).to_string();
        assert!(error.contains(name), "{error}");
    }
    let error = optimizer
        .step(0.1, &good, zeros(2))
        .expect_err("two losses");
    assert!(error.to_string().contains("loss"), "{error}");
    assert_eq!(optimizer.report(), Ok(None));
}

macro_rules! device_tests {
    ($module:ident, $device:expr, [$($name:ident),+ $(,)?]) => {
        mod $module {
            use super::*;
            $(
                #[test]
                fn $name() {
                    super::$name(&$device);
                }
            )+
        }
    };
    ($module:ident, $device:expr) => {
        device_tests!($module, $device, [
            the_numbers_are_those_of_pytorch,
            moments_in_8_bit_are_those_of_bitsandbytes,
            gradients_of_all_types_add_up,
            a_step_that_is_not_finite_changes_nothing,
            views_are_values_of_their_time,
            a_state_goes_on_bit_for_bit,
            what_does_not_fit_is_named,
        ]);
    };
}

device_tests!(flex, Device::flex());
#[cfg(feature = "wgpu")]
device_tests!(wgpu, Device::wgpu(Default::default()));
#[cfg(feature = "cpu")]
device_tests!(cpu, Device::cpu());
#[cfg(feature = "cuda")]
device_tests!(cuda, Device::cuda(0));

#[cfg(feature = "wgpu")]
device_tests!(
    wgpu_memory,
    Device::wgpu(Default::default()),
    [steps_reserve_no_more_memory]
);
#[cfg(feature = "cuda")]
device_tests!(cuda_memory, Device::cuda(0), [steps_reserve_no_more_memory]);
