//! What can go wrong when a model is opened, run or trained.

use std::fmt;
use std::path::PathBuf;

use burn_nf4::Nf4Error;

/// An error, for people to read.
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
    /// The tensors of the checkpoint are not those of the model.
    #[error("{0}")]
    Tensors(Box<TensorFaults>),
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
    /// An argument, or a combination of them, that cannot be served.
    #[error("{0}")]
    Argument(String),
    /// A checkpoint of a training run that cannot be read or continued.
    #[error("{}: {message}", path.display())]
    Resume {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
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

impl ModelError {
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

/// Everything that is wrong with the tensors of a checkpoint, found in one pass.
#[derive(Debug, Default)]
pub struct TensorFaults {
    /// Where the tensors were looked for.
    pub path: PathBuf,
    /// Parameters of the model that the checkpoint does not hold.
    pub missing: Vec<String>,
    /// Parameters of the checkpoint that the model has no use for.
    pub unexpected: Vec<String>,
    /// Parameters of another shape or dtype, each with what is wrong.
    pub mismatched: Vec<String>,
}

impl TensorFaults {
    /// An error, unless nothing was found.
    pub fn into_result(self) -> Result<(), ModelError> {
        if self.missing.is_empty() && self.unexpected.is_empty() && self.mismatched.is_empty() {
            return Ok(());
        }
        Err(ModelError::Tensors(Box::new(self)))
    }
}

impl fmt::Display for TensorFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} does not fit the model of its config.json",
            self.path.display()
        )?;
        for (title, faults) in [
            ("missing", &self.missing),
            ("unexpected", &self.unexpected),
            ("mismatched", &self.mismatched),
        ] {
            for fault in faults {
                write!(f, "\n  {title}: {fault}")?;
            }
        }
        Ok(())
    }
}
