//! The one error type of the crate.

mod text;

use std::fmt;
use std::io;
use std::ops::Deref;
#[cfg(feature = "checkpoint")]
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use burn::tensor::Device;
#[cfg(feature = "checkpoint")]
use safetensors::SafeTensorError;

use crate::format::ScaleType;
use text::{found_instead, lines, misfits, tensors_do};

/// Everything that can go wrong with a caller's input.
///
/// Each variant says what was given and what was expected, and names the tensor it concerns:
/// a component such as `absmax` where a value was built in memory, the full key such as
/// `model.layers.0.mlp.up_proj.weight.absmax` where it was read from a file.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Nf4Error {
    /// The block size is not one that the format has.
    #[error("`{tensor}`: block size {given} is not one of 32, 64, 128, 256, 512, 1024, 2048, 4096")]
    BlockSize {
        /// The tensor concerned.
        tensor: String,
        /// The size given, in elements.
        given: u64,
    },
    /// A shape that a format of blocks does not have.
    #[error("`{tensor}` has shape {shape:?}, expected {expected}, as {format} is quantized")]
    Blocks {
        /// The tensor concerned.
        tensor: String,
        /// The name of the format.
        format: &'static str,
        /// The shape given.
        shape: Vec<usize>,
        /// The shapes that the format has.
        expected: String,
    },
    /// A buffer holds another number of elements than its shape and block size ask for.
    #[error("`{tensor}` holds {given} elements, expected {expected}")]
    Length {
        /// The tensor concerned.
        tensor: String,
        /// Elements asked for.
        expected: usize,
        /// Elements given.
        given: usize,
    },
    /// Scales of another kind than the format has.
    #[error("`{tensor}` has scales of another kind than {format}, expected {expected:?}")]
    Scales {
        /// The tensor concerned.
        tensor: String,
        /// The name of the format.
        format: &'static str,
        /// The kind of scales that the format has.
        expected: ScaleType,
    },
    /// A buffer on a device that begins where a kernel cannot load whole vectors.
    #[error("`{tensor}` begins at byte {given} of its memory, expected a multiple of {expected}")]
    Alignment {
        /// The tensor concerned.
        tensor: String,
        /// What the offset must be a multiple of, in bytes.
        expected: u64,
        /// The offset given, in bytes.
        given: u64,
    },
    /// A tensor has another number of dimensions than expected.
    #[error("`{tensor}` has shape {shape:?}, expected {expected} dimensions")]
    Rank {
        /// The tensor concerned.
        tensor: String,
        /// Dimensions asked for.
        expected: usize,
        /// The shape given.
        shape: Vec<usize>,
    },
    /// A tensor has another shape than expected.
    #[error("`{tensor}` has shape {given:?}, expected {expected:?}")]
    Shape {
        /// The tensor concerned.
        tensor: String,
        /// Shape asked for.
        expected: Vec<usize>,
        /// Shape given.
        given: Vec<usize>,
    },
    /// A shape without elements, or with more than memory can address.
    #[error("`{tensor}`: shape {shape:?} has no elements, or more than can be addressed")]
    ElementCount {
        /// The tensor concerned.
        tensor: String,
        /// The shape given.
        shape: Vec<usize>,
    },
    /// An operation on matrices was given a weight of another rank.
    #[error("`{tensor}` has shape {shape:?}, expected a matrix [out_features, in_features]")]
    NotAMatrix {
        /// The tensor concerned.
        tensor: String,
        /// The shape given.
        shape: Vec<usize>,
    },
    /// A name of a 4-bit data type that is neither `nf4` nor `fp4`.
    #[error("`{tensor}`: quant_type `{given}` is not one of `nf4`, `fp4`")]
    QuantType {
        /// The tensor concerned.
        tensor: String,
        /// The name given.
        given: String,
    },
    /// A data type that is not allowed in this place.
    #[error("`{tensor}` has dtype {given}, expected {expected}")]
    Dtype {
        /// The tensor concerned.
        tensor: String,
        /// The dtypes allowed.
        expected: String,
        /// The dtype given.
        given: String,
    },
    /// A `quant_map` that differs from the table that bitsandbytes' kernels use.
    #[error(
        "`{tensor}`[{index}] is {given}, expected {expected} as in the table of its quant_type"
    )]
    Codebook {
        /// The tensor concerned.
        tensor: String,
        /// The first entry that differs.
        index: usize,
        /// The table's value.
        expected: f32,
        /// The value given.
        given: f32,
    },
    /// A value that is NaN or infinite where only finite numbers can be quantized or decoded.
    #[error("`{tensor}`[{index}] is {given}, expected a finite number")]
    NonFinite {
        /// The tensor concerned.
        tensor: String,
        /// Flat index of the first such value.
        index: usize,
        /// The value given.
        given: f32,
    },
    /// A row range that is empty or leaves the weight.
    #[error("rows {start}..{end} of a weight with {rows} rows: expected start < end <= {rows}")]
    RowRange {
        /// First row asked for.
        start: usize,
        /// One past the last row asked for.
        end: usize,
        /// Rows of the weight.
        rows: usize,
    },
    /// An id that no row of an embedding has.
    #[error("`{tensor}`[{index}] is {given}, expected an id in 0..{rows}")]
    IdRange {
        /// The tensor concerned.
        tensor: String,
        /// Flat index of the first such id.
        index: usize,
        /// The id given.
        given: i128,
        /// Rows of the weight.
        rows: usize,
    },
    /// A range of elements that is empty or leaves the weight.
    #[error("elements {start}..{end} of a weight with {elems}: expected start < end <= {elems}")]
    ElementRange {
        /// First element asked for.
        start: usize,
        /// One past the last element asked for.
        end: usize,
        /// Elements of the weight.
        elems: usize,
    },
    /// A kernel variant was forced on a device or a weight that it cannot serve.
    #[error("kernel variant `{variant}` cannot run here: {reason}")]
    Variant {
        /// Name of the variant.
        variant: &'static str,
        /// What is missing.
        reason: String,
    },
    /// The device cannot hold or compute a data type.
    #[error("device `{device}` does not support {dtype} here")]
    DeviceDtype {
        /// Name of the device's runtime.
        device: String,
        /// The dtype asked for.
        dtype: String,
    },
    /// A library that is loaded at run time is not there, or cannot be used.
    #[error("{library} cannot be used, tried: {}", tried.join("; "))]
    Library {
        /// The library.
        library: &'static str,
        /// What was tried, each with why it was rejected.
        tried: Vec<String>,
    },
    /// A rank of several that work together failed, or ended before the others: see
    /// [`parallel`](crate::parallel).
    #[error("rank {rank}: {message}")]
    Parallel {
        /// The rank, from 0.
        rank: usize,
        /// What it said.
        message: String,
    },
    /// A tensor or buffer on another device.
    #[error("`{tensor}` lies on {given}, expected {expected}")]
    Device {
        /// The tensor concerned.
        tensor: String,
        /// The device that is to use it.
        expected: String,
        /// Where it lies.
        given: String,
    },
    /// Tensors that are to be moved to the memory of the host, from a device whose memory that is.
    #[error(
        "device `{device}` computes in the memory of the host, expected one with memory of its own"
    )]
    HostDevice {
        /// The device.
        device: String,
    },
    /// A device that failed at what it was asked to compute, often for want of memory.
    #[error(
        "device `{device}` could not compute what it was asked to, perhaps for want of memory: {message}"
    )]
    Execution {
        /// The device.
        device: String,
        /// What its runtime says.
        message: String,
    },
    /// A copy between a device and the memory of the host that failed.
    #[error("device `{device}`: a copy to the memory of the host or from it failed: {message}")]
    HostCopy {
        /// The device.
        device: String,
        /// What its runtime says.
        message: String,
    },
    /// A packed buffer whose header does not describe the weight it is used as.
    #[error("packed weight: {what} is {given}, expected {expected}")]
    Header {
        /// The field that differs.
        what: &'static str,
        /// The value asked for.
        expected: String,
        /// The value found.
        given: String,
    },
    /// A module setting that makes no sense.
    #[error("`{field}` is {given}, expected {expected}")]
    Config {
        /// The setting's name.
        field: &'static str,
        /// What is allowed.
        expected: &'static str,
        /// The value given.
        given: String,
    },
    /// A file or folder could not be opened, read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said; [`Error::source`](std::error::Error::source) gives it
        /// as the [`io::Error`] that it is.
        source: IoError,
    },
    /// A file was cut, extended or rewritten while it was open.
    #[error("{}: the file was changed while it was open", path.display())]
    FileChanged {
        /// The file.
        path: PathBuf,
    },
    /// A file that only stands for another one, which Git LFS has to fetch.
    #[error(
        "{}: is a Git LFS pointer and not the file itself: fetch it with `git lfs pull`",
        path.display()
    )]
    GitLfsPointer {
        /// The file.
        path: PathBuf,
    },
    /// A folder without the weights of a model, at least under the names that transformers looks
    /// for.
    #[error(
        "{}: neither `model.safetensors` nor `model.safetensors.index.json` is there{}",
        path.display(), found_instead(found, advice)
    )]
    NoWeights {
        /// The folder.
        path: PathBuf,
        /// Files that may hold the weights in another form, sorted.
        found: Vec<String>,
        /// What can be done about them.
        advice: &'static str,
    },
    /// A file is not well-formed safetensors.
    #[error("{}: not a valid safetensors file: {message}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The index of a folder is malformed, or differs from what the folder holds.
    #[error("{}: {message}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A tensor that belongs to a weight in a format that is not read.
    #[error(
        "`{tensor}` belongs to a weight in {method}, expected floats, bitsandbytes in 4 bit, NVFP4, \
         MXFP4, or FP8 in E4M3 with scales of rows or of tiles of 128 by 128"
    )]
    OtherQuantization {
        /// The tensor.
        tensor: String,
        /// The method, as far as names and dtypes tell.
        method: &'static str,
    },
    /// A parameter that is there in two forms, or with two kinds of scales.
    #[error("`{first}` and `{second}` are both there, expected one of them for `{tensor}`")]
    TwoForms {
        /// The parameter.
        tensor: String,
        /// A tensor of one form.
        first: String,
        /// A tensor of the other.
        second: String,
    },
    /// A scale of a whole tensor by which nothing can be divided.
    #[error("`{tensor}` is {given}, expected a number that scales can be divided by")]
    Divisor {
        /// The tensor concerned.
        tensor: String,
        /// The value given.
        given: f32,
    },
    /// A tensor that must be there is missing.
    #[error("{}: `{key}` is missing", path.display())]
    MissingKey {
        /// The file or folder.
        path: PathBuf,
        /// The key looked for.
        key: String,
    },
    /// A `quant_state` whose JSON text cannot be understood.
    #[error("`{key}`: {message}")]
    QuantState {
        /// The key of the quant_state tensor.
        key: String,
        /// What is wrong with it.
        message: String,
    },
    /// A folder to be written to that holds something already.
    #[error("{}: the folder is not empty", path.display())]
    FolderNotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// A writer that is used after a failed write: its folder would lack something.
    #[error("{}: cannot go on after a failed write: {source}", path.display())]
    WriterFailed {
        /// The folder being written.
        path: PathBuf,
        /// Why the first write failed.
        source: Box<Nf4Error>,
    },
    /// A tensor or file that is written twice, or under a name that is not free.
    #[error("{}: `{name}` is there already, or is a name that has another use", path.display())]
    NameTaken {
        /// The folder being written.
        path: PathBuf,
        /// The key of the tensor, or the name of the file.
        name: String,
    },
    /// The `config.json` of a folder is malformed.
    #[error("{}: {message}", path.display())]
    ModelConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A pattern among the settings is not a valid regular expression, or takes too long
    /// to match.
    #[error("`{field}`: pattern `{pattern}`: {message}")]
    Pattern {
        /// The setting that holds it.
        field: &'static str,
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        message: String,
    },
    /// Tensors of a checkpoint and parameters of a module that do not fit each other.
    #[error("{}: {} not fit the module{}", path.display(), tensors_do(tensors.len()), lines(tensors))]
    Misfit {
        /// The file or folder.
        path: PathBuf,
        /// Every one of them, sorted by key.
        tensors: Vec<TensorMisfit>,
    },
    /// Two tensors of a checkpoint that remapping gives the same path in the module.
    #[error("`{first}` and `{second}` both become `{path}`")]
    SamePath {
        /// The path in the module.
        path: String,
        /// The key of one.
        first: String,
        /// The key of the other.
        second: String,
    },
    /// A tensor that fits could not be put into its place.
    #[error("`{key}` could not be loaded: {message}")]
    Load {
        /// The path of the parameter in the module.
        key: String,
        /// What went wrong.
        message: String,
    },
    /// Something was to be saved to what can only be read.
    #[error("{}: opened for reading only", path.display())]
    ReadOnly {
        /// The file or folder.
        path: PathBuf,
    },
    /// The `adapter_config.json` of an adapter is malformed, or its settings contradict each other.
    #[error("{}: {message}", path.display())]
    AdapterConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// An adapter uses a setting that changes what it computes and is not supported.
    #[error("adapter setting `{key}` is {given}, which is not supported")]
    AdapterOption {
        /// The setting's name.
        key: String,
        /// The value given, as JSON.
        given: String,
    },
    /// The tensors of an adapter are not those that its settings ask for.
    #[error("{}: {}", path.display(), misfits(missing, unexpected))]
    AdapterKeys {
        /// The file.
        path: PathBuf,
        /// Keys that must be there and are not.
        missing: Vec<String>,
        /// Keys that nothing asks for.
        unexpected: Vec<String>,
    },
    /// A tensor of an adapter that cannot be used.
    #[error("{}: `{key}` {reason}", path.display())]
    AdapterTensor {
        /// The file.
        path: PathBuf,
        /// The tensor's key.
        key: String,
        /// Why, and what can be done.
        reason: String,
    },
    /// An adapter without branches or weights that its settings ask for.
    #[error("the adapter lacks what its settings ask for: [{}]", missing.join(", "))]
    AdapterLacks {
        /// Paths of modules without a branch, and names of parameters that are not there, sorted.
        missing: Vec<String>,
    },
    /// An adapter whose tensors are in a pickle, which is not read: loading one runs its code.
    #[error(
        "{}: pickled tensors are not read; load the adapter in PEFT and save it again, which \
         writes adapter_model.safetensors",
        path.display()
    )]
    PickledAdapter {
        /// The file.
        path: PathBuf,
    },
    /// An adapter for a model with another vocabulary than that of the base model.
    #[error(
        "`{tensor}`: the adapter has {given} rows for the vocabulary, the base model {expected}: \
         it was trained with resized embeddings; resize those of the base model to it first"
    )]
    ResizedEmbeddings {
        /// The parameter or the branch.
        tensor: String,
        /// Rows of the base model.
        expected: usize,
        /// Rows that the adapter is for.
        given: usize,
    },
    /// A module that an adapter does not adapt, or must not.
    #[error("module `{module}` is not one that the adapter adapts")]
    NotAdapted {
        /// The module's path.
        module: String,
    },
    /// A base model without parameters that an adapter changes.
    #[error("the base model lacks what the adapter changes: [{}]", missing.join(", "))]
    BaseLacks {
        /// The parameters that are not there.
        missing: Vec<String>,
    },
}

impl Nf4Error {
    /// Turns what a device says into one of these.
    pub(crate) fn execution(device: &Device, error: &dyn fmt::Display) -> Self {
        Self::Execution {
            device: format!("{device:?}"),
            message: error.to_string(),
        }
    }
}

#[cfg(feature = "checkpoint")]
impl Nf4Error {
    /// Turns an error of the operating system about `path` into one of these.
    pub(crate) fn io(path: impl AsRef<Path>) -> impl Fn(io::Error) -> Self {
        move |error| Self::Io {
            path: path.as_ref().into(),
            source: error.into(),
        }
    }
}

impl Nf4Error {
    /// Names the weight `key` of a checkpoint, and its parts, where a function that knows no key has
    /// named the component at fault.
    pub(crate) fn with_key(mut self, key: &str) -> Self {
        if let Self::Length { tensor, .. }
        | Self::NonFinite { tensor, .. }
        | Self::ElementCount { tensor, .. }
        | Self::Blocks { tensor, .. }
        | Self::Dtype { tensor, .. } = &mut self
        {
            *tensor = match tensor.as_str() {
                "weight" => key.into(),
                part => format!("{key}.{part}"),
            };
        }
        self
    }
}

#[cfg(feature = "peft")]
impl Nf4Error {
    /// Names the module that an error of a single layer is about.
    pub(crate) fn of_module(mut self, module: &str) -> Self {
        match &mut self {
            Self::Config { given, .. } if !given.contains(&format!("`{module}")) => {
                given.push_str(&format!(" for `{module}`"));
            }
            Self::NonFinite { tensor, .. }
            | Self::Dtype { tensor, .. }
            | Self::Shape { tensor, .. }
            | Self::Rank { tensor, .. }
            | Self::Length { tensor, .. }
            | Self::ElementCount { tensor, .. }
            | Self::NotAMatrix { tensor, .. }
                if tensor != module && !tensor.starts_with(&format!("{module}.")) =>
            {
                *tensor = match tensor.as_str() {
                    "weight" | "merged weight" => format!("{module}.weight"),
                    part if part.contains(' ') => format!("{module}: {part}"),
                    part => format!("{module}.{part}"),
                };
            }
            _ => {}
        }
        self
    }
}

impl Nf4Error {
    /// For a parameter with a reparameterization of Burn's.
    pub(crate) fn unmaterialized(field: &'static str, path: &str) -> Self {
        Self::Config {
            field,
            expected: "one without reparameterizations of Burn's (apply_lora, apply_qlora, \
                       reparameterize_linears): `materialize` it first",
            given: format!("one with a reparameterization on `{path}`"),
        }
    }
}

#[cfg(feature = "checkpoint")]
impl Nf4Error {
    /// Turns an error of the safetensors crate about the file `path` into one of these.
    pub(crate) fn safetensors(path: impl AsRef<Path>) -> impl Fn(SafeTensorError) -> Self {
        move |error| match error {
            SafeTensorError::IoError(error) => Self::io(&path)(error),
            error => Self::Safetensors {
                path: path.as_ref().into(),
                message: error.to_string(),
            },
        }
    }
}

/// An error of the operating system. Two are equal if they are of one kind and read the same.
#[derive(Debug, Clone)]
pub struct IoError(Arc<io::Error>);

impl From<io::Error> for IoError {
    fn from(error: io::Error) -> Self {
        Self(Arc::new(error))
    }
}

// Not an error itself: so thiserror takes the inner one as the source.
impl Deref for IoError {
    type Target = io::Error;

    fn deref(&self) -> &io::Error {
        &self.0
    }
}

impl PartialEq for IoError {
    fn eq(&self, other: &Self) -> bool {
        self.kind() == other.kind() && self.to_string() == other.to_string()
    }
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A tensor of a checkpoint that does not fit a module: missing where nothing was given,
/// unexpected where nothing was expected, mismatched otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorMisfit {
    /// The key in the checkpoint; of a missing tensor, its path in the module.
    pub key: String,
    /// Where key remapping puts an unexpected tensor in the module, if that is another name.
    pub path: Option<String>,
    /// What the module has there.
    pub expected: Option<TensorForm>,
    /// What the checkpoint has there.
    pub given: Option<TensorForm>,
}

/// Dtype and shape of a tensor, in the layout of the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorForm {
    /// The dtype, or the dtypes allowed; of a quantized weight, how it is quantized.
    pub dtype: String,
    /// The shape.
    pub shape: Vec<usize>,
    /// Whether it is a quantized weight.
    pub quantized: bool,
}

impl fmt::Display for TensorForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of {}", self.shape, self.dtype)
    }
}

impl fmt::Display for TensorMisfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = &self.key;
        match (&self.expected, &self.given) {
            (Some(expected), None) => write!(f, "`{key}` is missing, expected {expected}"),
            (None, Some(given)) => {
                write!(f, "`{key}`")?;
                if let Some(path) = &self.path {
                    write!(f, ", in the module `{path}`,")?;
                }
                write!(f, " is unexpected, a {given}")
            }
            (Some(expected), Some(given)) => {
                write!(f, "`{key}` is {given}, expected {expected}")?;
                let is_form = expected.shape == given.shape;
                match (expected.quantized, given.quantized) {
                    _ if !is_form => Ok(()),
                    (true, false) => write!(f, " (a dense tensor for a quantized weight)"),
                    (false, true) => write!(f, " (a quantized weight for a dense tensor)"),
                    _ => Ok(()),
                }
            }
            (None, None) => write!(f, "`{key}`"),
        }
    }
}
