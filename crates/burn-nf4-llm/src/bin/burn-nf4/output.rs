//! What goes to stdout, whose reader may go away early.

use std::fmt::Display;
use std::io::{ErrorKind, Write, stdout};

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
