//! Folders that are broken or lie: an index, its shards, and what a name can lead to. Every one is
//! refused by a typed error that names the file and the key at fault, and none by a panic.
#![cfg(feature = "checkpoint")]

mod golden;
mod stored;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{Checkpoint, INDEX_FILE, QuantState, SINGLE_FILE, SafetensorsFile};
use burn_nf4::format::{BlockTensor, QuantConfig};
use rstest::rstest;
use stored::Tensors;
use tempfile::TempDir;

const SHARDS: [&str; 2] = [
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
];
const PREFIX: &str = "layer.weight";

fn quantized() -> BlockTensor {
    let values: Vec<f32> = (0..20_000).map(|i| (i as f32 * 0.7).sin()).collect();
    BlockTensor::quantize(&values, &[100, 200], QuantConfig::default()).unwrap()
}

/// A weight whose tensors lie in two shards, in turn.
fn sharded() -> [Tensors; 2] {
    let mut shards = [Tensors::new(), Tensors::new()];
    for (i, (key, tensor)) in stored::weight(PREFIX, &quantized()).into_iter().enumerate() {
        shards[i % 2].insert(key, tensor);
    }
    shards[1].insert("norm.weight".into(), stored::floats(&[1.0; 4], &[4]));
    shards
}

fn weight_map(shards: &[Tensors; 2]) -> BTreeMap<String, String> {
    let entries = shards.iter().zip(SHARDS).flat_map(|(shard, name)| {
        let entry = move |key: &String| (key.clone(), name.to_string());
        shard.keys().map(entry)
    });
    entries.collect()
}

fn write_index(folder: &Path, map: &BTreeMap<String, String>) {
    let json = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map});
    fs::write(folder.join(INDEX_FILE), json.to_string()).unwrap();
}

fn write_shards(folder: &Path, shards: &[Tensors; 2]) {
    for (shard, name) in shards.iter().zip(SHARDS) {
        fs::write(folder.join(name), stored::to_bytes(shard)).unwrap();
    }
}

/// A folder that opens.
fn written() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let shards = sharded();
    write_shards(folder.path(), &shards);
    write_index(folder.path(), &weight_map(&shards));
    folder
}

#[track_caller]
fn error(folder: &Path) -> Nf4Error {
    Checkpoint::open(folder).unwrap_err()
}

/// The index is at fault, and the message has some words.
#[track_caller]
fn assert_index(folder: &Path, words: &[&str]) {
    match error(folder) {
        Nf4Error::Index { path, message } => {
            assert_eq!(path, folder.join(INDEX_FILE));
            for words in words {
                assert!(message.contains(words), "{message}");
            }
        }
        other => panic!("{other:?}"),
    }
}

/// A file could not be read, and it is this one.
#[track_caller]
fn assert_io(folder: &Path, name: &str) {
    match error(folder) {
        Nf4Error::Io { path, .. } => assert_eq!(path, folder.join(name)),
        other => panic!("{other:?}"),
    }
}

/// The edits below must be what breaks the folder.
#[test]
fn unedited_folder_loads() {
    let folder = written();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.load_quantized(PREFIX).unwrap(), quantized());
    assert_eq!(checkpoint.parameters(), [PREFIX, "norm.weight"]);
}

#[test]
fn folder_without_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let expected = Nf4Error::NoWeights {
        path: folder.path().into(),
        found: vec![],
        advice: "",
    };
    assert_eq!(error(folder.path()), expected);
    let nowhere = folder.path().join("nowhere");
    assert!(matches!(error(&nowhere), Nf4Error::Io { path, .. } if path == nowhere));
}

#[rstest]
#[case::empty("", "EOF")]
#[case::no_json("weight_map", "expected value")]
#[case::no_map("[]", "expected struct Index")]
#[case::no_weight_map(r#"{"metadata": {}}"#, "missing field `weight_map`")]
#[case::list(r#"{"weight_map": []}"#, "expected a map")]
#[case::number(r#"{"weight_map": {"norm.weight": 1}}"#, "`norm.weight`: invalid type")]
#[case::two_maps(
    r#"{"weight_map": {}, "weight_map": {}}"#,
    "duplicate field `weight_map`"
)]
#[case::twice(
    r#"{"weight_map": {"norm.weight": "a.safetensors", "norm.weight": "b.safetensors"}}"#,
    "`norm.weight` is there twice"
)]
#[case::twice_escaped(
    r#"{"weight_map": {"norm.weight": "a.safetensors", "norm\u002eweight": "b.safetensors"}}"#,
    "`norm.weight` is there twice"
)]
#[case::trailing(r#"{"weight_map": {}} {}"#, "trailing characters")]
#[case::no_shards(r#"{"weight_map": {}}"#, "names no shard")]
#[case::not_utf8(
    "{\"weight_map\": {\n\"\u{fffd}\": Infinity}}",
    "`\u{fffd}`: invalid type"
)]
fn malformed_index(#[case] json: &str, #[case] words: &str) {
    let folder = written();
    fs::write(folder.path().join(INDEX_FILE), json).unwrap();
    assert_index(folder.path(), &[words]);
}

#[test]
fn deeply_nested_index() {
    let folder = written();
    let json = format!(r#"{{"weight_map": {}"#, "[".repeat(1_000_000));
    fs::write(folder.path().join(INDEX_FILE), json).unwrap();
    assert_index(folder.path(), &["expected a map"]);
    let json = format!(r#"{{"other": {}"#, "[".repeat(1_000_000));
    fs::write(folder.path().join(INDEX_FILE), json).unwrap();
    assert_index(folder.path(), &[]);
}

#[rstest]
fn shard_names_that_are_no_names_in_the_folder(
    #[values(
        "../outside.safetensors",
        "..",
        ".",
        "",
        "/etc/passwd",
        "sub/shard.safetensors",
        "./shard.safetensors",
        r"..\outside.safetensors",
        r"C:\shard.safetensors",
        "C:shard.safetensors"
    )]
    name: &str,
) {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("folder");
    fs::create_dir_all(folder.join("sub")).unwrap();
    // They are all there to be found.
    let shard = stored::to_bytes(&sharded()[1]);
    for path in [
        "outside.safetensors",
        "folder/sub/shard.safetensors",
        "folder/shard.safetensors",
    ] {
        fs::write(parent.path().join(path), &shard).unwrap();
    }
    let shards = sharded();
    let map = shards[1].keys().map(|key| (key.clone(), name.to_string()));
    write_index(&folder, &map.collect());
    assert_index(
        &folder,
        &["is not the name of a file", &format!("`{name}`")],
    );
}

#[test]
fn index_that_names_what_is_not_a_shard() {
    let folder = written();
    fs::create_dir(folder.path().join("directory")).unwrap();
    let with = |name: &str| {
        let mut map = weight_map(&sharded());
        map.insert("more.weight".into(), name.into());
        write_index(folder.path(), &map);
    };
    with("directory");
    assert_io(folder.path(), "directory");
    with("nowhere.safetensors");
    assert_io(folder.path(), "nowhere.safetensors");
    with("nul\0.safetensors");
    assert_io(folder.path(), "nul\0.safetensors");
    with(INDEX_FILE);
    let index = folder.path().join(INDEX_FILE);
    assert!(matches!(error(folder.path()), Nf4Error::Safetensors { path, .. } if path == index));
}

/// What shards hold counts for transformers, and not where the index says it lies.
#[test]
fn shards_count_more_than_the_index() {
    let folder = written();
    let map = weight_map(&sharded());
    let absmax = format!("{PREFIX}.absmax");

    let mut too_little = map.clone();
    let home = too_little.remove(&absmax).unwrap();
    let mut moved = map.clone();
    let other = SHARDS.iter().find(|name| **name != home).unwrap();
    moved.insert(absmax.clone(), other.to_string());
    for map in [too_little, moved] {
        write_index(folder.path(), &map);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.load_quantized(PREFIX).unwrap(), quantized());
        assert_eq!(checkpoint.parameters(), [PREFIX, "norm.weight"]);
    }
}

/// transformers begins without such a weight, and warns.
#[test]
fn index_that_names_what_no_shard_holds() {
    let folder = written();
    let mut map = weight_map(&sharded());
    map.insert("more.weight".into(), SHARDS[0].into());
    write_index(folder.path(), &map);
    assert_index(folder.path(), &["`more.weight`, which no shard holds"]);
}

/// transformers takes the last one; which one is meant, nobody knows.
#[test]
fn tensor_in_two_shards() {
    let folder = written();
    let mut shards = sharded();
    let absmax = format!("{PREFIX}.absmax");
    let from = usize::from(shards[1].contains_key(&absmax));
    let again = shards[from][&absmax].clone();
    shards[1 - from].insert(absmax.clone(), again);
    write_shards(folder.path(), &shards);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.load_quantized(PREFIX).unwrap(), quantized());

    let last = shards[1 - from].get_mut(&absmax).unwrap();
    *last.bytes.last_mut().unwrap() ^= 1;
    write_shards(folder.path(), &shards);
    assert_index(folder.path(), &[&absmax, SHARDS[0], SHARDS[1]]);
}

#[cfg(any(feature = "flex", feature = "cube"))]
#[test]
fn part_of_a_weight_that_no_shard_holds() {
    for part in stored::weight(PREFIX, &quantized()).into_keys() {
        let mut shards = sharded();
        for shard in &mut shards {
            shard.remove(&part);
        }
        let folder = tempfile::tempdir().unwrap();
        write_shards(folder.path(), &shards);
        write_index(folder.path(), &weight_map(&shards));
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let expected = Nf4Error::MissingKey {
            path: folder.path().into(),
            key: part,
        };
        assert_eq!(checkpoint.load_quantized(PREFIX).unwrap_err(), expected);
        let device = burn::tensor::Device::default();
        assert_eq!(
            checkpoint.load_weight(PREFIX, &device).unwrap_err(),
            expected
        );
    }
}

#[rstest]
fn truncated_shard(#[values(0, 7, 8, 100, 5_000)] keep: usize) {
    let folder = written();
    let path = folder.path().join(SHARDS[0]);
    let bytes = fs::read(&path).unwrap();
    assert!(keep < bytes.len());
    fs::write(&path, &bytes[..keep]).unwrap();
    match error(folder.path()) {
        Nf4Error::Safetensors { path: at, .. } | Nf4Error::Io { path: at, .. } => {
            assert_eq!(at, path);
        }
        other => panic!("{other:?}"),
    }
}

#[cfg(unix)]
mod links {
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::*;

    /// As in the cache of huggingface_hub.
    #[test]
    fn links_to_files_elsewhere_are_followed() {
        let blobs = written();
        let folder = tempfile::tempdir().unwrap();
        for name in SHARDS.into_iter().chain([INDEX_FILE]) {
            symlink(blobs.path().join(name), folder.path().join(name)).unwrap();
        }
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.load_quantized(PREFIX).unwrap(), quantized());
    }

    fn loop_at(path: PathBuf) {
        let other = path.with_extension("other");
        symlink(&other, &path).unwrap();
        symlink(&path, &other).unwrap();
    }

    #[rstest]
    #[case::index(INDEX_FILE)]
    #[case::shard(SHARDS[1])]
    fn loop_of_links(#[case] name: &str) {
        let folder = written();
        fs::remove_file(folder.path().join(name)).unwrap();
        loop_at(folder.path().join(name));
        assert_io(folder.path(), name);
    }

    #[test]
    fn loop_of_links_for_all_there_is() {
        let folder = tempfile::tempdir().unwrap();
        loop_at(folder.path().join(SINGLE_FILE));
        assert_io(folder.path(), SINGLE_FILE);
        let looping = folder.path().join("folder");
        loop_at(looping.clone());
        assert!(matches!(error(&looping), Nf4Error::Io { path, .. } if path == looping));
    }

    /// As for Python's `isfile`, a link that leads nowhere is no file.
    #[test]
    fn links_that_lead_nowhere() {
        let folder = written();
        let link = |name: &str| symlink(folder.path().join("nowhere"), folder.path().join(name));
        link(SINGLE_FILE).unwrap();
        assert!(Checkpoint::open(folder.path()).is_ok());
        fs::remove_file(folder.path().join(INDEX_FILE)).unwrap();
        assert_io(folder.path(), SINGLE_FILE);
        fs::remove_file(folder.path().join(SINGLE_FILE)).unwrap();
        link(INDEX_FILE).unwrap();
        assert_io(folder.path(), INDEX_FILE);
        stored::write(folder.path(), &sharded()[1]);
        assert!(Checkpoint::open(folder.path()).is_ok());
    }

    /// Opening one would wait for ever.
    #[rstest]
    fn pipe(#[values(INDEX_FILE, SINGLE_FILE)] name: &str) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        assert!(
            Command::new("mkfifo")
                .arg(&path)
                .status()
                .unwrap()
                .success()
        );
        assert_io(folder.path(), name);
    }
}

/// A file of one byte tensor of 4 elements with a given header.
fn header_error(header: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(SINGLE_FILE);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(&[0; 4]);
    fs::write(&path, bytes).unwrap();
    match SafetensorsFile::open(&path) {
        Ok(file) => {
            assert_eq!(file.keys().count(), 1, "opens");
            "opens".into()
        }
        Err(Nf4Error::Safetensors { path: at, message }) => {
            assert_eq!(at, path);
            message
        }
        Err(other) => panic!("{other:?}"),
    }
}

const LINE: &str = r#"{"dtype":"U8","shape":[4],"data_offsets":[0,4]}"#;

#[rstest]
#[case::valid(&format!(r#"{{"a":{LINE}}}"#), "opens")]
#[case::metadata(&format!(r#"{{"__metadata__":{{"format":"pt"}},"a":{LINE}}}"#), "opens")]
#[case::metadata_null(&format!(r#"{{"__metadata__":null,"a":{LINE}}}"#), "opens")]
#[case::metadata_empty(&format!(r#"{{"__metadata__":{{}},"a":{LINE}}}"#), "opens")]
#[case::metadata_list(&format!(r#"{{"__metadata__":[],"a":{LINE}}}"#), "`__metadata__`: invalid")]
#[case::metadata_null_value(
    &format!(r#"{{"__metadata__":{{"format":null}},"a":{LINE}}}"#), "`__metadata__`: `format`: invalid")]
#[case::metadata_null_twice(
    &format!(r#"{{"__metadata__":null,"a":{LINE},"__metadata__":null}}"#),
    "`__metadata__` is there twice")]
#[case::more_fields(
    r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"new":[1,2]}}"#,
    "opens"
)]
#[case::key_twice(&format!(r#"{{"a":{LINE},"a":{LINE}}}"#), "`a` is there twice")]
#[case::key_twice_escaped(&format!(r#"{{"a":{LINE},"\u0061":{LINE}}}"#), "`a` is there twice")]
#[case::empty_key_twice(&format!(r#"{{"":{LINE},"":{LINE}}}"#), "`` is there twice")]
#[case::metadata_twice(
    &format!(r#"{{"__metadata__":{{}},"a":{LINE},"__metadata__":{{}}}}"#),
    "`__metadata__` is there twice")]
#[case::metadata_key_twice(
    &format!(r#"{{"__metadata__":{{"format":"pt","format":"np"}},"a":{LINE}}}"#),
    "`__metadata__`: `format` is there twice")]
#[case::metadata_number(
    &format!(r#"{{"__metadata__":{{"format":1}},"a":{LINE}}}"#), "`__metadata__`: `format`: invalid")]
#[case::field_twice(
    r#"{"a":{"dtype":"U8","shape":[4],"shape":[2,2],"data_offsets":[0,4]}}"#,
    "`a`: duplicate field `shape`"
)]
#[case::field_missing(
    r#"{"a":{"dtype":"U8","data_offsets":[0,4]}}"#,
    "`a`: missing field `shape`"
)]
#[case::dtype(
    r#"{"a":{"dtype":"U9","shape":[4],"data_offsets":[0,4]}}"#,
    "`a`: unknown variant `U9`"
)]
#[case::negative(
    r#"{"a":{"dtype":"U8","shape":[-4],"data_offsets":[0,4]}}"#,
    "`a`: invalid"
)]
#[case::fraction(
    r#"{"a":{"dtype":"U8","shape":[4.0],"data_offsets":[0,4]}}"#,
    "`a`: invalid"
)]
#[case::too_many_dims(
    &format!(r#"{{"a":{{"dtype":"U8","shape":[4{}],"data_offsets":[0,4]}}}}"#, ",1".repeat(64)),
    "`a`: invalid length 65, expected a list of at most 64 dimensions")]
#[case::most_dims(
    &format!(r#"{{"a":{{"dtype":"U8","shape":[4{}],"data_offsets":[0,4]}}}}"#, ",1".repeat(63)),
    "opens")]
#[case::shorter(
    r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,4]}}"#,
    "`a`: U8 of shape [3] does not take the bytes 0..4"
)]
#[case::half_bytes(
    r#"{"a":{"dtype":"F4","shape":[7],"data_offsets":[0,4]}}"#,
    "does not take the bytes"
)]
#[case::backwards(
    r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}"#,
    "does not take the bytes 4..0"
)]
#[case::overflow(
    r#"{"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#,
    "does not take the bytes"
)]
#[case::overflow_to_the_right_size(
    r#"{"a":{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}}"#,
    "does not take the bytes"
)]
#[case::past_the_end(
    r#"{"a":{"dtype":"U8","shape":[5],"data_offsets":[0,5]}}"#,
    "take 5 bytes, but 4 follow the header: the file was cut short"
)]
#[case::not_all(
    r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}"#,
    "take 3 bytes, but 4"
)]
#[case::gap(
    r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[1,4]}}"#,
    "`a` begins at byte 1, the one before ends at 0"
)]
#[case::overlap(
    r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},
        "b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}"#,
    "`b` begins at byte 2, the one before ends at 3"
)]
#[case::near_the_end_of_numbers(
    r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[18446744073709551614,18446744073709551615]}}"#,
    "`a` begins at byte")]
#[case::past_the_end_of_numbers(
    r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,18446744073709551616]}}"#,
    "`a`: invalid"
)]
fn header_lines(#[case] header: &str, #[case] words: &str) {
    let message = header_error(header);
    assert!(message.contains(words), "{message}");
}

#[rstest]
#[case::shape(r#""shape":[64]"#)]
#[case::quant_type(r#""quant_type":"fp4""#)]
#[case::blocksize(r#""blocksize":64"#)]
#[case::dtype(r#""dtype":"float16""#)]
#[case::nested_offset(r#""nested_offset":0.5"#)]
fn quant_state_with_a_field_twice(#[case] again: &str) {
    let json = format!(
        r#"{{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[64],
            "nested_blocksize":256,"nested_dtype":"float32","nested_offset":0.1,{again}}}"#
    );
    let error = QuantState::parse(json.as_bytes(), "key").unwrap_err();
    let field = again.split('"').nth(1).unwrap();
    match error {
        Nf4Error::QuantState { key, message } => {
            assert_eq!(key, "key");
            assert!(
                message.contains(&format!("duplicate field `{field}`")),
                "{message}"
            );
        }
        other => panic!("{other:?}"),
    }
    let unknown =
        r#"{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[64],"x":1,"x":2}"#;
    assert!(QuantState::parse(unknown.as_bytes(), "key").is_ok());
}
