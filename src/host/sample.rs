//! The choice of tokens from logits.

use rayon::prelude::*;

use crate::format::FloatElement;
use crate::sampling::{
    DISTANCE_UNITS, POWER, STATE_HEADER, SampleConstants, SampleSettings, TOO_FAR, state_words,
};

/// What is chosen for a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// The token; 0 if there is none.
    pub id: u32,
    /// How many tokens were chosen before; `None` if a logit is NaN or infinite, or all are minus infinity.
    pub number: Option<u32>,
}

/// Chooses a token for each row of `[rows, vocabulary]` logits as the kernels do, to the bit.
///
/// - `state`: of each row the seed, low word first, how many tokens were chosen, and, if there is a history, a
///   bit for each token that says whether the text has it; it is carried on
///
/// # Panics
/// If there is no vocabulary, or the state or the logits are no whole rows, or a bit stands for no token.
pub fn sample<T: FloatElement>(
    logits: &[T],
    vocabulary: usize,
    state: &mut [u32],
    settings: &SampleSettings,
) -> Vec<Choice> {
    assert!(vocabulary > 0 && logits.len().is_multiple_of(vocabulary));
    let rows = logits.len() / vocabulary;
    if rows == 0 {
        return Vec::new();
    }
    let words = state.len() / rows;
    let fits = [None, Some(vocabulary)].map(state_words).contains(&words);
    assert!(fits && words * rows == state.len());
    let constants = settings.constants();
    let rows = logits
        .par_chunks(vocabulary)
        .zip(state.par_chunks_mut(words));
    rows.map(|(logits, state)| choose(logits, state, &constants))
        .collect()
}

fn choose<T: FloatElement>(logits: &[T], state: &mut [u32], constants: &SampleConstants) -> Choice {
    let (header, history) = state.split_at_mut(STATE_HEADER);
    let keys = keys(logits, history, constants);
    let number = header[2];
    let Some((id, largest)) = likeliest(&keys) else {
        return Choice {
            id: 0,
            number: None,
        };
    };
    let id = match constants.greedy {
        true => id,
        false => draw(&keys, largest, random(header), constants),
    };
    header[2] = number.wrapping_add(1);
    if let Some(word) = history.get_mut(id as usize / 32) {
        *word |= 1 << (id % 32);
    }
    Choice {
        id,
        number: Some(number),
    }
}

/// The logits after the penalty, as integers in their order.
fn keys<T: FloatElement>(logits: &[T], history: &[u32], constants: &SampleConstants) -> Vec<u32> {
    let mut keys: Vec<u32> = logits.iter().map(|logit| key(logit.to_f32())).collect();
    for (&word, tokens) in history.iter().zip(0..) {
        let mut left = word;
        while left != 0 {
            let id = tokens * 32 + left.trailing_zeros() as usize;
            let logit = logits[id].to_f32();
            let factor = match logit < 0.0 {
                true => constants.penalty,
                false => constants.inverse_penalty,
            };
            keys[id] = key(logit * factor);
            left &= left - 1;
        }
    }
    keys
}

/// An integer in the order of the numbers: zeros are equal, and NaN is above all.
pub(super) fn key(value: f32) -> u32 {
    let bits = value.to_bits();
    match bits & 0x7fff_ffff {
        0 => 0x8000_0000,
        0x7f80_0001.. => u32::MAX,
        magnitude if magnitude == bits => bits | 0x8000_0000,
        _ => !bits,
    }
}

pub(super) fn value(key: u32) -> f32 {
    f32::from_bits(match key >= 0x8000_0000 {
        true => key ^ 0x8000_0000,
        false => !key,
    })
}

/// The first of the likeliest tokens, and its logit, unless that is not finite.
fn likeliest(keys: &[u32]) -> Option<(u32, f32)> {
    let largest = keys.iter().copied().max()?;
    let id = keys.iter().position(|&key| key == largest)?;
    let value = value(largest);
    value.is_finite().then_some((id as u32, value))
}

/// A token that may be drawn.
#[derive(Clone, Copy)]
struct Candidate {
    /// Its place among the others: the smaller the likelier.
    rank: u64,
    id: u32,
    weight: u32,
    distance: u32,
}

/// The tokens that [`sample`] draws among for a row, the likeliest first: one where nothing is drawn, none where
/// logits are not finite.
///
/// - `state`: as for [`sample`], of one row
pub fn sample_candidates<T: FloatElement>(
    logits: &[T],
    state: &[u32],
    settings: &SampleSettings,
) -> Vec<u32> {
    let constants = settings.constants();
    let history = state.get(STATE_HEADER..).unwrap_or_default();
    let keys = keys(logits, history, &constants);
    match likeliest(&keys) {
        None => Vec::new(),
        Some((id, _)) if constants.greedy => vec![id],
        Some((_, largest)) => {
            let mut candidates = candidates(&keys, largest, &constants);
            candidates.sort_unstable_by_key(|candidate| candidate.rank);
            candidates.iter().map(|candidate| candidate.id).collect()
        }
    }
}

fn draw(keys: &[u32], largest: f32, random: u64, constants: &SampleConstants) -> u32 {
    let mut candidates = candidates(keys, largest, constants);
    let place = (u128::from(random) * u128::from(total(&candidates))) >> 64;
    // In an order in which the units of a GPU do not get into each other's way.
    let drawn = first_to_reach(&mut candidates, place as u64 + 1, |candidate| {
        candidate.id.swap_bytes()
    });
    candidates[drawn].id
}

fn candidates(keys: &[u32], largest: f32, constants: &SampleConstants) -> Vec<Candidate> {
    let candidates = keys.iter().zip(0..).filter_map(|(&key, id)| {
        let distance = distance(largest, key, constants.per_logit);
        (distance < TOO_FAR).then(|| Candidate {
            rank: u64::from(!key) << 32 | u64::from(id),
            id,
            weight: weight(distance),
            distance,
        })
    });
    let mut candidates: Vec<Candidate> = candidates.collect();
    let top_k = constants.top_k as usize;
    if top_k > 0 && top_k < candidates.len() {
        candidates.select_nth_unstable_by_key(top_k - 1, |candidate| candidate.rank);
        candidates.truncate(top_k);
    }
    if constants.top_p > 0 {
        let part = u128::from(total(&candidates)) * u128::from(constants.top_p);
        let target = part.div_ceil(1 << 32) as u64;
        let last = first_to_reach(&mut candidates, target, |candidate| candidate.rank);
        candidates.truncate(last + 1);
    }
    candidates.retain(|candidate| candidate.distance <= constants.farthest);
    candidates
}

fn total(candidates: &[Candidate]) -> u64 {
    let weights = candidates.iter();
    weights.map(|candidate| u64::from(candidate.weight)).sum()
}

/// The place of the first candidate in an order with which the weights reach a sum, and all before it in front
/// of it. Halves what is left, as quickselect does.
fn first_to_reach<K: Ord>(
    candidates: &mut [Candidate],
    target: u64,
    order: impl Fn(&Candidate) -> K,
) -> usize {
    let (mut start, mut end, mut before) = (0, candidates.len(), 0);
    while end - start > 1 {
        let part = &mut candidates[start..end];
        let half = part.len() / 2;
        part.select_nth_unstable_by_key(half, &order);
        let sum = before + total(&part[..half]);
        if sum >= target {
            end = start + half;
        } else {
            (start, before) = (start + half, sum);
        }
    }
    start
}

/// How much less likely a token is than the likeliest: see [`SampleConstants`].
fn distance(largest: f32, key: u32, per_logit: f32) -> u32 {
    let distance = (largest - value(key)) * per_logit;
    (distance.min(31.0) * DISTANCE_UNITS as f32) as u32
}

/// 2^31 times 2 to the power of minus a distance, to within two units and rounding down.
fn weight(distance: u32) -> u32 {
    let whole = distance / DISTANCE_UNITS;
    let part = (distance % DISTANCE_UNITS) << 6;
    let [terms @ .., last] = POWER;
    let sum = terms
        .iter()
        .rev()
        .fold(last, |sum, term| term - high_word(part, sum));
    let lost = high_word(part, sum);
    ((1 << 31) - lost.div_ceil(2)) >> whole
}

fn high_word(a: u32, b: u32) -> u32 {
    ((u64::from(a) * u64::from(b)) >> 32) as u32
}

/// The random number of a draw: the first two words that Philox gives for the number of the draw under the seed.
fn random(header: &[u32]) -> u64 {
    let [low, high, ..] = philox([header[2], 0, 0, 0], [header[0], header[1]]);
    u64::from(high) << 32 | u64::from(low)
}

/// Philox4x32-10, a generator that computes its numbers from a counter (Salmon et al., "Parallel random numbers:
/// as easy as 1, 2, 3", SC 2011).
fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut a, mut b, mut c, mut d], [mut left, mut right]) = (counter, key);
    for _ in 0..10 {
        let first = u64::from(a) * 0xd251_1f53;
        let second = u64::from(c) * 0xcd9e_8d57;
        (a, b, c, d) = (
            (second >> 32) as u32 ^ b ^ left,
            second as u32,
            (first >> 32) as u32 ^ d ^ right,
            first as u32,
        );
        left = left.wrapping_add(0x9e37_79b9);
        right = right.wrapping_add(0xbb67_ae85);
    }
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// From `kat_vectors` of Random123, which publishes the generator.
    #[rstest]
    #[case([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8])]
    #[case(
        [u32::MAX; 4],
        [u32::MAX; 2],
        [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
    )]
    #[case(
        [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
        [0xa409_3822, 0x299f_31d0],
        [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
    )]
    fn known_answers_of_philox(
        #[case] counter: [u32; 4],
        #[case] key: [u32; 2],
        #[case] expected: [u32; 4],
    ) {
        assert_eq!(philox(counter, key), expected);
    }

    #[test]
    fn weights_are_powers_of_two() {
        for distance in (0..TOO_FAR).step_by(9973) {
            let exact = 2f64.powf(31.0 - f64::from(distance) / f64::from(DISTANCE_UNITS));
            let given = f64::from(weight(distance));
            assert!((given - exact).abs() < 3.0, "{distance}: {given} {exact}");
        }
        assert_eq!(weight(0), 1 << 31);
    }

    #[test]
    fn keys_are_in_the_order_of_numbers() {
        let numbers = [
            f32::NEG_INFINITY,
            f32::MIN,
            -1.0,
            -f32::MIN_POSITIVE,
            0.0,
            1e-40,
            1.0,
            f32::MAX,
            f32::INFINITY,
        ];
        assert!(numbers.is_sorted_by_key(|&number| key(number)));
        assert!(numbers.iter().all(|&number| value(key(number)) == number));
        assert_eq!(key(-0.0), key(0.0));
        assert!(
            [f32::NAN, -f32::NAN]
                .iter()
                .all(|&nan| key(nan) > key(f32::INFINITY))
        );
    }
}
