//! Ways to train low-rank adapters over a packed weight, on the CPU: Burn's own LoRA and QLoRA, Burn's
//! LoRA over unchanged layers with an NF4 weight, and the layers of this crate. Bytes are those of a
//! counting allocator.
//!
//! ```text
//! cargo bench --bench burn_lora [-- WIDTH LAYERS ROWS]
//! ```
//!
//! A model is a chain of square layers. Each way is compared with the dense chain before it is timed.

#[path = "../tests/counting/mod.rs"]
mod counting;

use std::env;
use std::time::Instant;

use burn::module::{Lora, Module, ParamGroup, QLora, Quantizer};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::quantization::{Calibration, QuantValue, ScaleDtype};
use burn::tensor::{Device, Distribution, Tensor};
use burn_nf4::Nf4Error;
use burn_nf4::format::QuantConfig;
use burn_nf4::nn::{QLoraLinear, QLoraLinearConfig, QuantLinear, reparameterize_linears};

const RANK: usize = 16;
const ALPHA: f64 = 16.0;
/// Runs of each measurement. The fastest counts: what else the machine does only makes them slower.
const RUNS: usize = 15;

/// A chain of layers.
trait Chain: Module {
    fn forward(&self, x: Tensor<2>) -> Tensor<2>;
}

macro_rules! chain {
    ($name:ident, $layer:ty) => {
        #[derive(Module, Debug)]
        struct $name {
            layers: Vec<$layer>,
        }

        impl Chain for $name {
            fn forward(&self, x: Tensor<2>) -> Tensor<2> {
                self.layers.iter().fold(x, |x, layer| layer.forward(x))
            }
        }
    };
}

chain!(Linears, Linear);
chain!(Frozen, QuantLinear);
chain!(Trained, QLoraLinear);

struct Sizes {
    width: usize,
    layers: usize,
    rows: usize,
}

fn main() -> Result<(), Nf4Error> {
    let sizes: Vec<usize> = env::args()
        .skip(1)
        .filter_map(|argument| argument.parse().ok())
        .collect();
    let size = |index, default| sizes.get(index).copied().unwrap_or(default);
    let sizes = Sizes {
        width: size(0, 1024),
        layers: size(1, 8),
        rows: size(2, 256),
    };
    let device = Device::flex().autodiff();
    let dense = Linears {
        layers: (0..sizes.layers)
            .map(|_| LinearConfig::new(sizes.width, sizes.width).init(&device))
            .collect(),
    };
    let x = input(1, &sizes, &device);
    let expected = dense.forward(x.clone()).inner();
    println!(
        "{} layers of {} x {}, {} rows, f32; MiB and ms",
        sizes.layers, sizes.width, sizes.width, sizes.rows
    );
    println!(
        "{:<46}{:>7}{:>7}{:>7}{:>8}{:>8}{:>8}{:>7}",
        "", "rest", "kept", "peak", "step", "1 row", "rows", "error"
    );
    let report = Report {
        sizes,
        x: x.inner(),
        expected,
    };
    let checkpointing = device.clone().gradient_checkpointing();
    println!("frozen");
    report.run("Linear", &device, |device| {
        Ok(copy(&dense, device).no_grad())
    })?;
    report.run("Linear, 4 bit of Burn's", &device, |device| {
        let linears = copy(&dense, device).no_grad();
        Ok(linears.quantize_weights_group(&mut burn_q4(device), weights()))
    })?;
    for (name, device) in [
        ("Linear, reparameterize_linears", &device),
        ("  with gradient checkpointing", &checkpointing),
    ] {
        report.run(name, device, |device| nf4_linears(&dense, device))?;
    }
    report.run("QuantLinear", &device, |device| {
        let layers = frozen(&dense, device)?;
        Ok(Frozen { layers })
    })?;

    println!("with an adapter of rank {RANK}");
    let lora = || Lora::new(RANK, ALPHA);
    report.run("Linear, apply_lora", &device, |device| {
        Ok(copy(&dense, device).apply_lora(lora()))
    })?;
    for (name, device) in [
        ("Linear, apply_qlora in 4 bit", &device),
        ("  with gradient checkpointing", &checkpointing),
    ] {
        report.run(name, device, |device| {
            let mut quantizer = burn_q4(device);
            quantizer.set_param_group(weights());
            Ok(copy(&dense, device).apply_qlora(QLora::new(lora(), quantizer)))
        })?;
    }
    report.run(
        "Linear, reparameterize_linears, apply_lora",
        &device,
        |device| Ok(nf4_linears(&dense, device)?.apply_lora(lora())),
    )?;
    report.run("QLoraLinear", &device, |device| {
        let config = QLoraLinearConfig::new(RANK).with_alpha(ALPHA);
        let layers = frozen(&dense, device)?.into_iter();
        let layers = layers.map(|base| config.init(base, device));
        Ok(Trained {
            layers: layers.collect::<Result<_, Nf4Error>>()?,
        })
    })
}

fn weights() -> ParamGroup {
    ParamGroup::from_predicate("weight")
}

fn nf4_linears(dense: &Linears, device: &Device) -> Result<Linears, Nf4Error> {
    let linears = copy(dense, device).no_grad();
    reparameterize_linears(linears, QuantConfig::default(), ParamGroup::all())
}

fn frozen(dense: &Linears, device: &Device) -> Result<Vec<QuantLinear>, Nf4Error> {
    let layers = copy(dense, device).layers.into_iter();
    layers
        .map(|layer| QuantLinear::quantize(layer, QuantConfig::default()))
        .collect()
}

/// Symmetric, a scale for 32 weights: the nearest that Burn has.
fn burn_q4(device: &Device) -> Quantizer {
    let scheme = device.settings().quantization.scheme;
    let scheme = scheme
        .with_value(QuantValue::Q4S)
        .per_block([32], ScaleDtype::F32);
    Quantizer::new(Calibration::MinMax, scheme)
}

/// The dense model on a device, with values of its own: no buffer is shared.
fn copy(dense: &Linears, device: &Device) -> Linears {
    let layers = dense.layers.iter().map(|layer| {
        let [d_input, d_output] = layer.weight.dims();
        LinearConfig::new(d_input, d_output).init(device)
    });
    let fresh = Linears {
        layers: layers.collect(),
    };
    fresh.load_record(dense.clone().into_record())
}

fn input(rows: usize, sizes: &Sizes, device: &Device) -> Tensor<2> {
    Tensor::random([rows, sizes.width], Distribution::Normal(0.0, 1.0), device)
}

struct Report {
    sizes: Sizes,
    x: Tensor<2>,
    expected: Tensor<2>,
}

impl Report {
    /// Prints what the model takes at rest, keeps between forward and backward, and takes at most in a
    /// training step beyond what it takes at rest; then the times of a training step (forward, and
    /// backward to the input) and of inference.
    fn run<M: Chain>(
        &self,
        name: &str,
        device: &Device,
        build: impl Fn(&Device) -> Result<M, Nf4Error>,
    ) -> Result<(), Nf4Error> {
        let x = input(self.sizes.rows, &self.sizes, device).require_grad();
        let ready = || -> Result<M, Nf4Error> {
            let model = build(device)?;
            // Initializes lazy parameters; without autodiff, whose graph would stay.
            drop(model.valid().forward(self.x.clone()));
            Ok(model)
        };
        drop(ready()?); // starts the threads
        let before = counting::live_bytes();
        let model = ready()?;
        let rest = counting::live_bytes() - before;

        let step = || {
            let before = counting::live_bytes();
            let y = model.forward(x.clone());
            let kept = counting::live_bytes() - before;
            let grads = y.sum().backward();
            assert!(x.grad(&grads).is_some());
            kept
        };
        step();
        let (peak, kept) = counting::peak_bytes(step);
        let step_ms = fastest_ms(|| {
            step();
        });

        let inference = model.valid();
        let difference = inference.forward(self.x.clone()) - self.expected.clone();
        let [error, size] = [difference, self.expected.clone()].map(|values| {
            let squares: f32 = (values.clone() * values).sum().into_scalar();
            squares.sqrt()
        });
        let [one_ms, rows_ms] = [1, self.sizes.rows].map(|rows| {
            let x = input(rows, &self.sizes, &self.x.device());
            fastest_ms(|| drop(inference.forward(x.clone()).into_data()))
        });
        let [rest, kept, peak] = [rest, kept, peak].map(|bytes| bytes as f64 / f64::from(1 << 20));
        println!(
            "{name:<46}{rest:>7.1}{kept:>7.1}{peak:>7.1}{step_ms:>8.1}{one_ms:>8.2}{rows_ms:>8.1}{:>7.3}",
            error / size,
        );
        Ok(())
    }
}

/// The fastest of some runs, after one that does not count.
fn fastest_ms(mut run: impl FnMut()) -> f64 {
    run();
    let times = (0..RUNS).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64() * 1e3
    });
    times.fold(f64::INFINITY, f64::min)
}
