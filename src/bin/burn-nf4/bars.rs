//! Progress for people.

use std::io::{IsTerminal, stderr};

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
