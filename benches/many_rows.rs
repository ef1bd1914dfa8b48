//! Device time of products of many rows with a packed weight, forward (`x Wᵀ`) and for the gradient of
//! the input (`dY W`), beside what they are made of: decoding, and the product with a dense weight.

use std::sync::Mutex;

use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use burn_nf4::format::{FloatType, PackedLayout, QuantConfig};
use burn_nf4::launch::check_dtype;
use burn_nf4::op::{DenseSpec, DequantizeSpec, LinearSpec, MatmulStrategy, QuantBackend};
use bytemuck::Pod;
use half::{bf16, f16};

use crate::args::Args;
use crate::gpu::Gpu;
use crate::matmul::{self, AUTO, Timed, floats};
use crate::problems::Weight;
use crate::report::Report;
use crate::timing::{self, Window};

/// Rows of `x` in bf16.
const ROWS: [usize; 9] = [65, 96, 128, 192, 256, 512, 2048, 4096, 8192];
/// Those in f16.
const F16_ROWS: [usize; 3] = [128, 2048, 8192];
/// Up to here there are kernels that do not decode.
const FUSED_ROWS: usize = 256;
/// The variant that only decodes.
const DECODING: &str = "decoding";
/// Rows of the result that are compared with f64.
const CHECKED: usize = 4;

/// What is timed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// The op as it is used.
    Auto,
    /// The rule without a measurement.
    Rule,
    /// The fused kernel.
    Fused,
    /// Over the decoded weight, by cuBLASLt.
    Decoded,
    /// Over the decoded weight, by Burn's product.
    Burn,
    /// cuBLASLt with a dense weight.
    Dense,
    /// No product, only the decoding.
    Decoding,
}

impl Way {
    const ALL: [Self; 7] = [
        Self::Auto,
        Self::Rule,
        Self::Fused,
        Self::Decoded,
        Self::Burn,
        Self::Dense,
        Self::Decoding,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Auto => AUTO,
            Self::Rule => "rule",
            Self::Fused => "tensor_core",
            Self::Decoded => "decoded",
            Self::Burn => "decoded_burn",
            Self::Dense => "cublaslt_dense",
            Self::Decoding => DECODING,
        }
    }

    /// Whether it can be timed.
    fn exists(self, dx: bool, m: usize) -> bool {
        let cublaslt = cfg!(feature = "cublaslt");
        match self {
            Self::Auto => true,
            Self::Rule => !dx,
            Self::Fused => !dx && m <= FUSED_ROWS,
            Self::Decoded => !dx && cublaslt,
            Self::Burn => cublaslt,
            Self::Dense => cublaslt,
            // The same for all numbers of rows.
            Self::Decoding => !dx && (m == ROWS[0] || m == F16_ROWS[0]),
        }
    }

    fn strategy(self) -> MatmulStrategy {
        match self {
            Self::Auto | Self::Dense | Self::Decoding => MatmulStrategy::Auto,
            Self::Rule => MatmulStrategy::Rule,
            Self::Fused => MatmulStrategy::TensorCore,
            Self::Decoded | Self::Burn => MatmulStrategy::Decode,
        }
    }
}

/// What is computed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// Of the weight.
    pub shape: [usize; 2],
    /// Rows of `x`, or of `dY`.
    pub m: usize,
    pub dtype: FloatType,
    /// Whether it is the gradient of the input.
    pub dx: bool,
}

impl Product {
    fn all(gpu: &Gpu) -> Vec<Self> {
        let mut all = Vec::new();
        for &shape in matmul::shapes(gpu) {
            let of = |dtype, rows: &[usize]| -> Vec<Self> {
                let product = |m, dx| Self {
                    shape,
                    m,
                    dtype,
                    dx,
                };
                let both = |&m| [product(m, false), product(m, true)];
                rows.iter().flat_map(both).collect()
            };
            all.extend(of(FloatType::BF16, &ROWS));
            all.extend(of(FloatType::F16, &F16_ROWS));
        }
        all
    }

    /// Columns of the left matrix, and of the result.
    fn widths(&self) -> [usize; 2] {
        let [n, k] = self.shape;
        if self.dx { [n, k] } else { [k, n] }
    }
}

/// The variant in a name, marked where the product is the gradient.
pub fn variant_name(name: &str, dx: bool) -> String {
    if dx {
        format!("dx_{name}")
    } else {
        name.into()
    }
}

/// Who is timed beside, on the same products.
const PEERS: [&str; 2] = ["bitsandbytes", "cublas"];

/// What peers are to be timed on: their name, and the product.
pub fn peer_products(gpu: &Gpu) -> impl Iterator<Item = (&'static str, Product)> {
    let with_peers = |product| PEERS.map(|peer| (peer, product));
    Product::all(gpu).into_iter().flat_map(with_peers)
}

/// Shape and dtype of a weight.
type DenseForm = ([usize; 2], FloatType);

/// Every way on every shape and number of rows.
pub fn benches(gpu: &Gpu, args: &Args, report: &mut Report) -> Vec<Timed> {
    let mut all = Vec::new();
    let mut last: Option<(Weight, Vec<CubeTensor>)> = None;
    let mut decoded: Option<(DenseForm, Vec<f64>)> = None;
    for product in Product::all(gpu) {
        if check_dtype(&gpu.client, product.dtype).is_err() {
            continue;
        }
        for way in Way::ALL {
            let Product {
                shape,
                m,
                dtype,
                dx,
            } = product;
            let variant = variant_name(way.name(), dx);
            let name = matmul::name(&variant, dtype, shape, m);
            if !way.exists(dx, m) || !args.starts(&name) {
                continue;
            }
            if all.is_empty() {
                matmul::head("Products of many rows, device time, weights rotated");
            }
            if last
                .as_ref()
                .is_none_or(|(weight, _)| weight.shape != shape)
            {
                let weight = Weight::new(shape, QuantConfig::default(), 1);
                let copies = matmul::packed_copies(gpu, &weight);
                last = Some((weight, copies));
            }
            let (weight, packed) = last.as_ref().expect("just set");
            if decoded.as_ref().is_none_or(|(of, _)| *of != (shape, dtype)) {
                let values = widen(&weight.decoded(dtype), dtype);
                decoded = Some(((shape, dtype), values));
            }
            let (_, decoded) = decoded.as_ref().expect("just set");
            let host = Host {
                layout: weight.layout,
                decoded,
            };
            let timed = time(gpu, product, way, variant, host, packed);
            all.push(matmul::take(gpu, timed, report));
        }
    }
    all
}

/// A weight on the host.
#[derive(Clone, Copy)]
struct Host<'a> {
    layout: PackedLayout,
    decoded: &'a [f64],
}

fn time(
    gpu: &Gpu,
    product: Product,
    way: Way,
    variant: String,
    weight: Host,
    packed: &[CubeTensor],
) -> Timed {
    let Product {
        shape,
        m,
        dtype,
        dx,
    } = product;
    let [n, k] = shape;
    let [width, out_width] = product.widths();
    let client = &gpu.client;
    let x_values = floats(dtype, &matmul::x_values(m, width));
    let x = gpu.tensor(
        client.create_from_slice(&x_values),
        [m, width],
        dtype.into(),
    );
    let spec = LinearSpec {
        weight: DequantizeSpec {
            layout: weight.layout,
            rows: n,
            columns: k,
            start: 0,
            dtype,
        },
        strategy: way.strategy(),
        cublaslt: cfg!(feature = "cublaslt") && way != Way::Burn,
    };
    let dense: Vec<CubeTensor> = match way {
        Way::Dense => {
            let copies = gpu.copies(n * k * 2).min(packed.len());
            let decode =
                |packed: &CubeTensor| CubeBackend::quant_dequantize(packed.clone(), spec.weight);
            packed[..copies].iter().map(decode).collect()
        }
        _ => Vec::new(),
    };
    let newest: Mutex<Option<CubeTensor>> = Mutex::default();
    let copies = if way == Way::Dense {
        dense.len()
    } else {
        packed.len()
    };
    let launch = |i: usize| {
        let y = match way {
            Way::Dense => dense_product(x.clone(), dense[i % copies].clone(), product),
            Way::Decoding => CubeBackend::quant_dequantize(packed[i % copies].clone(), spec.weight),
            _ if dx => {
                CubeBackend::quant_linear_backward(x.clone(), packed[i % copies].clone(), spec)
            }
            _ => CubeBackend::quant_linear(x.clone(), packed[i % copies].clone(), spec),
        };
        *newest.lock().expect("no one panicked") = Some(y);
    };
    launch(0);
    let y = newest
        .lock()
        .expect("no one panicked")
        .take()
        .expect("it ran");
    let relative_error = (way != Way::Decoding).then(|| {
        let read = gpu.read(&y.handle, m * out_width * dtype.size_bytes());
        let error = relative_error(&read, &x_values, weight.decoded, product);
        assert!(
            error < 4e-3,
            "{variant} {shape:?} {m}: relative error {error}"
        );
        error
    });
    drop(y);
    let window = Window {
        launches: if gpu.is_card { copies.min(16) } else { 2 },
        launch: &launch,
        poison: None,
        copier: Some(&gpu.copier),
    };
    let timing = timing::device_time(client, &window);
    Timed {
        variant,
        dtype,
        shape,
        m,
        timing,
        relative_error,
    }
}

fn dense_product(x: CubeTensor, weight: CubeTensor, product: Product) -> CubeTensor {
    let [width, out_width] = product.widths();
    let sizes = [product.m, out_width, width];
    let spec = DenseSpec::of_matrices(sizes, !product.dx, product.dtype);
    CubeBackend::dense_matmul(x, weight, spec)
}

fn widen(bytes: &[u8], dtype: FloatType) -> Vec<f64> {
    fn values<T: Pod + Into<f64>>(bytes: &[u8]) -> Vec<f64> {
        let values: Vec<T> = bytemuck::pod_collect_to_vec(bytes);
        values.into_iter().map(Into::into).collect()
    }
    match dtype {
        FloatType::BF16 => values::<bf16>(bytes),
        FloatType::F16 => values::<f16>(bytes),
        FloatType::F32 => values::<f32>(bytes),
    }
}

/// The error of some rows against f64, in the Frobenius norm.
fn relative_error(y: &[u8], x: &[u8], decoded: &[f64], product: Product) -> f64 {
    let Product { m, dtype, dx, .. } = product;
    let [n, k] = product.shape;
    let [width, out_width] = product.widths();
    let size = dtype.size_bytes();
    let rows: Vec<usize> = (0..CHECKED).map(|i| i * (m - 1) / (CHECKED - 1)).collect();
    let x: Vec<Vec<f64>> = rows
        .iter()
        .map(|row| widen(&x[row * width * size..][..width * size], dtype))
        .collect();
    let mut exact = vec![vec![0.0; out_width]; rows.len()];
    for (x, exact) in x.iter().zip(&mut exact) {
        for row in 0..n {
            let weights = &decoded[row * k..(row + 1) * k];
            match dx {
                true => exact
                    .iter_mut()
                    .zip(weights)
                    .for_each(|(sum, w)| *sum += x[row] * w),
                false => exact[row] = x.iter().zip(weights).map(|(x, w)| x * w).sum(),
            }
        }
    }
    let (mut error, mut norm) = (0.0, 0.0);
    for (row, exact) in rows.iter().zip(&exact) {
        let got = widen(&y[row * out_width * size..][..out_width * size], dtype);
        for (got, exact) in got.iter().zip(exact) {
            error += (got - exact).powi(2);
            norm += exact * exact;
        }
    }
    f64::sqrt(error / norm)
}

/// Prints ours beside what it is made of, and beside the peers.
pub fn summarise(gpu: &Gpu, all: &[Timed]) {
    let mut headed = false;
    for product in Product::all(gpu) {
        let Product {
            shape,
            m,
            dtype,
            dx,
        } = product;
        let of = |name: &str| {
            let variant = variant_name(name, dx);
            let same = |timed: &&Timed| {
                timed.variant == variant
                    && timed.shape == shape
                    && timed.m == m
                    && timed.dtype == dtype
            };
            all.iter().find(same).map(|timed| timed.timing.median_us)
        };
        let Some(ours) = of(AUTO) else { continue };
        if !headed {
            println!(
                "\nMedian time in microseconds, and how many times ours; the floor is cuBLAS dense and our decoding"
            );
            println!(
                "{:28} {:>8} {:>9} {:>9} {:>17} {:>17} {:>17}",
                "", "ours", "decoding", "of floor", "cuBLAS dense", "bitsandbytes", "Burn, decoded"
            );
            headed = true;
        }
        let cell = |time: Option<f64>| match time {
            Some(time) => format!("{time:.1} ({:.2}x)", time / ours),
            None => "-".into(),
        };
        let decodes = |timed: &&Timed| {
            timed.variant == DECODING && timed.dtype == dtype && timed.shape == shape
        };
        let decode = all.iter().find(decodes).map(|timed| timed.timing.median_us);
        let cublas = of("cublas").or(of("cublaslt_dense"));
        let floor = decode.zip(cublas).map(|(a, b)| a + b);
        let [n, k] = shape;
        println!(
            "{:28} {ours:>8.1} {:>9} {:>9} {:>17} {:>17} {:>17}",
            format!(
                "{}{n}x{k} {} m{m}",
                if dx { "dX " } else { "" },
                crate::problems::dtype_name(dtype)
            ),
            decode.map_or("-".into(), |time| format!("{time:.1}")),
            floor.map_or("-".into(), |floor| format!("{:.3}", ours / floor)),
            cell(cublas),
            cell(of("bitsandbytes")),
            cell(of("decoded_burn")),
        );
    }
}
