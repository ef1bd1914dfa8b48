//! The fields of a JSON object, read by name, so that an error says which field it is about.

use std::path::{Path, PathBuf};

use burn_nf4::checkpoint::python_json;
use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::json::files::{parse_json, read};

/// A JSON object of a file.
#[derive(Debug, Clone)]
pub struct Fields {
    path: PathBuf,
    /// The name of the object in the file, and a dot; empty for the file's own.
    prefix: String,
    entries: Map<String, Value>,
}

/// What a field can hold.
pub trait FieldType: Sized {
    /// In words, for errors.
    const NAME: &'static str;

    /// The value as this type; `None` if it is of another.
    fn read(value: &Value) -> Option<Self>;
}

impl FieldType for bool {
    const NAME: &'static str = "true or false";

    fn read(value: &Value) -> Option<Self> {
        value.as_bool()
    }
}

impl FieldType for usize {
    const NAME: &'static str = "a whole number";

    fn read(value: &Value) -> Option<Self> {
        value.as_u64()?.try_into().ok()
    }
}

impl FieldType for u32 {
    const NAME: &'static str = "a token id";

    fn read(value: &Value) -> Option<Self> {
        value.as_u64()?.try_into().ok()
    }
}

impl FieldType for f64 {
    const NAME: &'static str = "a finite number";

    fn read(value: &Value) -> Option<Self> {
        value.as_f64().filter(|number| number.is_finite())
    }
}

impl FieldType for String {
    const NAME: &'static str = "a text";

    fn read(value: &Value) -> Option<Self> {
        value.as_str().map(Self::from)
    }
}

impl FieldType for Vec<String> {
    const NAME: &'static str = "a list of texts";

    fn read(value: &Value) -> Option<Self> {
        value.as_array()?.iter().map(String::read).collect()
    }
}

impl FieldType for Vec<f64> {
    const NAME: &'static str = "a list of finite numbers";

    fn read(value: &Value) -> Option<Self> {
        value.as_array()?.iter().map(f64::read).collect()
    }
}

impl FieldType for Vec<usize> {
    const NAME: &'static str = "a list of whole numbers";

    fn read(value: &Value) -> Option<Self> {
        value.as_array()?.iter().map(usize::read).collect()
    }
}

impl FieldType for Map<String, Value> {
    const NAME: &'static str = "an object";

    fn read(value: &Value) -> Option<Self> {
        value.as_object().cloned()
    }
}

/// A value as it is in the file.
pub fn spelled(value: &Value) -> String {
    python_json::to_string(value).unwrap_or_else(|_| value.to_string())
}

impl Fields {
    /// Reads the object that a file consists of.
    pub fn read(path: &Path) -> Result<Self, ModelError> {
        Self::parse(&read(path)?, path)
    }

    /// As [`read`](Self::read), but without a field where there is no such file.
    pub fn read_or_empty(path: &Path) -> Result<Self, ModelError> {
        match path.exists() {
            true => Self::read(path),
            false => Self::parse(b"{}", path),
        }
    }

    /// The object that a text consists of; the path is for errors.
    pub fn parse(text: &[u8], path: &Path) -> Result<Self, ModelError> {
        Ok(Self {
            path: path.into(),
            prefix: String::new(),
            entries: parse_json(text, path)?,
        })
    }

    /// The fields as they are in the file.
    pub fn into_entries(self) -> Map<String, Value> {
        self.entries
    }

    /// The names of all fields.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The value of a field as it is written, unless it is absent.
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.entries.get(name)
    }

    /// A field that may be absent, but not `null`.
    pub fn get<T: FieldType>(&self, name: &str) -> Result<Option<T>, ModelError> {
        let Some(value) = self.value(name) else {
            return Ok(None);
        };
        match T::read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(self.unsupported(name, spelled(value), T::NAME)),
        }
    }

    /// A field that may be absent or `null`.
    pub fn nullable<T: FieldType>(&self, name: &str) -> Result<Option<T>, ModelError> {
        match self.value(name) {
            Some(Value::Null) => Ok(None),
            _ => self.get(name),
        }
    }

    /// A field that must be there.
    pub fn required<T: FieldType>(&self, name: &str) -> Result<T, ModelError> {
        self.get(name)?
            .ok_or_else(|| self.unsupported(name, "missing", T::NAME))
    }

    /// The fields of an object in a field, if it is neither absent nor `null`.
    pub fn object(&self, name: &str) -> Result<Option<Self>, ModelError> {
        Ok(self.nullable(name)?.map(|entries| self.of(name, entries)))
    }

    /// An object of this file, under a name.
    pub fn of(&self, name: &str, entries: Map<String, Value>) -> Self {
        Self {
            path: self.path.clone(),
            prefix: format!("{}{name}.", self.prefix),
            entries,
        }
    }

    /// The error for a value that is not implemented or makes no sense.
    pub fn unsupported(
        &self,
        name: &str,
        given: impl ToString,
        supported: impl Into<String>,
    ) -> ModelError {
        ModelError::Unsupported {
            path: self.path.clone(),
            field: format!("{}{name}", self.prefix),
            given: given.to_string(),
            supported: supported.into(),
        }
    }
}
