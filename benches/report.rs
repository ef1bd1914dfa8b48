//! Results, for people and for machines.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};

pub use crate::measure::{Method, Timing};
use crate::problems::{Problem, dtype_name};

/// Where a result comes from.
#[derive(Clone, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The device as it names itself.
    pub device: String,
    /// `cuda`, `wgpu`, …, or `host`.
    pub backend: &'static str,
}

/// A timed dequantization or quantization.
#[derive(Clone, Serialize)]
pub struct Row {
    #[serde(flatten)]
    pub place: Place,
    pub kind: &'static str,
    pub name: String,
    /// A variant's name, `default`, `unfused`, `host`, or a peer's.
    pub variant: String,
    pub dtype: &'static str,
    pub shape: [usize; 2],
    pub quant_type: &'static str,
    /// `nested` or `flat` scales.
    pub scales: &'static str,
    /// Buffers were not rotated.
    pub hot: bool,
    pub median_us: f64,
    pub spread_us: f64,
    pub best_us: f64,
    pub bytes: usize,
    pub gb_s: f64,
    pub percent_of_copy: f64,
    pub method: Method,
    /// Of a peer: whether it gave our bits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub same_bits: Option<bool>,
}

/// What a row is about, without its times.
#[derive(Clone)]
pub struct Subject {
    pub kind: &'static str,
    pub name: String,
    pub variant: String,
    pub problem: Problem,
    pub config: burn_nf4::format::QuantConfig,
    pub hot: bool,
    pub same_bits: Option<bool>,
}

/// Prints results as they come in, writes them as JSON lines and keeps them.
pub struct Report {
    file: Option<File>,
    environment: Value,
    pub rows: Vec<Row>,
}

impl Report {
    /// Writes to `path`, or only prints.
    ///
    /// # Errors
    /// If the file cannot be created.
    pub fn create(path: Option<&Path>) -> std::io::Result<Self> {
        let create = |path: &Path| {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder)?;
            }
            File::create(path)
        };
        let file = path.map(create).transpose()?;
        let environment = json!({
            "date": date(),
            "burn_nf4": env!("CARGO_PKG_VERSION"),
            "burn": locked_version("burn"),
            "cubecl": locked_version("cubecl"),
            "fusion": cfg!(feature = "fusion"),
            "driver": driver(),
            "cpu": cpu_name(),
            "threads": rayon::current_num_threads(),
        });
        Ok(Self {
            file,
            environment,
            rows: Vec::new(),
        })
    }

    /// Versions and date, for the head of the output.
    pub fn print_environment(&self) {
        let text = |key: &str| match &self.environment[key] {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        println!(
            "burn-nf4 {}, burn {}, cubecl {}, {}",
            text("burn_nf4"),
            text("burn"),
            text("cubecl"),
            text("date")
        );
        println!("CPU: {}, {} threads", text("cpu"), text("threads"));
        if let Value::String(driver) = &self.environment["driver"] {
            println!("NVIDIA driver {driver}");
        }
    }

    /// Writes one object: `value` and the environment.
    pub fn record(&mut self, value: &impl Serialize) {
        let mut object = serde_json::to_value(value).expect("plain data");
        let fields = object.as_object_mut().expect("a struct or a map");
        for (key, value) in self.environment.as_object().expect("made above") {
            fields.insert(key.clone(), value.clone());
        }
        if let Some(file) = &mut self.file {
            writeln!(file, "{object}").expect("the results can be written");
        }
    }

    /// Prints the head of the columns that [`add`](Self::add) fills.
    pub fn head(&self, title: &str) {
        println!("\n{title}");
        println!(
            "{:44} {:>10} {:>9} {:>9} {:>8}",
            "", "median us", "spread", "GB/s", "% copy"
        );
    }

    /// Prints and records a time.
    pub fn add(&mut self, place: &Place, subject: Subject, timing: Timing, copy: f64) {
        let bytes = subject.problem.bytes(subject.config);
        let rate = bytes as f64 / (timing.median_us * 1e-6);
        let row = Row {
            place: place.clone(),
            kind: subject.kind,
            name: subject.name,
            variant: subject.variant,
            dtype: dtype_name(subject.problem.dtype),
            shape: subject.problem.shape,
            quant_type: subject.config.quant_type.name(),
            scales: match subject.config.nested_block_size {
                Some(_) => "nested",
                None => "flat",
            },
            hot: subject.hot,
            median_us: timing.median_us,
            spread_us: timing.spread_us,
            best_us: timing.best_us,
            bytes,
            gb_s: rate / 1e9,
            percent_of_copy: 100.0 * rate / copy,
            method: timing.method,
            same_bits: subject.same_bits,
        };
        let method = match timing.method {
            #[cfg(feature = "cube")]
            Method::HostLaunches => "  (host launches: not device time alone)",
            #[cfg(feature = "cube")]
            Method::Queued => "  (queued launches)",
            #[cfg(feature = "cube")]
            Method::Graph => "",
            Method::Clock => "",
        };
        let bits = match subject.same_bits {
            Some(false) => "  other bits than ours",
            _ => "",
        };
        println!(
            "{:44} {:>10.2} {:>9.2} {:>9.1} {:>8.1}{method}{bits}",
            row.name, row.median_us, row.spread_us, row.gb_s, row.percent_of_copy
        );
        self.record(&row);
        self.rows.push(row);
    }
}

/// The version of a package that this bench was built with.
fn locked_version(package: &str) -> &'static str {
    let lock = include_str!("../Cargo.lock");
    let entry = format!("name = \"{package}\"\nversion = \"");
    let after = lock.split_once(&entry).map_or("", |(_, after)| after);
    after.split('"').next().unwrap_or("")
}

/// The version of the NVIDIA driver, if there is one.
fn driver() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let line = text.lines().next()?;
    let version = line
        .split_whitespace()
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'))?;
    Some(version.into())
}

/// The processor's name, as Linux has it.
pub fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find(|line| line.starts_with("model name"))
        .and_then(|line| line.split_once(": "));
    model.map_or(std::env::consts::ARCH.into(), |(_, name)| {
        name.trim().into()
    })
}

/// Today, UTC, as `2026-11-23`.
fn date() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    // Days to a civil date, after Howard Hinnant, "chrono-compatible low-level date algorithms".
    let days = (now.map_or(0, |now| now.as_secs()) / 86_400) as i64 + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year}-{month:02}-{day:02}")
}
