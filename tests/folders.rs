//! Which files of a folder are read, as transformers 5.24 decides it, and what is said of those
//! that are not.
#![cfg(feature = "checkpoint")]

mod stored;

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{Checkpoint, CheckpointStore, INDEX_FILE, SINGLE_FILE, SafetensorsFile};
use rstest::rstest;
use serde_json::json;
use stored::Tensors;
use tempfile::TempDir;

const SHARD: &str = "model-00001-of-00001.safetensors";

fn temp() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// A file of one tensor that says where it comes from.
fn write_weights(path: &Path) {
    let name = path.file_name().unwrap().to_str().unwrap();
    let tensors = Tensors::from([(name.to_string(), stored::floats(&[1.0], &[1]))]);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, stored::to_bytes(&tensors)).unwrap();
}

fn write_index(path: &Path) {
    let index = json!({"metadata": {}, "weight_map": {SHARD: SHARD}});
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, index.to_string()).unwrap();
}

/// A folder of these files.
fn folder(names: &[&str]) -> TempDir {
    let folder = temp();
    for name in names {
        let path = folder.path().join(name);
        match name {
            name if name.ends_with("index.json") => write_index(&path),
            name if name.ends_with(".safetensors") => write_weights(&path),
            name if name.ends_with('/') => fs::create_dir(&path).unwrap(),
            _ => fs::write(&path, name).unwrap(),
        }
    }
    folder
}

/// The files come in the order in which transformers looks for them.
#[rstest]
#[case::single(&[SINGLE_FILE, SHARD, INDEX_FILE, "pytorch_model.bin"], SINGLE_FILE)]
#[case::index(&[SHARD, INDEX_FILE, "pytorch_model.bin", "model.fp16.safetensors"], SHARD)]
#[case::folder_of_the_name(&["model.safetensors/", SHARD, INDEX_FILE], SHARD)]
#[case::consolidated(&["consolidated.safetensors", SINGLE_FILE], SINGLE_FILE)]
#[case::adapter(&["adapter_model.safetensors", SINGLE_FILE], SINGLE_FILE)]
fn the_file_that_transformers_takes_is_read(#[case] names: &[&str], #[case] read: &str) {
    let folder = folder(names);
    for checkpoint in [
        Checkpoint::open(folder.path()),
        Checkpoint::read(folder.path()),
    ] {
        assert!(checkpoint.unwrap().keys().eq([read]));
    }
}

/// `transformers_weights` comes before everything else.
#[rstest]
#[case::file("other.safetensors", "other.safetensors")]
#[case::file_in_a_folder("sub/other.safetensors", "other.safetensors")]
#[case::index("other.safetensors.index.json", SHARD)]
fn the_file_that_the_config_names_is_read(#[case] named: &str, #[case] read: &str) {
    let folder = folder(&[SINGLE_FILE, SHARD, named]);
    let config = json!({"transformers_weights": named, "time_step_limit": [0.0, 1]});
    let config = config.to_string().replace("0.0", "Infinity");
    fs::write(folder.path().join("config.json"), config).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert!(checkpoint.keys().eq([read]));
}

#[rstest]
fn a_config_that_names_no_file_of_the_folder_is_refused(
    #[values(
        "../other.safetensors",
        "/other.safetensors",
        "pytorch_model.bin",
        "config.json",
        ""
    )]
    named: &str,
) {
    let folder = folder(&[SINGLE_FILE, "pytorch_model.bin"]);
    write_weights(&folder.path().join("other.safetensors"));
    let path = folder.path().join("config.json");
    fs::write(&path, json!({"transformers_weights": named}).to_string()).unwrap();
    match Checkpoint::open(folder.path()).unwrap_err() {
        Nf4Error::ModelConfig { path: at, message } => {
            assert_eq!(at, path);
            assert!(message.contains(&format!("`{named}`")), "{message}");
        }
        other => panic!("{other:?}"),
    }
}

/// The settings of the model are read by what needs them, and not on opening.
#[rstest]
fn other_configs_do_not_matter_for_opening(
    #[values("{}", r#"{"transformers_weights": null}"#, "[1", "[]", "")] config: &str,
) {
    let folder = folder(&[SINGLE_FILE]);
    fs::write(folder.path().join("config.json"), config).unwrap();
    assert!(Checkpoint::open(folder.path()).is_ok());
}

#[rstest]
#[case::pickled(&["pytorch_model.bin", "training_args.bin"], &["pytorch_model.bin"], "pickled")]
#[case::pickled_shards(
    &["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"],
    &["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], "pickled")]
#[case::original(&["consolidated.00.pth", "params.json"], &["consolidated.00.pth"], "pickled")]
#[case::variant(&["model.fp16.safetensors", "pytorch_model.bin"], &["model.fp16.safetensors"], "variant")]
#[case::variant_in_shards(
    &["model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json"],
    &["model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json"], "variant")]
#[case::consolidated(&["consolidated.safetensors", "config.json"], &["consolidated.safetensors"], "other names")]
#[case::shards_without_index(&[SHARD, "model.safetensors.index.json.txt"], &[SHARD], "index of the shards is missing")]
#[case::adapter(&["adapter_model.safetensors", "adapter_config.json"], &["adapter_model.safetensors"], "adapter")]
#[case::adapter_pickled(&["adapter_model.bin"], &["adapter_model.bin"], "adapter")]
#[case::other_name(&["weights.safetensors"], &["weights.safetensors"], "path of the file")]
#[case::gguf(&["model-q4_k_m.gguf"], &["model-q4_k_m.gguf"], "only safetensors is")]
#[case::other_frameworks(&["flax_model.msgpack", "tf_model.h5"], &["flax_model.msgpack", "tf_model.h5"], "only safetensors is")]
#[case::distributed(
    &["shard-00001-model-00001-of-00001.safetensors", SINGLE_FILE],
    &["shard-00001-model-00001-of-00001.safetensors"], "distributed checkpoint")]
#[case::nothing(&["tokenizer.json", "optimizer.pt"], &[], "")]
fn weights_in_other_forms_are_named(
    #[case] names: &[&str],
    #[case] expected: &[&str],
    #[case] words: &str,
) {
    let folder = folder(names);
    let error = Checkpoint::open(folder.path()).unwrap_err();
    let text = error.to_string();
    match error {
        Nf4Error::NoWeights { path, found, .. } => {
            assert_eq!(path, folder.path());
            assert_eq!(found, expected);
        }
        other => panic!("{other:?}"),
    }
    assert!(text.contains(words), "{text}");
    assert!(
        expected.first().is_none_or(|name| text.contains(name)),
        "{text}"
    );
}

/// Where it is given by its path, a file may have any name.
#[rstest]
fn a_file_is_read_by_its_path(
    #[values("consolidated.safetensors", "model.fp16.safetensors", "weights")] name: &str,
) {
    let folder = temp();
    let path = folder.path().join(name);
    write_weights(&path);
    assert!(Checkpoint::open(&path).unwrap().keys().eq([name]));
}

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\n\
    oid sha256:4665a5ea423c2713d436b5ee50593a9640e0018c1550b5a0002f74190d6caea8\n\
    size 5702746405\n";

#[rstest]
#[case::single(&[], SINGLE_FILE)]
#[case::shard(&[INDEX_FILE], SHARD)]
#[case::index(&[SHARD], INDEX_FILE)]
#[case::config(&[SINGLE_FILE], "config.json")]
fn a_git_lfs_pointer_is_named(#[case] names: &[&str], #[case] pointer: &str) {
    let folder = folder(names);
    let path = folder.path().join(pointer);
    fs::write(&path, POINTER).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap_err();
    assert_eq!(error, Nf4Error::GitLfsPointer { path });
    assert!(error.to_string().contains("git lfs pull"), "{error}");
}

/// What is no safetensors file often tells what it is.
#[rstest]
#[case::empty(b"", "0 bytes are too few")]
#[case::cut_in_the_header(
    b"\x10\0\0\0\0\0\0\0{",
    "a header of 16 bytes does not fit a file of 9"
)]
#[case::zip(b"PK\x03\x04\0\0\x08\x08", "zip archive, as PyTorch")]
#[case::pickle(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46", "pickled")]
#[case::gguf(b"GGUF\x03\0\0\0", "GGUF")]
#[case::web_page(b"<!DOCTYPE html>", "text `<!DOCTYP`")]
#[case::json(b"{\"a\": 1, \"b\": 2}", "text `{\"a\": 1,`")]
#[case::noise(
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    "18446744073709551615 bytes is over"
)]
fn other_files_are_told_apart(#[case] bytes: &[u8], #[case] words: &str) {
    let folder = temp();
    let path = folder.path().join(SINGLE_FILE);
    fs::write(&path, bytes).unwrap();
    let read = SafetensorsFile::read(&path).unwrap_err();
    assert!(read.to_string().contains(words), "{read}");
    if !bytes.is_empty() {
        // Some systems do not map an empty file.
        assert_eq!(SafetensorsFile::open(&path).unwrap_err(), read);
    }
}

/// As happens when a file is downloaded again in its place, while it is open.
#[rstest]
#[case::cut(|file: &File| file.set_len(9))]
#[case::extended(|file: &File| file.set_len(1 << 16))]
#[case::rewritten(|mut file: &File| file.write_all(&[0]))]
fn a_file_that_changed_is_not_read_any_more(#[case] change: fn(&File) -> io::Result<()>) {
    let folder = folder(&[SINGLE_FILE]);
    let path = folder.path().join(SINGLE_FILE);
    // Long ago: the clock of a file system may be too slow to tell two writes apart.
    let long_ago = std::time::SystemTime::UNIX_EPOCH;
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_modified(long_ago).unwrap();

    let mapped = Checkpoint::open(folder.path()).unwrap();
    let read = Checkpoint::read(folder.path()).unwrap();
    assert!(mapped.tensor_bytes(SINGLE_FILE).is_ok());
    change(&file).unwrap();
    assert_eq!(
        mapped.tensor_bytes(SINGLE_FILE),
        Err(Nf4Error::FileChanged { path })
    );
    assert!(mapped.load_float::<f32>(SINGLE_FILE).is_err());
    assert_eq!(read.load_float::<f32>(SINGLE_FILE).unwrap().0, [1.0]);
}

/// What takes the name of an open file is another file.
#[test]
fn a_file_that_was_replaced_is_read_on() {
    let folder = folder(&[SINGLE_FILE]);
    let path = folder.path().join(SINGLE_FILE);
    let open = SafetensorsFile::open(&path).unwrap();
    let new = folder.path().join("new");
    fs::write(&new, POINTER).unwrap();
    fs::rename(&new, &path).unwrap();
    assert_eq!(open.load_float::<f32>(SINGLE_FILE).unwrap().0, [1.0]);
}

/// The error of the operating system is there for those who want to look at it.
#[rstest]
fn an_io_error_is_the_source(#[values("nowhere", ".")] name: &str) {
    let folder = temp();
    let path = folder.path().join(name);
    let error = SafetensorsFile::open(&path).unwrap_err();
    let source = error
        .source()
        .and_then(|source| source.downcast_ref::<io::Error>());
    let kind = match name {
        "nowhere" => io::ErrorKind::NotFound,
        _ => io::ErrorKind::Other,
    };
    assert_eq!(source.map(io::Error::kind), Some(kind));
    assert_eq!(error, error.clone());
    let other = CheckpointStore::open(folder.path().join("elsewhere")).unwrap_err();
    assert_ne!(error, other);
}
