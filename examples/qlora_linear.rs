//! Loads a weight that bitsandbytes quantized, shows that it decodes to bitsandbytes' bits, and
//! trains a QLoRA layer on it.
//!
//! ```text
//! cargo run --release --example qlora_linear
//! cargo run --release --example qlora_linear --features cuda -- --device cuda --size 14336x4096
//! ```

use std::error::Error;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::nn::loss::{MseLoss, Reduction};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_nf4::BlockWeight;
use burn_nf4::checkpoint::SafetensorsFile;
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::nn::{QLoraLinear, QLoraLinearConfig, QuantLinear};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

/// Train a QLoRA layer on a frozen NF4 weight.
#[derive(Parser)]
struct Args {
    /// Where to run. Devices other than the CPU need the cargo feature of their name.
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    device: DeviceName,
    /// A safetensors file with one bitsandbytes 4-bit weight, called `weight`, and bitsandbytes'
    /// own answer, called `dequantized`.
    #[arg(
        long,
        default_value = "tests/fixtures/golden/f32_b64_nested_512x512_normal.safetensors"
    )]
    weight: PathBuf,
    /// Train on a random weight of this size, OUTxIN, instead of the loaded one.
    #[arg(long, value_parser = parse_size)]
    size: Option<[usize; 2]>,
    /// Type of activations; the default is f32 on the CPU, bf16 where the device has it.
    #[arg(long, value_enum)]
    dtype: Option<DTypeName>,
    /// Rank of the trained branch.
    #[arg(long, default_value_t = 8)]
    rank: usize,
    /// Rows of input a step.
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Training steps.
    #[arg(long, default_value_t = 200)]
    steps: usize,
    /// Learning rate of Adam.
    #[arg(long, default_value_t = 5e-3)]
    learning_rate: f64,
    /// Seed of all random numbers.
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum DeviceName {
    Cpu,
    Cuda,
    Rocm,
    Wgpu,
    Vulkan,
    Metal,
    /// CubeCL's own CPU runtime.
    Cubecpu,
}

#[derive(Clone, Copy, ValueEnum)]
enum DTypeName {
    F16,
    Bf16,
    F32,
}

fn parse_size(text: &str) -> Result<[usize; 2], String> {
    let (rows, columns) = text
        .split_once('x')
        .ok_or("expected OUTxIN, such as 4096x14336")?;
    let parse = |part: &str| match part.parse() {
        Ok(0) | Err(_) => Err(format!("`{part}` is not a positive number")),
        Ok(size) => Ok(size),
    };
    Ok([parse(rows)?, parse(columns)?])
}

fn main() {
    if let Err(error) = run(&Args::parse()) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let device = args.device.open()?;
    println!("device: {device:?}");
    device.seed(args.seed);

    let loaded = load_and_check(&weight_path(&args.weight), &device)?;
    let weight = match args.size {
        None => loaded,
        Some(size) => random_weight(size, &device)?,
    };

    let dtype = args
        .dtype
        .map_or_else(|| default_dtype(&device, args.device), DType::from);
    report_memory(&weight);
    train(args, weight, dtype, &device.autodiff())
}

/// Loads the weight, decodes it on the device, and compares every bit with bitsandbytes' answer.
fn load_and_check(path: &Path, device: &Device) -> Result<BlockWeight, Box<dyn Error>> {
    let file = SafetensorsFile::open(path)?;
    let host = file.load_quantized("weight")?;
    println!(
        "loaded {}: shape {:?}, {}, blocks of {}, {}",
        path.file_name().unwrap_or_default().display(),
        host.shape(),
        host.quant_type().name(),
        host.block_size().elems(),
        match host.config().nested_block_size {
            Some(_) => "double-quantized scales",
            None => "f32 scales",
        },
    );
    let weight = BlockWeight::from_host(&host, device);
    let decoded = weight.dequantize::<2>(host.dtype())?.into_data();
    let expected = file.tensor_bytes("dequantized")?;
    let size = host.dtype().size_bytes();
    let differing = decoded
        .as_bytes()
        .chunks(size)
        .zip(expected.chunks(size))
        .filter(|(ours, theirs)| ours != theirs)
        .count();
    if decoded.as_bytes().len() != expected.len() || differing > 0 {
        return Err(format!("{differing} decoded weights differ from bitsandbytes'").into());
    }
    println!(
        "decoded to {}: all {} weights have bitsandbytes' bits",
        host.dtype().name(),
        host.elems()
    );
    Ok(weight)
}

fn random_weight(
    [rows, columns]: [usize; 2],
    device: &Device,
) -> Result<BlockWeight, Box<dyn Error>> {
    let normal = Distribution::Normal(0.0, 1.0 / (columns as f64).sqrt());
    let dense = Tensor::<2>::random([rows, columns], normal, device);
    let started = Instant::now();
    let weight = BlockWeight::quantize(dense, QuantConfig::default())?;
    device.sync()?;
    println!(
        "quantized a random {rows}x{columns} weight in {:.1} ms (first call, compilation included)",
        started.elapsed().as_secs_f64() * 1e3
    );
    Ok(weight)
}

fn report_memory(weight: &BlockWeight) {
    let packed = weight.size_bytes();
    let elems = weight.layout().elems();
    println!(
        "memory of the frozen weight: {:.2} MB packed ({:.3} byte per weight); dense {:.2} MB in 16 bit, {:.2} MB in f32",
        packed as f64 / 1e6,
        packed as f64 / elems as f64,
        elems as f64 * 2.0 / 1e6,
        elems as f64 * 4.0 / 1e6,
    );
}

/// Trains the branch towards the frozen layer's own output shifted by a hidden low-rank matrix.
fn train(
    args: &Args,
    weight: BlockWeight,
    dtype: DType,
    device: &Device,
) -> Result<(), Box<dyn Error>> {
    let [d_output, d_input] = weight.matrix_dims()?;
    let base = QuantLinear::new(weight, None)?;
    let mut layer = QLoraLinearConfig::new(args.rank)
        .with_alpha(2.0 * args.rank as f64)
        .init(base, device)?;
    let shift = Shift::random(args.rank, d_input, d_output, device);
    let mut optimizer = AdamConfig::new().init();
    println!(
        "training rank {} on {d_output}x{d_input}, {} rows a step, activations {dtype:?}",
        args.rank, args.batch
    );

    let bar = progress_bar(args.steps);
    let report_every = (args.steps / 10).max(1);
    let mut losses = Vec::new();
    let mut step_ms = Vec::new();
    for step in 1..=args.steps {
        let started = Instant::now();
        let x = Tensor::<2>::random(
            [args.batch, d_input],
            Distribution::Normal(0.0, 1.0),
            (device, dtype),
        );
        let target = shift.apply(&layer.base, x.clone());
        let y = layer.forward(x);
        let loss =
            MseLoss::new().forward(y.cast(DType::F32), target.cast(DType::F32), Reduction::Mean);
        let grads = GradientsParams::from_grads(loss.backward(), &layer);
        layer = optimizer.step(args.learning_rate, layer, grads);
        // Reading the loss waits for the device, so that the time is that of a whole step.
        let loss = loss.into_scalar::<f32>();
        step_ms.push(started.elapsed().as_secs_f64() * 1e3);
        losses.push(loss);
        bar.inc(1);
        if step == 1 || step % report_every == 0 {
            bar.suspend(|| {
                println!(
                    "step {step:5}  loss {loss:.3e}  {:8.2} ms",
                    step_ms[step - 1]
                );
            });
        }
    }
    bar.finish_and_clear();

    step_ms.sort_by(f64::total_cmp);
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    println!(
        "loss {first:.3e} -> {last:.3e}; median {:.2} ms a step",
        step_ms[step_ms.len() / 2]
    );
    if !last.is_finite() {
        return Err("the loss is not finite".into());
    }
    report_trained(&layer);
    Ok(())
}

fn report_trained(layer: &QLoraLinear) {
    let trained = layer.lora_a.shape().num_elements() + layer.lora_b.shape().num_elements();
    let frozen = layer.base.weight.layout().elems();
    println!(
        "trained {trained} parameters, {:.2}% of the frozen {frozen}",
        100.0 * trained as f64 / frozen as f64
    );
}

/// The hidden change of the weight that training is to find, in low-rank form.
struct Shift {
    a: Tensor<2>,
    b: Tensor<2>,
}

impl Shift {
    fn random(rank: usize, d_input: usize, d_output: usize, device: &Device) -> Self {
        let normal = |fan: usize| Distribution::Normal(0.0, 1.0 / (fan as f64).sqrt());
        Self {
            a: Tensor::random([d_input, rank], normal(d_input), device),
            b: Tensor::random([rank, d_output], normal(rank), device),
        }
    }

    fn apply(&self, base: &QuantLinear, x: Tensor<2>) -> Tensor<2> {
        let shift = x
            .clone()
            .cast(DType::F32)
            .matmul(self.a.clone())
            .matmul(self.b.clone());
        let dtype = x.dtype();
        (base.forward(x) + shift.cast(dtype)).detach()
    }
}

fn progress_bar(steps: usize) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {per_sec} eta {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(steps as u64).with_style(style)
}

/// The path as given, or below the package where it is not found from here.
fn weight_path(path: &Path) -> PathBuf {
    let packaged = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if !path.exists() && packaged.exists() {
        return packaged;
    }
    path.into()
}

fn default_dtype(device: &Device, name: DeviceName) -> DType {
    let on_cpu = matches!(name, DeviceName::Cpu | DeviceName::Cubecpu);
    if !on_cpu && device.supports_dtype(DType::BF16) {
        DType::BF16
    } else {
        DType::F32
    }
}

impl From<DTypeName> for DType {
    fn from(name: DTypeName) -> Self {
        DType::from(match name {
            DTypeName::F16 => FloatType::F16,
            DTypeName::Bf16 => FloatType::BF16,
            DTypeName::F32 => FloatType::F32,
        })
    }
}

impl DeviceName {
    fn open(self) -> Result<Device, String> {
        match self {
            #[cfg(feature = "flex")]
            Self::Cpu => Ok(Device::flex()),
            #[cfg(feature = "cuda")]
            Self::Cuda => Ok(Device::cuda(0)),
            #[cfg(feature = "rocm")]
            Self::Rocm => Ok(Device::rocm(0)),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Ok(Device::wgpu(Default::default())),
            #[cfg(feature = "vulkan")]
            Self::Vulkan => Ok(Device::vulkan(Default::default())),
            #[cfg(feature = "metal")]
            Self::Metal => Ok(Device::metal(Default::default())),
            #[cfg(feature = "cpu")]
            Self::Cubecpu => Ok(Device::cpu()),
            #[allow(unreachable_patterns)]
            _ => {
                let name = self
                    .to_possible_value()
                    .map_or(String::new(), |v| v.get_name().into());
                Err(format!(
                    "--device {name} was not compiled in: add `--features` of that name"
                ))
            }
        }
    }
}
