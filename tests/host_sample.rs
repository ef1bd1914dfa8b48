//! The choice of tokens on the host, against plain sorting, the processors of transformers and exact
//! probabilities.

#[path = "random/mod.rs"]
mod random;

use std::fs;
use std::path::Path;

use burn_nf4::host::{sample, sample_candidates};
use burn_nf4::op::SampleSettings;
use half::{bf16, f16};
use random::Random;
use rstest::rstest;
use serde_json::Value;

/// Words at the head of the state of a row.
const HEADER: usize = 3;

const ALL: SampleSettings = SampleSettings {
    temperature: 1.0,
    ..SampleSettings::greedy()
};

/// The state of a row.
fn state(seed: u64, history: &[u32], vocabulary: usize) -> Vec<u32> {
    let mut words = vec![0; HEADER + vocabulary.div_ceil(32)];
    words[0] = seed as u32;
    words[1] = (seed >> 32) as u32;
    for &id in history {
        words[HEADER + id as usize / 32] |= 1 << (id % 32);
    }
    words
}

fn ids(values: &Value) -> Vec<u32> {
    let values = values.as_array().unwrap();
    values
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

#[test]
fn transformers_leaves_the_same_tokens() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = package.join("tests/fixtures/sample/candidates.json");
    let fixture: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let cases = fixture["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 42);
    for (number, case) in cases.iter().enumerate() {
        let logits = case["logits"].as_array().unwrap();
        let logits: Vec<f32> = logits.iter().map(|x| x.as_f64().unwrap() as f32).collect();
        let [temperature, top_k, top_p, min_p, penalty] =
            std::array::from_fn(|i| case["settings"][i].as_f64().unwrap() as f32);
        let settings = SampleSettings {
            temperature,
            top_k: top_k as usize,
            top_p,
            min_p,
            repetition_penalty: penalty,
        };
        let history = ids(&case["history"]);
        let penalised = |id: u32| match (history.contains(&id), logits[id as usize]) {
            (false, logit) => logit,
            (true, logit) if logit < 0.0 => logit * penalty,
            (true, logit) => logit / penalty,
        };
        let mut expected = ids(&case["left"]);
        // What is less likely than 2^-31 of the likeliest is never drawn here.
        let largest = penalised(expected[0]);
        expected.retain(|&id| (largest - penalised(id)) / temperature < 31.0 * 2f32.ln());
        let given = sample_candidates(&logits, &state(0, &history, logits.len()), &settings);
        assert_eq!(given, expected, "case {number}: {settings:?}");
    }
}

/// By sorting, in f64.
fn sorted(logits: &[f32], settings: &SampleSettings) -> Vec<u32> {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|&a, &b| {
        let [of_a, of_b] = [a, b].map(|id| logits[id as usize]);
        of_b.partial_cmp(&of_a).unwrap().then(a.cmp(&b))
    });
    let largest = f64::from(logits[order[0] as usize]);
    let probability = |id: &u32| {
        let logit = f64::from(logits[*id as usize]);
        ((logit - largest) / f64::from(settings.temperature)).exp()
    };
    order.retain(|id| probability(id) > 2f64.powi(-31));
    if settings.top_k > 0 {
        order.truncate(settings.top_k);
    }
    let total: f64 = order.iter().map(probability).sum();
    let mut before = 0.0;
    let kept = order.iter().take_while(|id| {
        let reached = before >= f64::from(settings.top_p) * total;
        before += probability(id);
        !reached
    });
    let kept = kept.count().max(1);
    order.truncate(kept);
    order.retain(|id| probability(id) >= f64::from(settings.min_p));
    order
}

/// Logits of many kinds.
fn adversarial(random: &mut Random) -> Vec<Vec<f32>> {
    let mut of =
        |len: usize, scale: f32| -> Vec<f32> { (0..len).map(|_| random.unit() * scale).collect() };
    let mut masked = of(300, 4.0);
    masked
        .iter_mut()
        .step_by(2)
        .for_each(|x| *x = f32::NEG_INFINITY);
    let mut one_left = vec![f32::NEG_INFINITY; 40];
    one_left[17] = -3.0;
    let in_steps: Vec<f32> = of(2000, 8.0)
        .iter()
        .map(|x| (x * 4.0).round() / 4.0)
        .collect();
    let zeros: Vec<f32> = (0..50)
        .map(|i| if i % 2 == 0 { 0.0 } else { -0.0 })
        .collect();
    vec![
        of(1, 1.0),
        of(7, 3.0),
        of(1000, 10.0),
        of(5000, 0.01),
        of(700, 1e4),
        of(100, 1e38),
        vec![2.5; 333],
        masked,
        one_left,
        in_steps,
        zeros,
    ]
}

#[test]
fn candidates_are_those_of_a_plain_sort() {
    let mut random = Random(3);
    for logits in adversarial(&mut random) {
        for temperature in [1.0, 0.3, 1e-30, 1e30] {
            for top_k in [0, 1, 2, 50, 100_000] {
                for top_p in [1.0, 0.9, 0.37, 1e-9] {
                    for min_p in [0.0, 0.05, 1.0] {
                        let settings = SampleSettings {
                            temperature,
                            top_k,
                            top_p,
                            min_p,
                            repetition_penalty: 1.0,
                        };
                        let given = sample_candidates(&logits, &[0; HEADER], &settings);
                        let expected = sorted(&logits, &settings);
                        let tokens = logits.len();
                        assert_eq!(given.len(), expected.len(), "{tokens}: {settings:?}");
                        assert_eq!(given, expected, "{tokens}: {settings:?}");
                    }
                }
            }
        }
    }
}

/// 99.99% of the values of a chi-square distribution with so many degrees of freedom lie below (Wilson and
/// Hilferty's approximation).
fn chi_square_bound(degrees: usize) -> f64 {
    let k = degrees as f64;
    let spread = (2.0 / (9.0 * k)).sqrt();
    k * (1.0 - 2.0 / (9.0 * k) + 3.72 * spread).powi(3)
}

/// Over the draws of a row, and over rows with seeds that follow each other.
#[rstest]
#[case::all(ALL)]
#[case::hot(SampleSettings { temperature: 3.0, ..ALL })]
#[case::cold(SampleSettings { temperature: 0.4, ..ALL })]
#[case::few(SampleSettings { top_k: 5, ..ALL })]
#[case::nucleus(SampleSettings { top_p: 0.8, ..ALL })]
#[case::likely(SampleSettings { min_p: 0.1, ..ALL })]
#[case::all_at_once(SampleSettings { top_k: 9, top_p: 0.95, min_p: 0.02, ..ALL })]
fn draws_have_their_probabilities(
    #[case] settings: SampleSettings,
    #[values(false, true)] rows: bool,
) {
    const DRAWS: usize = 40_000;
    let logits: Vec<f32> = (0..12).map(|i| (i as f32 * 1.7).sin() * 2.5).collect();
    let left = sample_candidates(&logits, &[0; HEADER], &settings);
    let weight = |id: u32| (f64::from(logits[id as usize]) / f64::from(settings.temperature)).exp();
    let total: f64 = left.iter().map(|&id| weight(id)).sum();
    let mut seen = vec![0usize; logits.len()];
    if rows {
        let mut states: Vec<u32> = (0..DRAWS).flat_map(|row| [row as u32, 0, 0]).collect();
        for choice in sample(&logits.repeat(DRAWS), logits.len(), &mut states, &settings) {
            seen[choice.id as usize] += 1;
        }
    } else {
        let mut state = [5, 0, 0];
        for number in 0..DRAWS as u32 {
            let choice = sample(&logits, logits.len(), &mut state, &settings)[0];
            assert_eq!(choice.number, Some(number));
            seen[choice.id as usize] += 1;
        }
    }
    let mut sum = 0.0;
    for (id, &seen) in seen.iter().enumerate() {
        if !left.contains(&(id as u32)) {
            assert_eq!(seen, 0);
            continue;
        }
        let expected = weight(id as u32) / total * DRAWS as f64;
        sum += (seen as f64 - expected).powi(2) / expected;
    }
    let bound = chi_square_bound((left.len() - 1).max(1));
    assert!(sum < bound, "{sum} {bound} {seen:?}");
}

/// The bound refuses what is off by little.
#[test]
fn a_wrong_generator_would_be_noticed() {
    let logits = [0.0f32; 8];
    let mut sum = 0.0;
    let mut seen = [0usize; 8];
    for number in 0..40_000 {
        // A generator of a linear congruence whose low digits are used.
        let mut state = [number * 3, 0, 0];
        let id = sample(&logits, 8, &mut state, &ALL)[0].id;
        seen[(id & !u32::from(number % 25 == 0)) as usize] += 1;
    }
    for seen in seen {
        sum += (seen as f64 - 5000.0).powi(2) / 5000.0;
    }
    assert!(sum > chi_square_bound(7), "{sum}");
}

#[test]
fn a_penalty_is_of_the_tokens_of_the_text() {
    let settings = SampleSettings {
        repetition_penalty: 2.0,
        ..SampleSettings::greedy()
    };
    let logits = [3.0f32, 2.0, -1.0, 1.4];
    let mut state = state(0, &[], 4);
    let chosen: Vec<u32> = (0..4)
        .map(|_| sample(&logits, 4, &mut state, &settings)[0].id)
        .collect();
    // 3, then 2 over 1.5, then 1.5 over 1.4 and 1.
    assert_eq!(chosen, [0, 1, 0, 0]);
    let negative = [-1.0f32, -1.5, -1.9];
    let mut state = self::state(0, &[0], 3);
    assert_eq!(sample(&negative, 3, &mut state, &settings)[0].id, 1);
}

#[test]
fn a_row_draws_what_it_draws_alone() {
    let mut random = Random(9);
    let logits: Vec<f32> = (0..6 * 100).map(|_| random.unit() * 5.0).collect();
    let mut states: Vec<u32> = (0..6).flat_map(|row| [row * 77, 1, row]).collect();
    let alone: Vec<u32> = (0..6)
        .map(|row| {
            let mut state = states[row * 3..row * 3 + 3].to_vec();
            sample(&logits[row * 100..(row + 1) * 100], 100, &mut state, &ALL)[0].id
        })
        .collect();
    let together = sample(&logits, 100, &mut states, &ALL);
    let together: Vec<u32> = together.iter().map(|choice| choice.id).collect();
    assert_eq!(together, alone);
}

#[rstest]
fn what_is_not_finite_is_not_chosen_from(
    #[values(SampleSettings::greedy(), ALL)] settings: SampleSettings,
) {
    let infinity = f32::INFINITY;
    for logits in [
        [1.0, f32::NAN, 2.0],
        [1.0, -f32::NAN, 2.0],
        [1.0, infinity, 2.0],
        [-infinity; 3],
    ] {
        let mut state = [1, 0, 7];
        let choice = sample(&logits, 3, &mut state, &settings)[0];
        assert_eq!((choice.id, choice.number), (0, None));
        assert!(sample_candidates(&logits, &state, &settings).is_empty());
    }
    let logits = [-infinity, 2.0, -infinity];
    let choice = sample(&logits, 3, &mut [1, 0, 7], &settings)[0];
    assert_eq!((choice.id, choice.number), (1, Some(7)));
}

#[test]
fn types_are_widened() {
    let mut random = Random(4);
    let logits: Vec<f32> = (0..500).map(|_| random.unit() * 4.0).collect();
    let halves: Vec<f16> = logits.iter().map(|&x| f16::from_f32(x)).collect();
    let brains: Vec<bf16> = logits.iter().map(|&x| bf16::from_f32(x)).collect();
    for seed in 0..200 {
        let of_halves = sample(&halves, 500, &mut [seed, 0, 0], &ALL);
        let widened: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
        assert_eq!(of_halves, sample(&widened, 500, &mut [seed, 0, 0], &ALL));
        let of_brains = sample(&brains, 500, &mut [seed, 0, 0], &ALL);
        let widened: Vec<f32> = brains.iter().map(|x| x.to_f32()).collect();
        assert_eq!(of_brains, sample(&widened, 500, &mut [seed, 0, 0], &ALL));
    }
}
