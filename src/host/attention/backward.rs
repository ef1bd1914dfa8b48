//! Gradients, from probabilities that are computed again.

use std::ops::Range;

use super::forward::{lanes_of, ranges_of};
use super::product::{Left, Rows, product};
use super::vector::Vector;
use super::{Backward, Block, KeyBlock, TILE_KEYS, TILE_QUERIES, widen};
use crate::format::FloatElement;

/// Gradients of some keys and values, `[keys, padded]`.
pub(super) struct KeyGrads {
    pub(super) keys: Vec<f32>,
    pub(super) values: Vec<f32>,
}

/// What there is of each query of a tile.
struct OfQueries<'a> {
    /// The log-sum-exp, of base two.
    lse: &'a [f32],
    delta: &'a [f32],
    /// The first key and the one past the last, if not all are seen by all.
    ranges: Option<[&'a [i32]; 2]>,
}

/// What the gradient of a block of queries has from some keys.
///
/// # Safety
/// The processor must have the instructions of `V`.
#[inline(always)]
pub(super) unsafe fn query_grads<T: FloatElement, V: Vector>(
    problem: &Backward<T>,
    block: Block,
    keys: Range<usize>,
) -> Vec<f32> {
    let head_dim = problem.settings.head_dim;
    let padded = head_dim.next_multiple_of(V::LANES);
    let rows = problem.group() * block.queries;
    let lanes = rows.next_multiple_of(V::LANES);
    let (factor, cap) = problem.factors();
    let queries = lanes_of(problem, &problem.q, block, factor, lanes);
    let grads = lanes_of(problem, &problem.grad, block, 1.0, lanes);
    let [queries, grads] = [&queries, &grads].map(|numbers| Rows {
        start: numbers.as_ptr(),
        stride: lanes,
    });
    let [lse, delta] = [&problem.lse, &problem.delta].map(|of_all| {
        let of_row = |[row, token, head]: [usize; 3]| of_all[problem.queries_of(row, head)][token];
        let mut numbers: Vec<f32> = block.rows(problem.group()).map(of_row).collect();
        numbers.resize(lanes, 0.0);
        numbers
    });
    let [firsts, ends] = ranges_of(problem, block, lanes);
    let by_all = problem.bounds(block.row, block.range()).by_all;
    let mut sums = vec![0.0; rows * padded];
    let mut scores = vec![0.0; TILE_KEYS * lanes];
    let mut products = vec![0.0; TILE_KEYS * lanes];
    let mut buffers = [Vec::new(), Vec::new()];
    for start in keys.clone().step_by(TILE_KEYS) {
        let tile = start..keys.end.min(start + TILE_KEYS);
        let numbers: Vec<i32> = tile.clone().map(|key| key as i32).collect();
        let at = [block.row, block.kv_head];
        let [of_k, of_v] = &mut buffers;
        let shape = [tile.len(), head_dim, lanes];
        let masked = tile.start < by_all.start || tile.end > by_all.end;
        let of_queries = OfQueries {
            lse: &lse,
            delta: &delta,
            ranges: masked.then_some([&firsts, &ends]),
        };
        // SAFETY: the caller vouches for the instructions. Scores and products have a row of `lanes` for
        // each key, keys and values one for each, of at least `head_dim` elements, those of keys whole
        // vectors, and there are numbers for all lanes and keys.
        unsafe {
            let k = problem
                .k
                .tokens::<V>(at, tile.clone(), [head_dim, padded], of_k);
            let v = problem.v.tokens::<V>(at, tile.clone(), [head_dim; 2], of_v);
            product::<V, false>(k.left(), queries, shape, scores.as_mut_ptr(), lanes);
            product::<V, false>(v.left(), grads, shape, products.as_mut_ptr(), lanes);
            gradients::<V, true>(
                &mut scores,
                &mut products,
                lanes,
                &of_queries,
                &numbers,
                cap,
            );
            let left = Left {
                start: scores.as_ptr(),
                row: 1,
                column: lanes,
            };
            let shape = [rows, tile.len(), padded];
            product::<V, true>(left, k, shape, sums.as_mut_ptr(), padded);
        }
    }
    sums
}

/// The gradients of a block of keys and values.
///
/// # Safety
/// The processor must have the instructions of `V`.
#[inline(always)]
pub(super) unsafe fn key_grads<T: FloatElement, V: Vector>(
    problem: &Backward<T>,
    block: KeyBlock,
) -> KeyGrads {
    let head_dim = problem.settings.head_dim;
    let padded = head_dim.next_multiple_of(V::LANES);
    let lanes = block.keys.next_multiple_of(V::LANES);
    let (factor, cap) = problem.factors();
    let [k, v] = [(&problem.k, factor), (&problem.v, 1.0)].map(|(tensor, factor)| {
        let mut all = vec![0.0; head_dim * lanes];
        let mut row = vec![0.0; head_dim];
        for key in 0..block.keys {
            let at = [block.row, block.first + key, block.kv_head];
            widen(tensor.row(at, head_dim), &mut row);
            for (element, to) in row.iter().zip(all.chunks_exact_mut(lanes)) {
                to[key] = element * factor;
            }
        }
        all
    });
    let [keys, values] = [&k, &v].map(|numbers| Rows {
        start: numbers.as_ptr(),
        stride: lanes,
    });
    let numbers: Vec<i32> = (block.first..block.first + lanes)
        .map(|key| key as i32)
        .collect();
    let end = block.first + block.keys;
    let mut sums = KeyGrads {
        keys: vec![0.0; block.keys * padded],
        values: vec![0.0; block.keys * padded],
    };
    let mut scores = vec![0.0; TILE_QUERIES * lanes];
    let mut products = vec![0.0; TILE_QUERIES * lanes];
    let mut buffers = [Vec::new(), Vec::new()];
    for first in (0..problem.settings.queries).step_by(TILE_QUERIES) {
        let tile = first..problem.settings.queries.min(first + TILE_QUERIES);
        let bounds = problem.bounds(block.row, tile.clone());
        if bounds.seen.start >= end || bounds.seen.end <= block.first {
            continue;
        }
        let masked = block.first < bounds.by_all.start || end > bounds.by_all.end;
        let ranges = problem.ranges(block.row, tile.clone());
        let [firsts, ends] =
            [0, 1].map(|side| ranges.iter().map(|range| range[side]).collect::<Vec<i32>>());
        for head in 0..problem.group() {
            let head = block.kv_head * problem.group() + head;
            let at = [block.row, head];
            let [of_q, of_grad] = &mut buffers;
            let of_head = problem.queries_of(block.row, head);
            let of_queries = OfQueries {
                lse: &problem.lse[of_head.clone()][tile.clone()],
                delta: &problem.delta[of_head][tile.clone()],
                ranges: masked.then_some([&firsts, &ends]),
            };
            let shape = [tile.len(), head_dim, lanes];
            // SAFETY: the caller vouches for the instructions. Scores and products have a row of `lanes`
            // for each query, queries and gradients one of whole vectors for each, and there are numbers
            // for all lanes and queries.
            unsafe {
                let whole = [head_dim, padded];
                let q = problem.q.tokens::<V>(at, tile.clone(), whole, of_q);
                let grad = problem.grad.tokens::<V>(at, tile.clone(), whole, of_grad);
                product::<V, false>(q.left(), keys, shape, scores.as_mut_ptr(), lanes);
                product::<V, false>(grad.left(), values, shape, products.as_mut_ptr(), lanes);
                gradients::<V, false>(
                    &mut scores,
                    &mut products,
                    lanes,
                    &of_queries,
                    &numbers,
                    cap,
                );
                let shape = [block.keys, tile.len(), padded];
                for (left, right, sums) in [
                    (&scores, q, &mut sums.keys),
                    (&products, grad, &mut sums.values),
                ] {
                    let left = Left {
                        start: left.as_ptr(),
                        row: 1,
                        column: lanes,
                    };
                    product::<V, true>(left, right, shape, sums.as_mut_ptr(), padded);
                }
            }
        }
    }
    sums
}

/// Replaces scores by their gradients, and gradients of probabilities by the probabilities.
///
/// The lanes are queries and the rows keys, or the other way round. `keys` are their numbers.
///
/// # Safety
/// The processor must have the instructions of `V`, `lanes` be a multiple of a vector's; scores and products
/// must have a row of these for each of what rows are, and there must be a number for each lane and row.
#[inline(always)]
unsafe fn gradients<V: Vector, const QUERIES_IN_LANES: bool>(
    scores: &mut [f32],
    products: &mut [f32],
    lanes: usize,
    queries: &OfQueries,
    keys: &[i32],
    cap: Option<f32>,
) {
    let rows = match QUERIES_IN_LANES {
        true => keys.len(),
        false => queries.lse.len(),
    };
    for row in 0..rows {
        for lane in (0..lanes).step_by(V::LANES) {
            // SAFETY: as the caller vouches.
            unsafe {
                let of_query = |numbers: &[f32]| match QUERIES_IN_LANES {
                    true => V::load(numbers.as_ptr().add(lane)),
                    false => V::splat(*numbers.get_unchecked(row)),
                };
                let score_at = scores.as_mut_ptr().add(row * lanes + lane);
                let product_at = products.as_mut_ptr().add(row * lanes + lane);
                let mut score = V::load(score_at);
                let mut slope = None;
                if let Some(cap) = cap {
                    let tanh = score.tanh();
                    slope = Some(V::splat(1.0).sub(tanh.mul(tanh)));
                    score = tanh.mul(V::splat(cap));
                }
                if let Some([firsts, ends]) = queries.ranges {
                    let [first, end] = [firsts, ends].map(|numbers| match QUERIES_IN_LANES {
                        true => V::load_ints(numbers.as_ptr().add(lane)),
                        false => V::splat_int(*numbers.get_unchecked(row)),
                    });
                    let key = match QUERIES_IN_LANES {
                        true => V::splat_int(*keys.get_unchecked(row)),
                        false => V::load_ints(keys.as_ptr().add(lane)),
                    };
                    score = score.mask(first, end, key);
                }
                let probability = score.sub(of_query(queries.lse)).exp2();
                let mut grad = V::load(product_at).sub(of_query(queries.delta));
                if let Some(slope) = slope {
                    grad = grad.mul(slope);
                }
                grad.mul(probability).store(score_at);
                probability.store(product_at);
            }
        }
    }
}
