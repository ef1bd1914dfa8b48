//! Tokens chosen on every device, against those that the host chooses, see `host_sample.rs`.
#![cfg(feature = "flex")]

#[path = "random/mod.rs"]
mod random;

#[macro_use]
mod devices;

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_nf4::Nf4Error;
use burn_nf4::host;
use burn_nf4::op::{SampleSettings, SampleState, Sampled, sample};
use half::{bf16, f16};
use random::Random;

const ALL: SampleSettings = SampleSettings {
    temperature: 1.0,
    ..SampleSettings::greedy()
};

const SETTINGS: [SampleSettings; 12] = [
    SampleSettings::greedy(),
    ALL,
    SampleSettings { top_k: 1, ..ALL },
    SampleSettings { top_k: 7, ..ALL },
    SampleSettings { top_k: 1500, ..ALL },
    SampleSettings { top_p: 0.9, ..ALL },
    SampleSettings { top_p: 1e-7, ..ALL },
    SampleSettings {
        temperature: 1e-30,
        top_k: 3,
        ..ALL
    },
    SampleSettings {
        temperature: 1e30,
        top_k: 40,
        top_p: 0.5,
        ..ALL
    },
    SampleSettings { min_p: 1.0, ..ALL },
    SampleSettings {
        temperature: 1.4,
        top_k: 300,
        top_p: 0.97,
        min_p: 0.01,
        ..ALL
    },
    SampleSettings {
        repetition_penalty: 1.3,
        ..SampleSettings::greedy()
    },
];

fn numbers(sampled: &Sampled) -> (Vec<i64>, Vec<i64>) {
    let of = |tensor: &Tensor<1, burn::tensor::Int>| tensor.to_data().iter::<i64>().collect();
    (of(&sampled.ids), of(&sampled.numbers))
}

/// What the host chooses from values that were rounded to a type.
fn on_host(
    logits: &[f32],
    dtype: DType,
    vocabulary: usize,
    state: &mut [u32],
    settings: &SampleSettings,
) -> (Vec<i64>, Vec<i64>) {
    let choices = match dtype {
        DType::F16 => {
            let logits: Vec<f16> = logits.iter().map(|&x| f16::from_f32(x)).collect();
            host::sample(&logits, vocabulary, state, settings)
        }
        DType::BF16 => {
            let logits: Vec<bf16> = logits.iter().map(|&x| bf16::from_f32(x)).collect();
            host::sample(&logits, vocabulary, state, settings)
        }
        _ => host::sample(logits, vocabulary, state, settings),
    };
    let ids = choices.iter().map(|choice| i64::from(choice.id));
    let numbers = choices
        .iter()
        .map(|choice| choice.number.map_or(-1, i64::from));
    (ids.collect(), numbers.collect())
}

fn words(seeds: &[u64], texts: Option<&[Vec<u32>]>, vocabulary: usize) -> Vec<u32> {
    let mut all = Vec::new();
    for (row, &seed) in seeds.iter().enumerate() {
        let start = all.len();
        all.extend([seed as u32, (seed >> 32) as u32, 0]);
        if let Some(texts) = texts {
            all.resize(start + 3 + vocabulary.div_ceil(32), 0);
            for &id in &texts[row] {
                all[start + 3 + id as usize / 32] |= 1 << (id % 32);
            }
        }
    }
    all
}

fn tensor(logits: &[f32], rows: usize, dtype: DType, device: &Device) -> Tensor<2> {
    let data = TensorData::new(logits.to_vec(), [rows, logits.len() / rows]);
    Tensor::from_data(data.convert_dtype(dtype), (device, dtype))
}

/// Several draws one after the other say what the host says, to the last one.
fn assert_as_on_host(logits: &[f32], rows: usize, dtype: DType, history: bool, device: &Device) {
    let vocabulary = logits.len() / rows;
    let seeds: Vec<u64> = (0..rows as u64).map(|row| row << 31 | 11).collect();
    let text = |row| (0..vocabulary as u32).filter(move |id| (id + row) % 5 == 0);
    let texts: Vec<Vec<u32>> = (0..rows as u32).map(|row| text(row).collect()).collect();
    for settings in SETTINGS {
        let settings = SampleSettings {
            repetition_penalty: if history { 1.3 } else { 1.0 },
            ..settings
        };
        let given = tensor(logits, rows, dtype, device);
        let (state, mut words) = match history {
            true => (
                SampleState::with_history(&seeds, &texts, vocabulary, device),
                words(&seeds, Some(&texts), vocabulary),
            ),
            false => (
                SampleState::new(&seeds, device),
                words(&seeds, None, vocabulary),
            ),
        };
        let mut state = state.unwrap();
        for number in 0..5 {
            let sampled = sample(given.clone(), &mut state, &settings).unwrap();
            let expected = on_host(logits, dtype, vocabulary, &mut words, &settings);
            let what = format!("[{rows}, {vocabulary}] {dtype:?} {settings:?}, draw {number}");
            assert_eq!(numbers(&sampled), expected, "{what}");
        }
    }
}

fn every_shape(device: &Device) {
    let mut random = Random(1);
    // Of one token, of no whole vector, of a word of history and a bit, of more than are listed.
    for (rows, vocabulary, scale) in [
        (1, 1, 1.0),
        (3, 7, 4.0),
        (2, 33, 4.0),
        (2, 1000, 8.0),
        (3, 5003, 1.0),
        (1, 20_000, 12.0),
    ] {
        let logits: Vec<f32> = (0..rows * vocabulary)
            .map(|_| random.unit() * scale)
            .collect();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            // Types differ in the load only.
            let is_tried = dtype == DType::F32 || vocabulary == 1000;
            if is_tried && burn_nf4::op::supports_dtype(device, dtype) {
                assert_as_on_host(&logits, rows, dtype, false, device);
            }
        }
        if [1, 33, 5003].contains(&vocabulary) {
            assert_as_on_host(&logits, rows, DType::F32, true, device);
        }
    }
}

fn ranges_of_logits(device: &Device) {
    let mut random = Random(2);
    let mut masked: Vec<f32> = (0..600).map(|_| random.unit() * 4.0).collect();
    masked
        .iter_mut()
        .step_by(3)
        .for_each(|x| *x = f32::NEG_INFINITY);
    let in_steps: Vec<f32> = (0..6000).map(|_| (random.unit() * 9.0).round()).collect();
    let huge: Vec<f32> = (0..500).map(|_| random.unit() * 1e38).collect();
    let mut zeros = vec![0.0; 200];
    zeros.iter_mut().step_by(2).for_each(|x| *x = -0.0);
    for logits in [masked, in_steps, huge, zeros, vec![-7.25; 3000]] {
        for history in [false, true] {
            assert_as_on_host(&logits, 1, DType::F32, history, device);
        }
    }
}

/// With 2^16 equal logits the token is the highest 16 bits of the random number, bytes in turn: of Philox with
/// the key and counter zero, whose first words are 6627e8d5 and e169c58d.
fn random_numbers_are_known(device: &Device) {
    let logits = Tensor::<2>::zeros([1, 1 << 16], device);
    let mut state = SampleState::new(&[0], device).unwrap();
    let sampled = sample(logits.clone(), &mut state, &ALL).unwrap();
    assert_eq!(numbers(&sampled), (vec![0x69e1], vec![0]));
    let seeds: Vec<u64> = (0..40u64)
        .map(|row| row.wrapping_mul(0x299f_31d0_a409_3822))
        .collect();
    let mut state = SampleState::new(&seeds, device).unwrap();
    let mut on_host = words(&seeds, None, 0);
    for _ in 0..3 {
        let all = logits.clone().repeat_dim(0, 40);
        let sampled = sample(all, &mut state, &ALL).unwrap();
        let zeros = vec![0.0f32; 40 << 16];
        let expected = host::sample(&zeros, 1 << 16, &mut on_host, &ALL);
        let expected: Vec<i64> = expected.iter().map(|choice| choice.id.into()).collect();
        assert_eq!(numbers(&sampled).0, expected);
    }
}

fn values_that_are_not_finite_are_told(device: &Device) {
    let infinity = f32::INFINITY;
    let logits = [
        [1.0, f32::NAN, 2.0],
        [5.0, 1.0, 2.0],
        [1.0, infinity, 2.0],
        [-infinity; 3],
        [-infinity, 3.0, -infinity],
        [1.0, -f32::NAN, 2.0],
    ];
    for settings in [
        SampleSettings::greedy(),
        SampleSettings {
            temperature: 1e-3,
            top_k: 2,
            top_p: 0.9,
            ..ALL
        },
    ] {
        let mut state = SampleState::new(&[3; 6], device).unwrap();
        let logits = tensor(logits.as_flattened(), 6, DType::F32, device);
        let sampled = sample(logits, &mut state, &settings).unwrap();
        let expected = (vec![0, 0, 0, 0, 1, 0], vec![-1, 0, -1, -1, 0, -1]);
        assert_eq!(numbers(&sampled), expected);
    }
}

fn shapes_that_do_not_fit_are_named(device: &Device) {
    let logits = || Tensor::<2>::zeros([2, 8], device);
    let state = || SampleState::new(&[1, 2], device).unwrap();
    let texts = [vec![1], vec![2]];
    let with_history =
        |vocabulary| SampleState::with_history(&[1, 2], &texts, vocabulary, device).unwrap();
    let penalty = SampleSettings {
        repetition_penalty: 1.2,
        ..ALL
    };
    let cases = [
        (SampleState::new(&[1], device).unwrap(), ALL, "state"),
        (with_history(9), ALL, "state"),
        (state(), penalty, "history"),
        (
            state(),
            SampleSettings {
                temperature: f32::NAN,
                ..ALL
            },
            "temperature",
        ),
        (state(), SampleSettings { top_p: 0.0, ..ALL }, "top_p"),
        (state(), SampleSettings { min_p: 1.5, ..ALL }, "min_p"),
        (
            state(),
            SampleSettings {
                repetition_penalty: 0.0,
                ..ALL
            },
            "repetition_penalty",
        ),
    ];
    for (mut state, settings, word) in cases {
        let error: Nf4Error = sample(logits(), &mut state, &settings).expect_err(word);
        assert!(error.to_string().contains(word), "{error}");
        // The state is as it was.
        assert!(state.snapshot().rows() > 0);
    }
    assert!(sample(logits(), &mut with_history(8), &penalty).is_ok());
    let beyond = SampleState::with_history(&[1], &[[8]], 8, device).expect_err("8 of 8");
    assert!(
        matches!(
            beyond,
            Nf4Error::IdRange {
                given: 8,
                rows: 8,
                ..
            }
        ),
        "{beyond}"
    );
    let fewer = SampleState::with_history(&[1, 2], &[[1]], 8, device).expect_err("one text");
    assert!(matches!(fewer, Nf4Error::Length { .. }), "{fewer}");
    assert!(SampleState::new(&[], device).is_err());
    let none = sample(Tensor::zeros([2, 0], device), &mut state(), &ALL).expect_err("nothing");
    assert!(matches!(none, Nf4Error::ElementCount { .. }), "{none}");
}

fn a_state_comes_back(device: &Device) {
    let mut random = Random(8);
    let logits: Vec<f32> = (0..2 * 50).map(|_| random.unit() * 3.0).collect();
    let logits = tensor(&logits, 2, DType::F32, device);
    let settings = SampleSettings {
        repetition_penalty: 1.5,
        ..ALL
    };
    let mut state = SampleState::with_history(&[1, 2], &[[3], [4]], 50, device).unwrap();
    let draw = |state: &mut SampleState| {
        let drawn = (0..6).map(|_| numbers(&sample(logits.clone(), state, &settings).unwrap()));
        drawn.collect::<Vec<_>>()
    };
    draw(&mut state);
    let snapshot = state.snapshot();
    let first = draw(&mut state);
    assert_ne!(draw(&mut state), first);
    state.restore(&snapshot).unwrap();
    assert_eq!(draw(&mut state), first);
    let other = SampleState::new(&[1, 2], device).unwrap();
    assert!(state.restore(&other).is_err());
}

/// With a graph for gradients, and for a tensor that is a view.
fn every_element_of_a_view(device: &Device) {
    let logits = Tensor::<2>::from_floats([[1.0, 9.0], [5.0, 2.0], [3.0, 4.0]], device);
    let device = device.clone().autodiff();
    let tracked = Tensor::<2>::from_data(logits.to_data(), &device).require_grad();
    let mut state = SampleState::new(&[0, 0], &device).unwrap();
    let greedy = SampleSettings::greedy();
    let sampled = sample(tracked.swap_dims(0, 1), &mut state, &greedy).unwrap();
    assert_eq!(numbers(&sampled).0, [1, 0]);
}

on_every_device!(
    every_shape,
    ranges_of_logits,
    random_numbers_are_known,
    values_that_are_not_finite_are_told,
    shapes_that_do_not_fit_are_named,
    a_state_comes_back,
    every_element_of_a_view,
);
