//! Rotations against the formula in f64, on every device.
#![cfg(feature = "flex")]

#[macro_use]
mod devices;

use burn::tensor::{DType, Device, Distribution, Int, Tensor};
use burn_nf4::Nf4Error;
use burn_nf4::op::{CachedKeys, TokenHeads, rotary, rotary_append};

/// `[batch, heads, tokens, head_dim]`, rotated elements, rows of the tables.
const SHAPES: [([usize; 4], usize, usize); 6] = [
    ([1, 1, 1, 2], 2, 1),
    ([2, 3, 5, 64], 64, 1),
    ([2, 3, 5, 64], 64, 2),
    ([3, 2, 4, 96], 72, 3),
    ([1, 4, 7, 80], 20, 1),
    ([2, 8, 33, 128], 128, 1),
];

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Uniform(-1.0, 1.0), device)
}

fn values<const D: usize>(x: &Tensor<D>) -> Vec<f64> {
    x.to_data().iter::<f64>().collect()
}

/// By the formula, from values as they are rounded.
fn expected(
    [batch, heads, tokens, head_dim]: [usize; 4],
    rows: usize,
    rotary_dim: usize,
    [x, cos, sin]: [&[f64]; 3],
) -> Vec<f64> {
    let mut y = x.to_vec();
    let half = rotary_dim / 2;
    for at in 0..batch * heads * tokens {
        let (b, t) = (at / (heads * tokens), at % tokens);
        let table = ((b % rows) * tokens + t) * rotary_dim;
        let head = &x[at * head_dim..];
        for i in 0..rotary_dim {
            let partner = head[(i + half) % rotary_dim];
            y[at * head_dim + i] = head[i] * cos[table + i] + partner * sin[table + i];
        }
    }
    y
}

fn assert_near(given: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(given.len(), expected.len());
    for (i, (given, expected)) in given.iter().zip(expected).enumerate() {
        let difference = (given - expected).abs();
        assert!(difference <= tolerance, "{i}: {given} {expected}");
    }
}

fn every_shape(device: &Device) {
    for (shape, rotary_dim, rows) in SHAPES {
        let [batch, heads, tokens, head_dim] = shape;
        // The last two are rounded three times, to 8 bits.
        for (dtype, table_dtype, tolerance) in [
            (DType::F32, DType::F32, 1e-6),
            (DType::F16, DType::F16, 3e-3),
            (DType::BF16, DType::BF16, 2e-2),
            (DType::BF16, DType::F32, 8e-3),
        ] {
            if !burn_nf4::op::supports_dtype(device, dtype) {
                continue;
            }
            // As projections give it, so that it is not contiguous here.
            let x = random([batch, tokens, heads, head_dim], device).cast(dtype);
            let x = x.swap_dims(1, 2);
            let [cos, sin] =
                [(); 2].map(|()| random([rows, tokens, rotary_dim], device).cast(table_dtype));
            let y = rotary(x.clone(), cos.clone(), sin.clone()).expect("it fits");
            assert_eq!((y.dims(), y.dtype()), (shape, dtype));
            let [of_x, of_cos, of_sin] = [values(&x), values(&cos), values(&sin)];
            let expected = expected(shape, rows, rotary_dim, [&of_x, &of_cos, &of_sin]);
            assert_near(&values(&y), &expected, tolerance);
        }
    }
}

/// The gradient is the transpose of the rotation: `<g, R x> = <R' g, x>` whatever `x` is.
fn gradients(device: &Device) {
    let with_graph = device.clone().autodiff();
    for (shape, rotary_dim, rows) in SHAPES {
        let [_, _, tokens, _] = shape;
        let x = random(shape, &with_graph).require_grad();
        let [cos, sin] = [(); 2].map(|()| random([rows, tokens, rotary_dim], &with_graph));
        let g = random(shape, &with_graph);
        let y = rotary(x.clone(), cos.clone(), sin.clone()).expect("it fits");
        let grads = (y * g.clone()).sum().backward();
        let given = values(&x.grad(&grads).expect("x is tracked"));
        let other = random(shape, &with_graph);
        let rotated = rotary(other.clone(), cos, sin).expect("it fits");
        let of =
            |a: &Tensor<4>, b: &[f64]| -> f64 { values(a).iter().zip(b).map(|(a, b)| a * b).sum() };
        let (left, right) = (of(&g, &values(&rotated)), of(&other, &given));
        let elems = (shape.iter().product::<usize>() as f64).sqrt();
        assert!((left - right).abs() < 1e-5 * elems, "{left} {right}");
    }
}

fn what_does_not_fit_is_named(device: &Device) {
    let x = || random([2, 3, 5, 64], device);
    let table = |shape| random(shape, device);
    let cases = [
        (table([1, 4, 64]), table([1, 4, 64]), "cos"),
        (table([3, 5, 64]), table([3, 5, 64]), "cos"),
        (table([1, 5, 64]), table([1, 5, 32]), "sin"),
        (table([1, 5, 66]), table([1, 5, 66]), "rotary_dim"),
        (table([1, 5, 7]), table([1, 5, 7]), "rotary_dim"),
        (table([1, 5, 64]), table([1, 5, 64]).cast(DType::F16), "sin"),
    ];
    for (cos, sin, word) in cases {
        let error: Nf4Error = rotary(x(), cos, sin).expect_err(word);
        assert!(error.to_string().contains(word), "{error}");
    }
    let none = rotary(
        Tensor::zeros([0, 3, 5, 64], device),
        table([1, 5, 64]),
        table([1, 5, 64]),
    );
    assert_eq!(none.expect("nothing").dims(), [0, 3, 5, 64]);
}

/// Batch, heads of queries and of keys, elements of a head, those rotated, rows of the tables, positions.
type AppendCase = ([usize; 3], [usize; 2], usize, &'static [i32]);

const APPENDED: [AppendCase; 5] = [
    ([1, 4, 2], [64, 64], 1, &[0]),
    ([1, 32, 8], [128, 128], 1, &[5]),
    ([3, 3, 1], [96, 72], 1, &[6]),
    ([3, 3, 1], [96, 72], 3, &[2, 0, 6]),
    ([2, 2, 2], [80, 20], 2, &[1, 3]),
];

/// Positions that the caches have room for.
const CAPACITY: usize = 7;

/// What [`rotary`] makes of queries and keys, and caches that differ at the positions alone. Written twice:
/// also to caches that nobody else holds.
fn appended_tokens(device: &Device) {
    for ([batch, heads, kv_heads], [head_dim, rotary_dim], rows, positions) in APPENDED {
        for (dtype, table_dtype) in [
            (DType::F32, DType::F32),
            (DType::F16, DType::F16),
            (DType::BF16, DType::BF16),
            (DType::BF16, DType::F32),
        ] {
            if !burn_nf4::op::supports_dtype(device, dtype) {
                continue;
            }
            let token = |heads| {
                random([batch, 1, heads, head_dim], device)
                    .cast(dtype)
                    .swap_dims(1, 2)
            };
            let (q, k, v) = (token(heads), token(kv_heads), token(kv_heads));
            let [cos, sin] =
                [(); 2].map(|()| random([rows, 1, rotary_dim], device).cast(table_dtype));
            let shape = [batch, kv_heads, CAPACITY, head_dim];
            let held = CachedKeys {
                keys: random(shape, device).cast(dtype),
                values: random(shape, device).cast(dtype),
            };
            let wanted = |held: &Tensor<4>, token: &Tensor<4>| {
                let (mut held, token) = (values(held), values(token));
                for (head, token) in token.chunks(head_dim).enumerate() {
                    let position = positions[head / kv_heads % positions.len()] as usize;
                    let at = (head * CAPACITY + position) * head_dim;
                    held[at..at + head_dim].copy_from_slice(token);
                }
                held
            };
            let rotated =
                |x: &Tensor<4>| rotary(x.clone(), cos.clone(), sin.clone()).expect("it fits");
            let of_keys = wanted(&held.keys, &rotated(&k));
            let of_values = wanted(&held.values, &v);
            let before = [values(&held.keys), values(&held.values)];
            let at = Tensor::<1, Int>::from_data(positions, device);
            let append = |cache| {
                let (q, k, v) = (q.clone(), k.clone(), v.clone());
                let tables = [cos.clone(), sin.clone()];
                rotary_append(TokenHeads { q, k, v }, tables, cache, at.clone()).expect("it fits")
            };
            let (of_q, cache) = append(held.clone());
            assert_eq!(
                (of_q.dims(), of_q.dtype()),
                ([batch, heads, 1, head_dim], dtype)
            );
            assert_eq!(values(&of_q), values(&rotated(&q)));
            assert_eq!(
                [values(&cache.keys), values(&cache.values)],
                [of_keys.clone(), of_values.clone()]
            );
            // The cache that was handed in with another owner is as it was.
            assert_eq!([values(&held.keys), values(&held.values)], before);
            let (_, cache) = append(held);
            assert_eq!(
                [values(&cache.keys), values(&cache.values)],
                [of_keys, of_values]
            );
        }
    }
}

fn what_cannot_be_appended_is_named(device: &Device) {
    let append = |k: [usize; 4], keys: [usize; 4], positions: &[i32]| {
        let q = random([2, 4, 1, 64], device);
        let (k, v) = (random(k, device), random(k, device));
        let tables = [random([1, 1, 64], device), random([1, 1, 64], device)];
        let cache = CachedKeys {
            keys: random(keys, device),
            values: random([2, 2, 9, 64], device),
        };
        let positions = Tensor::from_data(positions, device);
        rotary_append(TokenHeads { q, k, v }, tables, cache, positions).map(drop)
    };
    let (k, keys) = ([2, 2, 1, 64], [2, 2, 9, 64]);
    append(k, keys, &[3, 4]).expect("it fits");
    for (k, keys, positions, word) in [
        ([2, 2, 2, 64], keys, &[1][..], "k"),
        ([2, 1, 1, 64], keys, &[1], "k"),
        (k, [2, 2, 8, 64], &[1], "values"),
        (k, [1, 2, 9, 64], &[1], "keys"),
        (k, keys, &[1, 2, 3], "positions"),
        (k, keys, &[], "positions"),
    ] {
        let error = append(k, keys, positions).expect_err(word);
        assert!(error.to_string().contains(word), "{error}");
    }
}

on_every_device!(
    every_shape,
    gradients,
    what_does_not_fit_is_named,
    appended_tokens,
    what_cannot_be_appended_is_named,
);
