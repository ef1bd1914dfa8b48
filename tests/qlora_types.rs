//! Training beside a frozen weight of every type, on the CPU.
#![cfg(feature = "flex")]

use burn::nn::Linear;
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Tensor};
use burn_nf4::format::{BlockTensor, FloatType, QuantConfig, QuantType};
use burn_nf4::nn::{QLoraLinear, QLoraLinearConfig, QuantLinear};
use rstest::rstest;

const D_INPUT: usize = 96;
const D_OUTPUT: usize = 40;
const ROWS: usize = 6;
const RANK: usize = 4;
const ALPHA: f64 = 8.0;

fn values(elems: usize, seed: usize) -> Vec<f32> {
    (0..elems)
        .map(|i| ((i * 37 + seed * 101) as f32 * 0.618).sin())
        .collect()
}

fn matrix(rows: usize, columns: usize, seed: usize, device: &Device) -> Tensor<2> {
    let values = values(rows * columns, seed);
    Tensor::<1>::from_floats(values.as_slice(), device).reshape([rows, columns])
}

/// A layer with a branch that is not zero.
fn layer(quant_type: QuantType, device: &Device) -> QLoraLinear {
    let weight = values(D_OUTPUT * D_INPUT, 1);
    let config = QuantConfig::of(quant_type);
    let weight = BlockTensor::quantize(&weight, &[D_OUTPUT, D_INPUT], config).unwrap();
    let base = QuantLinear::from_host(&weight, None, device).unwrap();
    let a = matrix(D_INPUT, RANK, 2, device) * 0.1;
    let b = matrix(RANK, D_OUTPUT, 3, device) * 0.1;
    let config = QLoraLinearConfig::new(RANK).with_alpha(ALPHA);
    config.init_with(base, a, b).unwrap()
}

fn loss(y: Tensor<2>, device: &Device) -> Tensor<1> {
    let error = y - matrix(ROWS, D_OUTPUT, 5, device);
    (error.clone() * error).mean()
}

fn near(got: &Tensor<2>, expected: &Tensor<2>, what: &str) {
    let error = (got.clone() - expected.clone())
        .abs()
        .max()
        .into_scalar::<f32>();
    let largest = expected.clone().abs().max().into_scalar::<f32>();
    assert!(
        largest > 0.0 && error <= 1e-4 * largest,
        "{what}: {error} of {largest}"
    );
}

/// Those of a dense layer with the decoded weight, and a branch beside it.
#[rstest]
fn gradients_are_those_of_the_decoded_weight(#[values(0, 1, 2, 3, 4, 5)] index: usize) {
    let quant_type = QuantType::ALL[index];
    let device = Device::flex().autodiff();
    let layer = layer(quant_type, &device);
    let x = matrix(ROWS, D_INPUT, 4, &device).require_grad();
    let y = layer.forward(x.clone());
    let grads = loss(y.clone(), &device).backward();

    let dense: Linear = layer.base.to_dense(FloatType::F32).unwrap();
    let x_dense = matrix(ROWS, D_INPUT, 4, &device).require_grad();
    let a = layer.lora_a.val().detach().require_grad();
    let b = layer.lora_b.val().detach().require_grad();
    let branch = x_dense.clone().matmul(a.clone()).matmul(b.clone());
    let y_dense = dense.forward(x_dense.clone()) + branch * (ALPHA / RANK as f64);
    let dense_grads = loss(y_dense.clone(), &device).backward();

    near(&y.inner(), &y_dense.inner(), "y");
    let pairs = [
        (x.grad(&grads), x_dense.grad(&dense_grads), "dx"),
        (layer.lora_a.grad(&grads), a.grad(&dense_grads), "da"),
        (layer.lora_b.grad(&grads), b.grad(&dense_grads), "db"),
    ];
    for (got, expected, what) in pairs {
        near(&got.unwrap(), &expected.unwrap(), what);
    }
}

#[rstest]
fn the_loss_falls_and_the_weight_stays(#[values(0, 1, 2, 3, 4, 5)] index: usize) {
    let quant_type = QuantType::ALL[index];
    let device = Device::flex().autodiff();
    let mut layer = layer(quant_type, &device);
    let packed = |layer: &QLoraLinear| layer.base.weight.packed().into_data();
    let before = packed(&layer);
    let mut optimizer = AdamConfig::new().init();
    let mut losses = Vec::new();
    for _ in 0..30 {
        let loss = loss(layer.forward(matrix(ROWS, D_INPUT, 4, &device)), &device);
        losses.push(loss.clone().into_scalar::<f32>());
        let grads = GradientsParams::from_grads(loss.backward(), &layer);
        layer = optimizer.step(0.01, layer, grads);
    }
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!(
        last < 0.5 * first,
        "{}: {first} to {last}",
        quant_type.name()
    );
    assert_eq!(before, packed(&layer));
}
