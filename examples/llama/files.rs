//! Files, read as a whole.

use std::fs;
use std::path::Path;

use burn_nf4::checkpoint::python_json;
use serde::de::DeserializeOwned;

use crate::error::ModelError;

/// Reads a file.
pub fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    fs::read(path).map_err(ModelError::io(path))
}

/// Reads a file of JSON, as Python does.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, ModelError> {
    parse_json(&read(path)?, path)
}

/// Reads JSON as Python does; the path is for errors.
pub fn parse_json<T: DeserializeOwned>(text: &[u8], path: &Path) -> Result<T, ModelError> {
    python_json::from_slice(text).map_err(ModelError::json(path))
}
