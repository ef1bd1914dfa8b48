//! What goes to stdout, whose reader may go away early.

use std::fmt::Display;
use std::io::{ErrorKind, IsTerminal, Write, stderr, stdout};
use std::process::Command;

use burn_nf4_llm::ModelError;

/// What errors of stdout name in the place of a file.
const STDOUT: &str = "stdout";

/// Writes to stdout at once.
///
/// # Errors
/// [`ModelError::Io`]. One that [tells of a closed pipe](is_closed_pipe) ends the program quietly if it
/// comes to `main`.
pub fn show(text: impl Display) -> Result<(), ModelError> {
    let mut stdout = stdout().lock();
    let written = write!(stdout, "{text}").and_then(|()| stdout.flush());
    written.map_err(ModelError::io(STDOUT))
}

/// Prints an error and ends the program with its exit code, without waiting for threads that may wait on their devices
/// for ever. A TUI that such a thread has open is closed.
pub fn end_at_once(error: &ModelError) -> ! {
    let mut out = stdout();
    if out.is_terminal() {
        // The main screen, and the cursor.
        let _ = write!(out, "\x1b[?1049l\x1b[?25h");
        let _ = Command::new("stty").arg("sane").status();
    }
    let _ = out.flush();
    let _ = writeln!(stderr(), "error: {error}");
    signal_hook::low_level::exit(FAILED)
}

/// The exit code after an error.
const FAILED: i32 = 2;

/// Whether an error says that nobody reads stdout any more: who has read enough, as `head` has, is content.
pub fn is_closed_pipe(error: &ModelError) -> bool {
    matches!(error, ModelError::Io { path, source }
        if path.as_os_str() == STDOUT && source.kind() == ErrorKind::BrokenPipe)
}

/// `println!` that gives the error of [`show`] in place of a panic.
macro_rules! say {
    ($($text:tt)*) => {
        $crate::output::show(format_args!("{}\n", format_args!($($text)*)))
    };
}
pub(crate) use say;
