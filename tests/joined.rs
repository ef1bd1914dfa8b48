//! Linear maps of one input, joined in one launch where there is a kernel for it, against each by itself in f32.
#![cfg(feature = "flex")]

use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_nf4::format::{Absmax, BlockSize, BlockTensor, FloatType, QuantConfig, QuantType};
use burn_nf4::op::{
    Activation, LinearPart, LowRank, MatmulStrategy, gated_linear, joined_linear, lora_linear,
};
use burn_nf4::{BlockWeight, Nf4Error};

/// Rows of the weights, and their columns: even and ragged, small and of real layers.
const SHAPES: [([usize; 3], usize); 4] = [
    ([16, 1, 17], 64),
    ([200, 72, 8], 192),
    ([72, 24, 24], 576),
    ([96, 32, 32], 1024),
];

/// Those of a model of 8B: for graphics cards.
const LARGE: ([usize; 3], usize) = ([4096, 1024, 1024], 4096);

fn shapes(device: &Device) -> Vec<([usize; 3], usize)> {
    let mut shapes = SHAPES.to_vec();
    let is_card = format!("{device:?}").contains("Cuda");
    shapes.extend(is_card.then_some(LARGE));
    shapes
}

const CONFIGS: [QuantConfig; 3] = [
    QuantConfig {
        quant_type: QuantType::Nf4,
        block_size: BlockSize::B64,
        nested_block_size: Some(BlockSize::B256),
    },
    QuantConfig {
        quant_type: QuantType::Nf4,
        block_size: BlockSize::B64,
        nested_block_size: None,
    },
    QuantConfig {
        quant_type: QuantType::Fp4,
        block_size: BlockSize::B256,
        nested_block_size: Some(BlockSize::B256),
    },
];

/// What is added to the products: a bias, and a branch of a rank.
const ADDED: [(bool, usize); 4] = [(false, 0), (true, 0), (false, 16), (true, 24)];

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

/// Weights of magnitudes of their own, so that no two have the same offset of their scales.
fn weight(n: usize, k: usize, number: usize, config: QuantConfig, device: &Device) -> BlockWeight {
    let size = 0.02 * (number + 1) as f64;
    let weight = BlockWeight::quantize(random([n, k], device) * size, config);
    with_own_map(weight.expect("it can be quantized"), number, device)
}

/// The weight with another map of its scales, as a checkpoint can have: no two have the same.
fn with_own_map(weight: BlockWeight, number: usize, device: &Device) -> BlockWeight {
    let host = weight.to_host().expect("it can be read");
    let Absmax::Nested(mut nested) = host.absmax().clone() else {
        return weight;
    };
    let factor = 1.0 - 0.25 * number as f32;
    nested.map.iter_mut().for_each(|value| *value *= factor);
    let host = BlockTensor::from_parts(
        host.codes().to_vec(),
        Absmax::Nested(nested),
        host.shape().to_vec(),
        host.config().block_size,
        host.dtype(),
        host.config().quant_type,
    );
    BlockWeight::from_host(&host.expect("its parts fit"), device)
}

fn part<'a>(
    weight: &'a BlockWeight,
    (bias, rank): (bool, usize),
    dtype: DType,
    scale: f64,
    device: &Device,
) -> LinearPart<'a> {
    let &[n, k] = weight.shape() else {
        panic!("a matrix")
    };
    LinearPart {
        weight,
        bias: bias.then(|| random([n], device).cast(dtype)),
        branch: (rank > 0).then(|| LowRank {
            a: random([k, rank], device) * 0.05,
            b: random([rank, n], device) * 0.05,
            scale,
        }),
        strategy: MatmulStrategy::Rule,
    }
}

/// The same by itself, in f32 over the decoded weight.
fn alone<const D: usize>(x: &Tensor<D>, part: &LinearPart) -> Vec<f32> {
    let x = x.clone().cast(DType::F32);
    let bias = part.bias.clone().map(|bias| bias.cast(DType::F32));
    let strategy = MatmulStrategy::Decode;
    let y = match &part.branch {
        Some(branch) => lora_linear(x, part.weight, bias, branch.clone(), strategy),
        None => burn_nf4::op::linear_with(x, part.weight, bias, strategy),
    };
    y.expect("it fits").into_data().iter::<f32>().collect()
}

/// What a value may be off by: levels, the row or branches are rounded, to 11 bits with f16, to 8 with bf16.
fn relative(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 1.0 / 256.0,
        _ => 1.0 / 64.0,
    }
}

/// The bound of each value of a product: it has terms as large as others.
fn bounds(expected: &[f32], dtype: DType) -> Vec<f32> {
    let size = expected.iter().map(|y| y * y).sum::<f32>() / expected.len() as f32;
    // A single value may be small beside its terms.
    let size = size.sqrt().max(0.25);
    let bound = |y: &f32| relative(dtype) * (y.abs() + size);
    expected.iter().map(bound).collect()
}

#[track_caller]
fn assert_within(given: &[f32], expected: &[f32], bounds: &[f32], what: &str) {
    assert_eq!(given.len(), expected.len(), "{what}");
    for (i, (given, expected)) in given.iter().zip(expected).enumerate() {
        let difference = (given - expected).abs();
        assert!(difference <= bounds[i], "{what} {i}: {given} {expected}");
    }
}

#[track_caller]
fn assert_near(given: &[f32], expected: &[f32], dtype: DType, what: &str) {
    assert_within(given, expected, &bounds(expected, dtype), what);
}

fn floats<const D: usize>(y: Tensor<D>) -> Vec<f32> {
    y.into_data().iter::<f32>().collect()
}

fn dtypes(device: &Device) -> impl Iterator<Item = DType> + '_ {
    let all = [FloatType::F16, FloatType::BF16, FloatType::F32].map(DType::from);
    all.into_iter()
        .filter(|&dtype| burn_nf4::op::supports_dtype(device, dtype))
}

fn two_and_three(device: &Device) {
    for (rows, k) in shapes(device) {
        for config in CONFIGS {
            let weights = [0, 1, 2].map(|i| weight(rows[i], k, i, config, device));
            for added in ADDED {
                for dtype in dtypes(device) {
                    let what = format!("{rows:?} {k} {config:?} {added:?} {dtype:?}");
                    let x = random([1, 1, k], device).cast(dtype);
                    let parts = [0, 1, 2]
                        .map(|i| part(&weights[i], added, dtype, 0.5 * (i + 1) as f64, device));
                    let expected = parts.each_ref().map(|part| alone(&x, part));
                    let [q, k, v] = parts;
                    let two = joined_linear(x.clone(), [k.clone(), v.clone()]).expect("it fits");
                    let three = joined_linear(x, [q, k, v]).expect("it fits");
                    for (i, y) in three.into_iter().enumerate() {
                        assert_eq!((y.dims(), y.dtype()), ([1, 1, rows[i]], dtype), "{what}");
                        assert_near(
                            &floats(y),
                            &expected[i],
                            dtype,
                            &format!("{what} of three, {i}"),
                        );
                    }
                    for (y, i) in two.into_iter().zip([1, 2]) {
                        assert_near(
                            &floats(y),
                            &expected[i],
                            dtype,
                            &format!("{what} of two, {i}"),
                        );
                    }
                }
            }
        }
    }
}

fn activated(x: f32, activation: Activation) -> f32 {
    let x = f64::from(x);
    let y = match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::ClampedSwiGlu => x.min(7.0) / (1.0 + (-1.702 * x.min(7.0)).exp()),
    };
    y as f32
}

fn opened(x: f32, activation: Activation) -> f32 {
    match activation {
        Activation::ClampedSwiGlu => x.clamp(-7.0, 7.0) + 1.0,
        _ => x,
    }
}

fn gated(device: &Device) {
    for ([n, ..], k) in SHAPES
        .into_iter()
        .chain([([8192, 0, 0], 1024), ([1000, 0, 0], 64)])
    {
        for config in CONFIGS {
            let [gate, up] = [0, 1].map(|i| weight(n, k, i, config, device));
            for (added, activation) in ADDED.into_iter().zip([
                Activation::Silu,
                Activation::ClampedSwiGlu,
                Activation::GeluTanh,
                Activation::ClampedSwiGlu,
            ]) {
                for dtype in dtypes(device) {
                    let what = format!("{n} {k} {config:?} {added:?} {activation:?} {dtype:?}");
                    let x = random([1, k], device).cast(dtype);
                    let gate = part(&gate, added, dtype, 0.5, device);
                    let up = part(&up, added, dtype, 1.5, device);
                    let gates = alone(&x, &gate);
                    let factors = alone(&x, &up);
                    let of_gates = bounds(&gates, dtype);
                    let of_factors = bounds(&factors, dtype);
                    let expected = gates.iter().zip(&factors);
                    let expected: Vec<f32> = expected
                        .map(|(&gate, &factor)| {
                            activated(gate, activation) * opened(factor, activation)
                        })
                        .collect();
                    // No activation is steeper than 1.13.
                    let off = |i: usize| {
                        let factor = opened(factors[i], activation).abs();
                        let of_gate = 1.2 * of_gates[i] * (factor + of_factors[i]);
                        let of_factor = of_factors[i] * activated(gates[i], activation).abs();
                        of_gate + of_factor + relative(dtype) * expected[i].abs()
                    };
                    let off: Vec<f32> = (0..n).map(off).collect();
                    let y = gated_linear(x, gate, up, activation).expect("it fits");
                    assert_eq!((y.dims(), y.dtype()), ([1, n], dtype), "{what}");
                    assert_within(&floats(y), &expected, &off, &what);
                }
            }
        }
    }
}

/// Several rows, weights of different settings and a strategy of one: each by itself.
fn what_is_not_joined(device: &Device) {
    let k = 128;
    let nested = weight(64, k, 0, CONFIGS[0], device);
    let flat = weight(48, k, 1, CONFIGS[1], device);
    let plain = |weight, strategy| LinearPart {
        strategy,
        ..part(weight, (false, 0), DType::F32, 1.0, device)
    };
    let rule = MatmulStrategy::Rule;
    let with_bias = part(&nested, (true, 0), DType::F32, 1.0, device);
    for (rows, first, second) in [
        (3, plain(&nested, rule), plain(&nested, rule)),
        (1, plain(&nested, rule), plain(&flat, rule)),
        (
            1,
            plain(&nested, rule),
            plain(&nested, MatmulStrategy::Decode),
        ),
        (1, with_bias, plain(&nested, rule)),
    ] {
        let x = random([rows, k], device);
        let expected = [&first, &second].map(|part| alone(&x, part));
        let given = joined_linear(x, [first, second]).expect("it fits");
        for (y, expected) in given.into_iter().zip(&expected) {
            assert_near(&floats(y), expected, DType::F32, &format!("{rows} rows"));
        }
    }
}

fn refusals(device: &Device) {
    let [wide, other] = [128, 192].map(|k| weight(64, k, 0, CONFIGS[0], device));
    let x = || random([1, 128], device);
    let of = |weight| part(weight, (false, 0), DType::F32, 1.0, device);
    let error = joined_linear(x(), [of(&wide), of(&other)]).unwrap_err();
    assert!(matches!(error, Nf4Error::Shape { .. }), "{error}");
    let narrow = weight(32, 128, 0, CONFIGS[0], device);
    let error = gated_linear(x(), of(&wide), of(&narrow), Activation::Silu).unwrap_err();
    assert!(matches!(error, Nf4Error::Shape { .. }), "{error}");
    let mut wrong = part(&wide, (false, 8), DType::F32, 1.0, device);
    wrong.branch.as_mut().expect("it has one").b = random([8, 63], device);
    let error = joined_linear(x(), [of(&wide), wrong]).unwrap_err();
    assert!(matches!(error, Nf4Error::Shape { .. }), "{error}");
    let bias = LinearPart {
        bias: Some(random([63], device)),
        ..of(&wide)
    };
    let error = joined_linear(x(), [bias.clone(), bias]).unwrap_err();
    assert!(matches!(error, Nf4Error::Shape { .. }), "{error}");
}

/// Gradients go through products by themselves.
fn gradients(device: &Device) {
    let tracked = device.clone().autodiff();
    let weights = [0, 1].map(|i| weight(32, 64, i, CONFIGS[0], device));
    let x = Tensor::<2>::ones([1, 64], &tracked).require_grad();
    let parts = weights
        .each_ref()
        .map(|weight| part(weight, (false, 0), DType::F32, 1.0, device));
    let [a, b] = joined_linear(x.clone(), parts).expect("it fits");
    let grads = (a.sum() + b.sum()).backward();
    let given = floats(x.grad(&grads).expect("it has one"));
    let sum = |weight: &BlockWeight| {
        let dense = weight
            .dequantize::<2>(FloatType::F32)
            .expect("it can be decoded");
        floats(dense.sum_dim(0))
    };
    let [a, b] = weights.each_ref().map(sum);
    let expected: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
    assert_near(&given, &expected, DType::F32, "dx");
}

macro_rules! device_tests {
    ($name:ident, $device:expr) => {
        mod $name {
            use super::*;

            #[test]
            fn two_and_three() {
                super::two_and_three(&$device);
            }

            #[test]
            fn gated() {
                super::gated(&$device);
            }

            #[test]
            fn what_is_not_joined() {
                super::what_is_not_joined(&$device);
            }

            #[test]
            fn refusals() {
                super::refusals(&$device);
            }

            #[test]
            fn gradients() {
                super::gradients(&$device);
            }
        }
    };
}

device_tests!(flex, Device::flex());
#[cfg(feature = "wgpu")]
device_tests!(wgpu, Device::wgpu(Default::default()));
#[cfg(feature = "cuda")]
device_tests!(cuda, Device::cuda(0));

/// The tests above compare with what a product computes by itself: here it is the kernel that computes it.
#[cfg(feature = "cuda")]
#[test]
fn cuda_has_the_kernel() {
    use burn::backend::DispatchDevice;
    use burn_nf4::format::PackedLayout;
    use burn_nf4::launch::JoinedPlan;

    let device = &Device::cuda(0);
    let DispatchDevice::Cube(cube) = device.as_dispatch() else {
        panic!("a CubeCL device");
    };
    let client = cube.client();
    for (rows, k) in shapes(device) {
        for config in CONFIGS {
            let weights = rows.map(|n| (PackedLayout::new(n * k, config), n));
            let bf16 = FloatType::BF16;
            JoinedPlan::new(&client, &weights, k, bf16, None).expect("a kernel for three");
            let two = [weights[0]; 2];
            let gate = Some(Activation::Silu);
            JoinedPlan::new(&client, &two, k, bf16, gate).expect("a kernel for a gate");
        }
    }
}
