//! Adapters that PEFT saved for a tiny Llama, each in a folder of its own: `tests/fixtures/peft`.
#![allow(dead_code, reason = "shared by tests, each of which uses a part of it")]

use std::fs;
use std::path::{Path, PathBuf};

use burn_nf4::checkpoint::SafetensorsFile;
use burn_nf4::peft::{ADAPTER_FILE, CONFIG_FILE};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use tempfile::TempDir;

pub const PREFIX: &str = "base_model.model.";

/// A tensor of a file: its key, dtype, shape and bytes.
pub type Entry = (String, Dtype, Vec<usize>, Vec<u8>);

/// The tokens at which the logits were taken.
pub const IDS: [i64; 5] = [1, 2, 3, 4, 5];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft")
}

/// An adapter, and what its model computes.
pub struct Case {
    /// Whether the head of the base model was its embedding.
    pub is_tied: bool,
    /// `adapter_config.json`.
    pub config: Value,
    /// `adapter_model.safetensors`.
    pub tensors: Vec<Entry>,
    /// Of the adapted model at [`IDS`].
    pub logits: Vec<f32>,
}

impl Case {
    pub fn open(name: &str) -> Self {
        let text = fs::read(fixtures().join("cases.json")).expect("it is there");
        let cases: Value = serde_json::from_slice(&text).expect("the script wrote it");
        let file = SafetensorsFile::open(fixtures().join("cases.safetensors")).expect("valid");
        let tensors = entries(&file)
            .into_iter()
            .filter_map(|(key, dtype, shape, bytes)| {
                let key = key.strip_prefix(name)?.strip_prefix('/')?;
                let entry = (format!("{PREFIX}{key}"), dtype, shape, bytes);
                (key != "logits").then_some(entry)
            });
        let logits = file.load_float::<f32>(&format!("{name}/logits"));
        Self {
            is_tied: cases[name]["tied"].as_bool().expect("a flag"),
            config: cases[name]["adapter_config"].clone(),
            tensors: tensors.collect(),
            logits: logits.expect("it is there").0,
        }
    }

    /// The same with other keys.
    pub fn renamed(mut self, rename: impl Fn(&str) -> String) -> Self {
        for (key, ..) in &mut self.tensors {
            *key = rename(key);
        }
        self
    }

    /// The same without the tensors whose keys hold a text.
    pub fn without(mut self, part: &str) -> Self {
        self.tensors.retain(|(key, ..)| !key.contains(part));
        self
    }

    /// The folder of the adapter.
    pub fn folder(&self) -> TempDir {
        let folder = TempDir::new().expect("a folder");
        fs::write(folder.path().join(CONFIG_FILE), self.config.to_string()).expect("a file");
        write(&folder.path().join(ADAPTER_FILE), &self.tensors);
        folder
    }
}

/// The folder of the base model.
pub fn model(is_tied: bool) -> TempDir {
    let source = fixtures().join("model");
    let file = SafetensorsFile::open(source.join("model.safetensors")).expect("valid");
    let tensors: Vec<Entry> = entries(&file)
        .into_iter()
        .filter(|(key, ..)| !(is_tied && key == "lm_head.weight"))
        .collect();
    let config = fs::read(source.join("config.json")).expect("it is there");
    let mut config: Value = serde_json::from_slice(&config).expect("the script wrote it");
    config["tie_word_embeddings"] = is_tied.into();
    let folder = TempDir::new().expect("a folder");
    fs::write(folder.path().join("config.json"), config.to_string()).expect("a file");
    write(&folder.path().join("model.safetensors"), &tensors);
    folder
}

/// The tensors of a file.
pub fn entries(file: &SafetensorsFile) -> Vec<Entry> {
    let entry = |key: &str| {
        let info = file.tensor_info(key).expect("it is there");
        let bytes = file.tensor_bytes(key).expect("it is there").to_vec();
        (key.to_string(), info.dtype, info.shape.to_vec(), bytes)
    };
    file.keys().map(entry).collect()
}

/// Writes a file of tensors.
pub fn write(path: &Path, tensors: &[Entry]) {
    let views = tensors.iter().map(|(key, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).expect("consistent");
        (key.as_str(), view)
    });
    safetensors::serialize_to_file(views, None, path).expect("it can be written");
}
