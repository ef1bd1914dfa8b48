//! The loss of a head with the gradients of the hidden states: time a step by bytes of logits held at once, beside
//! Burn's own operations on parts of the same size.
//!
//! ```text
//! cargo bench --features fusion,cublaslt --bench cross_entropy -- [--rows 8192] [--trained]
//! ```
//!
//! The losses of both are compared before they are timed. Times are by the host's clock, around work that takes
//! many milliseconds.

#[allow(dead_code, reason = "shared with the other benches")]
mod measure;

use std::time::Instant;

use burn::backend::DispatchDevice;
use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData};
use burn_nf4::op::{
    LinearCrossEntropyOptions, LossReduction, MatmulOptions, linear_cross_entropy, matmul,
};
use clap::Parser;
use cubecl::MemoryScope;

use crate::measure::{Method, Timing};

/// Time the loss of a head. The sizes are those of Llama-3.1-8B.
#[derive(Parser)]
struct Args {
    /// Tokens.
    #[arg(long, default_value_t = 8192)]
    rows: usize,
    /// Elements of a hidden state.
    #[arg(long, default_value_t = 4096)]
    hidden: usize,
    /// Logits of a token.
    #[arg(long, default_value_t = 128_256)]
    vocabulary: usize,
    /// Mebibytes of logits held at once.
    #[arg(long, value_delimiter = ',', default_values_t = [64, 128, 256, 512, 1024])]
    chunks: Vec<usize>,
    /// Whether the head is trained too.
    #[arg(long)]
    trained: bool,
    /// Runs that are timed.
    #[arg(long, default_value_t = 10)]
    samples: usize,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What the loss is of.
struct Problem {
    x: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
}

fn device() -> Device {
    #[cfg(feature = "cuda")]
    return Device::cuda(0);
    #[cfg(all(feature = "wgpu", not(feature = "cuda")))]
    return Device::wgpu(Default::default());
    #[cfg(not(any(feature = "cuda", feature = "wgpu")))]
    Device::default()
}

/// The loss, after its gradients.
type Run = fn(&Problem, usize) -> Tensor<1>;

fn fused(problem: &Problem, chunk_bytes: usize) -> Tensor<1> {
    let options = LinearCrossEntropyOptions {
        reduction: LossReduction::Sum,
        chunk_bytes,
        ..Default::default()
    };
    let Problem { x, weight, targets } = problem;
    let loss = linear_cross_entropy(x.clone(), weight.clone(), None, targets.clone(), &options);
    let loss = loss.expect("it fits");
    let mut gradients = loss.backward();
    x.grad_remove(&mut gradients).expect("a gradient");
    loss.detach()
}

fn composed(problem: &Problem, chunk_bytes: usize) -> Tensor<1> {
    let Problem { x, weight, targets } = problem;
    let [rows, _] = x.dims();
    let [vocabulary, _] = weight.dims();
    let chunk = (chunk_bytes / vocabulary / x.dtype().size()).max(1);
    let mut loss: Option<Tensor<1>> = None;
    let mut parts = Vec::new();
    for start in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - start);
        let part = x.clone().detach().set_require_grad(false);
        let part = part.narrow(0, start, count).require_grad();
        let logits = matmul(
            part.clone(),
            weight.clone(),
            None,
            MatmulOptions::TRANSPOSE_RHS,
        );
        let log = log_softmax(logits.expect("it fits").cast(DType::F32), 1);
        let ids = targets.clone().narrow(0, start, count);
        let sum = -log.gather(1, ids.reshape([count, 1])).sum();
        let mut gradients = sum.backward();
        parts.extend(part.grad_remove(&mut gradients));
        let sum = sum.detach();
        loss = Some(match loss {
            Some(loss) => loss + sum,
            None => sum,
        });
    }
    drop(Tensor::cat(parts, 0));
    loss.expect("a row")
}

/// Bytes that the device's runtime holds.
fn reserved_bytes(device: &Device) -> u64 {
    device.sync().expect("it runs");
    match device.clone().without_autodiff().as_dispatch() {
        DispatchDevice::Cube(device) => {
            let report = device.client().memory_report(MemoryScope::Device);
            report.usage().bytes_reserved
        }
        _ => 0,
    }
}

fn main() {
    let args = Args::parse();
    let device = device();
    if !matches!(device.as_dispatch(), DispatchDevice::Cube(_)) {
        println!("no CubeCL device is compiled in");
        return;
    }
    let dtype = match device.supports_dtype(DType::BF16) {
        true => DType::BF16,
        false => DType::F32,
    };
    let device = device.autodiff();
    let Args {
        rows,
        hidden,
        vocabulary,
        ..
    } = args;
    println!("{device:?}, {dtype:?}, {rows} x {hidden} x {vocabulary}");
    let random = |shape: [usize; 2], deviation| {
        let tensor = Tensor::<2>::random(shape, Distribution::Normal(0.0, deviation), &device);
        tensor.cast(dtype).detach()
    };
    let weight = random([vocabulary, hidden], 0.02);
    let targets = (0..rows).map(|row| (row * 7919 % vocabulary) as i64);
    let problem = Problem {
        x: random([rows, hidden], 1.0).require_grad(),
        weight: match args.trained {
            true => weight.require_grad(),
            false => weight,
        },
        targets: Tensor::from_data(TensorData::new(targets.collect(), [rows]), &device),
    };
    let runs: [(&str, Run); 2] = [("fused", fused), ("composed", composed)];
    for mebibytes in args.chunks {
        let mut losses = Vec::new();
        for (name, run) in runs {
            device.memory_cleanup();
            let before = reserved_bytes(&device);
            let once = || run(&problem, mebibytes << 20).into_scalar::<f32>() / rows as f32;
            let loss = once();
            let peak = reserved_bytes(&device).saturating_sub(before);
            losses.push(loss);
            once();
            let samples = (0..args.samples).map(|_| {
                let start = Instant::now();
                once();
                start.elapsed().as_secs_f64() * 1e6
            });
            let timing = Timing::of(samples.collect(), Method::Clock);
            println!(
                "cross_entropy/{name:8}/{mebibytes:>4}MiB {:8.2} ms, spread {:.2}, reserved {:6.0} MB more, loss {loss:.5}",
                timing.median_us / 1e3,
                timing.spread_us / 1e3,
                peak as f64 / 1e6,
            );
        }
        let difference = (losses[0] - losses[1]).abs();
        assert!(difference < 1e-3, "{losses:?}");
    }
}
