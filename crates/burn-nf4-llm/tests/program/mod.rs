//! Runs of the program on a small model.

#![allow(dead_code, reason = "no test has use for all of it")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

/// What the program says of an error.
pub fn run(arguments: &[&str]) -> Result<(), String> {
    let program = env!("CARGO_BIN_EXE_burn-nf4");
    let output = Command::new(program).args(arguments).output().unwrap();
    match output.status.code() {
        Some(0) => Ok(()),
        Some(2) => Err(String::from_utf8(output.stderr).unwrap()),
        other => panic!("{other:?}: {}", String::from_utf8_lossy(&output.stderr)),
    }
}

pub fn fixture(path: &str) -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fixtures = match path.starts_with("hf/") {
        true => package.join("../../tests/fixtures"),
        false => package.join("tests/fixtures"),
    };
    fixtures.join(path)
}

/// A model with a tokenizer and two texts to train on.
pub fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("hf/f32/model");
    for entry in fs::read_dir(&model).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["max_position_embeddings"] = 16.into();
    fs::write(path, config.to_string()).unwrap();
    fs::copy(
        fixture("tokenizers/bytes.json"),
        folder.path().join("tokenizer.json"),
    )
    .unwrap();
    let config = json!({"eos_token": "</s>"});
    fs::write(
        folder.path().join("tokenizer_config.json"),
        config.to_string(),
    )
    .unwrap();
    fs::write(
        folder.path().join("data.jsonl"),
        "{\"text\": \"abc\"}\n{\"text\": \"abcdef\"}\n",
    )
    .unwrap();
    folder
}

/// Trains on `data.jsonl` of a folder, with its `out` as the output.
pub fn finetune(folder: &Path, further: &str) -> Result<(), String> {
    let arguments = of_finetune(folder, further);
    run(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

fn of_finetune(folder: &Path, further: &str) -> Vec<String> {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_string();
    let fixed = format!("--r 2 --target-modules q_proj {further}");
    [
        "finetune",
        "--model",
        &path(""),
        "--data",
        &path("data.jsonl"),
        "--output",
        &path("out"),
    ]
    .into_iter()
    .chain(fixed.split_whitespace())
    .map(String::from)
    .collect()
}

/// What `finetune` prints.
pub fn output(folder: &Path, further: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_burn-nf4"))
        .args(of_finetune(folder, further))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}
