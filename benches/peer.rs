//! Peers on the same card in the same run: bitsandbytes, Unsloth's two launches and a Triton
//! kernel, called by `peer.py` on the weights that ours decode.

use std::collections::HashMap;
use std::error::Error;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use burn_nf4::format::{Absmax, FloatType, QuantConfig};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::args::Args;
use crate::device_time::{
    ROTATION_BYTES, dequantize_name, quantize_configs, quantize_name, quantized,
};
use crate::gpu::Gpu;
use crate::many_rows::{self, Product, variant_name};
use crate::matmul::{self, Timed};
use crate::problems::{self, Problem, Weight, dtype_name};
use crate::puzzle::Puzzle;
use crate::report::{Method, Report, Row, Subject, Timing};

/// What `peer.py` can decode with.
const DEQUANTIZERS: [&str; 3] = ["bitsandbytes", "two_launch", "triton"];
/// What it can quantize with.
const QUANTIZER: &str = "bitsandbytes";

/// What it can multiply with.
const MULTIPLIERS: [&str; 2] = ["bitsandbytes", "cublas"];

/// A line of `peer.py`.
#[derive(Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
enum Line {
    /// Versions and the card.
    Hello {
        text: String,
    },
    /// A package is not there.
    Missing {
        package: String,
        error: String,
    },
    /// PyTorch's device copy.
    Copy {
        gb_s: f64,
    },
    /// Something worth telling.
    Note {
        text: String,
    },
    Time {
        name: String,
        median_us: f64,
        spread_us: f64,
        best_us: f64,
        method: PeerMethod,
        same: bool,
    },
    /// A matrix product.
    Product {
        variant: String,
        dtype: String,
        shape: [usize; 2],
        m: usize,
        median_us: f64,
        spread_us: f64,
        best_us: f64,
        method: PeerMethod,
        relative_error: f64,
    },
    Puzzle {
        name: String,
        seconds: Vec<f64>,
    },
    /// One job did not work.
    Failed {
        name: String,
        error: String,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum PeerMethod {
    Graph,
    Queued,
}

impl From<PeerMethod> for Method {
    fn from(method: PeerMethod) -> Self {
        match method {
            PeerMethod::Graph => Self::Graph,
            PeerMethod::Queued => Self::Queued,
        }
    }
}

/// Runs the peers and prints how they compare.
///
/// # Errors
/// If Python itself fails. A missing package is only told.
pub fn run(
    gpu: &Gpu,
    args: &Args,
    python: &str,
    puzzle: Option<&mut Puzzle>,
    products: &mut Vec<Timed>,
    report: &mut Report,
) -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let mut jobs = Jobs {
        folder: folder.path().to_path_buf(),
        list: Vec::new(),
        subjects: HashMap::new(),
    };
    jobs.dequantize(gpu, args)?;
    jobs.quantize(gpu, args)?;
    jobs.matmul(gpu, args)?;
    if let Some(puzzle) = &puzzle {
        jobs.puzzle(puzzle, args)?;
    }
    if jobs.list.is_empty() {
        return Ok(());
    }
    report.head(&format!("Peers, by {python}"));
    gpu.client
        .memory_cleanup()
        .map_err(|error| format!("{error:?}"))?;

    let script = folder.path().join("peer.py");
    std::fs::write(&script, include_str!("peer.py"))?;
    let manifest = folder.path().join("jobs.json");
    let rotation = json!({ "rotation_bytes": ROTATION_BYTES, "jobs": jobs.list });
    std::fs::write(&manifest, rotation.to_string())?;
    let mut child = Command::new(python)
        .arg(&script)
        .arg(&manifest)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start `{python}`: {error}"))?;
    let mut scores = Vec::new();
    for line in BufReader::new(child.stdout.take().expect("piped")).lines() {
        let line = line?;
        match serde_json::from_str(&line) {
            Ok(line) => take(gpu, line, &jobs.subjects, &mut scores, products, report),
            // Libraries print what they like.
            Err(_) => println!("{python}: {line}"),
        }
    }
    let status = child.wait()?;
    if !status.success() {
        return Err(format!("`{python}` with the peers: {status}").into());
    }

    ratios(gpu, &report.rows);
    if let Some(puzzle) = puzzle {
        let ours = puzzle.scores.len();
        for (name, seconds) in scores {
            let name = name.trim_start_matches("puzzle/");
            seconds
                .into_iter()
                .for_each(|seconds| puzzle.add(name, seconds));
        }
        if puzzle.scores.len() > ours {
            puzzle.print(&["unfused", "two_launch", "bitsandbytes"]);
            puzzle.record(report, ours);
        }
    }
    Ok(())
}

fn take(
    gpu: &Gpu,
    line: Line,
    subjects: &HashMap<String, Subject>,
    scores: &mut Vec<(String, Vec<f64>)>,
    products: &mut Vec<Timed>,
    report: &mut Report,
) {
    match line {
        Line::Hello { text } | Line::Note { text } => println!("{text}"),
        Line::Missing { package, error } => println!("missing: {package} ({error})"),
        Line::Copy { gb_s } => println!(
            "PyTorch's device copy: {gb_s:.1} GB/s, {:.1}% of ours",
            100.0 * gb_s * 1e9 / gpu.copy
        ),
        Line::Time {
            name,
            median_us,
            spread_us,
            best_us,
            method,
            same,
        } => {
            let mut subject = subjects[&name].clone();
            subject.same_bits = Some(same);
            let timing = Timing {
                median_us,
                spread_us,
                best_us,
                method: method.into(),
            };
            report.add(&gpu.place, subject, timing, gpu.copy);
        }
        Line::Product {
            variant,
            dtype,
            shape,
            m,
            median_us,
            spread_us,
            best_us,
            method,
            relative_error,
        } => {
            let of_name = |known: &FloatType| dtype_name(*known) == dtype;
            let timed = Timed {
                variant,
                dtype: FloatType::ALL
                    .into_iter()
                    .find(of_name)
                    .expect("as we asked for"),
                shape,
                m,
                timing: Timing {
                    median_us,
                    spread_us,
                    best_us,
                    method: method.into(),
                },
                relative_error: Some(relative_error),
            };
            products.push(matmul::take(gpu, timed, report));
        }
        Line::Puzzle { name, seconds } => scores.push((name, seconds)),
        Line::Failed { name, error } => println!("{name:44} failed: {error}"),
    }
}

/// The jobs for `peer.py`, and the files that they name.
struct Jobs {
    folder: PathBuf,
    list: Vec<Value>,
    subjects: HashMap<String, Subject>,
}

impl Jobs {
    fn write(&self, name: &str, bytes: &[u8]) -> std::io::Result<PathBuf> {
        let path = self.folder.join(name);
        std::fs::write(&path, bytes)?;
        Ok(path)
    }

    /// The files of a weight in its parts, and of what it decodes to.
    fn weight(&self, id: &str, weight: &Weight, dtype: FloatType) -> std::io::Result<Value> {
        let tensor = weight.tensor();
        let Absmax::Nested(nested) = tensor.absmax() else {
            unreachable!("quantized with double quantization");
        };
        let absmax = bytemuck::cast_slice::<f32, u8>(&nested.absmax);
        let map = bytemuck::cast_slice::<f32, u8>(nested.map.as_slice());
        Ok(json!({
            "shape": weight.shape,
            "dtype": dtype_name(dtype),
            "codes": self.write(&format!("{id}.codes"), tensor.codes())?,
            "scales": self.write(&format!("{id}.scales"), &nested.codes)?,
            "nested_absmax": self.write(&format!("{id}.nested_absmax"), absmax)?,
            "map": self.write(&format!("{id}.map"), map)?,
            "offset": f64::from(nested.offset),
            "decoded": self.write(&format!("{id}.decoded"), &weight.decoded(dtype))?,
        }))
    }

    fn dequantize(&mut self, gpu: &Gpu, args: &Args) -> std::io::Result<()> {
        for (number, &problem) in problems::peers(gpu.sizes).iter().enumerate() {
            let is_hot = problem == problems::hot(gpu.sizes);
            let mut wanted = Vec::new();
            for hot in [false, true].into_iter().filter(|hot| !hot || is_hot) {
                for variant in DEQUANTIZERS {
                    // bitsandbytes' C entry for f32 is not what Unsloth calls.
                    let exists = variant != "two_launch" || problem.dtype != FloatType::F32;
                    let name = dequantize_name(variant, &problem, hot);
                    if exists && args.starts(&name) {
                        wanted.push((name, variant, hot));
                    }
                }
            }
            if wanted.is_empty() {
                continue;
            }
            let weight = Weight::new(problem.shape, QuantConfig::default(), 1);
            let files = self.weight(&format!("d{number}"), &weight, problem.dtype)?;
            for (name, variant, hot) in wanted {
                self.list.push(json!({
                    "kind": "dequantize",
                    "name": name,
                    "variant": variant,
                    "weight": files,
                    "hot": hot,
                    "bytes": problem.bytes(QuantConfig::default()),
                }));
                self.add_subject(
                    "dequantize",
                    name,
                    variant,
                    problem,
                    QuantConfig::default(),
                    hot,
                );
            }
        }
        Ok(())
    }

    fn quantize(&mut self, gpu: &Gpu, args: &Args) -> std::io::Result<()> {
        for (number, problem) in problems::quantize(gpu.sizes).into_iter().enumerate() {
            for config in quantize_configs() {
                let name = quantize_name(QUANTIZER, &problem, config);
                if !args.starts(&name) {
                    continue;
                }
                let dense = problems::dense(problem.shape, 1);
                let dense = problems::round_bytes(&dense, problem.dtype);
                // The codes do not depend on how scales are kept.
                let words = quantized(&dense, problem, config);
                let codes = bytemuck::cast_slice::<u32, u8>(&words);
                let codes = &codes[..problem.elems().div_ceil(2)];
                self.list.push(json!({
                    "kind": "quantize",
                    "name": name,
                    "variant": QUANTIZER,
                    "shape": problem.shape,
                    "dtype": dtype_name(problem.dtype),
                    "nested": config.nested_block_size.is_some(),
                    "dense": self.write(&format!("q{number}.dense"), &dense)?,
                    "codes": self.write(&format!("q{number}.codes"), codes)?,
                    "bytes": problem.bytes(config),
                }));
                self.add_subject("quantize", name, QUANTIZER, problem, config, false);
            }
        }
        Ok(())
    }

    fn matmul(&mut self, gpu: &Gpu, args: &Args) -> std::io::Result<()> {
        let few = matmul::products(gpu).flat_map(|(shape, m)| {
            let product = Product {
                shape,
                m,
                dtype: matmul::DTYPE,
                dx: false,
            };
            MULTIPLIERS.map(|peer| (peer, product))
        });
        let mut last: Option<(Product, Value)> = None;
        for (peer, product) in few.chain(many_rows::peer_products(gpu)) {
            let Product {
                shape,
                m,
                dtype,
                dx,
            } = product;
            let variant = variant_name(peer, dx);
            let name = matmul::name(&variant, dtype, shape, m);
            if !args.starts(&name) {
                continue;
            }
            let [n, k] = shape;
            let files = match &last {
                Some((same, files)) if same.shape == shape && same.dtype == dtype => files.clone(),
                _ => {
                    let weight = Weight::new(shape, QuantConfig::default(), 1);
                    let id = format!("m{n}x{k}{}", dtype_name(dtype));
                    self.weight(&id, &weight, dtype)?
                }
            };
            last = Some((product, files.clone()));
            let width = if dx { n } else { k };
            let id = format!("x{m}x{width}{}", dtype_name(dtype));
            let x = matmul::floats(dtype, &matmul::x_values(m, width));
            self.list.push(json!({
                "kind": "matmul",
                "name": name,
                "variant": peer,
                "as": variant,
                "dx": dx,
                "weight": files,
                "m": m,
                "x": self.write(&id, &x)?,
                "bytes": n * k / 2,
            }));
        }
        Ok(())
    }

    fn puzzle(&mut self, puzzle: &Puzzle, args: &Args) -> std::io::Result<()> {
        let wanted: Vec<&str> = DEQUANTIZERS
            .into_iter()
            .filter(|variant| args.starts(&format!("puzzle/{variant}")))
            .collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let mut models = Vec::new();
        for (m, model) in puzzle.models.iter().enumerate() {
            let mut weights = Vec::new();
            for (w, weight) in model.weights().iter().enumerate() {
                weights.push(self.weight(&format!("p{m}{w}"), weight, model.dtype)?);
            }
            models.push(Value::from(weights));
        }
        for variant in wanted {
            self.list.push(json!({
                "kind": "puzzle",
                "name": format!("puzzle/{variant}"),
                "variant": variant,
                "rounds": puzzle.rounds,
                "models": models,
            }));
        }
        Ok(())
    }

    fn add_subject(
        &mut self,
        kind: &'static str,
        name: String,
        variant: &str,
        problem: Problem,
        config: QuantConfig,
        hot: bool,
    ) {
        let subject = Subject {
            kind,
            name: name.clone(),
            variant: variant.into(),
            problem,
            config,
            hot,
            same_bits: None,
        };
        self.subjects.insert(name, subject);
    }
}

/// Prints each peer's time, and how many times ours it is.
fn ratios(gpu: &Gpu, rows: &[Row]) {
    let here: Vec<&Row> = rows.iter().filter(|row| row.place == gpu.place).collect();
    let ours = here.iter().filter(|row| row.variant == "default");
    let mut headed = false;
    for ours in ours {
        let same = |row: &&&Row| {
            (row.kind, row.shape, row.dtype, row.scales, row.hot)
                == (ours.kind, ours.shape, ours.dtype, ours.scales, ours.hot)
        };
        let peers = DEQUANTIZERS.map(|peer| {
            let row = here.iter().filter(same).find(|row| row.variant == peer)?;
            Some((row.median_us, row.median_us / ours.median_us))
        });
        if peers.iter().all(Option::is_none) {
            continue;
        }
        if !headed {
            println!("\nMedian device time in microseconds, and how many times ours");
            print!("{:44} {:>9}", "", "default");
            for peer in DEQUANTIZERS {
                print!(" {peer:>18}");
            }
            println!();
            headed = true;
        }
        print!("{:44} {:>9.2}", ours.name, ours.median_us);
        for peer in peers {
            match peer {
                Some((us, ratio)) => print!(" {:>18}", format!("{us:.2} ({ratio:.2}x)")),
                None => print!(" {:>18}", "-"),
            }
        }
        println!();
    }
}
