//! Gradients of the fused operations of training against those of plain Burn operations, on every device.
#![cfg(feature = "flex")]

#[macro_use]
mod devices;

use burn::module::Param;
use burn::tensor::{DType, Device, Distribution, Gradients, Tensor};
use burn_nf4::BlockWeight;
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::nn::{AnyLinear, QLoraLinearConfig, QuantLinear};
use burn_nf4::op::{
    Activation, LinearPart, LowRank, MatmulStrategy, NormForm, Seed, gated, joined_linear,
    rms_norm, rms_norm_beside,
};

/// Types, with the tolerance of a sum of products rounded to them.
const DTYPES: [(DType, f64); 2] = [(DType::F32, 2e-5), (DType::BF16, 3e-2)];

fn random<const D: usize>(shape: [usize; D], dtype: DType, device: &Device) -> Tensor<D> {
    // Rounded first, so that what it is compared with begins with the same values.
    let values: Tensor<D> = Tensor::random(shape, Distribution::Normal(0.0, 1.0), device);
    // On the host: not every device has bf16.
    let rounded = values.into_data().convert_dtype(DType::BF16);
    let rounded = rounded.convert_dtype(DType::F32);
    Tensor::<D>::from_data(rounded, (device, DType::F32)).cast(dtype)
}

fn leaf<const D: usize>(x: &Tensor<D>, dtype: DType) -> Tensor<D> {
    x.clone().cast(dtype).detach().require_grad()
}

fn values<const D: usize>(x: Tensor<D>) -> Vec<f64> {
    x.into_data().iter::<f64>().collect()
}

/// By the largest value that is expected.
fn assert_near<const D: usize>(given: Tensor<D>, expected: Tensor<D>, tolerance: f64, what: &str) {
    assert_eq!(given.dims(), expected.dims(), "{what}");
    let (given, expected) = (values(given), values(expected));
    let size = expected.iter().fold(0f64, |size, x| size.max(x.abs()));
    assert!(size > 0.0, "{what}: nothing but zeros is expected");
    for (i, (given, expected)) in given.iter().zip(&expected).enumerate() {
        let difference = (given - expected).abs();
        assert!(
            difference <= tolerance * size,
            "{what} {i}: {given} {expected}"
        );
    }
}

fn gradient<const D: usize>(x: &Tensor<D>, gradients: &Gradients) -> Tensor<D> {
    x.grad(gradients).expect("there is a path to it")
}

/// Rows of an input: CubeCL's CPU runtime takes minutes over many.
fn rows(device: &Device) -> &'static [usize] {
    match format!("{device:?}").contains("Cpu") {
        true => &[1, 7],
        false => &[1, 7, 300],
    }
}

fn gates(device: &Device) {
    let device = &device.clone().autodiff();
    for shape in [[1, 1, 1], [2, 3, 7], [3, 5, 64], [1, 2, 4096]] {
        for activation in [
            Activation::Silu,
            Activation::GeluTanh,
            Activation::ClampedSwiGlu,
        ] {
            for (dtype, tolerance) in DTYPES {
                if !burn_nf4::op::supports_dtype(device, dtype) {
                    continue;
                }
                let what = format!("{shape:?} {activation:?} {dtype:?}");
                let [gate, up, g] = [(); 3].map(|()| random(shape, dtype, device));
                // A number alone, by whose size the difference goes, is where nothing cancels out and nothing
                // is cut.
                let [gate, up] = [gate, up].map(|x| match shape {
                    [1, 1, 1] => x.abs().clamp_max(1.5) + 0.5,
                    _ => x,
                });
                let run = |dtype, fused: bool| {
                    let (gate, up) = (
                        leaf(&(gate.clone() * 3.0), dtype),
                        leaf(&(up.clone() * 3.0), dtype),
                    );
                    let y = match fused {
                        true => gated(gate.clone(), up.clone(), activation).expect("it fits"),
                        false => activation.forward(gate.clone()) * activation.opened(up.clone()),
                    };
                    let gradients = (y.clone() * g.clone().cast(dtype)).sum().backward();
                    [
                        y.inner(),
                        gradient(&gate, &gradients),
                        gradient(&up, &gradients),
                    ]
                };
                let (given, expected) = (run(dtype, true), run(DType::F32, false));
                for (given, expected) in given.into_iter().zip(expected) {
                    assert_near(given, expected, tolerance, &what);
                }
            }
        }
    }
}

/// The gradients of what goes past a norm and through it, of each and of both.
fn ways_past_a_norm(device: &Device) {
    let device = &device.clone().autodiff();
    for size in [1, 7, 64, 4096, 20_000] {
        for (dtype, tolerance) in DTYPES {
            if !burn_nf4::op::supports_dtype(device, dtype) {
                continue;
            }
            for (by_norm, past) in [(true, true), (true, false), (false, true)] {
                let what = format!("{size} {dtype:?} {by_norm} {past}");
                let [x, g, h] = [(); 3].map(|()| random([3, size], dtype, device));
                let weight = random([size], dtype, device);
                let run = |dtype, fused: bool| {
                    let x = leaf(&x, dtype);
                    let weight = weight.clone().cast(dtype).detach();
                    let form = NormForm::CastThenWeight;
                    let (rest, normed) = match fused {
                        true => rms_norm_beside(x.clone(), weight, 1e-5, form).expect("it fits"),
                        false => {
                            let mean = (x.clone() * x.clone()).mean_dim(1);
                            let scale = (mean + 1e-5).sqrt().recip();
                            (x.clone(), x.clone() * scale * weight.unsqueeze())
                        }
                    };
                    let [g, h] = [&g, &h].map(|g| g.clone().cast(dtype));
                    let loss = match (by_norm, past) {
                        (true, true) => (normed * g).sum() + (rest * h).sum(),
                        (true, false) => (normed * g).sum(),
                        (false, _) => (rest * h).sum(),
                    };
                    gradient(&x, &loss.backward())
                };
                let expected = run(DType::F32, false);
                // Of one element the norm is the sign, without a slope.
                if size > 1 || past {
                    assert_near(run(dtype, true), expected, tolerance, &what);
                }
            }
        }
    }
    // A norm alone is one of both ways.
    let x = random([2, 8], DType::F32, device).require_grad();
    let weight = Tensor::ones([8], device).require_grad();
    let y = rms_norm(x.clone(), weight.clone(), 1e-5, NormForm::CastThenWeight).expect("it fits");
    let gradients = y.sum().backward();
    assert!(x.grad(&gradients).is_some() && weight.grad(&gradients).is_some());
}

/// A weight of the layers of a small model.
fn weight(n: usize, k: usize, device: &Device) -> BlockWeight {
    let weight = Tensor::<2>::random([n, k], Distribution::Normal(0.0, 0.05), device);
    BlockWeight::quantize(weight, QuantConfig::default()).expect("it can be quantized")
}

struct Case {
    weight: BlockWeight,
    bias: Option<Tensor<1>>,
    a: Tensor<2>,
    b: Tensor<2>,
}

const SCALE: f64 = 0.5;

impl Case {
    fn new(n: usize, k: usize, rank: usize, bias: bool, device: &Device) -> Self {
        let f32 = DType::F32;
        Self {
            weight: weight(n, k, device),
            bias: bias.then(|| random([n], f32, device)),
            a: random([k, rank], f32, device) * 0.1,
            b: random([rank, n], f32, device) * 0.1,
        }
    }

    /// In plain operations, in f32, on the host: on CUDA Burn multiplies in TF32.
    fn expected(&self, x: &Tensor<2>, [a, b]: [Tensor<2>; 2]) -> Tensor<2> {
        let host = &x.device();
        let dense = self
            .weight
            .dequantize::<2>(FloatType::F32)
            .expect("it can be decoded");
        let dense = on_host(dense, host);
        let y = x.clone().matmul(dense.transpose()) + x.clone().matmul(a).matmul(b) * SCALE;
        match &self.bias {
            Some(bias) => y + on_host(bias.clone(), host).unsqueeze(),
            None => y,
        }
    }
}

fn on_host<const D: usize>(x: Tensor<D>, host: &Device) -> Tensor<D> {
    Tensor::from_data(x.into_data(), (host, DType::F32))
}

/// Three products of one `x`, with branches in the type of `x` and in f32. What is not used has no part in
/// the gradient.
fn joined_branches(device: &Device) {
    let device = &device.clone().autodiff();
    let cases = rows(device)
        .iter()
        .flat_map(|&rows| [(rows, false), (rows, true)]);
    for (rows, bias) in cases {
        let cases = [64, 32, 96].map(|n| Case::new(n, 128, 4, bias, device));
        let x = random([rows, 128], DType::F32, device);
        for (dtype, tolerance) in DTYPES {
            if !burn_nf4::op::supports_dtype(device, dtype) {
                continue;
            }
            for of_branch in [DType::F32, dtype] {
                for used in [&[0, 1, 2][..], &[1]] {
                    let what = format!("{rows} {bias} {dtype:?} {of_branch:?} {used:?}");
                    joined_branches_of(&cases, &x, used, [dtype, of_branch], tolerance, &what);
                }
            }
        }
    }
}

fn joined_branches_of(
    cases: &[Case; 3],
    x: &Tensor<2>,
    used: &[usize],
    [dtype, of_branch]: [DType; 2],
    tolerance: f64,
    what: &str,
) {
    let [rows, _] = x.dims();
    let device = &x.device();
    let g = cases
        .each_ref()
        .map(|case| random([rows, case.b.dims()[1]], DType::F32, device));
    let leaves = |dtype| {
        cases
            .each_ref()
            .map(|case| [leaf(&case.a, dtype), leaf(&case.b, dtype)])
    };
    let loss = |results: &[Tensor<2>]| {
        let of = |&i: &usize| {
            let y = results[i].clone();
            let g = Tensor::from_data(g[i].to_data(), (&y.device(), y.dtype()));
            (y * g).sum()
        };
        used.iter()
            .map(of)
            .reduce(|sum, loss| sum + loss)
            .expect("one is used")
    };

    let host = &Device::flex().autodiff();
    let of_x = on_host(x.clone(), host).require_grad();
    let of_factors = cases
        .each_ref()
        .map(|case| [&case.a, &case.b].map(|factor| on_host(factor.clone(), host).require_grad()));
    let expected = [0, 1, 2].map(|i: usize| cases[i].expected(&of_x, of_factors[i].clone()));
    let (given_x, factors) = (leaf(x, dtype), leaves(of_branch));
    let parts = [0, 1, 2].map(|i: usize| LinearPart {
        weight: &cases[i].weight,
        bias: cases[i].bias.clone().map(|bias| bias.cast(dtype)),
        branch: Some(LowRank {
            a: factors[i][0].clone(),
            b: factors[i][1].clone(),
            scale: SCALE,
        }),
        strategy: MatmulStrategy::Auto,
    });
    let given = joined_linear(given_x.clone(), parts).expect("they fit");
    for (given, expected) in given.iter().zip(&expected) {
        assert_near(
            given.clone().inner(),
            expected.clone().inner(),
            tolerance,
            what,
        );
    }

    let (given, expected) = (loss(&given).backward(), loss(&expected).backward());
    assert_near(
        gradient(&given_x, &given),
        gradient(&of_x, &expected),
        tolerance,
        what,
    );
    for i in 0..3 {
        for (factor, wanted) in factors[i].iter().zip(&of_factors[i]) {
            if !used.contains(&i) {
                assert!(factor.grad(&given).is_none(), "{what}");
                continue;
            }
            let given = gradient(factor, &given);
            assert_eq!(given.dtype(), of_branch);
            assert_near(given, gradient(wanted, &expected), tolerance, what);
        }
    }
}

/// What a seed gives are the gradients of the result with that gradient, for every kind of layer.
fn seeds(device: &Device) {
    let device = &device.clone().autodiff();
    let base = || QuantLinear::new(weight(48, 64, device), None).expect("a matrix");
    let lora = |dora: bool| {
        let branch = QLoraLinearConfig::new(4).with_use_dora(dora);
        let mut layer = branch.init(base(), device).expect("a branch");
        layer.lora_b = Param::from_tensor(random([4, 48], DType::F32, device) * 0.1);
        layer
    };
    let with_bias = AnyLinear::from(lora(false));
    let bias = Param::from_tensor(random([48], DType::F32, device));
    let layers: [AnyLinear; 4] = [
        base().into(),
        lora(false).into(),
        lora(true).into(),
        with_bias.with_bias(bias).expect("it fits"),
    ];
    for (dtype, tolerance) in DTYPES {
        if !burn_nf4::op::supports_dtype(device, dtype) {
            continue;
        }
        for (i, layer) in layers.iter().enumerate() {
            for &rows in rows(device) {
                let what = format!("layer {i} {dtype:?} {rows}");
                let x = random([2, rows, 64], dtype, device);
                let g = random([2, rows, 48], dtype, device).inner();
                let (first, second) = (leaf(&x, dtype), leaf(&x, dtype));
                let given = layer.seed(first.clone(), g.clone()).backward();
                let y = layer.forward(second.clone());
                let expected = (y * g.autodiff()).sum().backward();
                assert_near(
                    gradient(&first, &given),
                    gradient(&second, &expected),
                    tolerance,
                    &what,
                );
                if let AnyLinear::QLora(layer) = layer {
                    for factor in [&layer.lora_a, &layer.lora_b] {
                        let factor = factor.val();
                        let (given, expected) =
                            (gradient(&factor, &given), gradient(&factor, &expected));
                        assert_near(given, expected, tolerance, &what);
                    }
                }
            }
        }
    }
}

fn seeds_that_do_not_fit(device: &Device) {
    let device = &device.clone().autodiff();
    let y = Tensor::<2>::ones([2, 3], device).require_grad();
    let of = |shape: [usize; 2], dtype| Tensor::<2>::ones(shape, (device, dtype));
    let error = Seed::of(y.clone(), of([3, 2], DType::F32)).expect_err("another shape");
    assert!(error.to_string().contains("grad"), "{error}");
    let error = Seed::of(y, of([2, 3], DType::F16)).expect_err("another type");
    assert!(error.to_string().contains("grad"), "{error}");
    let up = Tensor::<2>::ones([2, 4], device);
    let error = gated(of([2, 3], DType::F32), up, Activation::Silu).expect_err("another shape");
    assert!(error.to_string().contains("up"), "{error}");
}

on_every_device!(
    gates,
    ways_past_a_norm,
    joined_branches,
    seeds,
    seeds_that_do_not_fit,
);
