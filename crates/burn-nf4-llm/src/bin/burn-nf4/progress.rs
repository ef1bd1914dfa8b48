//! What people see while they wait: a bar, the memory in use.

use std::fs;
use std::io::{IsTerminal, stderr};
use std::time::Duration;

use burn_nf4::checkpoint::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar on stderr, which is not there unless stderr is a terminal, and goes when dropped.
pub struct Bar {
    bar: ProgressBar,
}

impl Bar {
    pub fn new(what: &'static str) -> Self {
        let target = if stderr().is_terminal() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(0), target).with_prefix(what);
        let template = "{prefix} {wide_bar} {bytes}/{total_bytes}, {msg} parameters, {eta}";
        // The template is fixed; a mistake in it leaves the default bar.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self { bar }
    }

    pub fn show(&self, progress: Progress<'_>) {
        self.bar.set_length(progress.bytes_total as u64);
        self.bar.set_position(progress.bytes_done as u64);
        self.bar.set_message(format!(
            "{}/{}",
            progress.parameters_done, progress.parameters_total
        ));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// The most memory that the process has held, where the system tells (Linux).
pub fn peak_memory_bytes() -> Option<u64> {
    kilobytes("/proc/self/status", "VmHWM:")
}

/// The memory that the process holds, where the system tells (Linux).
pub fn memory_bytes() -> Option<u64> {
    kilobytes("/proc/self/status", "VmRSS:")
}

/// Has [`peak_memory_bytes`] count from now on. Returns whether that is possible (Linux).
pub fn restart_peak() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// The memory that the machine can still give without swapping, where the system tells (Linux).
pub fn available_memory_bytes() -> Option<u64> {
    kilobytes("/proc/meminfo", "MemAvailable:")
}

/// The bytes of a line of a file of `/proc`.
fn kilobytes(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// Bytes for people.
pub fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1024.0 * 1024.0))
}

/// Seconds for people.
pub fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}
