//! The CPU path, by the host's clock, and bitsandbytes' CPU library beside it.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use burn_nf4::format::{Absmax, FloatElement, FloatType, QuantConfig};
use burn_nf4::host;
use half::{bf16, f16};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::args::{Args, Sizes};
use crate::cpu_matmul;
use crate::problems::{self, Problem, Weight, dtype_name};
use crate::puzzle::{self, Puzzle};
use crate::report::{Method, Place, Report, Subject, Timing, cpu_name};

/// Timed calls, after one that warms up.
const SAMPLES: usize = 21;

pub fn benches(args: &Args, report: &mut Report) -> Result<(), Box<dyn Error>> {
    let place = Place {
        device: cpu_name(),
        backend: "host",
    };
    let copy = if args.list {
        f64::NAN
    } else {
        copy_bandwidth()
    };
    if !args.list {
        println!("\n== {} (host)", place.device);
        println!(
            "threaded copy of 128 MiB: {:.1} GB/s read + written (from caches, more is possible)",
            copy / 1e9
        );
    }
    dequantize(args, report, &place, copy);
    quantize(args, report, &place, copy);
    cpu_matmul::benches(args, report, &place);
    if let Some(puzzle) = puzzle_on_host(args, &place) {
        puzzle.print(&["reference"]);
        puzzle.record(report, 0);
    }
    if let Some(library) = &args.cpu_peer {
        peer(args, library, report, &place, copy)?;
        cpu_matmul::peer(args, library, report, &place)?;
    }
    Ok(())
}

/// Median time of `call`, after one that warms up.
pub fn time(mut call: impl FnMut()) -> Timing {
    call();
    let samples = (0..SAMPLES).map(|_| time_once(&mut call)).collect();
    Timing::of(samples, Method::Clock)
}

fn time_once(call: &mut impl FnMut()) -> f64 {
    let started = Instant::now();
    call();
    started.elapsed().as_secs_f64() * 1e6
}

/// Bandwidth of a copy of 128 MiB by all threads, in bytes read and written a second.
fn copy_bandwidth() -> f64 {
    const BYTES: usize = 128 << 20;
    let part = BYTES / rayon::current_num_threads();
    let from: Vec<u8> = (0..BYTES).map(|i| i as u8).collect();
    let mut to = vec![0u8; BYTES];
    let timing = time(|| {
        let parts = to.par_chunks_mut(part).zip(from.par_chunks(part));
        parts.for_each(|(to, from)| to.copy_from_slice(from));
    });
    assert!(to == from, "the copy is wrong");
    2.0 * BYTES as f64 / (timing.median_us * 1e-6)
}

fn subject(kind: &'static str, name: String, problem: Problem, config: QuantConfig) -> Subject {
    Subject {
        kind,
        name,
        variant: "host".into(),
        problem,
        config,
        hot: true,
        same_bits: None,
    }
}

fn dequantize(args: &Args, report: &mut Report, place: &Place, copy: f64) {
    let mut headed = false;
    for problem in problems::HOST {
        let name = format!("dequant/host/{}", problem.id());
        if !args.starts(&name) {
            continue;
        }
        if !headed {
            report.head("Dequantization on the CPU, wall time, the same buffers each time");
            headed = true;
        }
        let config = QuantConfig::default();
        let weight = Weight::new(problem.shape, config, 1);
        let timing = time_dequantize(&weight, problem.dtype, time_call);
        let subject = subject("dequantize", name, problem, config);
        report.add(place, subject, timing, copy);
    }
}

fn time_call(call: &mut dyn FnMut()) -> Timing {
    time(call)
}

/// Hands a call that decodes `weight` to `time`, once it has been checked.
fn time_dequantize<R>(
    weight: &Weight,
    dtype: FloatType,
    time: impl FnOnce(&mut dyn FnMut()) -> R,
) -> R {
    fn typed<T: FloatElement, R>(
        weight: &Weight,
        expected: &[u8],
        time: impl FnOnce(&mut dyn FnMut()) -> R,
    ) -> R {
        let mut out = vec![T::zeroed(); weight.layout.elems()];
        let result = time(&mut || host::dequantize(&weight.words, &weight.layout, 0, &mut out));
        assert!(
            bytemuck::cast_slice::<T, u8>(&out) == expected,
            "wrong as timed"
        );
        result
    }
    // Checks the first elements against the reference.
    let expected = weight.decoded(dtype);
    match dtype {
        FloatType::F16 => typed::<f16, R>(weight, &expected, time),
        FloatType::BF16 => typed::<bf16, R>(weight, &expected, time),
        FloatType::F32 => typed::<f32, R>(weight, &expected, time),
    }
}

fn quantize(args: &Args, report: &mut Report, place: &Place, copy: f64) {
    let mut headed = false;
    for problem in problems::HOST_QUANTIZE {
        for (config, flat) in [(QuantConfig::default(), ""), (QuantConfig::flat(), "/flat")] {
            let name = format!("quantize/host/{}{flat}", problem.id());
            if !args.starts(&name) {
                continue;
            }
            if !headed {
                report.head("Quantization on the CPU, wall time");
                headed = true;
            }
            let dense: Vec<bf16> = problems::dense(problem.shape, 1)
                .into_iter()
                .map(bf16::from_f32)
                .collect();
            let call = || host::quantize(&dense, &problem.shape, config).expect("finite");
            let reference = burn_nf4::format::BlockTensor::quantize(&dense, &problem.shape, config);
            let reference = reference.expect("finite").to_packed();
            assert!(
                call() == reference,
                "{name}: other words than the reference"
            );
            let timing = time(|| drop(std::hint::black_box(call())));
            report.add(
                place,
                subject("quantize", name, problem, config),
                timing,
                copy,
            );
        }
    }
}

/// The puzzle at its small sizes: the plain reference, the CPU path, and the op on Flex.
fn puzzle_on_host(args: &Args, place: &Place) -> Option<Puzzle> {
    let names: Vec<&str> = ["host_path", "op_flex", "reference"]
        .into_iter()
        .filter(|name| *name != "op_flex" || cfg!(feature = "flex"))
        .filter(|name| args.starts(&format!("puzzle/{name}")))
        .collect();
    if names.is_empty() {
        return None;
    }
    let models = puzzle::models(args.sizes.unwrap_or(Sizes::Small));
    let rounds = puzzle::rounds(args, args.sizes.unwrap_or(Sizes::Small));
    let mut puzzle = Puzzle::new(place.clone(), models, rounds);
    for model in models {
        let weights = model.weights();
        let expected = weights.each_ref().map(|weight| weight.decoded(model.dtype));
        for &name in &names {
            let seconds = match name {
                "op_flex" => time_flex_op(&weights, model.dtype, &expected, rounds),
                _ => {
                    let plain = name == "reference";
                    match model.dtype {
                        FloatType::F16 => time_plain::<f16>(&weights, &expected, rounds, plain),
                        FloatType::BF16 => time_plain::<bf16>(&weights, &expected, rounds, plain),
                        FloatType::F32 => time_plain::<f32>(&weights, &expected, rounds, plain),
                    }
                }
            };
            puzzle.add(name, seconds);
        }
    }
    Some(puzzle)
}

#[cfg(feature = "flex")]
fn time_flex_op(
    weights: &[Weight; 3],
    dtype: FloatType,
    expected: &[Vec<u8>; 3],
    rounds: usize,
) -> f64 {
    let device = burn::tensor::Device::flex();
    puzzle::time_op(&device, weights, dtype, expected, rounds)
}

#[cfg(not(feature = "flex"))]
fn time_flex_op(_: &[Weight; 3], _: FloatType, _: &[Vec<u8>; 3], _: usize) -> f64 {
    unreachable!("left out of the list without the feature")
}

fn time_plain<T: FloatElement>(
    weights: &[Weight; 3],
    expected: &[Vec<u8>; 3],
    rounds: usize,
    plain: bool,
) -> f64 {
    let tensors = weights.each_ref().map(Weight::tensor);
    puzzle::time_model(
        if plain { "reference" } else { "host_path" },
        expected,
        rounds,
        |i| {
            if plain {
                return tensors[i].dequantize::<T>();
            }
            let mut out = vec![T::zeroed(); weights[i].layout.elems()];
            host::dequantize(&weights[i].words, &weights[i].layout, 0, &mut out);
            out
        },
        || {},
        |out| bytemuck::cast_slice(out).to_vec(),
    )
}

/// bitsandbytes' CPU library in a Python process that makes a call when told to.
pub struct PeerProcess {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl PeerProcess {
    pub fn answer(&mut self) -> Result<Value, Box<dyn Error>> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        if line.is_empty() {
            return Err(format!("the CPU peer ended: {}", self.child.wait()?).into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Microseconds of some calls.
    fn time(&mut self) -> Result<Vec<f64>, Box<dyn Error>> {
        let orders = self.orders.as_mut().expect("open until the end");
        writeln!(orders, "time")?;
        Ok(serde_json::from_value(self.answer()?)?)
    }

    pub fn end(mut self) -> Result<(), Box<dyn Error>> {
        drop(self.orders.take());
        let status = self.child.wait()?;
        if status.success() {
            return Ok(());
        }
        Err(format!("the CPU peer ended: {status}").into())
    }
}

/// Plain scales, decoded by both in turns, with the same number of threads.
fn peer(
    args: &Args,
    library: &Path,
    report: &mut Report,
    place: &Place,
    copy: f64,
) -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let config = QuantConfig::flat();
    let mut ratios = Vec::new();
    for problem in problems::CPU_PEER {
        let name = |variant: &str| format!("dequant/{variant}/{}/flat", problem.id());
        let wanted = ["host", "bitsandbytes_cpu"].map(|variant| args.starts(&name(variant)));
        if wanted == [false; 2] {
            continue;
        }
        if ratios.is_empty() {
            report.head("Dequantization on the CPU from plain scales, both in turns, wall time");
        }
        let weight = Weight::new(problem.shape, config, 1);
        let job = write_for_peer(library, &weight, problem, folder.path())?;
        let mut process = start_peer(args, folder.path(), &job)?;
        let ready = process.answer()?;
        if let Some(missing) = ready["missing"].as_str() {
            println!("{:44} not run: {missing}", name("bitsandbytes_cpu"));
            process.end()?;
            continue;
        }
        let (ours, theirs) = time_dequantize(&weight, problem.dtype, |call| {
            take_turns(call, &mut process)
        })?;
        process.end()?;
        let subject = subject("dequantize", name("host"), problem, config);
        report.add(place, subject.clone(), ours, copy);
        let subject = Subject {
            name: name("bitsandbytes_cpu"),
            variant: "bitsandbytes_cpu".into(),
            same_bits: ready["same"].as_bool(),
            ..subject
        };
        report.add(place, subject, theirs, copy);
        ratios.push((problem.id(), ours, theirs));
    }
    print_ratios(ratios.into_iter());
    Ok(())
}

/// Ours and theirs of each name.
pub fn print_ratios(ratios: impl ExactSizeIterator<Item = (String, Timing, Timing)>) {
    if ratios.len() == 0 {
        return;
    }
    println!(
        "\nbitsandbytes' CPU library / ours, {} threads each; the best calls are what other \
         programs on the machine disturbed least",
        rayon::current_num_threads()
    );
    for (name, ours, theirs) in ratios {
        println!(
            "{name:36} median {:>8.1} / {:>8.1} us = {:>5.2}x   best {:>8.1} / {:>8.1} us = {:>5.2}x",
            theirs.median_us,
            ours.median_us,
            theirs.median_us / ours.median_us,
            theirs.best_us,
            ours.best_us,
            theirs.best_us / ours.best_us
        );
    }
}

/// Writes what the peer needs; its job.
fn write_for_peer(
    library: &Path,
    weight: &Weight,
    problem: Problem,
    folder: &Path,
) -> std::io::Result<Value> {
    let tensor = weight.tensor();
    let Absmax::Flat(scales) = tensor.absmax() else {
        unreachable!("quantized without double quantization");
    };
    std::fs::write(folder.join("codes"), tensor.codes())?;
    std::fs::write(
        folder.join("scales"),
        bytemuck::cast_slice::<f32, u8>(scales),
    )?;
    std::fs::write(folder.join("decoded"), weight.decoded(problem.dtype))?;
    Ok(json!({
        "kind": "dequantize",
        "library": library,
        "folder": folder,
        "shape": problem.shape,
        "dtype": dtype_name(problem.dtype),
    }))
}

/// A process that answers whether it can do the job, then waits for orders.
pub fn start_peer(args: &Args, folder: &Path, job: &Value) -> Result<PeerProcess, Box<dyn Error>> {
    let script = folder.join("peer_cpu.py");
    std::fs::write(&script, include_str!("peer_cpu.py"))?;
    let mut child = Command::new(&args.cpu_python)
        .arg(script)
        .arg(job.to_string())
        .env("OMP_NUM_THREADS", rayon::current_num_threads().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start `{}`: {error}", args.cpu_python))?;
    let orders = child.stdin.take();
    let answers = child.stdout.take().expect("piped");
    Ok(PeerProcess {
        child,
        orders,
        answers: BufReader::new(answers),
    })
}

/// Times ours and the peer's calls in turns, so that both see the same machine. Threads of either
/// that spin for a while after a call have stopped when the other's turn comes.
pub fn take_turns(
    mut call: &mut dyn FnMut(),
    peer: &mut PeerProcess,
) -> Result<(Timing, Timing), Box<dyn Error>> {
    const TURNS: usize = 15;
    const PAUSE: Duration = Duration::from_millis(20);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        std::thread::sleep(PAUSE);
        call();
        ours.extend((0..3).map(|_| time_once(&mut call)));
        std::thread::sleep(PAUSE);
        theirs.extend(peer.time()?);
    }
    Ok((
        Timing::of(ours, Method::Clock),
        Timing::of(theirs, Method::Clock),
    ))
}
