//! NF4 beside other block formats, as shares of what the device's memory can do.

use burn_nf4::format::{QuantConfig, QuantType};

use crate::gpu::Gpu;
use crate::matmul::{self, Timed};
use crate::problems::{self, Problem, dtype_name};
use crate::report::Report;

/// The formats that a problem is timed in, NF4 first: all of them for the one that is also decoded from a warm
/// cache.
pub fn of_problem(gpu: &Gpu, problem: &Problem) -> impl Iterator<Item = QuantConfig> + use<> {
    configs(*problem == problems::hot(gpu.sizes))
}

/// The same of products: all formats for the first shape.
pub fn of_product(gpu: &Gpu, shape: [usize; 2]) -> impl Iterator<Item = QuantConfig> + use<> {
    configs(shape == matmul::shapes(gpu)[0])
}

/// All formats, or NF4 alone.
fn configs(all: bool) -> impl Iterator<Item = QuantConfig> {
    let formats = QuantType::ALL.into_iter().map(QuantConfig::of);
    formats.filter(move |config| all || is_nf4(*config))
}

/// The name of a variant for a format: `tiled_2d`, where it is NF4, or `tiled_2d_mxfp4`.
pub fn variant(name: &str, config: QuantConfig) -> String {
    match is_nf4(config) {
        true => name.into(),
        false => format!("{name}_{}", config.quant_type.name()),
    }
}

pub fn is_nf4(config: QuantConfig) -> bool {
    config.quant_type == QuantType::Nf4
}

/// A line of the summary: a share for each format.
struct Line {
    name: String,
    shares: [Option<f64>; QuantType::ALL.len()],
}

/// Prints each format's share of the speed of a copy, and how many times NF4's it is: of dequantization, and of
/// products, whose bytes are those of the packed weight, of `x` and of the result.
pub fn summarise(gpu: &Gpu, report: &Report, products: &[Timed]) {
    let lines: Vec<Line> = dequantizations(gpu, report)
        .into_iter()
        .chain(of_products(gpu, products))
        .collect();
    let compared = |line: &&Line| line.shares.iter().flatten().count() > 1;
    if !lines.iter().any(|line| compared(&line)) {
        return;
    }
    println!("\nShare of the speed of a copy, and how many times NF4's share");
    print!("{:36}", "");
    for quant_type in QuantType::ALL {
        print!(" {:>16}", quant_type.name());
    }
    println!();
    for Line { name, shares } in lines.iter().filter(compared) {
        print!("{name:36}");
        for share in shares {
            let cell = match (share, shares[0]) {
                (Some(share), Some(nf4)) => format!("{:.1}% ({:.2}x)", 100.0 * share, share / nf4),
                (Some(share), None) => format!("{:.1}%", 100.0 * share),
                (None, _) => "-".into(),
            };
            print!(" {cell:>16}");
        }
        println!();
    }
}

fn dequantizations(gpu: &Gpu, report: &Report) -> Vec<Line> {
    let problem = problems::hot(gpu.sizes);
    let share = |name: &str, quant_type| {
        let variant = variant(name, QuantConfig::of(quant_type));
        let row = report.rows.iter().find(|row| {
            (row.kind, &row.place, row.shape, row.dtype, row.hot)
                == (
                    "dequantize",
                    &gpu.place,
                    problem.shape,
                    dtype_name(problem.dtype),
                    false,
                )
                && row.variant == variant
        });
        row.map(|row| row.percent_of_copy / 100.0)
    };
    let names = ["tiled_2d", "warp_per_block", "default"];
    let line = |name: &str| Line {
        name: format!("dequant/{name}/{}", problem.id()),
        shares: QuantType::ALL.map(|quant_type| share(name, quant_type)),
    };
    names.into_iter().map(line).collect()
}

fn of_products(gpu: &Gpu, products: &[Timed]) -> Vec<Line> {
    let shape = matmul::shapes(gpu)[0];
    let [n, k] = shape;
    let share = |m: usize, quant_type| {
        let config = QuantConfig::of(quant_type);
        let variant = variant(matmul::AUTO, config);
        let timed = products.iter().find(|timed| {
            (timed.shape, timed.m, timed.dtype) == (shape, m, matmul::DTYPE)
                && timed.variant == variant
        })?;
        let bytes =
            problems::layout(shape, config).words() * 4 + m * (n + k) * matmul::DTYPE.size_bytes();
        Some(bytes as f64 / gpu.copy * 1e6 / timed.timing.median_us)
    };
    let line = |m: usize| Line {
        name: matmul::name(matmul::AUTO, matmul::DTYPE, shape, m),
        shares: QuantType::ALL.map(|quant_type| share(m, quant_type)),
    };
    matmul::ROWS.into_iter().map(line).collect()
}
