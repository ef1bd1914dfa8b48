//! The attention of a block of queries.

use std::ops::Range;

use super::product::{Left, Rows, product};
use super::vector::Vector;
use super::{Block, Problem, TILE_KEYS, widen};
use crate::format::FloatElement;

/// Most rows of a tile that are multiplied with keys one by one, a dot product each. With more it is
/// cheaper to have them in the lanes of vectors.
const FEW_ROWS: usize = 2;

/// The softmax of some queries over the keys that came so far.
pub(super) struct State {
    /// `[rows, padded]`: values with their weights, `2^(score - largest)`.
    pub(super) values: Vec<f32>,
    /// `[rows]`: the sums of these weights; once finished, the log-sum-exp.
    pub(super) sums: Vec<f32>,
    /// The largest scores.
    largest: Vec<f32>,
}

/// A score as it can be subtracted: of those that are `-inf` there may be no difference.
fn finite(score: f32) -> f32 {
    score.max(f32::MIN)
}

impl State {
    /// Adds the softmax over other keys.
    pub(super) fn merge(&mut self, other: Self) {
        let padded = self.values.len() / self.sums.len();
        for row in 0..self.sums.len() {
            let (mine, others) = (self.largest[row], other.largest[row]);
            let largest = mine.max(others);
            let [of_mine, of_others] = [mine, others].map(|score| (score - finite(largest)).exp2());
            self.largest[row] = largest;
            self.sums[row] = self.sums[row] * of_mine + other.sums[row] * of_others;
            let range = row * padded..(row + 1) * padded;
            let values = self.values[range.clone()].iter_mut();
            for (value, other) in values.zip(&other.values[range]) {
                *value = *value * of_mine + other * of_others;
            }
        }
    }

    /// Divides values by the sums of their weights, which are replaced by their logarithms.
    pub(super) fn finish(&mut self) {
        let padded = self.values.len() / self.sums.len();
        let rows = self.values.chunks_exact_mut(padded);
        for ((values, sum), largest) in rows.zip(&mut self.sums).zip(&self.largest) {
            if *sum == 0.0 {
                *sum = f32::NEG_INFINITY;
                continue;
            }
            values.iter_mut().for_each(|value| *value /= *sum);
            *sum = largest * std::f32::consts::LN_2 + sum.ln();
        }
    }
}

/// The queries of a block, as factors of scores.
enum Queries {
    /// `[rows, padded]`
    Few(Vec<f32>),
    /// `[head_dim, lanes]`
    Lanes(Vec<f32>),
}

/// Attention over some keys.
///
/// # Safety
/// The processor must have the instructions of `V`.
#[inline(always)]
pub(super) unsafe fn block<T: FloatElement, V: Vector>(
    problem: &Problem<T>,
    block: Block,
    keys: Range<usize>,
) -> State {
    let head_dim = problem.settings.head_dim;
    let padded = head_dim.next_multiple_of(V::LANES);
    let rows = problem.group() * block.queries;
    let lanes = rows.next_multiple_of(V::LANES);
    let mut state = State {
        values: vec![0.0; rows * padded],
        sums: vec![0.0; lanes],
        largest: vec![f32::NEG_INFINITY; lanes],
    };
    let (factor, cap) = problem.factors();
    let queries = match rows <= FEW_ROWS {
        true => Queries::Few(rows_of(problem, block, factor, padded)),
        false => Queries::Lanes(lanes_of(problem, &problem.q, block, factor, lanes)),
    };
    let [firsts, ends] = ranges_of(problem, block, lanes);
    let by_all = problem.bounds(block.row, block.range()).by_all;
    let mut scores = vec![0.0; TILE_KEYS * lanes];
    let mut corrections = vec![0.0; lanes];
    let mut buffers = [Vec::new(), Vec::new()];
    for start in keys.clone().step_by(TILE_KEYS) {
        let tile = start..keys.end.min(start + TILE_KEYS);
        let at = [block.row, block.kv_head];
        let [of_k, of_v] = &mut buffers;
        // SAFETY: the caller vouches for the instructions. `scores` has a row of `lanes` for each key, `k`
        // and `v` one for each key of `head_dim`, or of `padded`, elements, the state what is asked for.
        unsafe {
            match &queries {
                Queries::Few(queries) => {
                    let k = problem
                        .k
                        .tokens::<V>(at, tile.clone(), [head_dim, padded], of_k);
                    dot_products::<V>(k, queries, tile.len(), padded, lanes, &mut scores);
                }
                Queries::Lanes(queries) => {
                    let k = problem.k.tokens::<V>(at, tile.clone(), [head_dim; 2], of_k);
                    let right = Rows {
                        start: queries.as_ptr(),
                        stride: lanes,
                    };
                    let shape = [tile.len(), head_dim, lanes];
                    product::<V, false>(k.left(), right, shape, scores.as_mut_ptr(), lanes);
                }
            }
            let masked = tile.start < by_all.start || tile.end > by_all.end;
            let mask = masked.then_some([&*firsts, &*ends]);
            let keys = tile.clone();
            softmax::<V>(&mut scores, keys, cap, mask, &mut state, &mut corrections);
            for (values, &correction) in state.values.chunks_exact_mut(padded).zip(&corrections) {
                if correction != 1.0 {
                    values.iter_mut().for_each(|value| *value *= correction);
                }
            }
            let v = problem
                .v
                .tokens::<V>(at, tile.clone(), [head_dim, padded], of_v);
            let weights = Left {
                start: scores.as_ptr(),
                row: 1,
                column: lanes,
            };
            let shape = [rows, tile.len(), padded];
            product::<V, true>(weights, v, shape, state.values.as_mut_ptr(), padded);
        }
    }
    state.sums.truncate(rows);
    state.largest.truncate(rows);
    state
}

/// The queries of a block, multiplied with a factor, `[rows, padded]`.
#[inline(always)]
fn rows_of<T: FloatElement>(
    problem: &Problem<T>,
    block: Block,
    factor: f32,
    padded: usize,
) -> Vec<f32> {
    let head_dim = problem.settings.head_dim;
    let rows = problem.group() * block.queries;
    let mut all = vec![0.0; rows * padded];
    for (to, at) in all
        .chunks_exact_mut(padded)
        .zip(block.rows(problem.group()))
    {
        let to = &mut to[..head_dim];
        widen(problem.q.row(at, head_dim), to);
        to.iter_mut().for_each(|element| *element *= factor);
    }
    all
}

/// What a tensor of the shape of queries has of a block, multiplied with a factor, `[head_dim, lanes]`: the
/// rows of a tile are the lanes, zeros after them.
#[inline(always)]
pub(super) fn lanes_of<T: FloatElement>(
    problem: &Problem<T>,
    tensor: &super::Heads<T>,
    block: Block,
    factor: f32,
    lanes: usize,
) -> Vec<f32> {
    let head_dim = problem.settings.head_dim;
    let mut all = vec![0.0; head_dim * lanes];
    let mut row = vec![0.0; head_dim];
    for (lane, at) in block.rows(problem.group()).enumerate() {
        widen(tensor.row(at, head_dim), &mut row);
        for (element, to) in row.iter().zip(all.chunks_exact_mut(lanes)) {
            to[lane] = element * factor;
        }
    }
    all
}

/// The first key of each lane and the one past the last; no keys for the lanes after the rows.
#[inline(always)]
pub(super) fn ranges_of<T: FloatElement>(
    problem: &Problem<T>,
    block: Block,
    lanes: usize,
) -> [Vec<i32>; 2] {
    let ranges = problem.ranges(block.row, block.range());
    [0, 1].map(|side| {
        let mut numbers = vec![0; lanes];
        for numbers in numbers.chunks_exact_mut(ranges.len()).take(problem.group()) {
            for (number, range) in numbers.iter_mut().zip(ranges) {
                *number = range[side];
            }
        }
        numbers
    })
}

/// Scores of a few queries: `[keys, lanes]`, of which each row has a number for each query.
///
/// # Safety
/// The processor must have the instructions of `V`, and `k` must be `keys` rows of `padded` elements.
#[inline(always)]
unsafe fn dot_products<V: Vector>(
    k: Rows,
    queries: &[f32],
    keys: usize,
    padded: usize,
    lanes: usize,
    scores: &mut [f32],
) {
    for (key, scores) in scores.chunks_exact_mut(lanes).take(keys).enumerate() {
        for (score, query) in scores.iter_mut().zip(queries.chunks_exact(padded)) {
            // SAFETY: as the caller vouches.
            unsafe {
                let mut sum = V::splat(0.0);
                for i in (0..padded).step_by(V::LANES) {
                    let k = V::load(k.start.add(key * k.stride + i));
                    sum = k.mul_add(V::load(query.as_ptr().add(i)), sum);
                }
                *score = sum.sum();
            }
        }
    }
}

/// Replaces scores by their weights in the softmax, `[keys, lanes]`, and brings its state up to date but for
/// the values, which are to be multiplied with the corrections.
///
/// # Safety
/// The processor must have the instructions of `V`; the state, corrections and mask must have as many
/// numbers as there are lanes, a multiple of a vector's, and scores a row of these for each key.
#[inline(always)]
unsafe fn softmax<V: Vector>(
    scores: &mut [f32],
    keys: Range<usize>,
    cap: Option<f32>,
    mask: Option<[&[i32]; 2]>,
    state: &mut State,
    corrections: &mut [f32],
) {
    let lanes = corrections.len();
    for lane in (0..lanes).step_by(V::LANES) {
        // SAFETY: as the caller vouches.
        unsafe {
            let scores = scores.as_mut_ptr().add(lane);
            let earlier = V::load(state.largest.as_ptr().add(lane));
            let mut largest = earlier;
            if cap.is_some() || mask.is_some() {
                for (i, key) in keys.clone().enumerate() {
                    let at = scores.add(i * lanes);
                    let mut score = V::load(at);
                    if let Some(cap) = cap {
                        score = score.tanh().mul(V::splat(cap));
                    }
                    if let Some([firsts, ends]) = mask {
                        let first = V::load_ints(firsts.as_ptr().add(lane));
                        let end = V::load_ints(ends.as_ptr().add(lane));
                        score = score.mask(first, end, V::splat_int(key as i32));
                    }
                    score.store(at);
                    largest = largest.max(score);
                }
            } else {
                for i in 0..keys.len() {
                    largest = largest.max(V::load(scores.add(i * lanes)));
                }
            }
            let base = largest.max(V::splat(f32::MIN));
            let correction = earlier.sub(base).exp2();
            let mut sum = V::splat(0.0);
            for i in 0..keys.len() {
                let at = scores.add(i * lanes);
                let weight = V::load(at).sub(base).exp2();
                sum = sum.add(weight);
                weight.store(at);
            }
            let sums = state.sums.as_mut_ptr().add(lane);
            V::load(sums).mul_add(correction, sum).store(sums);
            largest.store(state.largest.as_mut_ptr().add(lane));
            correction.store(corrections.as_mut_ptr().add(lane));
        }
    }
}
