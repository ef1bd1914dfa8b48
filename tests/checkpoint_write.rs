//! Writing folders: the bytes of bitsandbytes and transformers, shards, and nothing left behind.

mod golden;

use std::fs;
use std::path::{Path, PathBuf};

use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{
    Checkpoint, CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, Dtype, INDEX_FILE, QuantState,
    SINGLE_FILE,
};
use burn_nf4::format::{BlockSize, FloatType, Nf4Tensor, QuantConfig, QuantType};
use rstest::rstest;
use tempfile::TempDir;

fn temp() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn hf(name: &str) -> PathBuf {
    PathBuf::from("tests/fixtures/hf").join(name).join("model")
}

/// Reads every parameter of a checkpoint and hands it to a writer, in the order of the names.
fn rewrite(source: &Checkpoint, folder: &Path, max_shard_bytes: usize) {
    let mut writer = CheckpointWriter::create(folder, max_shard_bytes).unwrap();
    for key in source.parameters() {
        let info = source.tensor_info(key).unwrap();
        if source.is_quantized(key) {
            let weight = source.load_nf4(key).unwrap();
            let transposed = source.is_transposed(key).unwrap();
            writer
                .write_nf4(key, &weight, info.dtype, transposed)
                .unwrap();
        } else {
            let bytes = source.tensor_bytes(key).unwrap();
            writer
                .write_tensor(key, info.dtype, info.shape, bytes)
                .unwrap();
        }
    }
    writer.finish().unwrap();
}

#[track_caller]
fn assert_same_tensors(a: &Checkpoint, b: &Checkpoint) {
    assert!(a.keys().eq(b.keys()), "other names");
    for key in a.keys() {
        assert_eq!(a.tensor_info(key).unwrap(), b.tensor_info(key).unwrap());
        let (a, b) = (a.tensor_bytes(key).unwrap(), b.tensor_bytes(key).unwrap());
        assert!(a == b, "{key} has other bytes");
    }
}

fn file_names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[rstest]
fn golden_weights_are_written_as_bitsandbytes_did(
    #[files("tests/fixtures/golden/*.safetensors")] path: PathBuf,
) {
    let folder = temp();
    let source = Checkpoint::open(&path).unwrap();
    rewrite(&source, folder.path(), DEFAULT_MAX_SHARD_BYTES);
    assert_same_tensors(&source, &Checkpoint::open(folder.path()).unwrap());
}

#[rstest]
fn folders_are_written_as_transformers_did(
    // `save_pretrained(max_shard_size="120KB")` made the sharded one.
    #[values(("f32", DEFAULT_MAX_SHARD_BYTES), ("bf16", DEFAULT_MAX_SHARD_BYTES), ("f32_sharded", 120_000))]
    case: (&str, usize),
) {
    let (name, max_shard_bytes) = case;
    let folder = temp();
    let source = Checkpoint::open(hf(name)).unwrap();
    rewrite(&source, folder.path(), max_shard_bytes);
    assert_same_tensors(&source, &Checkpoint::open(folder.path()).unwrap());
    for file in file_names(&hf(name)) {
        if file.starts_with("model") {
            let theirs = fs::read(hf(name).join(&file)).unwrap();
            let ours = fs::read(folder.path().join(&file)).unwrap();
            assert!(ours == theirs, "{file} has other bytes");
        }
    }
}
