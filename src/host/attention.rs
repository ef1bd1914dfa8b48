//! Attention that holds scores of a few queries with a few keys at a time.
//!
//! The forward pass is that of FlashAttention: the softmax goes along as keys come, each query keeping its
//! largest score and the sum so far. The backward pass makes probabilities anew from the log-sum-exp, once
//! for the gradients of queries and once for those of keys and values, so that no two threads add to one
//! number. Results do not depend on the number of threads.
//!
//! Of a tile of scores the lanes of a vector are queries, where the softmax is taken over keys, and all
//! heads that share keys are in one tile. Thus K is multiplied as it lies, element by element.

use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::Simd;
use super::dequantize::round;
use crate::format::{FloatElement, FloatType};

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
mod backward;
mod forward;
pub(super) mod portable;
mod product;
pub(super) mod vector;

use backward::KeyGrads;
use forward::State;
use product::Rows;
use vector::Vector;

/// Keys of a tile of scores.
const TILE_KEYS: usize = 64;

/// Most queries of a tile of scores, of one head.
const TILE_QUERIES: usize = 64;

/// About how many queries a tile of scores has, of all heads that share keys.
const TILE_ROWS: usize = 128;

/// Keys that a thread takes at least where there are few queries.
const PART_KEYS: usize = 1024;

/// Multiplications of a task that is worth handing to another thread.
const TASK_PRODUCTS: usize = 1 << 17;

/// The sizes and constants of an attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSettings {
    /// Rows of the batch.
    pub batch: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values; divides `heads`.
    pub kv_heads: usize,
    /// Queries of a row and head.
    pub queries: usize,
    /// Keys of a row and head.
    pub keys: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// The factor of scores.
    pub scale: f32,
    /// `c` of `c tanh(score / c)`, if scores are capped.
    pub softcap: Option<f32>,
}

/// A tensor `[batch, tokens, heads, head_dim]`, the elements of a head side by side.
#[derive(Debug)]
pub struct Heads<'a, T> {
    /// The first element of the tensor, and at least all others.
    pub data: &'a [T],
    /// Elements from one row of the batch to the next, one token, one head.
    pub strides: [usize; 3],
}

impl<T> Clone for Heads<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Heads<'_, T> {}

impl<'a, T: FloatElement> Heads<'a, T> {
    /// A tensor without gaps.
    pub fn contiguous(data: &'a [T], [tokens, heads, head_dim]: [usize; 3]) -> Self {
        Self {
            data,
            strides: [tokens * heads * head_dim, heads * head_dim, head_dim],
        }
    }

    /// # Panics
    /// If the data do not reach to the end of a tensor of this shape.
    fn assert_len(&self, what: &str, shape: [usize; 4]) {
        let last = (0..3)
            .map(|i| (shape[i] - 1) * self.strides[i])
            .sum::<usize>()
            + shape[3];
        let len = self.data.len();
        assert!(last <= len, "{what} of {len} elements, expected {last}");
    }

    /// The elements of a head of a token, and all that come after.
    fn tail(&self, [row, token, head]: [usize; 3]) -> &'a [T] {
        let [of_row, of_token, of_head] = self.strides;
        &self.data[row * of_row + token * of_token + head * of_head..]
    }

    /// The elements of a head of a token.
    fn row(&self, at: [usize; 3], head_dim: usize) -> &'a [T] {
        &self.tail(at)[..head_dim]
    }

    /// Some tokens of a head in f32, `padded - head_dim` zeros after each: where they lie, or in a buffer.
    ///
    /// # Safety
    /// The processor must have the instructions of `V`.
    #[inline(always)]
    unsafe fn tokens<V: Vector>(
        &self,
        [row, head]: [usize; 2],
        tokens: Range<usize>,
        [head_dim, padded]: [usize; 2],
        buffer: &mut Vec<f32>,
    ) -> Rows {
        if T::FLOAT_TYPE == FloatType::F32 && padded == head_dim {
            return Rows {
                start: self.tail([row, tokens.start, head]).as_ptr().cast(),
                stride: self.strides[1],
            };
        }
        buffer.resize(tokens.len() * padded, 0.0);
        for (to, token) in buffer.chunks_exact_mut(padded).zip(tokens) {
            let (to, padding) = to.split_at_mut(head_dim);
            // SAFETY: as the caller vouches.
            unsafe { widen_with::<T, V>(self.row([row, token, head], head_dim), to) };
            padding.fill(0.0);
        }
        Rows {
            start: buffer.as_ptr(),
            stride: padded,
        }
    }
}

/// Converts numbers to f32.
#[inline(always)]
fn widen<T: FloatElement>(from: &[T], to: &mut [f32]) {
    match T::FLOAT_TYPE {
        FloatType::F32 => to.copy_from_slice(bytemuck::cast_slice(from)),
        // By the slice, for which `half` uses vector instructions where there are any.
        FloatType::F16 => bytemuck::cast_slice::<T, f16>(from).convert_to_f32_slice(to),
        FloatType::BF16 => {
            for (to, &bits) in to.iter_mut().zip(bytemuck::cast_slice::<T, u16>(from)) {
                *to = f32::from_bits(u32::from(bits) << 16);
            }
        }
    }
}

/// [`widen`] with vector instructions.
///
/// # Safety
/// The processor must have the instructions of `V`.
#[inline(always)]
unsafe fn widen_with<T: FloatElement, V: Vector>(from: &[T], to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    if T::FLOAT_TYPE != FloatType::F16 {
        return widen(from, to);
    }
    let whole = from.len() - from.len() % V::LANES;
    let bits: &[u16] = bytemuck::cast_slice(from);
    for i in (0..whole).step_by(V::LANES) {
        // SAFETY: the caller vouches for the instructions, and there are as many numbers.
        unsafe { V::load_f16(bits.as_ptr().add(i)).store(to.as_mut_ptr().add(i)) };
    }
    widen(&from[whole..], &mut to[whole..]);
}

/// `softmax(scale q kᵀ) v` over the keys that each query sees, and the logarithm of the softmax's
/// denominator.
///
/// # Shapes
/// - `q`: `[batch, queries, heads, head_dim]`; `k`, `v`: `[batch, keys, kv_heads, head_dim]`
/// - `ranges`: `[batch or 1, queries, 2]`: the first key that a query sees, and the one past the last; no
///   keys give zeros, and `-inf`
/// - `out`: that of `q`; `lse`: `[batch, heads, queries]`
///
/// # Panics
/// If a size is zero, if the heads are no multiple of those of keys, and for slices that are too short, or
/// for outputs of another length.
pub fn attention<T: FloatElement>(
    q: Heads<T>,
    k: Heads<T>,
    v: Heads<T>,
    ranges: &[i32],
    settings: AttentionSettings,
    out: &mut [T],
    lse: &mut [f32],
) {
    attention_with(Simd::detect(), q, k, v, ranges, settings, out, lse);
}

/// [`attention`] with given vector instructions.
///
/// # Panics
/// As [`attention`], and if the processor does not have `simd`.
#[doc(hidden)]
#[expect(clippy::too_many_arguments, reason = "as attention")]
pub fn attention_with<T: FloatElement>(
    simd: Simd,
    q: Heads<T>,
    k: Heads<T>,
    v: Heads<T>,
    ranges: &[i32],
    settings: AttentionSettings,
    out: &mut [T],
    lse: &mut [f32],
) {
    let kernels = Kernels::new(simd);
    let problem = Problem::new(q, k, v, ranges, settings);
    let AttentionSettings {
        batch,
        heads,
        kv_heads,
        queries,
        head_dim,
        ..
    } = settings;
    assert_eq!(out.len(), batch * queries * heads * head_dim, "output");
    assert_eq!(lse.len(), batch * heads * queries, "log-sum-exp");
    let group = heads / kv_heads;
    let mut by_token = vec![0.0f32; lse.len()];
    let rows = out.par_chunks_mut(queries * heads * head_dim);
    let rows = rows.zip(by_token.par_chunks_mut(queries * heads));
    rows.enumerate().for_each(|(row, (out, lse))| {
        let tile = problem.tile_queries();
        let blocks = out.par_chunks_mut(tile * heads * head_dim);
        let blocks = blocks.zip(lse.par_chunks_mut(tile * heads));
        blocks.enumerate().for_each(|(i, (out, lse))| {
            let block = |kv_head| problem.block(row, kv_head, i);
            let keys = problem.bounds(row, block(0).range()).seen;
            let parts = match queries <= tile {
                true => keys.len().div_ceil(PART_KEYS).max(1),
                false => 1,
            };
            let tasks = (0..kv_heads * parts).into_par_iter();
            let products = keys.len() / parts * block(0).queries * group * head_dim;
            let states: Vec<State> = tasks
                .with_min_len(TASK_PRODUCTS / products.max(1))
                .map(|task| {
                    let (start, end) = (keys.start, keys.end);
                    let start = start + task % parts * PART_KEYS;
                    let end = if parts == 1 {
                        end
                    } else {
                        end.min(start + PART_KEYS)
                    };
                    // SAFETY: `Kernels::new` checked the instructions.
                    unsafe { (kernels.forward)(&problem, block(task / parts), start..end) }
                })
                .collect();
            let mut states = states.into_iter();
            for kv_head in 0..kv_heads {
                let mut parts = states.by_ref().take(parts);
                let mut state = parts.next().expect("one of each head");
                parts.for_each(|part| state.merge(part));
                state.finish();
                block(kv_head).store(&problem, &state.values, 1.0, out);
                let rows = state.sums.iter().enumerate();
                for (i, lse_of) in rows {
                    let (head, query) =
                        (kv_head * group + i / block(0).queries, i % block(0).queries);
                    lse[query * heads + head] = *lse_of;
                }
            }
        });
    });
    for (i, lse) in lse.iter_mut().enumerate() {
        let (head, query) = (i / queries, i % queries);
        *lse = by_token[(head / heads * queries + query) * heads + head % heads];
    }
}

/// The gradients of [`attention`] for `q`, `k` and `v`.
///
/// # Shapes
/// - `out`, `grad`: those of `q`, the output and its gradient
/// - `lse`: `[batch, heads, queries]`
/// - `dq`, `dk`, `dv`: those of `q`, `k` and `v`
///
/// # Panics
/// As [`attention`].
#[expect(clippy::too_many_arguments, reason = "seven tensors in, three out")]
pub fn attention_backward<T: FloatElement>(
    q: Heads<T>,
    k: Heads<T>,
    v: Heads<T>,
    ranges: &[i32],
    out: Heads<T>,
    lse: &[f32],
    grad: Heads<T>,
    settings: AttentionSettings,
    dq: &mut [T],
    dk: &mut [T],
    dv: &mut [T],
) {
    attention_backward_with(
        Simd::detect(),
        q,
        k,
        v,
        ranges,
        out,
        lse,
        grad,
        settings,
        dq,
        dk,
        dv,
    );
}

/// [`attention_backward`] with given vector instructions.
///
/// # Panics
/// As [`attention`], and if the processor does not have `simd`.
#[doc(hidden)]
#[expect(clippy::too_many_arguments, reason = "as attention_backward")]
pub fn attention_backward_with<T: FloatElement>(
    simd: Simd,
    q: Heads<T>,
    k: Heads<T>,
    v: Heads<T>,
    ranges: &[i32],
    out: Heads<T>,
    lse: &[f32],
    grad: Heads<T>,
    settings: AttentionSettings,
    dq: &mut [T],
    dk: &mut [T],
    dv: &mut [T],
) {
    let kernels = Kernels::new(simd);
    let problem = Problem::new(q, k, v, ranges, settings);
    let AttentionSettings {
        batch,
        heads,
        kv_heads,
        queries,
        keys,
        head_dim,
        scale,
        ..
    } = settings;
    let [of_q, of_k] = [queries * heads * head_dim, keys * kv_heads * head_dim];
    assert_eq!(dq.len(), batch * of_q, "gradient of q");
    assert_eq!(dk.len(), batch * of_k, "gradient of k");
    assert_eq!(dv.len(), batch * of_k, "gradient of v");
    let problem = Backward::new(problem, out, lse, grad);
    let dq = dq.par_chunks_mut(of_q).enumerate();
    dq.for_each(|(row, dq)| {
        let tile = problem.tile_queries();
        let blocks = dq.par_chunks_mut(tile * heads * head_dim).enumerate();
        blocks.for_each(|(i, dq)| {
            let block = |kv_head| problem.block(row, kv_head, i);
            let keys = problem.bounds(row, block(0).range()).seen;
            let sums: Vec<Vec<f32>> = (0..kv_heads)
                .into_par_iter()
                // SAFETY: `Kernels::new` checked the instructions.
                .map(|head| unsafe { (kernels.query_grads)(&problem, block(head), keys.clone()) })
                .collect();
            for (kv_head, sums) in sums.iter().enumerate() {
                block(kv_head).store(&problem, sums, scale, dq);
            }
        });
    });
    let rows = dk.par_chunks_mut(of_k).zip(dv.par_chunks_mut(of_k));
    rows.enumerate().for_each(|(row, (dk, dv))| {
        let of_block = TILE_KEYS * kv_heads * head_dim;
        let blocks = dk.par_chunks_mut(of_block).zip(dv.par_chunks_mut(of_block));
        blocks.enumerate().for_each(|(i, (dk, dv))| {
            let first = i * TILE_KEYS;
            let block = |kv_head| KeyBlock {
                row,
                kv_head,
                first,
                keys: TILE_KEYS.min(keys - first),
            };
            let sums: Vec<KeyGrads> = (0..kv_heads)
                .into_par_iter()
                // SAFETY: `Kernels::new` checked the instructions.
                .map(|head| unsafe { (kernels.key_grads)(&problem, block(head)) })
                .collect();
            for (kv_head, sums) in sums.iter().enumerate() {
                block(kv_head).store(&problem, &sums.keys, scale, dk);
                block(kv_head).store(&problem, &sums.values, 1.0, dv);
            }
        });
    });
}

/// Functions in terms of one set of vector instructions.
struct Kernels<T> {
    /// The part of some keys in the attention of some queries.
    ///
    /// # Safety
    /// The processor must have the instructions, of this and all others.
    forward: unsafe fn(&Problem<T>, Block, Range<usize>) -> State,
    /// What the gradient of some queries has from some keys, without the scale: `[rows, padded]`.
    query_grads: unsafe fn(&Backward<T>, Block, Range<usize>) -> Vec<f32>,
    /// The gradients of some keys and values, that of keys without the scale.
    key_grads: unsafe fn(&Backward<T>, KeyBlock) -> KeyGrads,
}

impl<T: FloatElement> Kernels<T> {
    /// # Panics
    /// If the processor does not have `simd`.
    fn new(simd: Simd) -> Self {
        simd.assert_available();
        match simd {
            Simd::Portable => portable::kernels(),
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => avx2::kernels(),
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 | Simd::Avx512Bf16 => avx512::kernels(),
            #[cfg(not(target_arch = "x86_64"))]
            Simd::Avx2 | Simd::Avx512 | Simd::Avx512Bf16 => unreachable!("not available"),
        }
    }
}

/// An attention whose arguments were checked.
struct Problem<'a, T> {
    settings: AttentionSettings,
    q: Heads<'a, T>,
    k: Heads<'a, T>,
    v: Heads<'a, T>,
    /// Of each query, or of those of one row for all, within the keys; none is `[0, 0]`.
    ranges: Vec<[i32; 2]>,
}

/// Keys of some queries.
struct Bounds {
    /// Those that any of them sees, and maybe some between.
    seen: Range<usize>,
    /// Those that all of them see.
    by_all: Range<usize>,
}

impl<'a, T: FloatElement> Problem<'a, T> {
    fn new(
        q: Heads<'a, T>,
        k: Heads<'a, T>,
        v: Heads<'a, T>,
        ranges: &[i32],
        settings: AttentionSettings,
    ) -> Self {
        let AttentionSettings {
            batch,
            heads,
            kv_heads,
            queries,
            keys,
            head_dim,
            ..
        } = settings;
        let sizes = [batch, heads, kv_heads, queries, keys, head_dim];
        assert!(!sizes.contains(&0), "{settings:?}");
        assert!(heads.is_multiple_of(kv_heads), "{settings:?}");
        q.assert_len("q", [batch, queries, heads, head_dim]);
        k.assert_len("k", [batch, keys, kv_heads, head_dim]);
        v.assert_len("v", [batch, keys, kv_heads, head_dim]);
        let rows = ranges.len() / (2 * queries);
        assert!(rows == 1 || rows == batch, "ranges of {rows} rows");
        assert_eq!(ranges.len(), rows * queries * 2, "ranges");
        let last = i32::try_from(keys).expect("keys that an i32 counts");
        let ranges = ranges.as_chunks::<2>().0.iter().map(|&[first, end]| {
            let (first, end) = (first.max(0), end.min(last));
            if first < end { [first, end] } else { [0, 0] }
        });
        Self {
            settings,
            q,
            k,
            v,
            ranges: ranges.collect(),
        }
    }

    /// Ranges of some queries of a row.
    fn ranges(&self, row: usize, queries: Range<usize>) -> &[[i32; 2]] {
        let row = match self.ranges.len() == self.settings.queries {
            true => 0,
            false => row,
        };
        &self.ranges[row * self.settings.queries..][queries]
    }

    fn bounds(&self, row: usize, queries: Range<usize>) -> Bounds {
        let ranges = self.ranges(row, queries);
        let seen = ranges.iter().filter(|[first, end]| first < end);
        let range = |first: Option<i32>, end: Option<i32>| {
            first.unwrap_or(0) as usize..end.unwrap_or(0) as usize
        };
        let [firsts, ends] = [0, 1].map(|side| seen.clone().map(move |range| range[side]));
        Bounds {
            seen: range(firsts.min(), ends.max()),
            by_all: range(
                ranges.iter().map(|range| range[0]).max(),
                ranges.iter().map(|range| range[1]).min(),
            ),
        }
    }

    fn group(&self) -> usize {
        self.settings.heads / self.settings.kv_heads
    }

    /// Block `i` of the queries of a row.
    fn block(&self, row: usize, kv_head: usize, i: usize) -> Block {
        let tile = self.tile_queries();
        let first = i * tile;
        Block {
            row,
            kv_head,
            first,
            queries: tile.min(self.settings.queries - first),
        }
    }

    /// Queries of a block, but for the last.
    fn tile_queries(&self) -> usize {
        (TILE_ROWS / self.group()).clamp(1, TILE_QUERIES)
    }

    /// What products of queries and keys are multiplied with, and then their hyperbolic tangent: to make
    /// scores as powers of two.
    fn factors(&self) -> (f32, Option<f32>) {
        let AttentionSettings { scale, softcap, .. } = self.settings;
        let log2_e = std::f32::consts::LOG2_E;
        match softcap {
            None => (scale * log2_e, None),
            Some(cap) => (scale / cap, Some(cap * log2_e)),
        }
    }
}

/// A backward pass whose arguments were checked.
struct Backward<'a, T> {
    problem: Problem<'a, T>,
    grad: Heads<'a, T>,
    /// `[batch, heads, queries]`: the log-sum-exp, of base two; `f32::MIN` for that of no key.
    lse: Vec<f32>,
    /// As much: the product of output and gradient.
    delta: Vec<f32>,
}

impl<'a, T> std::ops::Deref for Backward<'a, T> {
    type Target = Problem<'a, T>;

    fn deref(&self) -> &Self::Target {
        &self.problem
    }
}

impl<'a, T: FloatElement> Backward<'a, T> {
    fn new(problem: Problem<'a, T>, out: Heads<T>, lse: &[f32], grad: Heads<'a, T>) -> Self {
        let AttentionSettings {
            batch,
            heads,
            queries,
            head_dim,
            ..
        } = problem.settings;
        out.assert_len("output", [batch, queries, heads, head_dim]);
        grad.assert_len("gradient", [batch, queries, heads, head_dim]);
        assert_eq!(lse.len(), batch * heads * queries, "log-sum-exp");
        let mut delta = vec![0.0; lse.len()];
        let of_heads = delta.par_chunks_mut(queries).enumerate();
        of_heads.for_each(|(head, delta)| {
            let mut buffers = [vec![0.0; head_dim], vec![0.0; head_dim]];
            for (query, delta) in delta.iter_mut().enumerate() {
                let at = [head / heads, query, head % heads];
                for (tensor, buffer) in [out, grad].iter().zip(&mut buffers) {
                    widen(tensor.row(at, head_dim), buffer);
                }
                let [out, grad] = &buffers;
                *delta = out.iter().zip(grad).map(|(out, grad)| out * grad).sum();
            }
        });
        let log2_e = std::f32::consts::LOG2_E;
        Self {
            problem,
            grad,
            lse: lse.iter().map(|lse| (lse * log2_e).max(f32::MIN)).collect(),
            delta,
        }
    }

    /// Where the numbers of a head's queries are.
    fn queries_of(&self, row: usize, head: usize) -> Range<usize> {
        let AttentionSettings { heads, queries, .. } = self.settings;
        let first = (row * heads + head) * queries;
        first..first + queries
    }
}

/// Queries that one task takes, of all heads that share a head of keys: row `i` of a tile is that of query
/// `first + i % queries` and of the group's head `i / queries`.
#[derive(Clone, Copy)]
struct Block {
    row: usize,
    kv_head: usize,
    first: usize,
    queries: usize,
}

impl Block {
    fn range(&self) -> Range<usize> {
        self.first..self.first + self.queries
    }

    /// Row of the batch, token and head of each row of a tile.
    fn rows(self, group: usize) -> impl Iterator<Item = [usize; 3]> {
        let heads = self.kv_head * group..(self.kv_head + 1) * group;
        heads.flat_map(move |head| self.range().map(move |token| [self.row, token, head]))
    }

    /// Rounds sums, each multiplied with a factor, to a part of a tensor that starts with the block's first
    /// query.
    ///
    /// # Shapes
    /// - `sums`: `[rows, padded]`; `out`: `[queries, heads, head_dim]`
    fn store<T: FloatElement>(
        self,
        problem: &Problem<T>,
        sums: &[f32],
        factor: f32,
        out: &mut [T],
    ) {
        let AttentionSettings {
            heads, head_dim, ..
        } = problem.settings;
        let group = problem.group();
        let padded = sums.len() / (group * self.queries);
        let rows = self.rows(group).zip(sums.chunks_exact(padded));
        for ([_, token, head], sums) in rows {
            let at = ((token - self.first) * heads + head) * head_dim;
            store(&sums[..head_dim], factor, &mut out[at..][..head_dim]);
        }
    }
}

/// Keys that one task takes.
#[derive(Clone, Copy)]
struct KeyBlock {
    row: usize,
    kv_head: usize,
    first: usize,
    keys: usize,
}

impl KeyBlock {
    /// As [`Block::store`], for `[keys, kv_heads, head_dim]`.
    fn store<T: FloatElement>(
        self,
        problem: &Problem<T>,
        sums: &[f32],
        factor: f32,
        out: &mut [T],
    ) {
        let AttentionSettings {
            kv_heads, head_dim, ..
        } = problem.settings;
        let padded = sums.len() / self.keys;
        let rows = out.chunks_exact_mut(kv_heads * head_dim);
        for (out, sums) in rows.zip(sums.chunks_exact(padded)) {
            let out = &mut out[self.kv_head * head_dim..][..head_dim];
            store(&sums[..head_dim], factor, out);
        }
    }
}

/// Rounds numbers, each multiplied with a factor.
fn store<T: FloatElement>(numbers: &[f32], factor: f32, out: &mut [T]) {
    let mut buffer = [0.0; 64];
    for (numbers, out) in numbers.chunks(64).zip(out.chunks_mut(64)) {
        let buffer = &mut buffer[..numbers.len()];
        for (to, number) in buffer.iter_mut().zip(numbers) {
            *to = number * factor;
        }
        round(buffer, out);
    }
}
