//! Attention over the keys of a range, on every device that is compiled in, against a loop in f64. A
//! device that is compiled in but missing fails its tests.
//!
//! With the feature `fusion` the CubeCL devices run everything here through `Fusion`.

#[path = "attention/reference.rs"]
mod reference;
mod tensors;

use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData};
use burn_nf4::Nf4Error;
use burn_nf4::format::FloatType;
use burn_nf4::op::{
    AttentionMask, AttentionOptions, KeyRanges, MAX_HEAD_DIM, attention, attention_with_lse,
};
use reference::{Expected, Inputs, Mask, Problem, Results};
use rstest::rstest;
use tensors::*;

/// How a tensor `[batch, heads, tokens, head_dim]` lies in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Layout {
    Contiguous,
    /// As projections give it: `[batch, tokens, heads, head_dim]`.
    TokenMajor,
    /// The filled part of a cache `[batch, heads, longer, head_dim]`.
    Cache,
    /// The filled part of a cache `[batch, longer, heads, head_dim]`.
    TokenMajorCache,
}

/// Tokens of a cache before its filled part.
const BEFORE: usize = 3;

/// Tokens of a cache after its filled part.
const AFTER: usize = 4;

impl Layout {
    const ALL: [Self; 4] = [
        Self::Contiguous,
        Self::TokenMajor,
        Self::Cache,
        Self::TokenMajorCache,
    ];

    fn is_cache(self) -> bool {
        matches!(self, Self::Cache | Self::TokenMajorCache)
    }

    fn is_token_major(self) -> bool {
        matches!(self, Self::TokenMajor | Self::TokenMajorCache)
    }

    /// The tensor that the view is of. What the view does not show is NaN.
    fn leaf(
        self,
        values: &[f64],
        dims: [usize; 4],
        dtype: FloatType,
        device: &Device,
    ) -> Tensor<4> {
        let [batch, heads, tokens, d] = dims;
        let (before, all) = match self.is_cache() {
            true => (BEFORE, BEFORE + tokens + AFTER),
            false => (0, tokens),
        };
        let mut data = vec![f32::NAN; batch * heads * all * d];
        for (row, from) in values.chunks_exact(d).enumerate() {
            let (token, head) = (row % tokens + before, row / tokens);
            let (b, h) = (head / heads, head % heads);
            let at = match self.is_token_major() {
                true => ((b * all + token) * heads + h) * d,
                false => ((b * heads + h) * all + token) * d,
            };
            for (to, &from) in data[at..][..d].iter_mut().zip(from) {
                *to = from as f32;
            }
        }
        let shape = match self.is_token_major() {
            true => [batch, all, heads, d],
            false => [batch, heads, all, d],
        };
        tensor(&data, shape, dtype, device)
    }

    /// The view `[batch, heads, tokens, head_dim]` of a leaf, or of its gradient.
    fn view(self, leaf: Tensor<4>) -> Tensor<4> {
        let x = match self.is_token_major() {
            true => leaf.swap_dims(1, 2),
            false => leaf,
        };
        let all = x.dims()[2];
        match self.is_cache() {
            true => x.narrow(2, BEFORE, all - BEFORE - AFTER),
            false => x,
        }
    }
}

/// One call of attention.
#[derive(Debug, Clone)]
struct Case {
    name: String,
    problem: Problem,
    /// Of queries, and of keys and values.
    layouts: [Layout; 2],
    sinks: bool,
    /// The sinks, where they are to be these.
    sinks_of_heads: Option<Vec<f32>>,
    /// What queries are multiplied with: how peaked the softmax is.
    peak: f64,
}

/// A case of `[batch, heads, kv_heads, queries, keys, head_dim]`.
fn case(name: impl Into<String>, sizes: [usize; 6], mask: Mask) -> Case {
    let [batch, heads, kv_heads, queries, keys, head_dim] = sizes;
    Case {
        name: name.into(),
        problem: Problem {
            batch,
            heads,
            kv_heads,
            queries,
            keys,
            head_dim,
            mask,
            options: AttentionOptions::default(),
        },
        layouts: [Layout::TokenMajor; 2],
        sinks: false,
        sinks_of_heads: None,
        peak: 6.0,
    }
}

fn round(values: Vec<f32>, dtype: FloatType) -> Vec<f64> {
    let round = |value: f32| match dtype {
        FloatType::F16 => half::f16::from_f32(value).to_f64(),
        FloatType::BF16 => half::bf16::from_f32(value).to_f64(),
        FloatType::F32 => value.into(),
    };
    values.into_iter().map(round).collect()
}

impl Case {
    /// Inputs rounded to a dtype, and a gradient of the output. Keys and values that no query sees are
    /// large, to be found in a result if they are read.
    fn inputs(&self, dtype: FloatType) -> (Inputs, Vec<f64>) {
        let problem = &self.problem;
        let of = |dims: [usize; 4], seed: u64, factor: f64| {
            let values = uniform(dims.iter().product(), seed).into_iter();
            values.map(|x| x * factor as f32).collect::<Vec<f32>>()
        };
        let [k, v] = [2, 3].map(|seed| {
            let mut values = of(problem.key_dims(), seed, 1.0);
            for (row, values) in values.chunks_exact_mut(problem.head_dim).enumerate() {
                let head = row / problem.keys;
                if !problem.is_seen(head / problem.kv_heads, row % problem.keys) {
                    values.fill(1000.0);
                }
            }
            round(values, dtype)
        });
        let random = || {
            let sinks = uniform(problem.heads, 5).into_iter();
            sinks.map(|x| x * 3.0).collect()
        };
        let sinks = self
            .sinks
            .then(|| self.sinks_of_heads.clone().unwrap_or_else(random));
        let inputs = Inputs {
            q: round(of(problem.query_dims(), 1, self.peak), dtype),
            k,
            v,
            sinks: sinks.map(|sinks| sinks.into_iter().map(f64::from).collect()),
        };
        (inputs, round(of(problem.query_dims(), 4, 1.0), dtype))
    }

    fn ranges(&self, device: &Device) -> KeyRanges {
        let Problem {
            queries,
            keys,
            mask,
            ..
        } = &self.problem;
        let ranges = KeyRanges::new(&mask.on(device), *queries, *keys, device);
        let ranges = ranges.expect("valid");
        let of_rows = mask.starts.is_some() || mask.lengths.is_some();
        let rows = match of_rows || mask.sequence_ends.is_some() {
            true => self.problem.batch,
            false => 1,
        };
        assert_eq!(ranges.rows(), rows, "{}", self.name);
        ranges
    }
}

/// What a device gives.
#[derive(Debug, Clone, PartialEq)]
struct Got {
    output: Vec<f64>,
    lse: Vec<f64>,
    /// Of q, k, v and the sinks, as far as they are tracked.
    grads: [Option<Vec<f64>>; 4],
}

/// Runs a case with those of q, k, v and the sinks tracked that are `tracked`.
fn run(case: &Case, dtype: FloatType, device: &Device, tracked: [bool; 4]) -> Got {
    let problem = &case.problem;
    let (inputs, grad) = case.inputs(dtype);
    let [of_q, of_k] = case.layouts;
    let leaf = |layout: Layout, values: &[f64], dims, tracked: bool| {
        let leaf = layout.leaf(values, dims, dtype, device);
        if tracked { leaf.require_grad() } else { leaf }
    };
    let q = leaf(of_q, &inputs.q, problem.query_dims(), tracked[0]);
    let k = leaf(of_k, &inputs.k, problem.key_dims(), tracked[1]);
    let v = leaf(of_k, &inputs.v, problem.key_dims(), tracked[2]);
    let sinks = inputs.sinks.as_ref().map(|sinks| {
        let sinks: Vec<f32> = sinks.iter().map(|&sink| sink as f32).collect();
        let sinks = tensor(&sinks, [problem.heads], FloatType::F32, device);
        if tracked[3] {
            sinks.require_grad()
        } else {
            sinks
        }
    });
    let (y, lse) = attention_with_lse(
        of_q.view(q.clone()),
        of_k.view(k.clone()),
        of_k.view(v.clone()),
        &case.ranges(device),
        sinks.clone(),
        problem.options,
    )
    .expect(&case.name);
    assert_eq!(y.dims(), problem.query_dims(), "{}", case.name);
    assert_eq!(y.dtype(), DType::from(dtype), "{}", case.name);
    assert_eq!(lse.dtype(), DType::F32, "{}", case.name);
    let lse_dims = [problem.batch, problem.heads, problem.queries];
    assert_eq!(lse.dims(), lse_dims, "{}", case.name);
    assert!(!lse.is_require_grad());
    let mut got = Got {
        output: values(&y),
        lse: values(&lse),
        grads: [const { None }; 4],
    };
    if tracked == [false; 4] {
        return got;
    }
    let grad = Layout::Contiguous.leaf(&grad, problem.query_dims(), dtype, device);
    let grads = (y * grad).sum().backward();
    let of_leaf =
        |layout: Layout, leaf: &Tensor<4>| leaf.grad(&grads).map(|grad| values(&layout.view(grad)));
    got.grads = [
        of_leaf(of_q, &q),
        of_leaf(of_k, &k),
        of_leaf(of_k, &v),
        sinks.and_then(|sinks| sinks.grad(&grads).map(|grad| values(&grad))),
    ];
    got
}

/// How far results may lie from the exact ones, as a part of how large their terms are: of the output, and
/// of gradients.
///
/// f32: rounding to 24 bits, which the exponential makes worse as scores grow, whose rounding becomes a
/// factor of the probability. f16, bf16: the output is rounded once to 11 or 8 bits, and products of
/// matrices may round each probability, and what is multiplied with keys and queries, to as many.
fn tolerances(dtype: FloatType, largest_score: f64) -> [f64; 2] {
    let of_scores = 2f64.powi(-22) * (8.0 + largest_score);
    let of_dtype = match dtype {
        FloatType::F32 => 0.0,
        FloatType::F16 => 2f64.powi(-10),
        FloatType::BF16 => 2f64.powi(-7),
    };
    [of_scores + of_dtype, 2.0 * (of_scores + of_dtype)]
}

#[track_caller]
fn assert_expected(got: &[f64], expected: &Expected, tolerance: f64, what: &str) {
    let bounds: Vec<(f64, f64)> = expected
        .values
        .iter()
        .map(|&value| (value, expected.magnitude.max(value.abs()) * tolerance))
        .collect();
    assert_close(got, &bounds, what);
}

fn check_output(case: &Case, got: &Got, expected: &Results, dtype: FloatType) {
    let name = format!("{} {dtype:?}", case.name);
    let [tolerance, _] = tolerances(dtype, expected.largest_score);
    assert_expected(&got.output, &expected.output, tolerance, &name);
    // Sums are of f32, whatever the dtype.
    let [of_lse, _] = tolerances(FloatType::F32, expected.largest_score);
    assert_eq!(got.lse.len(), expected.lse.len(), "{name}");
    for (i, (&got, &value)) in got.lse.iter().zip(&expected.lse).enumerate() {
        // Also equal where both are of no key.
        let close = got == value || (got - value).abs() <= of_lse;
        assert!(close, "{name}: lse[{i}] is {got}, expected {value}");
    }
}

fn check_grads(case: &Case, got: &Got, expected: &Results, dtype: FloatType) {
    let [_, tolerance] = tolerances(dtype, expected.largest_score);
    let [dq, dk, dv, d_sinks] = &got.grads;
    for (what, got, expected) in [
        ("dq", dq, &expected.dq),
        ("dk", dk, &expected.dk),
        ("dv", dv, &expected.dv),
    ] {
        let name = format!("{} {dtype:?} {what}", case.name);
        let got = got.as_ref().expect(&name);
        assert_expected(got, expected, tolerance, &name);
        // Where nothing flows, nothing may.
        let problem = &case.problem;
        let (heads, tokens) = match what {
            "dq" => (problem.heads, problem.queries),
            _ => (problem.kv_heads, problem.keys),
        };
        for (i, row) in got.chunks(problem.head_dim).enumerate() {
            let (batch_row, token) = (i / tokens / heads, i % tokens);
            let flows = match what {
                "dq" => problem.sees_any(batch_row, token),
                _ => problem.is_seen(batch_row, token),
            };
            assert!(flows || row.iter().all(|&x| x == 0.0), "{name}: {row:?}");
        }
    }
    assert_eq!(d_sinks.is_some(), case.sinks, "{}", case.name);
    if let Some(got) = d_sinks {
        let name = format!("{} {dtype:?} d_sinks", case.name);
        assert_expected(got, &expected.d_sinks, tolerance, &name);
        for (sink, got) in case.sinks_of_heads.iter().flatten().zip(got) {
            assert!(sink.is_finite() || *got == 0.0, "{name} of {sink}: {got}");
        }
    }
}

/// Runs cases without a graph and with one, and compares all results with the reference.
fn check(device: &Device, dtype: FloatType, cases: Vec<Case>) {
    if lacks(device, dtype.into()) {
        return;
    }
    for case in cases {
        let (inputs, grad) = case.inputs(dtype);
        let expected = reference::attention(&case.problem, &inputs, &grad);
        let plain = run(&case, dtype, device, [false; 4]);
        check_output(&case, &plain, &expected, dtype);
        let tracked = device.clone().autodiff();
        let got = run(&case, dtype, &tracked, [true; 4]);
        check_output(&case, &got, &expected, dtype);
        check_grads(&case, &got, &expected, dtype);
    }
}

fn head_sizes(device: &Device, dtype: FloatType) {
    let cases = [1, 7, 8, 32, 40, 64, 80, 96, 128, MAX_HEAD_DIM].map(|d| {
        let queries = if d > 128 { 18 } else { 35 };
        case(
            format!("head of {d}"),
            [1, 4, 2, queries, queries, d],
            Mask::causal(),
        )
    });
    check(device, dtype, cases.into());
}

fn head_counts(device: &Device, dtype: FloatType) {
    let cases = [(1, 1), (4, 2), (6, 1), (8, 2), (3, 3), (12, 4)].map(|(heads, kv_heads)| {
        case(
            format!("{heads} heads, {kv_heads} of keys"),
            [2, heads, kv_heads, 37, 37, 32],
            Mask::causal(),
        )
    });
    check(device, dtype, cases.into());
}

/// Fewer queries than keys, with a causal mask the last of the tokens; and more.
fn token_counts(device: &Device, dtype: FloatType) {
    let cases = [
        (1, 1),
        (2, 2),
        (16, 16),
        (64, 64),
        (65, 65),
        (130, 130),
        (1, 130),
        (1, 64),
        (5, 37),
        (33, 129),
        (64, 128),
        (9, 4),
    ];
    let cases = cases.iter().flat_map(|&(queries, keys)| {
        let name = format!("{queries} queries, {keys} keys");
        [
            case(
                format!("{name}, causal"),
                [1, 4, 2, queries, keys, 64],
                Mask::causal(),
            ),
            case(name, [1, 2, 1, queries, keys, 32], Mask::default()),
        ]
    });
    check(device, dtype, cases.collect());
}

/// A few queries over many keys, which cubes or threads share.
fn long_caches(device: &Device, dtype: FloatType) {
    let lengths = Mask {
        lengths: Some(vec![700, 5, 0]),
        ..Mask::causal()
    };
    let window = Mask {
        window: Some(300),
        ..Mask::causal()
    };
    let cases = vec![
        case("one query", [2, 8, 2, 1, 700, 64], Mask::causal()),
        case("three queries", [1, 4, 1, 3, 600, 128], Mask::causal()),
        case(
            "queries of two tiles",
            [1, 5, 1, 5, 500, 96],
            Mask::causal(),
        ),
        case("lengths far apart", [3, 4, 2, 1, 700, 32], lengths),
        case("a window", [1, 3, 1, 2, 640, 160], window),
        case("a long head", [1, 2, 2, 1, 300, 256], Mask::default()),
    ];
    check(device, dtype, cases);
}

fn windows(device: &Device, dtype: FloatType) {
    let window = |window: usize| Mask {
        window: Some(window),
        ..Mask::causal()
    };
    let cases = vec![
        case("a window of one", [1, 2, 1, 20, 20, 32], window(1)),
        case("a window of 16", [2, 4, 2, 70, 70, 32], window(16)),
        case("a window of 33", [1, 2, 2, 130, 130, 64], window(33)),
        case("a window above all", [1, 2, 1, 20, 20, 32], window(500)),
        case("a window and a cache", [1, 4, 2, 7, 100, 64], window(24)),
        // As an i32 it would be -1, and hide all keys.
        case(
            "a window above all, and lengths",
            [2, 2, 1, 5, 20, 32],
            Mask {
                lengths: Some(vec![20, 9]),
                ..window(usize::MAX)
            },
        ),
        case("a window, one query", [3, 4, 2, 1, 100, 64], window(24)),
    ];
    check(device, dtype, cases);
}

fn paddings(device: &Device, dtype: FloatType) {
    let starts = |starts: &[usize], mask: Mask| Mask {
        starts: Some(starts.to_vec()),
        ..mask
    };
    let windowed = Mask {
        window: Some(8),
        ..Mask::causal()
    };
    let causal = Mask::causal;
    let cases = vec![
        case(
            "padding",
            [3, 4, 2, 70, 70, 32],
            starts(&[0, 5, 66], causal()),
        ),
        case(
            "padding, all of a row",
            [3, 2, 1, 40, 40, 32],
            starts(&[40, 0, 17], causal()),
        ),
        case(
            "padding, not causal",
            [2, 2, 1, 40, 40, 32],
            starts(&[13, 39], Mask::default()),
        ),
        case(
            "padding and a window",
            [2, 2, 1, 40, 40, 32],
            starts(&[13, 2], windowed),
        ),
        case(
            "padding, one query",
            [3, 4, 2, 1, 90, 64],
            starts(&[0, 70, 90], causal()),
        ),
        case(
            "padding, new tokens",
            [2, 4, 2, 6, 50, 64],
            starts(&[46, 3], causal()),
        ),
    ];
    check(device, dtype, cases);
}

fn lengths(device: &Device, dtype: FloatType) {
    let lengths = |lengths: &[usize], mask: Mask| Mask {
        lengths: Some(lengths.to_vec()),
        ..mask
    };
    let windowed = Mask {
        window: Some(8),
        ..Mask::causal()
    };
    let padded = Mask {
        starts: Some(vec![4, 0, 20]),
        ..Mask::causal()
    };
    let causal = Mask::causal;
    let cases = vec![
        case(
            "one query",
            [3, 8, 2, 1, 128, 64],
            lengths(&[1, 77, 128], causal()),
        ),
        case(
            "new tokens",
            [3, 4, 2, 5, 100, 32],
            lengths(&[5, 64, 100], causal()),
        ),
        case(
            "nothing, and less than the queries",
            [3, 2, 1, 9, 40, 32],
            lengths(&[0, 3, 20], causal()),
        ),
        case(
            "not causal",
            [3, 4, 2, 20, 50, 32],
            lengths(&[1, 33, 50], Mask::default()),
        ),
        case(
            "with a window",
            [2, 2, 1, 6, 60, 32],
            lengths(&[7, 44], windowed),
        ),
        case(
            "with padding",
            [3, 2, 1, 6, 60, 32],
            lengths(&[10, 44, 24], padded),
        ),
    ];
    check(device, dtype, cases);
}

fn packed_sequences(device: &Device, dtype: FloatType) {
    let packed = |ends: &[&[usize]], mask: Mask| Mask {
        sequence_ends: Some(ends.iter().map(|ends| ends.to_vec()).collect()),
        ..mask
    };
    let windowed = Mask {
        window: Some(8),
        ..Mask::causal()
    };
    let padded = Mask {
        starts: Some(vec![10, 3]),
        ..Mask::causal()
    };
    let ends: &[&[usize]] = &[&[1, 20, 64, 70], &[70]];
    let sizes = [2, 4, 2, 70, 70, 32];
    let cases = vec![
        case("packed", sizes, packed(ends, Mask::causal())),
        case("packed, not causal", sizes, packed(ends, Mask::default())),
        case("packed, with a window", sizes, packed(ends, windowed)),
        case("packed, with padding", sizes, packed(ends, padded)),
    ];
    check(device, dtype, cases);
}

fn scores(device: &Device, dtype: FloatType) {
    let sizes = [2, 4, 2, 40, 40, 64];
    let with = |name: &str, scale: Option<f32>, softcap: Option<f32>, sinks: bool| {
        let mut case = case(name, sizes, Mask::causal());
        case.problem.options = AttentionOptions { scale, softcap };
        case.sinks = sinks;
        case
    };
    let masked = Mask {
        starts: Some(vec![40, 9]),
        window: Some(7),
        ..Mask::causal()
    };
    let decode = Mask {
        lengths: Some(vec![90, 0]),
        ..Mask::causal()
    };
    // Far from all scores on either side, and none at all.
    let far = Some(vec![-1e9, f32::MIN, f32::NEG_INFINITY, 1e9]);
    let cases = vec![
        with("a scale", Some(0.3), None, false),
        with("capped", None, Some(2.0), false),
        with("capped and scaled", Some(0.05), Some(30.0), false),
        with("sinks", None, None, true),
        with("sinks, capped", None, Some(5.0), true),
        Case {
            sinks: true,
            ..case("sinks and rows of nothing", sizes, masked.clone())
        },
        Case {
            sinks: true,
            sinks_of_heads: far.clone(),
            ..case("sinks far off", sizes, Mask::causal())
        },
        Case {
            sinks: true,
            sinks_of_heads: far,
            ..case("sinks far off and rows of nothing", sizes, masked)
        },
        Case {
            sinks: true,
            ..case("sinks, one query", [2, 8, 2, 1, 96, 64], decode)
        },
        // Without the maximum taken away the exponential overflows.
        Case {
            peak: 300.0,
            ..case("large scores", sizes, Mask::causal())
        },
        Case {
            peak: 0.0,
            ..case("equal scores", sizes, Mask::causal())
        },
    ];
    check(device, dtype, cases);
}

fn views(device: &Device, dtype: FloatType) {
    let mut cases = Vec::new();
    for of_q in Layout::ALL {
        for of_k in Layout::ALL {
            // Strides of a head with 36 elements are a multiple of four, but not of eight.
            for (queries, d) in [(9, 64), (1, 32), (9, 36)] {
                cases.push(Case {
                    layouts: [of_q, of_k],
                    ..case(
                        format!("{queries} queries {of_q:?}, keys {of_k:?}"),
                        [2, 4, 2, queries, 21, d],
                        Mask::causal(),
                    )
                });
            }
        }
    }
    check(device, dtype, cases);
}

/// Of a head, of the first dimension and in both, where a kernel may count on neighbours.
fn other_strides(device: &Device) {
    let dims = [2, 2, 12, 32];
    let elems = dims.iter().product();
    let of = |seed| tensor::<4>(&uniform(elems, seed), dims, FloatType::F32, device);
    let ranges = KeyRanges::new(&AttentionMask::causal(), 12, 12, device).expect("valid");
    let call = |q, k, v| {
        let y = attention(q, k, v, &ranges, None, AttentionOptions::default());
        values(&y.expect("valid"))
    };
    let contiguous = |x: Tensor<4>| Tensor::<4>::from_data(x.to_data(), device);
    type View = fn(Tensor<4>) -> Tensor<4>;
    let views: [(&str, View); 3] = [
        ("elements far apart", |x| {
            x.reshape([2, 2, 32, 12]).swap_dims(2, 3)
        }),
        ("a row for all", |x| {
            x.narrow(0, 1, 1).expand([2, 2, 12, 32])
        }),
        ("a head for all", |x| {
            x.narrow(1, 1, 1).expand([2, 2, 12, 32])
        }),
    ];
    for (name, view) in views {
        let [q, k, v] = [1, 2, 3].map(|seed| view(of(seed)));
        let expected = call(
            contiguous(q.clone()),
            contiguous(k.clone()),
            contiguous(v.clone()),
        );
        assert_near(&call(q, k, v), &expected, 1e-6, name);
    }
}

fn one_row_of_ranges_serves_all(device: &Device, dtype: FloatType) {
    let mask = Mask {
        window: Some(11),
        ..Mask::causal()
    };
    let cases = vec![
        case("shared, causal", [3, 4, 2, 33, 33, 32], Mask::causal()),
        case("shared, a window", [3, 4, 2, 20, 33, 32], mask),
        case("shared, one query", [3, 4, 2, 1, 33, 32], Mask::causal()),
    ];
    check(device, dtype, cases);
}

/// Some cases that between them have all that a backward pass does.
fn varied_cases() -> Vec<Case> {
    let mask = Mask {
        starts: Some(vec![0, 50]),
        window: Some(40),
        ..Mask::causal()
    };
    vec![
        case("causal", [1, 6, 2, 130, 130, 64], Mask::causal()),
        Case {
            layouts: [Layout::TokenMajor, Layout::Cache],
            sinks: true,
            ..case("all together", [2, 4, 2, 33, 90, 32], mask)
        },
    ]
}

fn results_are_the_same_each_time(device: &Device, dtype: FloatType) {
    if lacks(device, dtype.into()) {
        return;
    }
    let device = device.clone().autodiff();
    for case in varied_cases() {
        let first = run(&case, dtype, &device, [true; 4]);
        for _ in 0..2 {
            // No NaN is among them, which would differ from itself.
            assert!(
                first == run(&case, dtype, &device, [true; 4]),
                "{}",
                case.name
            );
        }
    }
}

fn checkpointing_changes_nothing(device: &Device) {
    let tracked = device.clone().autodiff();
    let checkpointing = tracked.clone().gradient_checkpointing();
    for case in varied_cases() {
        let expected = run(&case, FloatType::F32, &tracked, [true; 4]);
        let got = run(&case, FloatType::F32, &checkpointing, [true; 4]);
        assert!(got == expected, "{}", case.name);
    }
}

fn gradients_are_of_what_is_tracked(device: &Device) {
    let device = device.clone().autodiff();
    for mut case in varied_cases() {
        for sinks in [false, true] {
            case.sinks = sinks;
            let all = run(&case, FloatType::F32, &device, [true; 4]);
            for tracked in 1..if sinks { 16 } else { 8 } {
                let tracked = [0, 1, 2, 3].map(|i| tracked >> i & 1 == 1);
                let got = run(&case, FloatType::F32, &device, tracked);
                for i in 0..4 {
                    let expected = all.grads[i].as_ref().filter(|_| tracked[i]);
                    let name = format!("{} {tracked:?} {i}", case.name);
                    assert!(got.grads[i].as_ref() == expected, "{name}");
                }
            }
        }
    }
}

fn tracked_and_plain_tensors_mix(device: &Device) {
    let tracked = device.clone().autodiff();
    let case = &varied_cases()[0];
    let (inputs, _) = case.inputs(FloatType::F32);
    let problem = &case.problem;
    let of = |values: &[f64], dims, device: &Device| {
        Layout::Contiguous.leaf(values, dims, FloatType::F32, device)
    };
    for of_ranges in [device, &tracked] {
        let q = of(&inputs.q, problem.query_dims(), &tracked).require_grad();
        let [k, v] = [&inputs.k, &inputs.v].map(|x| of(x, problem.key_dims(), device));
        let ranges = case.ranges(of_ranges);
        let y = attention(q.clone(), k, v, &ranges, None, problem.options).expect("valid");
        let grads = y.sum().backward();
        assert!(
            values(&q.grad(&grads).expect("tracked"))
                .iter()
                .any(|&x| x != 0.0)
        );
    }
}

/// The output alone is that with the log-sum-exp beside it.
/// Keys past those of the ranges, as in a cache that is longer than what it holds: NaN here.
fn a_cache_may_be_longer_than_the_ranges(device: &Device) {
    for (queries, keys) in [(1, 40), (7, 40), (40, 40)] {
        let dims = |heads, tokens| [2, heads, tokens, 32];
        let random = |heads, tokens| {
            Tensor::<4>::random(
                dims(heads, tokens),
                Distribution::Default,
                (device, DType::F32),
            )
        };
        let (q, k, v) = (random(4, queries), random(2, keys), random(2, keys));
        let ranges = KeyRanges::new(&AttentionMask::causal(), queries, keys, device);
        let ranges = ranges.expect("valid");
        let longer = |x: &Tensor<4>| {
            let rest = Tensor::full(dims(2, 9), f32::NAN, (device, DType::F32));
            Tensor::cat(vec![x.clone(), rest], 2)
        };
        let call = |k: Tensor<4>, v: Tensor<4>| {
            let options = AttentionOptions::default();
            values(&attention(q.clone(), k, v, &ranges, None, options).expect("fits"))
        };
        assert_near(&call(longer(&k), longer(&v)), &call(k, v), 1e-6, "output");
    }
}

fn attention_is_the_output_alone(device: &Device) {
    for case in varied_cases() {
        let (inputs, _) = case.inputs(FloatType::F32);
        let problem = &case.problem;
        let of =
            |values: &[f64], dims| Layout::Contiguous.leaf(values, dims, FloatType::F32, device);
        let q = of(&inputs.q, problem.query_dims());
        let [k, v] = [&inputs.k, &inputs.v].map(|x| of(x, problem.key_dims()));
        let sinks = inputs.sinks.as_ref().map(|sinks| {
            let sinks: Vec<f32> = sinks.iter().map(|&sink| sink as f32).collect();
            tensor::<1>(&sinks, [problem.heads], FloatType::F32, device)
        });
        let y = attention(q, k, v, &case.ranges(device), sinks, problem.options);
        let got = run(&case, FloatType::F32, device, [false; 4]);
        assert_near(&values(&y.expect("valid")), &got.output, 1e-6, &case.name);
    }
}

/// Sinks of the dtype of all else.
fn sinks_have_either_dtype(device: &Device) {
    if lacks(device, DType::F16) {
        return;
    }
    let device = &device.clone().autodiff();
    let dtype = FloatType::F16;
    let of = |seed| tensor::<4>(&uniform(2 * 8 * 32, seed), [1, 2, 8, 32], dtype, device);
    let ranges = KeyRanges::new(&AttentionMask::causal(), 8, 8, device).expect("valid");
    let [in_f16, in_f32] = [FloatType::F16, FloatType::F32].map(|of_sinks| {
        // Numbers that f16 has too.
        let sinks = tensor::<1>(&[0.5, -1.25], [2], of_sinks, device).require_grad();
        let [q, k, v] = [1, 2, 3].map(of);
        let options = AttentionOptions::default();
        let y = attention(q, k, v, &ranges, Some(sinks.clone()), options).expect("valid");
        let grads = (y.clone() * of(4)).sum().backward();
        let grad = sinks.grad(&grads).expect("tracked");
        assert_eq!(grad.dtype(), DType::from(of_sinks));
        (values(&y), values(&grad))
    });
    assert_eq!(in_f16.0, in_f32.0);
    assert_near(&in_f16.1, &in_f32.1, 2f64.powi(-10), "d_sinks");
}

fn nothing_gives_nothing(device: &Device) {
    let device = &device.clone().autodiff();
    let options = AttentionOptions::default();
    for dims in [[0, 2, 5], [2, 2, 0], [2, 0, 5]] {
        let [batch, heads, queries] = dims;
        let of = |heads, tokens| {
            let shape = [batch, heads, tokens, 32];
            Tensor::<4>::ones(shape, (device, DType::F32)).require_grad()
        };
        let ranges = KeyRanges::new(&AttentionMask::default(), queries, 5, device);
        let ranges = ranges.expect("valid");
        let (q, k, v) = (of(heads, queries), of(2, 5), of(2, 5));
        let result = attention_with_lse(q.clone(), k.clone(), v, &ranges, None, options);
        let (y, lse) = result.expect("valid");
        assert_eq!(y.dims(), [batch, heads, queries, 32]);
        assert_eq!(lse.dims(), dims);
        let grads = y.sum().backward();
        assert_eq!(q.grad(&grads).expect("tracked").dims(), q.dims());
        let dk = k.grad(&grads).expect("tracked");
        assert_eq!(dk.dims(), k.dims());
        assert!(values(&dk).iter().all(|&x| x == 0.0));
    }
    for number in [1.0, f32::MAX, f32::INFINITY, f32::NAN] {
        no_keys_give_zeros(device, number);
    }
}

/// Queries without any key, whatever they hold.
fn no_keys_give_zeros(device: &Device, number: f32) {
    let options = AttentionOptions::default();
    let q = Tensor::<4>::full([2, 2, 3, 32], number, (device, DType::F32)).require_grad();
    let none = || Tensor::<4>::ones([2, 1, 0, 32], (device, DType::F32));
    let ranges = KeyRanges::new(&AttentionMask::causal(), 3, 0, device).expect("valid");
    let sinks = tensor::<1>(&[0.5, f32::NEG_INFINITY], [2], FloatType::F32, device);
    for sinks in [None, Some(sinks.require_grad())] {
        let result = attention_with_lse(q.clone(), none(), none(), &ranges, sinks.clone(), options);
        let (y, lse) = result.expect("valid");
        assert_eq!(values(&y), [0.0; 2 * 2 * 3 * 32]);
        let of_head = |head: usize| match sinks {
            Some(_) => [0.5, f64::NEG_INFINITY][head],
            None => f64::NEG_INFINITY,
        };
        let expected: Vec<f64> = (0..12).map(|i| of_head(i / 3 % 2)).collect();
        assert_eq!(values(&lse), expected);
        let grads = y.sum().backward();
        assert!(
            values(&q.grad(&grads).expect("tracked"))
                .iter()
                .all(|&x| x == 0.0)
        );
        if let Some(sinks) = sinks {
            assert_eq!(values(&sinks.grad(&grads).expect("tracked")), [0.0; 2]);
        }
    }
}

/// Ranges without queries or rows, as without starts and lengths.
fn ranges_of_nothing(device: &Device) {
    for [batch, queries] in [[0, 5], [2, 0], [0, 0], [0, 1]] {
        for [starts, lengths] in [[true, false], [false, true], [true, true]] {
            for window in [None, Some(3)] {
                let mask = Mask {
                    window,
                    starts: starts.then(|| vec![1; batch]),
                    lengths: lengths.then(|| vec![4; batch]),
                    ..Mask::causal()
                };
                let ranges = KeyRanges::new(&mask.on(device), queries, 5, device);
                let ranges = ranges.expect("valid");
                assert_eq!(ranges.tensor().dims(), [batch, queries, 2]);
                assert_eq!(ranges.tensor().dtype(), DType::I32);
                let of = |tokens| Tensor::<4>::ones([batch, 2, tokens, 32], (device, DType::F32));
                let options = AttentionOptions::default();
                let y = attention(of(queries), of(5), of(5), &ranges, None, options);
                assert_eq!(y.expect("valid").dims(), [batch, 2, queries, 32]);
            }
        }
    }
    // Starts and lengths of no keys.
    let mask = Mask {
        window: Some(3),
        starts: Some(vec![0, 2]),
        lengths: Some(vec![0, 2]),
        ..Mask::causal()
    };
    let ranges = KeyRanges::new(&mask.on(device), 2, 0, device).expect("valid");
    let numbers: Vec<i64> = ranges.tensor().to_data().iter::<i64>().collect();
    assert_eq!(numbers, [0; 2 * 2 * 2]);
}

/// Starts and lengths out of range are the nearest in it, of whatever type they are.
fn starts_and_lengths_stay_within_the_keys(device: &Device) {
    let numbers: [(DType, &[i64]); 4] = [
        (
            DType::I64,
            &[
                i64::MIN,
                -(1 << 32) + 3,
                -1,
                3,
                301,
                (1 << 31) + 5,
                (1 << 32) + 5,
                i64::MAX,
            ],
        ),
        (DType::U32, &[0, 3, 301, (1 << 31) + 5, u32::MAX as i64]),
        (
            DType::I32,
            &[i32::MIN as i64, -1, 0, 3, 301, i32::MAX as i64],
        ),
        (DType::U8, &[0, 3, 255]),
    ];
    for (dtype, numbers) in numbers {
        if lacks(device, dtype) {
            continue;
        }
        let within: Vec<usize> = numbers.iter().map(|&n| n.clamp(0, 300) as usize).collect();
        let len = numbers.len();
        let data = TensorData::new(numbers.to_vec(), [len]).convert_dtype(dtype);
        let numbers = Tensor::<1, Int>::from_data(data, (device, dtype));
        for queries in [1, 2, 310] {
            for side in 0..3 {
                let [starts, lengths] = [side != 1, side != 0];
                let window = (side == 2).then_some(7);
                let expected = Mask {
                    window,
                    starts: starts.then(|| within.clone()),
                    lengths: lengths.then(|| within.clone()),
                    ..Mask::causal()
                };
                let given = AttentionMask {
                    starts: starts.then(|| numbers.clone()),
                    lengths: lengths.then(|| numbers.clone()),
                    ..AttentionMask::causal().with_window(window)
                };
                let [given, expected] = [given, expected.on(device)].map(|mask| {
                    let ranges = KeyRanges::new(&mask, queries, 300, device).expect("valid");
                    ranges.tensor().to_data().iter::<i64>().collect::<Vec<_>>()
                });
                let what = format!("{dtype:?}, {queries} queries, {starts} {lengths}");
                assert_eq!(given, expected, "{what}");
                assert!(given.iter().all(|n| (0..=300).contains(n)), "{what}");
            }
        }
    }
}

/// The largest and smallest scales and caps overflow nowhere, rows that see nothing among them.
fn factors_at_their_limits(device: &Device, dtype: FloatType) {
    if lacks(device, dtype.into()) {
        return;
    }
    let device = &device.clone().autodiff();
    let mask = Mask {
        starts: Some(vec![40, 9]),
        ..Mask::causal()
    };
    for scale in [1e-30, 1e8] {
        for softcap in [None, Some(1e-4), Some(1e4)] {
            for queries in [40, 1] {
                let sizes = [2, 4, 2, queries, 40, 64];
                let mut case = case(format!("{scale} {softcap:?}"), sizes, mask.clone());
                // Scores far above a thousand lose what they are apart from each other.
                case.peak = if scale > 1.0 { 1e-6 } else { 6.0 };
                let scale = Some(scale);
                case.problem.options = AttentionOptions { scale, softcap };
                let got = run(&case, dtype, device, [true; 4]);
                let finite = |numbers: &[f64]| numbers.iter().all(|x| x.is_finite());
                assert!(finite(&got.output), "{}", case.name);
                assert!(
                    got.lse
                        .iter()
                        .all(|x| x.is_finite() || *x == f64::NEG_INFINITY)
                );
                let of_nothing = &got.output[..4 * queries * 64];
                assert!(of_nothing.iter().all(|&x| x == 0.0), "{}", case.name);
                // A gradient that is multiplied with 1e8 may be none of f16.
                for (grad, what) in got.grads.iter().zip(["dq", "dk", "dv"]) {
                    let finite = finite(grad.as_ref().expect("tracked"));
                    assert!(finite || dtype == FloatType::F16, "{} {what}", case.name);
                }
            }
        }
    }
}

fn what_does_not_fit_is_named(device: &Device) {
    let zeros = |dims: [usize; 4]| Tensor::<4>::zeros(dims, (device, DType::F32));
    let ranges = |queries, keys| {
        KeyRanges::new(&AttentionMask::causal(), queries, keys, device).expect("valid")
    };
    let options = AttentionOptions::default();
    let of_shapes = |q, k, v, of_ranges: [usize; 2]| {
        let ranges = ranges(of_ranges[0], of_ranges[1]);
        attention(zeros(q), zeros(k), zeros(v), &ranges, None, options).expect_err("does not fit")
    };
    let shape = |tensor: &str, expected: &[usize], given: &[usize]| Nf4Error::Shape {
        tensor: tensor.into(),
        expected: expected.to_vec(),
        given: given.to_vec(),
    };
    let (q, k) = ([2, 4, 5, 32], [2, 2, 9, 32]);
    assert_eq!(
        of_shapes(q, [1, 2, 9, 32], [1, 2, 9, 32], [5, 9]),
        shape("k", &[2, 2, 9, 32], &[1, 2, 9, 32]),
    );
    assert_eq!(
        of_shapes(q, [2, 2, 9, 16], [2, 2, 9, 16], [5, 9]),
        shape("k", &[2, 2, 9, 32], &[2, 2, 9, 16]),
    );
    for other in [[2, 1, 9, 32], [2, 2, 8, 32], [2, 2, 9, 16]] {
        assert_eq!(of_shapes(q, k, other, [5, 9]), shape("v", &k, &other));
    }
    for [queries, keys] in [[4, 9], [5, 10]] {
        assert_eq!(
            of_shapes(q, k, k, [queries, keys]),
            shape("key ranges", &[1, 5, 9], &[1, queries, keys]),
        );
    }
    let of_three = Mask {
        starts: Some(vec![0; 3]),
        ..Mask::causal()
    };
    let of_three = KeyRanges::new(&of_three.on(device), 5, 9, device).expect("valid");
    assert_eq!(
        attention(zeros(q), zeros(k), zeros(k), &of_three, None, options).expect_err("three rows"),
        shape("key ranges", &[2, 5, 9], &[3, 5, 9]),
    );
    let call = |sinks: Option<Tensor<1>>, options| {
        attention(zeros(q), zeros(k), zeros(k), &ranges(5, 9), sinks, options)
    };
    let sinks = Tensor::<1>::zeros([3], (device, DType::F32));
    let error = call(Some(sinks), options).expect_err("three sinks");
    assert_eq!(error, shape("sinks", &[4], &[3]));

    let field = |error: Nf4Error| match error {
        Nf4Error::Config { field, given, .. } => (field, given),
        error => panic!("{error}"),
    };
    let too_large = [2, 4, 5, MAX_HEAD_DIM + 1];
    let error = of_shapes(too_large, too_large, too_large, [5, 5]);
    assert_eq!(field(error), ("head_dim", "257".into()));
    let empty = [2, 4, 5, 0];
    let error = of_shapes(empty, empty, empty, [5, 5]);
    assert_eq!(field(error), ("head_dim", "0".into()));
    for kv_heads in [3, 8, 0] {
        let k = [2, kv_heads, 9, 32];
        let given = format!("{kv_heads} for 4 heads of queries");
        assert_eq!(field(of_shapes(q, k, k, [5, 9])), ("kv_heads", given));
    }
    let none = [0.0, -1.0, f32::INFINITY, f32::NAN];
    for number in none.into_iter().chain([3e38, 1.1e8, 9e-31]) {
        let options = AttentionOptions {
            scale: Some(number),
            softcap: None,
        };
        let error = call(None, options).expect_err("no such scale");
        assert_eq!(field(error), ("scale", number.to_string()));
    }
    for number in none.into_iter().chain([f32::MAX, 1.1e4, 9e-5]) {
        let options = AttentionOptions {
            scale: None,
            softcap: Some(number),
        };
        let error = call(None, options).expect_err("no such cap");
        assert_eq!(field(error), ("softcap", number.to_string()));
    }
}

fn other_dtypes_are_refused(device: &Device) {
    let of = |dtype: DType| Tensor::<4>::zeros([1, 1, 4, 32], (device, dtype));
    let ranges = KeyRanges::new(&AttentionMask::causal(), 4, 4, device).expect("valid");
    let named = |q, k, v, sinks| {
        let options = AttentionOptions::default();
        match attention(q, k, v, &ranges, sinks, options).expect_err("another dtype") {
            Nf4Error::Dtype { tensor, .. } => tensor,
            error => panic!("{error}"),
        }
    };
    let full = || of(DType::F32);
    if !lacks(device, DType::F16) {
        let half = || of(DType::F16);
        let sinks = Tensor::<1>::zeros([1], (device, DType::F16));
        assert_eq!(named(full(), half(), full(), None), "k");
        assert_eq!(named(full(), full(), half(), None), "v");
        assert_eq!(named(full(), full(), full(), Some(sinks)), "sinks");
    }
    if !lacks(device, DType::F64) {
        let double = || of(DType::F64);
        assert_eq!(named(double(), double(), double(), None), "q");
    }
}

fn two_devices_are_an_error(device: &Device) {
    #[cfg(feature = "flex")]
    let other = Device::flex();
    #[cfg(not(feature = "flex"))]
    let other = device.clone();
    if *device == other {
        skip("there is but one device");
        return;
    }
    let of = |device: &Device| Tensor::<4>::zeros([1, 1, 4, 32], (device, DType::F32));
    let ranges =
        |device: &Device| KeyRanges::new(&AttentionMask::causal(), 4, 4, device).expect("valid");
    let sinks = |device: &Device| Tensor::<1>::zeros([1], (device, DType::F32));
    for (i, name) in ["k", "v", "key ranges", "sinks"].into_iter().enumerate() {
        let at = |index: usize| if i == index { &other } else { device };
        let error = attention(
            of(device),
            of(at(0)),
            of(at(1)),
            &ranges(at(2)),
            Some(sinks(at(3))),
            AttentionOptions::default(),
        );
        match error.expect_err("two devices") {
            Nf4Error::Device { tensor, .. } => assert_eq!(tensor, name),
            error => panic!("{error}"),
        }
    }
}

/// All masks that make sense with some numbers of queries and keys, for two rows.
fn masks(queries: usize, keys: usize) -> Vec<Mask> {
    let half = keys / 2;
    let mut all = Vec::new();
    for (causal, window) in [
        (false, None),
        (true, None),
        (true, Some(1)),
        (true, Some(3)),
        (true, Some(100)),
        // Negative and -1 as an i32.
        (true, Some(1 << 31)),
        (true, Some(usize::MAX)),
    ] {
        for starts in [None, Some(vec![0, half]), Some(vec![keys, 1])] {
            for lengths in [None, Some(vec![keys, half]), Some(vec![0, 1])] {
                for ends in [None, Some(vec![vec![half, keys], vec![keys]])] {
                    if ends.is_some() && (queries != keys || half == 0 || lengths.is_some()) {
                        continue;
                    }
                    all.push(Mask {
                        causal,
                        window,
                        starts: starts.clone(),
                        lengths: lengths.clone(),
                        sequence_ends: ends,
                    });
                }
            }
        }
    }
    all
}

fn ranges_are_what_masks_say(device: &Device) {
    for [queries, keys] in [[7, 7], [1, 9], [3, 8], [6, 2], [1, 1]] {
        for mask in masks(queries, keys) {
            for device in [device.clone(), device.clone().autodiff()] {
                let ranges = KeyRanges::new(&mask.on(&device), queries, keys, &device);
                let ranges = ranges.expect("valid");
                assert_eq!((ranges.queries(), ranges.keys()), (queries, keys));
                assert_eq!(ranges.tensor().dtype(), DType::I32);
                let rows = ranges.rows();
                let of_rows = [mask.starts.is_some(), mask.lengths.is_some()];
                let of_rows = of_rows.contains(&true) || mask.sequence_ends.is_some();
                assert_eq!(rows, if of_rows { 2 } else { 1 });
                let numbers: Vec<i64> = ranges.tensor().to_data().iter::<i64>().collect();
                assert_eq!(numbers.len(), rows * queries * 2);
                for (row, numbers) in numbers.chunks(queries * 2).enumerate() {
                    let what = format!("row {row} of {queries} queries, {keys} keys, {mask:?}");
                    for (query, range) in numbers.chunks(2).enumerate() {
                        for key in 0..keys {
                            let seen = (range[0]..range[1]).contains(&(key as i64));
                            let expected = mask.sees(row, query, key, [queries, keys]);
                            assert_eq!(seen, expected, "query {query}, key {key}, {what}");
                        }
                        let within = range.iter().all(|n| (0..=keys as i64).contains(n));
                        assert!(within, "{range:?}, {what}");
                    }
                    for (range, next) in numbers.chunks(2).zip(numbers.chunks(2).skip(1)) {
                        assert!(range[0] <= next[0] && range[1] <= next[1], "{what}");
                    }
                }
            }
        }
    }
}

fn masks_that_make_no_sense_are_errors(device: &Device) {
    let error = |mask: Mask, queries, keys| {
        KeyRanges::new(&mask.on(device), queries, keys, device).expect_err("no sense")
    };
    let field = |error: Nf4Error| match error {
        Nf4Error::Config { field, .. } => field,
        error => panic!("{error}"),
    };
    let none = Mask {
        window: Some(0),
        ..Mask::causal()
    };
    assert_eq!(field(error(none, 4, 4)), "window");
    let not_causal = Mask {
        window: Some(3),
        ..Mask::default()
    };
    assert_eq!(field(error(not_causal, 4, 4)), "window");
    let packed = |ends: &[usize]| Mask {
        sequence_ends: Some(vec![vec![4], ends.to_vec()]),
        ..Mask::causal()
    };
    for ends in [&[][..], &[3], &[5], &[0, 4], &[2, 2, 4], &[3, 2, 4]] {
        assert_eq!(field(error(packed(ends), 4, 4)), "sequence_ends");
    }
    assert_eq!(field(error(packed(&[4]), 1, 4)), "sequence_ends");
    let rows = Mask {
        starts: Some(vec![0; 3]),
        lengths: Some(vec![4; 2]),
        ..Mask::default()
    };
    let of_two = |tensor: &str| Nf4Error::Shape {
        tensor: tensor.into(),
        expected: vec![3],
        given: vec![2],
    };
    assert_eq!(error(rows, 4, 4), of_two("lengths"));
    let rows = Mask {
        starts: Some(vec![4; 3]),
        ..packed(&[4])
    };
    assert_eq!(error(rows, 4, 4), of_two("sequence_ends"));
    let both = Mask {
        lengths: Some(vec![4; 2]),
        ..packed(&[4])
    };
    assert_eq!(field(error(both, 4, 4)), "sequence_ends");
    let too_many = error(Mask::default(), 1, i32::MAX as usize + 1);
    assert!(
        matches!(too_many, Nf4Error::ElementCount { .. }),
        "{too_many}"
    );
}

/// The gradients of the reference are the slopes of its own output.
#[test]
fn the_reference_has_the_gradients_of_finite_differences() {
    let mask = Mask {
        starts: Some(vec![0, 2]),
        window: Some(3),
        ..Mask::causal()
    };
    let mut case = Case {
        sinks: true,
        ..case("slopes", [2, 4, 2, 4, 5, 3], mask)
    };
    for softcap in [None, Some(1.5)] {
        case.problem.options.softcap = softcap;
        let (inputs, grad) = case.inputs(FloatType::F32);
        let results = reference::attention(&case.problem, &inputs, &grad);
        type Values = fn(&mut Inputs) -> &mut Vec<f64>;
        let operands: [(&str, Values, &Expected); 4] = [
            ("dq", |inputs| &mut inputs.q, &results.dq),
            ("dk", |inputs| &mut inputs.k, &results.dk),
            ("dv", |inputs| &mut inputs.v, &results.dv),
            (
                "d_sinks",
                |inputs| inputs.sinks.as_mut().expect("has some"),
                &results.d_sinks,
            ),
        ];
        for (name, of, expected) in operands {
            let slopes: Vec<f64> = (0..expected.values.len())
                .map(|i| {
                    let step = 1e-5;
                    let at = |step: f64| {
                        let mut inputs = inputs.clone();
                        of(&mut inputs)[i] += step;
                        let results = reference::attention(&case.problem, &inputs, &grad);
                        let products = results.output.values.iter().zip(&grad);
                        products.map(|(y, grad)| y * grad).sum::<f64>()
                    };
                    (at(step) - at(-step)) / (2.0 * step)
                })
                .collect();
            assert_near(&expected.values, &slopes, 1e-7, name);
        }
    }
}

macro_rules! device_tests {
    ($name:ident, $feature:literal, $device:expr) => {
        #[cfg(feature = $feature)]
        mod $name {
            use super::*;

            fn device() -> Device {
                $device
            }

            device_tests!(@each
                other_strides
                checkpointing_changes_nothing
                gradients_are_of_what_is_tracked
                tracked_and_plain_tensors_mix
                a_cache_may_be_longer_than_the_ranges
                attention_is_the_output_alone
                sinks_have_either_dtype
                nothing_gives_nothing
                ranges_of_nothing
                starts_and_lengths_stay_within_the_keys
                what_does_not_fit_is_named
                other_dtypes_are_refused
                two_devices_are_an_error
                ranges_are_what_masks_say
                masks_that_make_no_sense_are_errors
            );

            device_tests!(@each_dtype
                head_sizes
                head_counts
                token_counts
                long_caches
                windows
                paddings
                lengths
                packed_sequences
                scores
                views
                one_row_of_ranges_serves_all
                factors_at_their_limits
                results_are_the_same_each_time
            );
        }
    };
    (@each $($test:ident)*) => {
        $(
            #[test]
            fn $test() {
                super::$test(&device());
            }
        )*
    };
    (@each_dtype $($test:ident)*) => {
        $(
            #[rstest]
            fn $test(
                #[values(FloatType::F16, FloatType::BF16, FloatType::F32)] dtype: FloatType,
            ) {
                super::$test(&device(), dtype);
            }
        )*
    };
}

device_tests!(flex, "flex", Device::flex());
device_tests!(cuda, "cuda", Device::cuda(0));
device_tests!(rocm, "rocm", Device::rocm(0));
device_tests!(wgpu, "wgpu", Device::wgpu(Default::default()));
device_tests!(vulkan, "vulkan", Device::vulkan(Default::default()));
device_tests!(metal, "metal", Device::metal(Default::default()));
device_tests!(cpu, "cpu", Device::cpu());
