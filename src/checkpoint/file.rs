//! One safetensors file.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use burn::tensor::{Device, Tensor};
use memmap2::Mmap;

use super::float::{load_float, load_tensor};
use super::header::{Entry, MAX_HEADER_BYTES, read_header};
use super::stored::{StoredTensor, TensorInfo, TensorSource};
use super::weight::{
    find_weight, is_quantized, is_transposed, load_quantized, load_weight, quantized_weights,
};
use crate::error::Nf4Error;
use crate::format::{BlockTensor, FloatElement, FloatType, WeightForm};
use crate::op::BlockWeight;

/// A safetensors file, opened for reading.
///
/// The header is checked once; the tensors stay on disk until they are asked for, and each is
/// copied once. See [`open`](Self::open) for what must not happen to the file meanwhile.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    content: Content,
    entries: BTreeMap<String, Entry>,
}

/// Where the bytes are.
#[derive(Debug)]
enum Content {
    Mapped {
        map: Mmap,
        file: File,
        /// What it was when it was mapped.
        stamp: Stamp,
    },
    Memory(Vec<u8>),
}

/// What changes when a file is written to.
#[derive(Debug, PartialEq)]
struct Stamp {
    len: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            len: metadata.len(),
            // Not every platform has it.
            modified: metadata.modified().ok(),
        }
    }
}

impl Content {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped { map, .. } => map,
            Self::Memory(bytes) => bytes,
        }
    }
}

impl SafetensorsFile {
    /// Maps a file into memory and checks its header.
    ///
    /// # The file must not change while it is open
    /// The memory of a mapped file is the file itself. If another process shortens the file, reading
    /// a page that is gone ends this one (`SIGBUS`). If another process writes to it, bytes change
    /// while they are read, which is undefined behaviour in Rust. No program can prevent either,
    /// which is why mapping is unsafe in `memmap2`. This function is safe to call all the same, as
    /// burn-store's `SafetensorsStore` and Python's `safe_open` are: files of weights are written
    /// once, and then only read or replaced as a whole (a new file under the old name is another
    /// file and harms no map), and reading a file into memory takes as much memory as it is long.
    /// You have to see to it that nobody writes to the file.
    ///
    /// Before a tensor is read, the length of the file and the time of its last change are compared
    /// with those at opening, and a difference is [`Nf4Error::FileChanged`]. A change during the
    /// read goes unnoticed. Where others do write to a file, as on a shared disk during a download,
    /// use [`read`](Self::read).
    ///
    /// # Errors
    /// [`Nf4Error::Io`] if it cannot be opened or mapped, [`Nf4Error::GitLfsPointer`],
    /// [`Nf4Error::Safetensors`] if its header is malformed or names a tensor twice, or if the
    /// tensors do not cover the rest of the file exactly, as in a file that was cut short.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Nf4Error> {
        let path = path.as_ref();
        let file = open_file(path)?;
        let stamp = Stamp::of(&file.metadata().map_err(Nf4Error::io(path))?);
        // SAFETY: the mapping is read-only and private to this value, which owns it; no reference
        // into it outlives it. That nobody changes the file meanwhile is asked of the caller.
        let map = unsafe { Mmap::map(&file) }.map_err(Nf4Error::io(path))?;
        Self::with_content(path, Content::Mapped { map, file, stamp })
    }

    /// Reads a file into memory and checks its header: as [`open`](Self::open), but whatever
    /// happens to the file after that does no harm.
    ///
    /// # Errors
    /// Those of [`open`](Self::open), but for [`Nf4Error::FileChanged`] later on.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, Nf4Error> {
        let path = path.as_ref();
        let mut bytes = Vec::new();
        let mut file = open_file(path)?;
        file.read_to_end(&mut bytes).map_err(Nf4Error::io(path))?;
        Self::with_content(path, Content::Memory(bytes))
    }

    fn with_content(path: &Path, content: Content) -> Result<Self, Nf4Error> {
        let entries = match read_header(content.bytes()) {
            Ok(entries) => entries,
            Err(message) => {
                check_not_pointer(path, content.bytes())?;
                return Err(Nf4Error::Safetensors {
                    path: path.into(),
                    message,
                });
            }
        };
        Ok(Self {
            path: path.into(),
            content,
            entries,
        })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether the parameter `prefix` is quantized: whether the tensors are there that make a
    /// [format](super#the-tensors-of-one-weight).
    pub fn is_quantized(&self, prefix: &str) -> bool {
        is_quantized(self, prefix)
    }

    /// The quantized parameters, sorted, each by its own name: `X.weight` where the file has
    /// `X.weight_packed`.
    pub fn quantized_weights(&self) -> Vec<&str> {
        quantized_weights(self, || self.keys())
    }

    /// Whether the parameter `prefix` is stored transposed.
    ///
    /// bitsandbytes marks it by storing the codes as `[1, k]` instead of `[k, 1]`, and nothing
    /// else changes: codes, blocks and the shape in `quant_state` are those of the weight before
    /// it was transposed. [`load_quantized`](Self::load_quantized) returns that weight; where this is true,
    /// the parameter is its transpose. With one code byte the two forms are the same, and the
    /// answer is no. The other formats are never transposed.
    ///
    /// # Errors
    /// [`Nf4Error::MissingKey`], or [`Nf4Error::Shape`] if the codes have neither form.
    pub fn is_transposed(&self, prefix: &str) -> Result<bool, Nf4Error> {
        is_transposed(self, prefix)
    }

    /// Reads the quantized parameter `prefix`, bit for bit as it is stored.
    ///
    /// The stored weight may be of any dtype that bitsandbytes allows as `quant_storage`; its
    /// bytes are taken as they are. See [`is_transposed`](Self::is_transposed) for the `[1, k]`
    /// form. Files in NVFP4, MXFP4 and FP8 do not say which dtype a weight had: it counts as bf16;
    /// a [`Checkpoint`](super::Checkpoint) asks `config.json`.
    ///
    /// # Errors
    /// Each names the full key of the tensor at fault:
    /// - [`Nf4Error::MissingKey`] if a tensor is not there
    /// - [`Nf4Error::QuantState`] for a `quant_state` that cannot be understood, is there twice,
    ///   or contradicts the tensors beside it, and what [`QuantState::parse`] returns
    /// - [`Nf4Error::Dtype`], [`Nf4Error::Shape`], [`Nf4Error::Length`] for a tensor of the wrong
    ///   form; the length of the weight itself is in bytes
    /// - [`Nf4Error::Codebook`] for a `quant_map` that is not the table of its 4-bit type
    /// - [`Nf4Error::NonFinite`] for a scale, map entry or offset that is NaN or infinite
    /// - [`Nf4Error::TwoForms`] for a parameter that is there in two formats, or with two kinds of scales
    /// - [`Nf4Error::Blocks`] for a shape that the format does not have, as for rows that are not whole blocks
    /// - [`Nf4Error::Divisor`] for a `weight_global_scale` that nothing can be divided by
    /// - [`Nf4Error::OtherQuantization`] for integers and zero points in the form of compressed-tensors
    ///
    /// [`QuantState::parse`]: super::QuantState::parse
    pub fn load_quantized(&self, prefix: &str) -> Result<BlockTensor, Nf4Error> {
        load_quantized(self, prefix)
    }

    /// Reads a plain float tensor and its shape. It must be stored as `T`: nothing is converted.
    ///
    /// # Errors
    /// [`Nf4Error::MissingKey`], or [`Nf4Error::Dtype`] if it is stored as another type.
    pub fn load_float<T: FloatElement>(&self, key: &str) -> Result<(Vec<T>, Vec<usize>), Nf4Error> {
        load_float(self, key)
    }

    /// Reads the quantized parameter `prefix` to a device, without a copy in host memory beside
    /// the one that is handed to the device.
    ///
    /// The parameter is loaded, not the stored matrix: where
    /// [`is_transposed`](Self::is_transposed) is true, the result is a weight that
    /// [knows it](BlockWeight::is_transposed).
    ///
    /// # Errors
    /// Those of [`load_quantized`](Self::load_quantized), and [`Nf4Error::NotAMatrix`] for a transposed
    /// weight of more than two dimensions.
    pub fn load_weight(&self, prefix: &str, device: &Device) -> Result<BlockWeight, Nf4Error> {
        load_weight(self, prefix, device)
    }

    /// What the quantized parameter `prefix` is, apart from its values: what a module must have
    /// there to load it into.
    ///
    /// # Errors
    /// Those of [`load_weight`](Self::load_weight).
    pub fn weight_form(&self, prefix: &str) -> Result<WeightForm, Nf4Error> {
        find_weight(self, prefix)?.form(prefix)
    }

    /// Reads a plain float tensor to a device: as `dtype`, rounded to nearest, or as it is stored.
    ///
    /// # Errors
    /// [`Nf4Error::MissingKey`], [`Nf4Error::Dtype`] unless it is stored as F16, BF16 or F32,
    /// [`Nf4Error::Rank`] if it does not have `D` dimensions, [`Nf4Error::NonFinite`] for a
    /// finite value that `dtype` cannot hold, [`Nf4Error::DeviceDtype`] if the device has no such
    /// type.
    pub fn load_tensor<const D: usize>(
        &self,
        key: &str,
        dtype: Option<FloatType>,
        device: &Device,
    ) -> Result<Tensor<D>, Nf4Error> {
        load_tensor(self, key, dtype, device)
    }

    /// The dtype and shape of a tensor.
    ///
    /// # Errors
    /// [`Nf4Error::MissingKey`].
    pub fn tensor_info(&self, key: &str) -> Result<TensorInfo<'_>, Nf4Error> {
        Ok(self.stored(key)?.info)
    }

    /// The bytes of a tensor as they are stored, little-endian.
    ///
    /// # Errors
    /// [`Nf4Error::MissingKey`], [`Nf4Error::FileChanged`].
    pub fn tensor_bytes(&self, key: &str) -> Result<&[u8], Nf4Error> {
        Ok(self.stored(key)?.bytes)
    }
}

impl TensorSource for SafetensorsFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn find(&self, key: &str) -> Option<StoredTensor<'_>> {
        let entry = self.entries.get(key)?;
        Some(StoredTensor {
            info: TensorInfo {
                dtype: entry.dtype,
                shape: &entry.shape,
            },
            bytes: self.content.bytes().get(entry.bytes.clone())?,
        })
    }

    fn check_unchanged(&self, _key: &str) -> Result<(), Nf4Error> {
        match &self.content {
            Content::Mapped { file, stamp, .. } => {
                let metadata = file.metadata().map_err(Nf4Error::io(&self.path))?;
                if Stamp::of(&metadata) == *stamp {
                    return Ok(());
                }
                Err(Nf4Error::FileChanged {
                    path: self.path.clone(),
                })
            }
            Content::Memory(_) => Ok(()),
        }
    }
}

/// Opens what is a file; opening a pipe would wait for somebody to write to it.
fn open_file(path: &Path) -> Result<File, Nf4Error> {
    let metadata = fs::metadata(path).map_err(Nf4Error::io(path))?;
    if !metadata.is_file() {
        return Err(Nf4Error::io(path)(io::Error::other("is not a file")));
    }
    File::open(path).map_err(Nf4Error::io(path))
}

/// Reads a file of text, such as JSON. It may not be longer than a header, so that one that
/// claims to be takes no memory.
pub(crate) fn read_text(path: &Path) -> Result<Vec<u8>, Nf4Error> {
    let file = open_file(path)?;
    let len = file.metadata().map_err(Nf4Error::io(path))?.len();
    if len > MAX_HEADER_BYTES as u64 {
        let error = format!("{len} bytes are over {MAX_HEADER_BYTES}");
        return Err(Nf4Error::io(path)(io::Error::other(error)));
    }
    let mut text = Vec::with_capacity(len as usize);
    // Not more than that, even if the file grows meanwhile.
    let mut file = file.take(len);
    file.read_to_end(&mut text).map_err(Nf4Error::io(path))?;
    check_not_pointer(path, &text)?;
    Ok(text)
}

/// Refuses a file that Git LFS has not fetched.
///
/// # Errors
/// [`Nf4Error::GitLfsPointer`], [`Nf4Error::Io`].
pub(crate) fn check_fetched(path: &Path) -> Result<(), Nf4Error> {
    let mut start = Vec::new();
    let file = open_file(path)?;
    file.take(LFS_POINTER.len() as u64)
        .read_to_end(&mut start)
        .map_err(Nf4Error::io(path))?;
    check_not_pointer(path, &start)
}

/// How the file begins that Git LFS leaves in the place of one that it has not fetched.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Refuses the content of such a file.
fn check_not_pointer(path: &Path, content: &[u8]) -> Result<(), Nf4Error> {
    match content.starts_with(LFS_POINTER) {
        false => Ok(()),
        true => Err(Nf4Error::GitLfsPointer { path: path.into() }),
    }
}
