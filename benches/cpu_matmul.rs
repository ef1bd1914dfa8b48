//! The CPU's products with a packed weight, and bitsandbytes' beside them.

use std::error::Error;
use std::path::Path;

use burn_nf4::format::{Absmax, BlockTensor, QuantConfig};
use burn_nf4::host;
use half::bf16;
use serde_json::json;

use crate::args::Args;
use crate::cpu::{start_peer, take_turns, time};
use crate::problems::Weight;
use crate::report::{Place, Report, Timing};

/// `[n, k]`.
const SHAPES: [[usize; 2]; 3] = [[4096, 4096], [14336, 4096], [4096, 14336]];
/// Rows of x.
const ROWS: [usize; 3] = [1, 4, 16];

fn name(variant: &str, [n, k]: [usize; 2], m: usize) -> String {
    format!("matmul/{variant}/bf16/{n}x{k}/m{m}")
}

/// A weight, an x and their product.
struct Problem {
    weight: Weight,
    m: usize,
    x: Vec<bf16>,
    out: Vec<bf16>,
}

impl Problem {
    fn new(shape: [usize; 2], m: usize, config: QuantConfig) -> Self {
        let x = (0..m * shape[1]).map(|i| bf16::from_f32((i * 7919 % 1013) as f32 / 506.5 - 1.0));
        Self {
            weight: Weight::new(shape, config, 1),
            m,
            x: x.collect(),
            out: vec![bf16::NAN; m * shape[0]],
        }
    }

    fn call(&mut self) {
        let Weight {
            words,
            layout,
            shape: [n, k],
        } = &self.weight;
        host::matmul(&self.x, self.m, words, layout, *n, *k, None, &mut self.out);
    }

    /// The relative error of some rows of a product, held to that of bf16.
    fn check(&self, who: &str, out: &[bf16]) -> f64 {
        let [n, k] = self.weight.shape;
        let tensor: BlockTensor = self.weight.tensor();
        let (mut error, mut norm) = (0.0, 0.0);
        for row in (0..n).step_by(n / 61) {
            let w: Vec<bf16> = tensor.dequantize_range(row * k, k);
            for (i, x) in self.x.chunks_exact(k).enumerate() {
                let products = w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x));
                let sum: f64 = products.sum();
                error += (f64::from(out[i * n + row]) - sum).powi(2);
                norm += sum * sum;
            }
        }
        let relative = f64::sqrt(error / norm);
        assert!(relative < 1e-2, "{who}: relative error {relative}");
        relative
    }

    fn bytes(&self) -> usize {
        self.weight.words.len() * 4 + (self.x.len() + self.out.len()) * 2
    }

    fn add(&self, report: &mut Report, place: &Place, variant: &str, flat: &str, found: Found) {
        let name = name(variant, self.weight.shape, self.m) + flat;
        let Found { timing, relative } = found;
        let gb_s = self.bytes() as f64 / timing.median_us / 1e3;
        println!(
            "{name:52} {:>10.1} {:>8.1} {:>8.1} {:>10.1e}",
            timing.median_us, timing.spread_us, gb_s, relative
        );
        report.record(&json!({
            "kind": "matmul",
            "name": name,
            "device": place.device,
            "backend": place.backend,
            "variant": variant,
            "shape": self.weight.shape,
            "m": self.m,
            "median_us": timing.median_us,
            "spread_us": timing.spread_us,
            "best_us": timing.best_us,
            "bytes": self.bytes(),
            "gb_s": gb_s,
            "relative_error": relative,
        }));
    }
}

struct Found {
    timing: Timing,
    relative: f64,
}

fn head() {
    println!("\nMatrix products on the CPU, bf16, wall time, the same buffers each time");
    println!(
        "{:52} {:>10} {:>8} {:>8} {:>10}",
        "", "median us", "spread", "GB/s", "error"
    );
}

/// Every shape and number of rows.
pub fn benches(args: &Args, report: &mut Report, place: &Place) {
    let mut headed = false;
    for (shape, m) in problems() {
        let name = name("host", shape, m);
        if !args.starts(&name) {
            continue;
        }
        if !std::mem::replace(&mut headed, true) {
            head();
        }
        let mut problem = Problem::new(shape, m, QuantConfig::default());
        let timing = time(|| problem.call());
        let relative = problem.check(&name, &problem.out);
        problem.add(report, place, "host", "", Found { timing, relative });
    }
}

fn problems() -> impl Iterator<Item = ([usize; 2], usize)> {
    SHAPES
        .into_iter()
        .flat_map(|shape| ROWS.map(|m| (shape, m)))
}

/// Plain scales, both in turns, with the same number of threads.
pub fn peer(
    args: &Args,
    library: &Path,
    report: &mut Report,
    place: &Place,
) -> Result<(), Box<dyn Error>> {
    let mut ratios = Vec::new();
    for (shape, m) in problems() {
        let name = |variant: &str| name(variant, shape, m) + "/flat";
        let wanted = ["host", "bitsandbytes_cpu"].map(|variant| args.starts(&name(variant)));
        if wanted == [false; 2] {
            continue;
        }
        if ratios.is_empty() {
            head();
        }
        let mut problem = Problem::new(shape, m, QuantConfig::flat());
        let folder = tempfile::tempdir()?;
        write_for_peer(&problem, folder.path())?;
        let job = json!({
            "kind": "matmul",
            "library": library,
            "folder": folder.path(),
            "shape": shape,
            "rows": m,
        });
        let mut process = start_peer(args, folder.path(), &job)?;
        let ready = process.answer()?;
        if let Some(missing) = ready["missing"].as_str() {
            println!("{:52} not run: {missing}", name("bitsandbytes_cpu"));
            process.end()?;
            continue;
        }
        let theirs: Vec<bf16> =
            bytemuck::pod_collect_to_vec(&std::fs::read(folder.path().join("out"))?);
        let their_error = problem.check("bitsandbytes_cpu", &theirs);
        let (ours, theirs) = take_turns(&mut || problem.call(), &mut process)?;
        process.end()?;
        let our_error = problem.check("host", &problem.out);
        for (variant, timing, relative) in [
            ("host", ours, our_error),
            ("bitsandbytes_cpu", theirs, their_error),
        ] {
            let found = Found { timing, relative };
            problem.add(report, place, variant, "/flat", found);
        }
        ratios.push((name("*"), ours, theirs));
    }
    crate::cpu::print_ratios(ratios.into_iter());
    Ok(())
}

/// Codes in the order of bitsandbytes' CPU product: for 32 rows together, column pair by column
/// pair, 64 codes of which a byte has one of the first half in its low bits and one of the second
/// in its high bits. Scales of bf16, column-major.
fn write_for_peer(problem: &Problem, folder: &Path) -> std::io::Result<()> {
    let [n, k] = problem.weight.shape;
    let tensor = problem.weight.tensor();
    let Absmax::Flat(scales) = tensor.absmax() else {
        unreachable!("quantized without double quantization");
    };
    let mut codes = Vec::with_capacity(n * k / 2);
    for rows in (0..n).step_by(32) {
        for pair in 0..k / 2 {
            // Two codes a byte, of a row's columns `2 * pair` and the next.
            let pairs = |row: usize| tensor.codes()[(rows + row) * k / 2 + pair];
            for row in 0..16 {
                let (low, high) = (pairs(row), pairs(row + 16));
                codes.push(high & 0xf0 | low >> 4);
                codes.push(high << 4 | low & 15);
            }
        }
    }
    let blocks = scales.len() / n;
    let scales: Vec<bf16> = (0..scales.len())
        .map(|i| bf16::from_f32(scales[i % n * blocks + i / n]))
        .collect();
    std::fs::write(folder.join("codes"), codes)?;
    std::fs::write(
        folder.join("scales"),
        bytemuck::cast_slice::<_, u8>(&scales),
    )?;
    std::fs::write(folder.join("x"), bytemuck::cast_slice::<_, u8>(&problem.x))
}
