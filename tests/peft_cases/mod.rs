//! Adapters that PEFT saved for a tiny Llama, each in a folder of its own: `tests/fixtures/peft`.
#![allow(dead_code, reason = "shared by tests, each of which uses a part of it")]

use std::fs;
use std::path::{Path, PathBuf};

use burn_nf4::checkpoint::SafetensorsFile;
use burn_nf4::peft::{ADAPTER_FILE, CONFIG_FILE};
use serde_json::{Map, Value};
use tempfile::TempDir;

use crate::stored::{self, Tensors};

pub const PREFIX: &str = "base_model.model.";

/// The tokens at which the logits were taken.
pub const IDS: [i64; 5] = [1, 2, 3, 4, 5];

/// Of the workspace, whichever of its packages includes this.
fn fixtures() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let roots = [package.into(), package.join("../..")];
    let mut folders = roots
        .map(|root| root.join("tests/fixtures/peft"))
        .into_iter();
    let found = folders.find(|folder| folder.exists());
    found.expect("a folder of the workspace")
}

/// An adapter, and what its model computes.
pub struct Case {
    /// Whether the head of the base model was its embedding.
    pub is_tied: bool,
    /// `adapter_config.json`.
    pub config: Value,
    /// `adapter_model.safetensors`.
    pub tensors: Tensors,
    /// Of the adapted model at [`IDS`].
    pub logits: Vec<f32>,
}

/// `cases.json`: whether the base model is tied and the settings, by the names of the cases.
fn cases() -> Map<String, Value> {
    let text = fs::read(fixtures().join("cases.json")).expect("it is there");
    serde_json::from_slice(&text).expect("the script wrote it")
}

/// The names of all cases.
pub fn names() -> Vec<String> {
    let names: Vec<String> = cases().into_iter().map(|(name, _)| name).collect();
    assert!(names.len() > 20, "{names:?}");
    names
}

impl Case {
    pub fn open(name: &str) -> Self {
        let cases = cases();
        let file = SafetensorsFile::open(fixtures().join("cases.safetensors")).expect("valid");
        let tensors = stored::read(&file).into_iter().filter_map(|(key, tensor)| {
            let key = key.strip_prefix(name)?.strip_prefix('/')?;
            (key != "logits").then(|| (format!("{PREFIX}{key}"), tensor))
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
        let renamed = self.tensors.into_iter();
        self.tensors = renamed
            .map(|(key, tensor)| (rename(&key), tensor))
            .collect();
        self
    }

    /// The same without the tensors whose keys hold a text.
    pub fn without(mut self, part: &str) -> Self {
        self.tensors.retain(|key, _| !key.contains(part));
        self
    }

    /// The folder of the adapter.
    pub fn folder(&self) -> TempDir {
        let folder = TempDir::new().expect("a folder");
        fs::write(folder.path().join(CONFIG_FILE), self.config.to_string()).expect("a file");
        let tensors = stored::to_bytes(&self.tensors);
        fs::write(folder.path().join(ADAPTER_FILE), tensors).expect("a file");
        folder
    }
}

/// The folder of the base model.
pub fn model(is_tied: bool) -> TempDir {
    let source = fixtures().join("model");
    let file = SafetensorsFile::open(source.join("model.safetensors")).expect("valid");
    let mut tensors = stored::read(&file);
    if is_tied {
        tensors.remove("lm_head.weight");
    }
    let mut config = stored::config_of(&source);
    config["tie_word_embeddings"] = is_tied.into();
    let folder = TempDir::new().expect("a folder");
    fs::write(folder.path().join("config.json"), config.to_string()).expect("a file");
    stored::write(folder.path(), &tensors);
    folder
}
