//! Norms against the formula in f64, on every device.
#![cfg(feature = "flex")]

#[macro_use]
mod devices;

use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_nf4::op::{NormForm, add_rms_norm, rms_norm};

const FORMS: [NormForm; 3] = [
    NormForm::CastThenWeight,
    NormForm::WeightThenCast,
    NormForm::OnePlusWeight,
];

/// Sizes of a row that no vector, one and many divide.
const SHAPES: [[usize; 3]; 6] = [
    [1, 1, 1],
    [2, 3, 7],
    [1, 5, 64],
    [3, 2, 576],
    [1, 2, 4096],
    [1, 70_000, 4],
];

const EPS: f64 = 1e-5;

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Uniform(-2.0, 2.0), device)
}

fn values<const D: usize>(x: &Tensor<D>) -> Vec<f64> {
    x.to_data().iter::<f64>().collect()
}

fn expected(x: &[f64], weight: &[f64], form: NormForm) -> Vec<f64> {
    let of_row = |row: &[f64]| -> Vec<f64> {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
        let scale = 1.0 / (mean + EPS).sqrt();
        let factor = |w: f64| match form {
            NormForm::OnePlusWeight => 1.0 + w,
            _ => w,
        };
        let of = |(x, &w): (&f64, &f64)| x * scale * factor(w);
        row.iter().zip(weight).map(of).collect()
    };
    x.chunks(weight.len()).flat_map(of_row).collect()
}

fn assert_near(given: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(given.len(), expected.len());
    for (i, (given, expected)) in given.iter().zip(expected).enumerate() {
        let difference = (given - expected).abs();
        let bound = tolerance * (1.0 + expected.abs());
        assert!(difference <= bound, "{what} {i}: {given} {expected}");
    }
}

fn every_shape(device: &Device) {
    for shape in SHAPES {
        for form in FORMS {
            for (dtype, tolerance) in [
                (DType::F32, 2e-6),
                (DType::F16, 2e-3),
                (DType::BF16, 1.6e-2),
            ] {
                if !burn_nf4::op::supports_dtype(device, dtype) {
                    continue;
                }
                let what = format!("{shape:?} {form:?} {dtype:?}");
                let [x, y] = [(); 2].map(|()| random(shape, device).cast(dtype));
                let weight = random([shape[2]], device).cast(dtype);
                let of_weight = values(&weight);
                let normed = rms_norm(x.clone(), weight.clone(), EPS, form).expect("it fits");
                assert_eq!((normed.dims(), normed.dtype()), (shape, dtype));
                let wanted = expected(&values(&x), &of_weight, form);
                assert_near(&values(&normed), &wanted, tolerance, &what);

                let both = add_rms_norm(x.clone(), y.clone(), weight, EPS, form);
                let (sum, normed) = both.expect("it fits");
                let wanted = values(&(x + y));
                assert_eq!(values(&sum), wanted, "{what}");
                let wanted = expected(&wanted, &of_weight, form);
                assert_near(&values(&normed), &wanted, tolerance, &what);
            }
        }
    }
}

/// By finite differences of the formula.
fn gradients(device: &Device) {
    let device = device.clone().autodiff();
    for form in FORMS {
        let [x, y, g, h] = [(); 4].map(|()| random([2, 3, 12], &device));
        let (x, y) = (x.require_grad(), y.require_grad());
        let weight = random([12], &device).require_grad();
        let both = add_rms_norm(x.clone(), y.clone(), weight.clone(), EPS, form);
        let (sum, normed) = both.expect("it fits");
        let loss = (normed * g.clone()).sum() + (sum * h.clone()).sum();
        let grads = loss.backward();
        let [of_g, of_h, of_x, of_y] = [&g, &h, &x, &y].map(values);
        let of_weight = values(&weight);
        let loss = |x: &[f64], weight: &[f64]| -> f64 {
            let sum: Vec<f64> = x.iter().zip(&of_y).map(|(a, b)| a + b).collect();
            let normed = expected(&sum, weight, form);
            let of_normed = normed.iter().zip(&of_g).map(|(a, b)| a * b).sum::<f64>();
            of_normed + sum.iter().zip(&of_h).map(|(a, b)| a * b).sum::<f64>()
        };
        let difference = |at: &[f64], loss: &dyn Fn(&[f64]) -> f64| -> Vec<f64> {
            let step = 1e-5;
            let moved = |i: usize, by: f64| {
                let mut at = at.to_vec();
                at[i] += by;
                loss(&at)
            };
            let of = |i| (moved(i, step) - moved(i, -step)) / (2.0 * step);
            (0..at.len()).map(of).collect()
        };
        let dx = difference(&of_x, &|x| loss(x, &of_weight));
        let dw = difference(&of_weight, &|weight| loss(&of_x, weight));
        for (tensor, name) in [(&x, "x"), (&y, "y")] {
            let given = values(&tensor.grad(&grads).expect(name));
            assert_near(&given, &dx, 1e-4, &format!("{form:?} {name}"));
        }
        let given = values(&weight.grad(&grads).expect("weight"));
        assert_near(&given, &dw, 1e-4, &format!("{form:?} weight"));
    }
}

fn what_does_not_fit_is_named(device: &Device) {
    let form = NormForm::CastThenWeight;
    let x = || random([2, 3, 8], device);
    let error = rms_norm(x(), random([7], device), EPS, form).expect_err("a weight of 7");
    assert!(error.to_string().contains("weight"), "{error}");
    let weight = || random([8], device);
    let error = rms_norm(x(), weight().cast(DType::F16), EPS, form).expect_err("another type");
    assert!(error.to_string().contains("weight"), "{error}");
    let y = random([2, 4, 8], device);
    let error = add_rms_norm(x(), y, weight(), EPS, form).expect_err("another shape");
    assert!(error.to_string().contains('y'), "{error}");
    let none = rms_norm(Tensor::<2>::zeros([0, 8], device), weight(), EPS, form);
    assert_eq!(none.expect("nothing").dims(), [0, 8]);
}

on_every_device!(every_shape, gradients, what_does_not_fit_is_named,);
