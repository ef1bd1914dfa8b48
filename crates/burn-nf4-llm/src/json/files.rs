//! Files, read as a whole.

use std::fs;
use std::path::Path;

use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::python_json;
use serde::de::DeserializeOwned;

use crate::error::ModelError;

/// How a file begins that Git LFS has left in the place of one that it has not fetched.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Reads a file.
pub fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    let content = fs::read(path).map_err(ModelError::io(path))?;
    // As a template or a text it would pass for one.
    match content.starts_with(LFS_POINTER) {
        true => Err(Nf4Error::GitLfsPointer { path: path.into() }.into()),
        false => Ok(content),
    }
}

/// Reads a file of JSON, as Python does.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, ModelError> {
    parse_json(&read(path)?, path)
}

/// Reads JSON as Python does; the path is for errors.
pub fn parse_json<T: DeserializeOwned>(text: &[u8], path: &Path) -> Result<T, ModelError> {
    python_json::from_slice(text).map_err(ModelError::json(path))
}
