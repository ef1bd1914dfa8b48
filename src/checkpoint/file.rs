//! One safetensors file, memory-mapped.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use memmap2::Mmap;
use safetensors::Dtype;

use super::float::{load_float, load_tensor};
use super::header::{Entry, read_header};
use super::weight::{
    StoredTensor, TensorSource, find_quant_state, find_weight, is_transposed, load_nf4,
    load_weight, quantized_weights,
};
use crate::error::Nf4Error;
use crate::format::{FloatElement, FloatType, Nf4Tensor, WeightForm};
use crate::op::Nf4Weight;

/// A safetensors file, opened for reading.
///
/// The file is memory-mapped and its header checked once; the tensors stay on disk until they are
/// asked for, and each is copied once.
///
/// The file must not be changed or truncated while it is open: a mapped page that no longer
/// exists ends the process.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    entries: BTreeMap<String, Entry>,
}

/// What a file says about one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its shape, row-major.
    pub shape: &'a [usize],
}

impl SafetensorsFile {
    /// Maps a file and checks its header.
    ///
    /// # Errors
    /// [`Nf4Error::Io`] if it cannot be opened or mapped, [`Nf4Error::Safetensors`] if its header
    /// is malformed or names a tensor twice, or if the tensors do not cover the rest of the file exactly, as in a file
    /// that was cut short.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Nf4Error> {
        let path = path.as_ref();
        let io = |error: std::io::Error| Nf4Error::Io {
            path: path.into(),
            message: error.to_string(),
        };
        // Opening a pipe would wait for somebody to write to it.
        if !fs::metadata(path).map_err(io)?.is_file() {
            return Err(io(std::io::Error::other("is not a file")));
        }
        let file = File::open(path).map_err(io)?;
        // SAFETY: the mapping is read-only and private to this value, which owns it; no reference
        // into it outlives it. That nobody changes the file meanwhile is asked of the caller.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let entries = read_header(&map).map_err(|message| Nf4Error::Safetensors {
            path: path.into(),
            message,
        })?;
        Ok(Self {
            path: path.into(),
            map,
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

    /// Whether the parameter `prefix` is quantized: whether it has a `quant_state`.
    pub fn is_quantized(&self, prefix: &str) -> bool {
        find_quant_state(self, prefix).is_ok()
    }

    /// The quantized parameters, sorted.
    pub fn quantized_weights(&self) -> Vec<&str> {
        quantized_weights(self.keys())
    }

    /// Whether the parameter `prefix` is stored transposed.
    ///
    /// bitsandbytes marks it by storing the codes as `[1, k]` instead of `[k, 1]`, and nothing
    /// else changes: codes, blocks and the shape in `quant_state` are those of the weight before
    /// it was transposed. [`load_nf4`](Self::load_nf4) returns that weight; where this is true,
    /// the parameter is its transpose. With one code byte the two forms are the same, and the
    /// answer is no.
    ///
    /// # Errors
    /// [`Nf4Error::MissingKey`], or [`Nf4Error::Shape`] if the codes have neither form.
    pub fn is_transposed(&self, prefix: &str) -> Result<bool, Nf4Error> {
        is_transposed(&self.stored(prefix)?, prefix)
    }

    /// Reads the quantized parameter `prefix`, bit for bit as it is stored.
    ///
    /// The stored weight may be of any dtype that bitsandbytes allows as `quant_storage`; its
    /// bytes are taken as they are. See [`is_transposed`](Self::is_transposed) for the `[1, k]`
    /// form.
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
    ///
    /// [`QuantState::parse`]: super::QuantState::parse
    pub fn load_nf4(&self, prefix: &str) -> Result<Nf4Tensor, Nf4Error> {
        load_nf4(self, prefix)
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
    /// [knows it](Nf4Weight::is_transposed).
    ///
    /// # Errors
    /// Those of [`load_nf4`](Self::load_nf4), and [`Nf4Error::NotAMatrix`] for a transposed
    /// weight of more than two dimensions.
    pub fn load_weight(&self, prefix: &str, device: &Device) -> Result<Nf4Weight, Nf4Error> {
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
    /// [`Nf4Error::Rank`] if it does not have `D` dimensions, [`Nf4Error::DeviceDtype`] if the
    /// device has no such type.
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

    /// The bytes of a tensor, little-endian, in the mapped file.
    ///
    /// # Errors
    /// [`Nf4Error::MissingKey`].
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
            bytes: self.map.get(entry.bytes.clone())?,
        })
    }
}
