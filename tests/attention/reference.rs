//! Attention in f64, as a loop over queries that holds every score. Shared by the tests of attention, each
//! of which uses a part of it.
#![allow(dead_code)]

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_nf4::op::{AttentionMask, AttentionOptions};

/// The numbers of an [`AttentionMask`].
#[derive(Debug, Clone, Default)]
pub struct Mask {
    pub causal: bool,
    pub window: Option<usize>,
    pub starts: Option<Vec<usize>>,
    pub lengths: Option<Vec<usize>>,
    pub sequence_ends: Option<Vec<Vec<usize>>>,
}

impl Mask {
    pub fn causal() -> Self {
        Self {
            causal: true,
            ..Self::default()
        }
    }

    pub fn on(&self, device: &Device) -> AttentionMask {
        let column = |numbers: &Vec<usize>| {
            let numbers: Vec<i32> = numbers.iter().map(|&number| number as i32).collect();
            let len = numbers.len();
            Tensor::<1, Int>::from_data(TensorData::new(numbers, [len]), (device, DType::I32))
        };
        AttentionMask {
            causal: self.causal,
            window: self.window,
            starts: self.starts.as_ref().map(column),
            lengths: self.lengths.as_ref().map(column),
            sequence_ends: self.sequence_ends.clone(),
        }
    }

    /// Whether a query of a row sees a key, by the definition of each part of the mask.
    pub fn sees(&self, row: usize, query: usize, key: usize, [queries, keys]: [usize; 2]) -> bool {
        let length = self.lengths.as_ref().map_or(keys, |lengths| lengths[row]) as i64;
        let start = self.starts.as_ref().map_or(0, |starts| starts[row]) as i64;
        let position = length - queries as i64 + query as i64;
        let sequence = |token: usize| {
            let ends = self.sequence_ends.as_ref().map(|rows| &rows[row]);
            ends.map(|ends| ends.iter().position(|&end| token < end))
        };
        let at = key as i64;
        at < length
            && at >= start
            && (!self.causal || at <= position)
            && self
                .window
                .is_none_or(|window| at > position - window.min(1 << 40) as i64)
            && (self.sequence_ends.is_none() || sequence(query) == sequence(key))
    }
}

/// The sizes and settings of an attention.
#[derive(Debug, Clone)]
pub struct Problem {
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub queries: usize,
    pub keys: usize,
    pub head_dim: usize,
    pub mask: Mask,
    pub options: AttentionOptions,
}

impl Problem {
    pub fn query_dims(&self) -> [usize; 4] {
        [self.batch, self.heads, self.queries, self.head_dim]
    }

    pub fn key_dims(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.keys, self.head_dim]
    }

    /// Whether any query of a row sees a key.
    pub fn is_seen(&self, row: usize, key: usize) -> bool {
        let sizes = [self.queries, self.keys];
        (0..self.queries).any(|query| self.mask.sees(row, query, key, sizes))
    }

    /// Whether a query of a row sees any key.
    pub fn sees_any(&self, row: usize, query: usize) -> bool {
        let sizes = [self.queries, self.keys];
        (0..self.keys).any(|key| self.mask.sees(row, query, key, sizes))
    }

    pub fn scale(&self) -> f64 {
        let default = (self.head_dim as f64).powf(-0.5);
        self.options.scale.map_or(default, f64::from)
    }
}

/// Values with any leading dimensions, head after head.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// `[batch, heads, queries, head_dim]`
    pub q: Vec<f64>,
    /// `[batch, kv_heads, keys, head_dim]`
    pub k: Vec<f64>,
    pub v: Vec<f64>,
    /// `[heads]`
    pub sinks: Option<Vec<f64>>,
}

/// An expected tensor, and how large the terms are that its elements are sums of: the largest root of the
/// sum of their squares.
#[derive(Debug, Clone, Default)]
pub struct Expected {
    pub values: Vec<f64>,
    pub magnitude: f64,
}

/// A tensor as it is summed up.
struct Sums {
    values: Vec<f64>,
    squares: Vec<f64>,
}

impl Sums {
    fn new(elems: usize) -> Self {
        Self {
            values: vec![0.0; elems],
            squares: vec![0.0; elems],
        }
    }

    /// Adds `factor * row`, which is known to within a part of `magnitude * row`.
    fn add(&mut self, at: usize, row: &[f64], factor: f64, magnitude: f64) {
        for (i, x) in row.iter().enumerate() {
            self.values[at + i] += factor * x;
            self.squares[at + i] += (magnitude * x).powi(2);
        }
    }

    fn finish(self) -> Expected {
        Expected {
            values: self.values,
            magnitude: self.squares.into_iter().fold(0.0, f64::max).sqrt(),
        }
    }
}

/// What attention and its backward pass give.
#[derive(Debug, Clone)]
pub struct Results {
    pub output: Expected,
    /// `[batch, heads, queries]`
    pub lse: Vec<f64>,
    pub dq: Expected,
    pub dk: Expected,
    pub dv: Expected,
    /// `[heads]`
    pub d_sinks: Expected,
    /// The largest score, and sum of the magnitudes of its terms.
    pub largest_score: f64,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The output, the log-sum-exp, and the gradients for a gradient of the output.
pub fn attention(problem: &Problem, inputs: &Inputs, grad: &[f64]) -> Results {
    let Problem {
        batch,
        heads,
        kv_heads,
        queries,
        keys,
        head_dim: d,
        ref mask,
        options,
    } = *problem;
    let scale = problem.scale();
    let of_queries = || Sums::new(batch * heads * queries * d);
    let of_keys = || Sums::new(batch * kv_heads * keys * d);
    let (mut output, mut dq) = (of_queries(), of_queries());
    let (mut dk, mut dv) = (of_keys(), of_keys());
    let mut d_sinks = Sums::new(heads);
    let mut lse = Vec::new();
    let mut largest_score = 0f64;
    for b in 0..batch {
        for h in 0..heads {
            let sink = inputs.sinks.as_ref().map(|sinks| sinks[h]);
            for i in 0..queries {
                let at = ((b * heads + h) * queries + i) * d;
                let q = &inputs.q[at..][..d];
                let key_at = |j: usize| ((b * kv_heads + h / (heads / kv_heads)) * keys + j) * d;
                let seen: Vec<usize> = (0..keys)
                    .filter(|&j| mask.sees(b, i, j, [queries, keys]))
                    .collect();
                // The scores and what their softcap has as its slope.
                let scores: Vec<(f64, f64)> = seen
                    .iter()
                    .map(|&j| {
                        let k = &inputs.k[key_at(j)..][..d];
                        let terms: f64 = q.iter().zip(k).map(|(q, k)| (q * k).abs()).sum();
                        largest_score = largest_score.max(terms * scale);
                        let score = dot(q, k) * scale;
                        match options.softcap.map(f64::from) {
                            None => (score, 1.0),
                            Some(cap) => {
                                let tanh = (score / cap).tanh();
                                (cap * tanh, 1.0 - tanh * tanh)
                            }
                        }
                    })
                    .collect();
                let all = scores.iter().map(|&(score, _)| score).chain(sink);
                let max = all.clone().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = all.map(|score| (score - max).exp()).sum();
                // Of nothing, or of a sink that is none.
                let of_all = match max {
                    f64::NEG_INFINITY => max,
                    max => max + sum.ln(),
                };
                lse.push(of_all);
                let parts: Vec<f64> = scores.iter().map(|(s, _)| (s - of_all).exp()).collect();
                for (&j, &p) in seen.iter().zip(&parts) {
                    output.add(at, &inputs.v[key_at(j)..][..d], p, p);
                }
                let (grad, o) = (&grad[at..][..d], &output.values[at..][..d]);
                let delta = dot(grad, o);
                let products = grad.iter().zip(o).map(|(g, o)| (g * o).powi(2));
                let delta_magnitude = delta.abs() + products.sum::<f64>().sqrt();
                for ((&j, &p), &(_, slope)) in seen.iter().zip(&parts).zip(&scores) {
                    let (k, v) = (&inputs.k[key_at(j)..][..d], &inputs.v[key_at(j)..][..d]);
                    let dp = dot(grad, v);
                    let factor = p * slope * scale;
                    let magnitude = factor * (dp.abs() + delta_magnitude);
                    dq.add(at, k, factor * (dp - delta), magnitude);
                    dk.add(key_at(j), q, factor * (dp - delta), magnitude);
                    dv.add(key_at(j), grad, p, p);
                }
                if let Some(sink) = sink.filter(|&sink| sink > f64::NEG_INFINITY) {
                    let p = (sink - of_all).exp();
                    d_sinks.add(h, &[1.0], -p * delta, p * delta_magnitude);
                }
            }
        }
    }
    Results {
        output: output.finish(),
        lse,
        dq: dq.finish(),
        dk: dk.finish(),
        dv: dv.finish(),
        d_sinks: d_sinks.finish(),
        largest_score,
    }
}
