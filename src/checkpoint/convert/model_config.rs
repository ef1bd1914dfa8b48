//! The `config.json` of a folder.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::claim::Claim;
use super::entry::Quantized;
use super::source_folder;
use crate::checkpoint::file::read_text;
use crate::checkpoint::names::CONFIG_FILE;
use crate::checkpoint::python_json;
use crate::checkpoint::resolve::WEIGHTS_ENTRY;
use crate::checkpoint::{Checkpoint, CheckpointWriter};
use crate::error::Nf4Error;
use crate::format::FloatType;

/// Models whose linear layers are transformers' `Conv1D`, with weights `[in, out]`.
const CONV1D_MODELS: [&str; 5] = [
    "gpt2",
    "openai-gpt",
    "imagegpt",
    "decision_transformer",
    "clvp",
];

/// The names of the dtype entry: transformers 5's, and the one before.
const DTYPE_KEYS: [&str; 2] = ["dtype", "torch_dtype"];

const TIED: &str = "tie_word_embeddings";

/// The entries, each as it was read unless it is set here, but for the one that names the file of
/// the weights, which transformers does not save either.
#[derive(Debug)]
pub(crate) struct ModelConfig {
    path: PathBuf,
    entries: Map<String, Value>,
    /// Whether they differ from those of the file.
    changed: bool,
}

impl ModelConfig {
    /// Reads the file of a folder; `None` where there is none.
    ///
    /// # Errors
    /// [`Nf4Error::ModelConfig`] unless it holds a JSON object, [`Nf4Error::Io`].
    pub fn read(source: &Checkpoint) -> Result<Option<Self>, Nf4Error> {
        let Some(folder) = source_folder(source) else {
            return Ok(None);
        };
        let path = folder.join(CONFIG_FILE);
        // A link that leads nowhere is a file that cannot be read.
        if fs::symlink_metadata(&path).is_err() {
            return Ok(None);
        }
        let text = read_text(&path)?;
        match python_json::from_slice::<Map<String, Value>>(&text) {
            Ok(mut entries) => Ok(Some(Self {
                path,
                changed: entries.remove(WEIGHTS_ENTRY).is_some(),
                entries,
            })),
            Err(error) => Err(Nf4Error::ModelConfig {
                path,
                message: error.to_string(),
            }),
        }
    }

    /// The entries of a folder that has no file yet.
    #[cfg(feature = "peft")]
    pub fn from_entries(mut entries: Map<String, Value>) -> Self {
        entries.remove(WEIGHTS_ENTRY);
        Self {
            path: CONFIG_FILE.into(),
            entries,
            changed: true,
        }
    }

    /// # Errors
    /// [`Nf4Error::Config`] for a model that has transposed linear layers.
    pub fn check_layout(&self) -> Result<(), Nf4Error> {
        match self.conv1d_model() {
            None => Ok(()),
            Some(given) => Err(Nf4Error::Config {
                field: "model_type",
                expected: "a model with linear weights [out, in]",
                given: given.into(),
            }),
        }
    }

    /// The type of the model, if its linear layers but for the head are transformers' `Conv1D`.
    pub fn conv1d_model(&self) -> Option<&str> {
        let model_type = self.model_type()?;
        CONV1D_MODELS.contains(&model_type).then_some(model_type)
    }

    /// The type of the model.
    pub fn model_type(&self) -> Option<&str> {
        self.entries.get("model_type")?.as_str()
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The dtype of the weights, of the model itself or of the first part of it that names one.
    pub fn dtype(&self) -> Option<&str> {
        fn named(entries: &Map<String, Value>) -> Option<&str> {
            let mut named = DTYPE_KEYS.iter().filter_map(|key| entries.get(*key));
            named.find_map(Value::as_str)
        }
        let mut parts = self.entries.values().filter_map(Value::as_object);
        named(&self.entries).or_else(|| parts.find_map(named))
    }

    /// Every `quantization_config`, also of the parts of a composed model.
    pub fn claims(&self) -> Vec<Claim> {
        let mut claims = Vec::new();
        collect_claims(&self.entries, "", &mut claims);
        claims
    }

    /// Enters what says that weights are quantized so, and takes out what says that they are otherwise.
    pub fn set_quantized(&mut self, quantized: &Quantized<'_>) {
        self.set_dense();
        self.entries.insert(Claim::FIELD.into(), quantized.entry());
    }

    /// Whether it says that the output head is the embedding, in itself or in a part of a composed
    /// model; `None` where it says nothing.
    pub fn ties_embeddings(&self) -> Option<bool> {
        let flag = |entries: &Map<String, Value>| entries.get(TIED)?.as_bool();
        let mut parts = self.entries.values().filter_map(Value::as_object);
        flag(&self.entries).or_else(|| parts.find_map(flag))
    }

    /// Says whether the output head is the embedding, or has a weight of its own.
    pub fn set_tied(&mut self, is_tied: bool) {
        for_each_part(&mut self.entries, &mut |part| {
            part.entry(TIED).and_modify(|tied| *tied = is_tied.into());
        });
        self.entries.insert(TIED.into(), is_tied.into());
        self.changed = true;
    }

    /// Takes out the quantization, also of the parts of a composed model.
    pub fn set_dense(&mut self) {
        for_each_part(&mut self.entries, &mut |part| {
            part.remove(Claim::FIELD);
        });
        self.changed = true;
    }

    /// Enters the dtype of the weights, also in the parts of a composed model that name one.
    pub fn set_dtype(&mut self, dtype: FloatType) {
        let is_named = DTYPE_KEYS.iter().any(|key| self.entries.contains_key(*key));
        for_each_part(&mut self.entries, &mut |part| replace_dtype(part, dtype));
        if !is_named {
            self.entries
                .insert(DTYPE_KEYS[0].into(), dtype.name().into());
        }
        self.changed = true;
    }

    /// Writes the file of a new folder: as transformers does, indented and with sorted keys, or to the
    /// byte as it was read if nothing was changed.
    ///
    /// # Errors
    /// Those of [`CheckpointWriter::copy_file`].
    pub fn write(&self, writer: &mut CheckpointWriter) -> Result<(), Nf4Error> {
        if !self.changed {
            return writer.copy_file(CONFIG_FILE, &self.path);
        }
        // A map of values always has a text.
        let text = python_json::to_string_pretty(&self.entries).unwrap_or_default() + "\n";
        writer.write_file(CONFIG_FILE, text.as_bytes())
    }
}

fn replace_dtype(entries: &mut Map<String, Value>, dtype: FloatType) {
    for key in DTYPE_KEYS {
        if let Some(entry) = entries.get_mut(key) {
            *entry = dtype.name().into();
        }
    }
}

/// Calls a function with the entries of the model and of each part of it, such as `text_config`.
fn for_each_part(entries: &mut Map<String, Value>, call: &mut impl FnMut(&mut Map<String, Value>)) {
    call(entries);
    for part in entries.values_mut().filter_map(Value::as_object_mut) {
        for_each_part(part, call);
    }
}

fn collect_claims(entries: &Map<String, Value>, part: &str, claims: &mut Vec<Claim>) {
    for (key, value) in entries {
        if key == Claim::FIELD {
            claims.extend(Claim::new(part, value));
        } else if let Some(entries) = value.as_object() {
            let part = if part.is_empty() {
                key.clone()
            } else {
                format!("{part}.{key}")
            };
            collect_claims(entries, &part, claims);
        }
    }
}
