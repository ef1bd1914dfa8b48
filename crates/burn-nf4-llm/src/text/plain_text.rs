//! Files of text as people have them: UTF-8, or a message that says what they are instead.

use std::path::Path;

use crate::error::ModelError;
use crate::json::files;

/// A place in a text, counted from 1, the column in characters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Place {
    pub line: usize,
    pub column: usize,
}

impl Place {
    pub const START: Self = Self { line: 1, column: 1 };

    /// The place of a byte of a text.
    pub fn of(text: &str, at: usize) -> Self {
        Self::START.after(text.get(..at).unwrap_or(text))
    }

    /// The place behind a text that begins here.
    pub fn after(self, text: &str) -> Self {
        match text.rsplit_once('\n') {
            None => Self {
                column: self.column + text.chars().count(),
                ..self
            },
            Some((lines, last)) => Self {
                line: self.line + 1 + lines.matches('\n').count(),
                column: 1 + last.chars().count(),
            },
        }
    }

    /// The error for what was met here.
    pub fn error(self, path: &Path, message: impl ToString) -> ModelError {
        ModelError::Data {
            path: path.into(),
            line: self.line,
            column: self.column,
            message: message.to_string(),
        }
    }
}

const BYTE_ORDER_MARK: char = '\u{feff}';

/// Byte order marks of other encodings, the longer ones first.
const OTHER_MARKS: [(&[u8], &str); 4] = [
    (&[0xff, 0xfe, 0, 0], "UTF-32"),
    (&[0, 0, 0xfe, 0xff], "UTF-32"),
    (&[0xff, 0xfe], "UTF-16"),
    (&[0xfe, 0xff], "UTF-16"),
];

/// Reads a file of UTF-8, without its byte order mark.
pub fn read(path: &Path) -> Result<String, ModelError> {
    decode(files::read(path)?, path)
}

/// The text of a file; the path is for errors.
pub fn decode(bytes: Vec<u8>, path: &Path) -> Result<String, ModelError> {
    for (mark, name) in OTHER_MARKS {
        if bytes.starts_with(mark) {
            let message = format!("the file is {name}, expected UTF-8");
            return Err(Place::START.error(path, message));
        }
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let bytes = error.as_bytes();
        let message = format!("byte {:#04x} is not UTF-8, is the file Latin-1?", bytes[at]);
        Place::of(&String::from_utf8_lossy(&bytes[..at]), at).error(path, message)
    })?;
    if let Some(at) = text.find('\0') {
        let message = "a NUL byte, is the file UTF-16 or binary?";
        return Err(Place::of(&text, at).error(path, message));
    }
    match text.strip_prefix(BYTE_ORDER_MARK) {
        Some(text) => Ok(text.into()),
        None => Ok(text),
    }
}

/// Turns the line breaks of Windows and of old Macs into those of Unix, as Python does with text.
pub fn with_unix_lines(text: &str) -> String {
    text.replace("\r\n", "\n").replace('\r', "\n")
}
