//! Attention on the CPU, against a loop in f64, with every set of vector instructions that this processor
//! has.

mod random;
#[path = "attention/reference.rs"]
mod reference;

use burn_nf4::format::{FloatElement, FloatType};
use burn_nf4::host::{
    AttentionSettings, Heads, Simd, attention, attention_backward, attention_backward_with,
    attention_with,
};
use burn_nf4::op::AttentionOptions;
use half::{bf16, f16};
use random::{Random, available};
use reference::{Expected, Inputs, Mask, Problem};
use rstest::rstest;

/// Elements between one token and the next that belong to neither.
const GAP: usize = 3;

/// A tensor with gaps, which are NaN.
struct Gapped<T> {
    data: Vec<T>,
    strides: [usize; 3],
    /// `[batch, heads, tokens, head_dim]`
    values: Vec<f64>,
}

impl<T: FloatElement> Gapped<T> {
    fn new([batch, heads, tokens, d]: [usize; 4], factor: f32, seed: u64) -> Self {
        let token = heads * d + GAP;
        let mut data = vec![T::from_f32(f32::NAN); batch * tokens * token];
        let mut values = Vec::new();
        let mut random = Random(seed);
        for head in 0..batch * heads {
            for t in 0..tokens {
                let at = (head / heads * tokens + t) * token + head % heads * d;
                for element in &mut data[at..at + d] {
                    *element = T::from_f32(random.unit() * factor);
                    values.push(element.to_f32().into());
                }
            }
        }
        Self {
            data,
            strides: [tokens * token, token, d],
            values,
        }
    }

    fn heads(&self) -> Heads<'_, T> {
        Heads {
            data: &self.data,
            strides: self.strides,
        }
    }
}

/// What is to be computed, with all inputs.
struct Case<T> {
    problem: Problem,
    settings: AttentionSettings,
    ranges: Vec<i32>,
    q: Gapped<T>,
    k: Gapped<T>,
    v: Gapped<T>,
    grad: Gapped<T>,
}

/// What came out, token-major but for the log-sum-exp.
#[derive(Debug, Clone)]
struct Got<T> {
    output: Vec<T>,
    lse: Vec<f32>,
    dq: Vec<T>,
    dk: Vec<T>,
    dv: Vec<T>,
}

impl<T: FloatElement> Case<T> {
    /// Of `[batch, heads, kv_heads, queries, keys, head_dim]`.
    fn new(sizes: [usize; 6], mask: Mask, softcap: Option<f32>) -> Self {
        Self::with_peak(sizes, mask, softcap, 6.0)
    }

    /// With queries up to `peak`.
    fn with_peak(sizes: [usize; 6], mask: Mask, softcap: Option<f32>, peak: f32) -> Self {
        let [batch, heads, kv_heads, queries, keys, head_dim] = sizes;
        let problem = Problem {
            batch,
            heads,
            kv_heads,
            queries,
            keys,
            head_dim,
            mask,
            options: AttentionOptions {
                scale: None,
                softcap,
            },
        };
        let settings = AttentionSettings {
            batch,
            heads,
            kv_heads,
            queries,
            keys,
            head_dim,
            scale: problem.scale() as f32,
            softcap,
        };
        let mut ranges = Vec::new();
        for row in 0..batch {
            for query in 0..queries {
                let sees = |&key: &usize| problem.mask.sees(row, query, key, [queries, keys]);
                let first = (0..keys).find(sees).unwrap_or(keys);
                let end = (0..keys).rfind(sees).map_or(0, |last| last + 1);
                ranges.extend([first as i32, end as i32]);
            }
        }
        Self {
            q: Gapped::new(problem.query_dims(), peak, 1),
            k: Gapped::new(problem.key_dims(), 1.0, 2),
            v: Gapped::new(problem.key_dims(), 1.0, 3),
            grad: Gapped::new(problem.query_dims(), 1.0, 4),
            problem,
            settings,
            ranges,
        }
    }

    fn run(&self, simd: Simd) -> Got<T> {
        let nan = T::from_f32(f32::NAN);
        let of_q = vec![nan; self.q.values.len()];
        let of_k = vec![nan; self.k.values.len()];
        let AttentionSettings {
            heads,
            queries,
            head_dim,
            ..
        } = self.settings;
        let mut got = Got {
            output: of_q.clone(),
            lse: vec![f32::NAN; of_q.len() / head_dim],
            dq: of_q,
            dk: of_k.clone(),
            dv: of_k,
        };
        let [q, k, v, grad] = [&self.q, &self.k, &self.v, &self.grad].map(Gapped::heads);
        attention_with(
            simd,
            q,
            k,
            v,
            &self.ranges,
            self.settings,
            &mut got.output,
            &mut got.lse,
        );
        attention_backward_with(
            simd,
            q,
            k,
            v,
            &self.ranges,
            Heads::contiguous(&got.output, [queries, heads, head_dim]),
            &got.lse,
            grad,
            self.settings,
            &mut got.dq,
            &mut got.dk,
            &mut got.dv,
        );
        got
    }

    fn check(&self) {
        let inputs = Inputs {
            q: self.q.values.clone(),
            k: self.k.values.clone(),
            v: self.v.values.clone(),
            sinks: None,
        };
        let expected = reference::attention(&self.problem, &inputs, &self.grad.values);
        // As sums are of f32, and results are rounded once. The gradients come from a rounded output.
        let of_scores = 2f64.powi(-22) * (8.0 + expected.largest_score);
        let of_dtype = match T::FLOAT_TYPE {
            FloatType::F32 => 0.0,
            FloatType::F16 => 2f64.powi(-11),
            FloatType::BF16 => 2f64.powi(-8),
        };
        for simd in available() {
            let got = self.run(simd);
            let what = format!("{simd:?} {:?} {:?}", T::FLOAT_TYPE, self.problem);
            for (got, expected) in got.lse.iter().zip(&expected.lse) {
                let got = f64::from(*got);
                let close = got == *expected || (got - expected).abs() <= of_scores;
                assert!(close, "lse {got}, expected {expected}, {what}");
            }
            let Problem {
                heads,
                kv_heads,
                queries,
                keys,
                ..
            } = self.problem;
            let near = |got: &[T], expected: &Expected, [tokens, heads]: [usize; 2], name| {
                let d = self.problem.head_dim;
                let magnitude = expected.magnitude;
                for (i, expected) in expected.values.iter().enumerate() {
                    let (element, token, head) = (i % d, i / d % tokens, i / d / tokens);
                    let at = ((head / heads * tokens + token) * heads + head % heads) * d + element;
                    let got = f64::from(got[at].to_f32());
                    let bound = of_scores * magnitude + of_dtype * (magnitude + expected.abs());
                    // Not `> bound`: a NaN must fail.
                    let close = (got - expected).abs() <= bound;
                    assert!(
                        close,
                        "{name}[{i}] is {got}, expected {expected} within {bound}, {what}"
                    );
                }
            };
            near(&got.output, &expected.output, [queries, heads], "output");
            near(&got.dq, &expected.dq, [queries, heads], "dq");
            near(&got.dk, &expected.dk, [keys, kv_heads], "dk");
            near(&got.dv, &expected.dv, [keys, kv_heads], "dv");
        }
    }
}

fn check<T: FloatElement>(sizes: [usize; 6], mask: &Mask, softcap: Option<f32>) {
    Case::<T>::new(sizes, mask.clone(), softcap).check();
}

fn check_all(sizes: [usize; 6], mask: Mask, softcap: Option<f32>) {
    check::<f32>(sizes, &mask, softcap);
    check::<f16>(sizes, &mask, softcap);
    check::<bf16>(sizes, &mask, softcap);
}

#[rstest]
fn head_sizes(
    #[values(1, 3, 4, 8, 15, 16, 17, 40, 64, 80, 96, 256)] head_dim: usize,
    #[values([1, 1], [6, 2])] heads: [usize; 2],
) {
    let [heads, kv_heads] = heads;
    check_all([1, heads, kv_heads, 21, 21, head_dim], Mask::causal(), None);
}

/// Groups whose tiles have few rows, rows as many as lanes, or more than a tile is meant for.
#[rstest]
fn groups(#[values(1, 2, 4, 5, 16, 130)] group: usize, #[values(1, 2, 9)] queries: usize) {
    check_all([1, 2 * group, 2, queries, 40, 24], Mask::causal(), None);
}

#[rstest]
#[case::causal(Mask::causal())]
#[case::all(Mask::default())]
#[case::window(Mask { window: Some(30), ..Mask::causal() })]
#[case::padding(Mask { starts: Some(vec![0, 150]), ..Mask::causal() })]
#[case::padding_of_all(Mask { starts: Some(vec![200, 66]), ..Mask::causal() })]
#[case::lengths(Mask { lengths: Some(vec![0, 131]), ..Mask::causal() })]
#[case::packed(
    Mask { sequence_ends: Some(vec![vec![63, 65, 200], vec![10, 200]]), ..Mask::default() }
)]
fn masks(#[case] mask: Mask, #[values(None, Some(2.5))] softcap: Option<f32>) {
    check_all([2, 3, 1, 200, 200, 32], mask, softcap);
}

/// Few queries, whose keys are divided between threads: also such that there is nothing in a part, and with
/// the largest score anywhere.
#[rstest]
fn long_caches(#[values(1, 5)] queries: usize, #[values(1023, 1024, 1025, 2700)] keys: usize) {
    let sizes = [2, 3, 1, queries, keys, 16];
    check_all(sizes, Mask::causal(), None);
    let some = Mask {
        starts: Some(vec![keys - 3, 17]),
        lengths: Some(vec![keys, 1000]),
        ..Mask::causal()
    };
    check::<f32>(sizes, &some, None);
}

/// Such that one part's weights overflow if they are taken relative to the largest score of another.
#[test]
fn parts_of_long_caches_with_large_scores() {
    for seen_from in [0, 100, 600] {
        let mask = Mask {
            starts: Some(vec![seen_from]),
            ..Mask::causal()
        };
        Case::<f32>::with_peak([1, 16, 4, 2, 2700, 16], mask, None, 3000.0).check();
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    for sizes in [[2, 4, 2, 150, 150, 40], [1, 2, 1, 3, 2500, 40]] {
        let case = Case::<f32>::new(sizes, Mask::causal(), None);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let got = pool
                .build()
                .expect("threads")
                .install(|| case.run(Simd::detect()));
            [got.output, got.lse, got.dq, got.dk, got.dv]
        };
        let expected = run(1);
        for _ in 0..3 {
            assert!(run(3) == expected);
        }
    }
}

/// A NaN of one query does not become a number, and stays with it.
#[test]
fn nan_is_neither_lost_nor_spread() {
    for simd in available() {
        let mut case = Case::<f32>::new([1, 2, 1, 70, 70, 16], Mask::causal(), None);
        let expected = case.run(simd);
        let of_query = |query: usize, head: usize| {
            let at = (query * 2 + head) * 16;
            at..at + 16
        };
        // Of the second head.
        let at = 40 * case.q.strides[1] + case.q.strides[2];
        case.q.data[at] = f32::NAN;
        let got = case.run(simd);
        for query in 0..70 {
            for head in 0..2 {
                let [got, expected] =
                    [&got.output, &expected.output].map(|output| &output[of_query(query, head)]);
                if (query, head) == (40, 1) {
                    assert!(got.iter().all(|x| x.is_nan()), "{simd:?} {got:?}");
                } else {
                    assert_eq!(got, expected, "{simd:?} {query} {head}");
                }
            }
        }
        assert!(got.lse[70 + 40].is_nan());
    }
}

/// What [`attention_with`] gives with the best instructions.
#[test]
fn the_instructions_are_found() {
    let case = Case::<f32>::new([1, 2, 1, 9, 9, 16], Mask::causal(), None);
    let expected = case.run(Simd::detect());
    let [q, k, v, grad] = [&case.q, &case.k, &case.v, &case.grad].map(Gapped::heads);
    let mut got = expected.clone();
    for numbers in [
        &mut got.output,
        &mut got.lse,
        &mut got.dq,
        &mut got.dk,
        &mut got.dv,
    ] {
        numbers.fill(f32::NAN);
    }
    let ranges = &case.ranges;
    attention(
        q,
        k,
        v,
        ranges,
        case.settings,
        &mut got.output,
        &mut got.lse,
    );
    attention_backward(
        q,
        k,
        v,
        ranges,
        Heads::contiguous(&got.output, [9, 2, 16]),
        &got.lse,
        grad,
        case.settings,
        &mut got.dq,
        &mut got.dk,
        &mut got.dv,
    );
    assert_eq!(got.output, expected.output);
    assert_eq!(got.lse, expected.lse);
    assert_eq!(got.dq, expected.dq);
    assert_eq!(got.dk, expected.dk);
    assert_eq!(got.dv, expected.dv);
}

/// A case with something taken away.
fn run_short(change: impl Fn(&mut Case<f32>)) {
    let mut case = Case::<f32>::new([2, 2, 1, 5, 9, 16], Mask::causal(), None);
    change(&mut case);
    case.run(Simd::Portable);
}

#[test]
#[should_panic(expected = "q of 344 elements, expected 347")]
fn a_short_q_panics() {
    run_short(|case| case.q.data.truncate(344));
}

#[test]
#[should_panic(expected = "k of 100 elements, expected 339")]
fn a_short_k_panics() {
    run_short(|case| case.k.data.truncate(100));
}

#[test]
#[should_panic(expected = "v of 0 elements, expected 339")]
fn a_short_v_panics() {
    run_short(|case| case.v.data.clear());
}

#[test]
#[should_panic(expected = "gradient of 1 elements, expected 347")]
fn a_short_gradient_panics() {
    run_short(|case| case.grad.data.truncate(1));
}

#[test]
#[should_panic(expected = "ranges")]
fn short_ranges_panic() {
    run_short(|case| case.ranges.truncate(19));
}

#[test]
#[should_panic(expected = "keys: 0")]
fn a_size_of_zero_panics() {
    run_short(|case| case.settings.keys = 0);
}

#[test]
#[should_panic(expected = "heads: 2, kv_heads: 3")]
fn heads_that_are_no_multiple_panic() {
    run_short(|case| case.settings.kv_heads = 3);
}
