//! The harness: NF4 on the devices that are compiled in and on the CPU, as a share of a copy
//! measured in the same run, and beside what users would pick instead. `--help` lists the options.
//!
//! ```text
//! cargo bench --bench dequantize --features cuda -- [OPTIONS] [FILTER]...
//! ```
//!
//! Every result is compared with the CPU path's, and that one with the plain reference, before it
//! is timed.

mod args;
#[cfg(feature = "cube")]
mod chart;
mod cpu;
mod cpu_matmul;
#[cfg(feature = "cube")]
mod device_time;
#[cfg(feature = "cube")]
mod formats;
#[cfg(feature = "cube")]
mod gpu;
#[cfg(feature = "cube")]
mod host_cost;
#[cfg(feature = "cube")]
mod lora;
#[cfg(feature = "cube")]
mod many_rows;
#[cfg(feature = "cube")]
mod matmul;
mod measure;
#[cfg(feature = "cube")]
mod peer;
mod problems;
#[cfg(feature = "cube")]
mod product_chart;
mod puzzle;
mod report;
#[cfg(feature = "cube")]
mod timing;
#[cfg(feature = "cube")]
mod unfused;

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;

use args::{Args, DeviceName};
use report::Report;

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let devices = args.devices()?;
    let on_card = devices.iter().any(|device| *device != DeviceName::Host);
    if args.peer.is_some() && !on_card {
        return Err("--peer needs a device that is not the host".into());
    }
    if args.cpu_peer.is_some() && !devices.contains(&DeviceName::Host) {
        return Err("--cpu-peer needs `--device host`, alone or with others".into());
    }
    let json = (!args.list).then_some(args.json.as_path());
    let mut report = Report::create(json)?;
    if !args.list {
        report.print_environment();
    }
    for device in devices {
        match device {
            DeviceName::Host => cpu::benches(args, &mut report)?,
            #[cfg(feature = "cube")]
            device => on_gpu(device, args, &mut report)?,
            #[cfg(not(feature = "cube"))]
            device => unreachable!("{} is not compiled in", device.name()),
        }
    }
    if !args.list {
        println!("\nresults: {}", args.json.display());
    }
    Ok(())
}

#[cfg(feature = "cube")]
fn on_gpu(name: DeviceName, args: &Args, report: &mut Report) -> Result<(), Box<dyn Error>> {
    let mut gpu = gpu::Gpu::open(name, args)?;
    if !args.list {
        println!("\n== {} ({})", gpu.place.device, name.name());
        gpu.measure_copy();
        println!("device copy: {:.1} GB/s read + written", gpu.copy / 1e9);
    }
    device_time::dequantize(&gpu, args, report);
    device_time::quantize(&gpu, args, report);
    let mut products = matmul::benches(&gpu, args, report);
    products.extend(many_rows::benches(&gpu, args, report));
    lora::benches(&gpu, args, report);
    let mut puzzle = puzzle::on_gpu(&gpu, args, report);
    host_cost::run(&gpu, args, report);
    if let Some(python) = &args.peer {
        peer::run(&gpu, args, python, puzzle.as_mut(), &mut products, report)?;
    }
    formats::summarise(&gpu, report, &products);
    matmul::summarise(&products);
    many_rows::summarise(&gpu, &products);
    if !args.list {
        chart::draw(&gpu.place, &report.rows, &args.svg)?;
        product_chart::draw(&gpu.place, &products, &args.matmul_svg)?;
    }
    Ok(())
}
