//! What can go wrong when a model is opened, run or trained.

use std::fmt;
use std::path::PathBuf;

use burn::tensor::Device;
use burn_nf4::Nf4Error;

/// An error, for people to read.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The library could not read or build something.
    #[error(transparent)]
    Nf4(#[from] Nf4Error),
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the file system says.
        source: std::io::Error,
    },
    /// A file that is not the JSON expected.
    #[error("{}: {message}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the reader says.
        message: String,
    },
    /// A field of a JSON file whose value is not implemented here or makes no sense.
    #[error("{}: `{field}` is {given}, supported: {supported}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The field, by its path in the file.
        field: String,
        /// What it is.
        given: String,
        /// What would do.
        supported: String,
    },
    /// A file of texts that holds something unexpected.
    #[error("{}, line {line}, column {column}: {message}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// Counted from one.
        line: usize,
        /// Counted from one, in characters.
        column: usize,
        /// What was met.
        message: String,
    },
    /// The chat template cannot be used, or not for this conversation.
    #[error("the chat template: {0}")]
    Template(String),
    /// The tokenizer failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A setting, or a combination of them, that cannot be served.
    #[error("{name} is {given}, expected {expected}")]
    Setting {
        /// The setting's name.
        name: String,
        /// What was given.
        given: String,
        /// What would do.
        expected: String,
    },
    /// A device that does not answer.
    #[error("{device}: {message}")]
    Device {
        /// The device.
        device: String,
        /// What it says.
        message: String,
    },
    /// The keys and values of a generation do not fit.
    #[error(
        "the KV cache of {rows} {} of {positions} positions needs {}, {} {}",
        if *rows == 1 { "row" } else { "rows" },
        mebibytes(*needed),
        limit,
        mebibytes(*available)
    )]
    Memory {
        /// Rows of the batch.
        rows: usize,
        /// Positions of each row.
        positions: usize,
        /// Bytes that they need.
        needed: u64,
        /// Bytes that there are for them.
        available: u64,
        /// Who says so.
        limit: MemoryLimit,
    },
    /// A step of decoding that was recorded, or to be recorded, and went wrong. Without
    /// [`Request::capture`](crate::generate::Request::capture) none is.
    #[error("{device}: a replayed step: {message}")]
    Replay {
        /// The device.
        device: String,
        /// What went wrong.
        message: String,
    },
    /// A checkpoint of a training run that cannot be read or continued.
    #[error("{}: {message}", path.display())]
    Resume {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// Training that came to numbers which are not finite, several steps in a row. The parameters are those of
    /// before.
    #[error(
        "step {step}: the loss is {loss} and the norm of the gradients {grad_norm}, expected finite numbers: \
         {skipped} steps in a row were left out; lower the learning rate, or look for what is wrong with the data \
         or the weights"
    )]
    NotFinite {
        /// The last of them, counted from one.
        step: usize,
        /// Its loss.
        loss: f32,
        /// The norm of its gradients.
        grad_norm: f32,
        /// How many there were.
        skipped: usize,
    },
    /// The model could not be fetched.
    #[error("cannot fetch {repo}: {message}")]
    Fetch {
        /// The repository, `org/name`.
        repo: String,
        /// What went wrong.
        message: String,
    },
}

/// What bounds the memory of a cache.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryLimit {
    /// [`Request::max_cache_bytes`](crate::generate::Request::max_cache_bytes).
    Request,
    /// What the device has beside all tensors that are there.
    Device,
}

impl fmt::Display for MemoryLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Request => "the limit given is",
            Self::Device => "the device has room for",
        })
    }
}

/// Bytes for people.
fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1024.0 * 1024.0))
}

impl ModelError {
    /// A setting that cannot be served.
    pub fn setting(
        name: impl Into<String>,
        given: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::Setting {
            name: name.into(),
            given: given.to_string(),
            expected: expected.into(),
        }
    }

    /// A device that does not answer.
    pub(crate) fn device(device: &Device, error: impl ToString) -> Self {
        Self::Device {
            device: format!("{device:?}"),
            message: error.to_string(),
        }
    }

    /// A recorded step that went wrong.
    pub(crate) fn replay(device: &Device, message: String) -> Self {
        Self::Replay {
            device: format!("{device:?}"),
            message,
        }
    }

    /// Wraps an error of the file system with the path it concerns.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// Wraps an error of the JSON reader with the path it concerns.
    pub fn json(path: impl Into<PathBuf>) -> impl FnOnce(serde_json::Error) -> Self {
        let path = path.into();
        move |error| Self::Json {
            path,
            message: error.to_string(),
        }
    }
}
