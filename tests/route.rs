//! The choice of experts against a plain sort on the host.
#![cfg(feature = "flex")]

use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData};
use burn_nf4::Nf4Error;
use burn_nf4::format::FloatType;
use burn_nf4::op::{MAX_EXPERTS, RouteForm, route};

#[macro_use]
mod devices;
mod random;

use random::Random;

const FORMS: [RouteForm; 3] = [
    RouteForm::SoftmaxThenTopK { normalise: false },
    RouteForm::SoftmaxThenTopK { normalise: true },
    RouteForm::TopKThenSoftmax,
];

/// Tokens, experts, and how many of them each token has.
const SIZES: [[usize; 3]; 7] = [
    [1, 1, 1],
    [1, 8, 2],
    [3, 5, 5],
    [64, 32, 4],
    [7, 128, 8],
    [70, 60, 4],
    [2, MAX_EXPERTS, 8],
];

fn dtypes(device: &Device) -> impl Iterator<Item = DType> + '_ {
    let all = [FloatType::F16, FloatType::BF16, FloatType::F32].map(DType::from);
    all.into_iter()
        .filter(|&dtype| burn_nf4::op::supports_dtype(device, dtype))
}

fn ids_of(ids: Tensor<2, Int>) -> Vec<usize> {
    ids.into_data()
        .iter::<i64>()
        .map(|id| id as usize)
        .collect()
}

/// The experts by a stable sort, and their weights in f64.
fn expected(row: &[f32], per_token: usize, form: RouteForm) -> (Vec<usize>, Vec<f64>) {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).expect("numbers"));
    order.truncate(per_token);
    let power = |id: usize| f64::from(row[id] - row[order[0]]).exp();
    let sum: f64 = match form {
        RouteForm::SoftmaxThenTopK { normalise: false } => (0..row.len()).map(power).sum(),
        _ => order.iter().map(|&id| power(id)).sum(),
    };
    let weights = order.iter().map(|&id| power(id) / sum).collect();
    (order, weights)
}

/// Few different scores, so that many are equal.
fn the_highest_scores_and_of_equal_ones_the_first(device: &Device) {
    for [tokens, experts, per_token] in SIZES {
        for (form, dtype) in FORMS
            .into_iter()
            .flat_map(|form| dtypes(device).map(move |d| (form, d)))
        {
            let mut numbers = Random((tokens * experts) as u64);
            let scores: Vec<f32> = (0..tokens * experts)
                .map(|_| (numbers.unit() * 6.0).round() * 0.5)
                .collect();
            let data = TensorData::new(scores.clone(), [tokens, experts]);
            let logits = Tensor::<2>::from_data(data, device).cast(dtype);
            let (ids, weights) = route(logits, per_token, form).expect("sizes that fit");
            assert_eq!(ids.dims(), [tokens, per_token]);
            assert_eq!(weights.dtype(), DType::F32);
            let (ids, weights) = (ids_of(ids), weights.into_data());
            let weights: Vec<f32> = weights.iter::<f32>().collect();
            for (token, row) in scores.chunks_exact(experts).enumerate() {
                let (order, expected) = expected(row, per_token, form);
                let at = token * per_token..(token + 1) * per_token;
                let what = format!("{tokens} {experts} {form:?} {dtype:?} token {token}");
                assert_eq!(ids[at.clone()], order, "{what}");
                for (given, expected) in weights[at].iter().zip(expected) {
                    let difference = (f64::from(*given) - expected).abs();
                    assert!(difference <= 1e-5 * expected, "{what}: {given} {expected}");
                }
            }
        }
    }
}

/// Numbers of all magnitudes, both zeros, and no number.
fn odd_scores_choose_the_same_everywhere(device: &Device) {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let rows = [
        ([-0.0, 0.0, -1e-30, 1e-30], [3, 0, 1, 2]),
        ([1.0, nan, 2.0, -nan], [1, 3, 2, 0]),
        ([nan; 4], [0, 1, 2, 3]),
        ([-inf, 3e38, inf, -3e38], [2, 1, 3, 0]),
        ([-inf; 4], [0, 1, 2, 3]),
        ([1.0, 1.0 + f32::EPSILON, 1.0, -1.0], [1, 0, 2, 3]),
    ];
    for form in FORMS {
        let logits = Tensor::<2>::from_floats(rows.map(|(row, _)| row), device);
        let (ids, weights) = route(logits, 4, form).expect("sizes that fit");
        assert_eq!(
            ids_of(ids),
            rows.map(|(_, order)| order).concat(),
            "{form:?}"
        );
        let weights: Vec<f32> = weights.into_data().iter::<f32>().collect();
        for (weights, (row, _)) in weights.chunks_exact(4).zip(rows) {
            let highest_is_finite =
                row.iter().all(|x| !x.is_nan() && *x < inf) && row.iter().any(|x| x.is_finite());
            let all = weights.iter().all(|weight| weight.is_finite());
            assert_eq!(all, highest_is_finite, "{row:?}: {weights:?}");
            assert!(all || weights.iter().all(|weight| weight.is_nan()));
        }
    }
}

fn weights_have_the_gradient_of_a_softmax(device: &Device) {
    for form in FORMS {
        let device = device.clone().autodiff();
        let logits = Tensor::<2>::random([5, 16], Distribution::Normal(0.0, 1.0), &device);
        let logits = logits.require_grad();
        let (ids, weights) = route(logits.clone(), 3, form).expect("sizes that fit");
        let factors = Tensor::<2>::from_floats([[1.0, -2.0, 0.5]], &device);
        let loss = (weights.clone() * factors.clone()).sum();
        let given = logits
            .grad(&loss.backward())
            .expect("a gradient")
            .into_data();

        let leaf = logits.clone().detach().require_grad();
        let all = burn::tensor::activation::softmax(leaf.clone(), 1).gather(1, ids);
        let composed = match form {
            RouteForm::SoftmaxThenTopK { normalise: false } => all,
            _ => all.clone() / all.sum_dim(1),
        };
        let given_weights = weights.into_data();
        let tolerance = burn::tensor::Tolerance::<f32>::default();
        given_weights.assert_approx_eq(&composed.clone().into_data(), tolerance);
        let loss = (composed * factors).sum();
        let expected = leaf.grad(&loss.backward()).expect("a gradient").into_data();
        given.assert_approx_eq::<f32>(&expected, tolerance);
    }
}

fn impossible_sizes_are_errors(device: &Device) {
    let choose = |tokens, experts, per_token| {
        let logits = Tensor::<2>::zeros([tokens, experts], device);
        route(logits, per_token, RouteForm::TopKThenSoftmax)
    };
    for experts in [0, MAX_EXPERTS + 1] {
        let error = choose(2, experts, 1).unwrap_err();
        assert!(matches!(error, Nf4Error::ElementCount { .. }), "{error}");
    }
    for per_token in [0, 5] {
        let error = choose(2, 4, per_token).unwrap_err();
        let of = matches!(
            error,
            Nf4Error::Config {
                field: "per_token",
                ..
            }
        );
        assert!(of, "{error}");
    }
    let (ids, weights) = choose(0, 4, 2).expect("no tokens");
    assert_eq!((ids.dims(), weights.dims()), ([0, 2], [0, 2]));
}

on_every_device!(
    the_highest_scores_and_of_equal_ones_the_first,
    odd_scores_choose_the_same_everywhere,
    weights_have_the_gradient_of_a_softmax,
    impossible_sizes_are_errors,
);
