//! The tensors of files, where they lie.

use std::path::Path;

use safetensors::Dtype;

use super::elements::dtype_error;
use crate::error::Nf4Error;
use crate::format::{FloatType, check_finite, stored_floats};

/// What a file says about one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its shape, row-major.
    pub shape: &'a [usize],
}

/// Somewhere that tensors can be looked up by key.
pub(super) trait TensorSource {
    /// The file or folder to name in errors.
    fn path(&self) -> &Path;

    /// The tensor, if it is there.
    fn find(&self, key: &str) -> Option<StoredTensor<'_>>;

    /// [`Nf4Error::FileChanged`] if the file of a tensor is no longer the one that was opened.
    fn check_unchanged(&self, key: &str) -> Result<(), Nf4Error>;

    /// The dtype that weights had whose own tensors do not tell: bf16 unless something says otherwise.
    fn block_dtype(&self) -> Result<FloatType, Nf4Error> {
        Ok(FloatType::BF16)
    }

    /// Checks that nothing says that scales of tiles belong to others than those of 128 by 128.
    fn check_tile(&self) -> Result<(), Nf4Error> {
        Ok(())
    }

    /// The tensor, from an unchanged file, or [`Nf4Error::MissingKey`].
    fn stored(&self, key: &str) -> Result<StoredTensor<'_>, Nf4Error> {
        let stored = self.find(key).ok_or_else(|| self.missing_key(key))?;
        self.check_unchanged(key)?;
        Ok(stored)
    }

    fn missing_key(&self, key: &str) -> Nf4Error {
        Nf4Error::MissingKey {
            path: self.path().into(),
            key: key.into(),
        }
    }
}

/// A tensor of a file. The number of bytes is what dtype and shape ask for.
#[derive(Debug, Clone, Copy)]
pub(super) struct StoredTensor<'a> {
    pub info: TensorInfo<'a>,
    pub bytes: &'a [u8],
}

impl StoredTensor<'_> {
    /// Whether they are equal to the byte.
    pub fn is_same(&self, other: &Self) -> bool {
        self.info == other.info && self.bytes == other.bytes
    }

    pub fn check_dtype(&self, key: &str, allowed: &[Dtype]) -> Result<(), Nf4Error> {
        if allowed.contains(&self.info.dtype) {
            return Ok(());
        }
        Err(dtype_error(key, allowed, self.info.dtype))
    }

    /// Checks that a tensor holds finite f32 values.
    pub fn check_finite_f32(&self, key: &str) -> Result<(), Nf4Error> {
        self.check_dtype(key, &[Dtype::F32])?;
        check_finite(key, stored_floats(self.bytes))
    }
}
