//! The optimizer alone, over the adapters of a Llama of 8B with rank 16 on all seven projections: 448 tensors, 42
//! million parameters.
//!
//! ```text
//! cargo bench --features cuda,fusion --bench adamw
//! ```
//!
//! Peers: `python3 benches/peer_adamw.py` (PyTorch and bitsandbytes).
//!
//! `host` is until the last call has returned, `all` until the device is done. `accumulate` is the 32 layers of a
//! pass, `step` the norm, AdamW and the views of all parameters; `burn` is Burn's AdamW, a tensor at a time, with
//! the gradients of one pass.

#[allow(dead_code, reason = "shared with the other benches")]
mod measure;

use std::time::{Duration, Instant};

use burn::optim::{AdamWConfig, Optimizer};
use burn::tensor::{DType, Device, Tensor};
use burn_nf4::op::{AdamWMoments, AdamWSettings, FlatAdamW, device_memory};

use crate::measure::{Method, Timing};

const LAYERS: usize = 32;
const RANK: usize = 16;
/// Inputs and outputs of the projections of a layer.
const PROJECTIONS: [[usize; 2]; 7] = [
    [4096, 4096],
    [4096, 1024],
    [4096, 1024],
    [4096, 4096],
    [4096, 14336],
    [4096, 14336],
    [14336, 4096],
];
const ROUNDS: usize = 10;
const RATE: f64 = 1e-4;

fn device() -> Device {
    #[cfg(feature = "cuda")]
    return Device::cuda(0);
    #[cfg(all(feature = "wgpu", not(feature = "cuda")))]
    return Device::wgpu(Default::default());
    #[cfg(not(any(feature = "cuda", feature = "wgpu")))]
    Device::default()
}

/// The shapes of the factors of a layer.
fn shapes() -> Vec<[usize; 2]> {
    let shapes = PROJECTIONS
        .iter()
        .flat_map(|&[inputs, outputs]| [[inputs, RANK], [RANK, outputs]]);
    shapes.collect()
}

fn tensors(value: f32, device: &Device) -> Vec<Vec<Tensor<2>>> {
    let layer = || {
        shapes()
            .into_iter()
            .map(|shape| Tensor::full(shape, value, (device, DType::F32)))
    };
    (0..LAYERS).map(|_| layer().collect()).collect()
}

/// Times of the host and of all there is to do.
fn timed(device: &Device, mut run: impl FnMut()) -> [Duration; 2] {
    device.sync().expect("a device");
    let start = Instant::now();
    run();
    let host = start.elapsed();
    device.sync().expect("a device");
    [host, start.elapsed()]
}

fn print(name: &str, times: &[[Duration; 2]], bytes: usize) {
    // The first one compiles.
    let of = |i: usize| {
        let samples = times[1..].iter().map(|times| times[i].as_secs_f64() * 1e6);
        Timing::of(samples.collect(), Method::Clock).median_us / 1e3
    };
    let [host, all] = [0, 1].map(of);
    let rate = bytes as f64 / all / 1e6;
    println!("{name:<12} host {host:>8.3} ms  all {all:>8.3} ms  {rate:>7.0} GB/s");
}

/// Times the flat optimizer; `bytes` of moments are read and written for each parameter.
fn flat(
    name: &str,
    kind: AdamWMoments,
    bytes: usize,
    gradients: &[Vec<Tensor<2>>],
    device: &Device,
) {
    let parameters = tensors(0.5, device).into_iter().flatten();
    let parameters: Vec<Tensor<1>> = parameters.map(|tensor| tensor.flatten(0, 1)).collect();
    let elems: usize = parameters.iter().map(|tensor| tensor.dims()[0]).sum();
    println!("{name}: {} tensors, {elems} parameters", parameters.len());
    let mut optimizer = FlatAdamW::new(parameters, kind).expect("parameters");
    let settings = AdamWSettings {
        max_grad_norm: Some(1.0),
        ..AdamWSettings::default()
    };
    let shapes = shapes();
    let mut views: Vec<Tensor<2>> = Vec::new();
    let [mut accumulate, mut step] = [(); 2].map(|()| Vec::new());
    for _ in 0..=ROUNDS {
        accumulate.push(timed(device, || {
            for (layer, gradients) in gradients.iter().enumerate() {
                let parts = gradients.iter().enumerate().map(|(at, gradient)| {
                    (layer * shapes.len() + at, gradient.clone().flatten(0, 1))
                });
                optimizer.accumulate(parts.collect()).expect("fits");
            }
        }));
        step.push(timed(device, || {
            views.clear();
            let loss = Tensor::ones([1], (device, DType::F32));
            optimizer.step(RATE, &settings, loss).expect("a step");
            let values = optimizer.values(DType::F32);
            for number in 0..LAYERS * shapes.len() {
                views.push(optimizer.view(&values, number, shapes[number % shapes.len()]));
            }
        }));
        let report = optimizer.report().unwrap().expect("a step was made");
        // Every gradient is 0.01.
        let norm = 0.01 * (elems as f32).sqrt();
        assert!((report.grad_norm - norm).abs() < 1e-3 * norm, "{report:?}");
    }
    // With equal gradients a step is the rate, and the decay.
    let expected = 0.5 - (ROUNDS + 1) as f32 * (RATE as f32 * (1.0 + 0.01 * 0.5));
    let given = views[0].clone().slice([0..1, 0..1]).into_scalar::<f32>();
    assert!((given - expected).abs() < 1e-5, "{given} {expected}");
    print("accumulate", &accumulate, elems * 12);
    // Gradients are read twice and written, values read and written.
    print("step", &step, elems * (20 + bytes));
    if let Some(memory) = device_memory(device) {
        println!("in use: {} MB", memory.in_use / 1_000_000);
    }
}

fn main() {
    let device = device();
    println!("{device:?}");
    let gradients = tensors(0.01, &device);
    for (name, kind, bytes) in [
        ("adamw_torch", AdamWMoments::F32, 16),
        ("adamw_8bit", AdamWMoments::Bits8, 4),
    ] {
        flat(name, kind, bytes, &gradients, &device);
    }

    let burn = AdamWConfig::new()
        .with_epsilon(1e-8)
        .with_weight_decay(0.01)
        .build();
    let mut parameters: Vec<_> = tensors(0.5, &device)
        .into_iter()
        .flatten()
        .map(|tensor| Some((tensor, None)))
        .collect();
    let gradients: Vec<Tensor<2>> = gradients.into_iter().flatten().collect();
    let elems: usize = gradients
        .iter()
        .map(|gradient| gradient.shape().num_elements())
        .sum();
    let mut times = Vec::new();
    for _ in 0..=ROUNDS {
        times.push(timed(&device, || {
            for (parameter, gradient) in parameters.iter_mut().zip(&gradients) {
                let (tensor, state) = parameter.take().expect("put back");
                *parameter = Some(burn.step(RATE, tensor, gradient.clone(), state));
            }
        }));
    }
    print("burn", &times, elems * (4 + 24));
}
