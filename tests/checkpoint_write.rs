//! Writing folders: the bytes of bitsandbytes and transformers, shards, and nothing left behind.
#![cfg(feature = "peft")]

mod golden;
mod stored;

use std::fs;
use std::path::{Path, PathBuf};

use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{
    Checkpoint, CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, Dtype, INDEX_FILE, QuantState,
    SINGLE_FILE,
};
use burn_nf4::format::{BlockSize, BlockTensor, FloatType, QuantConfig, QuantType};
use rstest::rstest;
use stored::file_names;
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
            let weight = source.load_quantized(key).unwrap();
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

/// 300 weights in 150 bytes of codes, flat scales.
fn weight() -> BlockTensor {
    let values: Vec<f32> = (0..300).map(|i| (i as f32 * 0.37).sin()).collect();
    BlockTensor::quantize(&values, &[10, 30], QuantConfig::flat()).unwrap()
}

#[rstest]
fn a_weight_is_read_back_whatever_its_storage(
    #[values(Dtype::U8, Dtype::BF16, Dtype::F16)] storage: Dtype,
    #[values(false, true)] transposed: bool,
    #[values(QuantType::Nf4, QuantType::Fp4)] quant_type: QuantType,
    #[values(None, Some(BlockSize::B256))] nested_block_size: Option<BlockSize>,
) {
    let config = QuantConfig {
        quant_type,
        nested_block_size,
        ..QuantConfig::default()
    };
    let values: Vec<f32> = (0..300).map(|i| (i as f32 * 0.37).sin()).collect();
    let weight = BlockTensor::quantize(&values, &[10, 30], config).unwrap();
    let folder = temp();
    let mut writer = CheckpointWriter::create(folder.path(), DEFAULT_MAX_SHARD_BYTES).unwrap();
    writer.write_nf4("w", &weight, storage, transposed).unwrap();
    writer.finish().unwrap();

    let read = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(read.load_quantized("w").unwrap(), weight);
    assert_eq!(read.is_transposed("w").unwrap(), transposed);
    assert_eq!(read.tensor_info("w").unwrap().dtype, storage);
}

#[rstest]
// 150 bytes of codes are no whole number of f32, and bitsandbytes has no such storage as I32.
#[case(Dtype::F32)]
#[case(Dtype::I32)]
fn codes_do_not_go_into_a_storage_they_do_not_fill(#[case] storage: Dtype) {
    let folder = temp();
    let mut writer = CheckpointWriter::create(folder.path(), DEFAULT_MAX_SHARD_BYTES).unwrap();
    let error = writer.write_nf4("w", &weight(), storage, false);
    assert!(
        matches!(&error, Err(Nf4Error::Dtype { tensor, .. }) if tensor == "w"),
        "{error:?}"
    );
}

#[test]
fn a_copied_parameter_keeps_every_tensor() {
    let folder = temp();
    let source = Checkpoint::open(hf("f32")).unwrap();
    let mut writer = CheckpointWriter::create(folder.path(), DEFAULT_MAX_SHARD_BYTES).unwrap();
    for key in source.parameters() {
        writer.copy(&source, key).unwrap();
    }
    writer.finish().unwrap();
    let ours = fs::read(folder.path().join(SINGLE_FILE)).unwrap();
    assert!(ours == fs::read(hf("f32").join(SINGLE_FILE)).unwrap());
}

/// What the state of a weight says survives the text.
#[test]
fn a_quant_state_is_read_back() {
    let source = Checkpoint::open(hf("bf16")).unwrap();
    for prefix in source.quantized_weights() {
        let state = QuantState::of(&source.load_quantized(prefix).unwrap());
        assert_eq!(state.dtype, FloatType::BF16);
        assert_eq!(
            QuantState::parse(state.to_json().as_bytes(), prefix).unwrap(),
            state
        );
    }
}

/// Tensors of these sizes in bytes, into shards of 100.
fn shards_of(sizes: &[usize]) -> Vec<Vec<usize>> {
    let folder = temp();
    let mut writer = CheckpointWriter::create(folder.path(), 100).unwrap();
    for (index, &size) in sizes.iter().enumerate() {
        let bytes = vec![index as u8; size];
        let key = format!("t{index:02}");
        writer
            .write_tensor(&key, Dtype::U8, &[size], &bytes)
            .unwrap();
    }
    let written = writer.finish().unwrap();
    assert_eq!(written.tensors, sizes.len());
    assert_eq!(written.size_bytes, sizes.iter().sum::<usize>());

    let read = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(read.keys().count(), sizes.len());
    for (index, key) in read.keys().enumerate() {
        assert_eq!(
            read.tensor_bytes(key).unwrap(),
            vec![index as u8; sizes[index]]
        );
    }
    assert_eq!(
        folder.path().join(INDEX_FILE).exists(),
        written.files.len() > 1
    );
    written
        .files
        .iter()
        .map(|path| {
            let file = Checkpoint::open(path).unwrap();
            let sizes = file.keys().map(|key| file.tensor_bytes(key).unwrap().len());
            sizes.collect()
        })
        .collect()
}

#[rstest]
#[case::fits(&[60, 40], vec![vec![60, 40]])]
#[case::one_byte_too_many(&[60, 41], vec![vec![60], vec![41]])]
#[case::exactly_full_then_more(&[100, 1], vec![vec![100], vec![1]])]
#[case::the_order_is_kept(&[60, 60, 20, 60, 20, 20], vec![vec![60], vec![60, 20], vec![60, 20, 20]])]
#[case::larger_than_a_shard(&[101], vec![vec![101]])]
// As in huggingface_hub: the large one goes out first, and the open shard stays open.
#[case::larger_between_others(&[30, 200, 30], vec![vec![200], vec![30, 30]])]
#[case::empty_tensors(&[0, 0], vec![vec![0, 0]])]
#[case::nothing(&[], vec![vec![]])]
fn tensors_fill_shards_in_order(#[case] sizes: &[usize], #[case] shards: Vec<Vec<usize>>) {
    assert_eq!(shards_of(sizes), shards);
}

#[test]
fn the_tensors_of_a_quantized_weight_stay_together() {
    let folder = temp();
    let weight = weight();
    // Room for the codes of the second weight, but not for its scales.
    let mut writer = CheckpointWriter::create(folder.path(), 600).unwrap();
    for prefix in ["a.weight", "b.weight"] {
        writer.write_nf4(prefix, &weight, Dtype::U8, false).unwrap();
    }
    let written = writer.finish().unwrap();
    assert_eq!(written.files.len(), 2);
    for (path, prefix) in written.files.iter().zip(["a.weight", "b.weight"]) {
        let shard = Checkpoint::open(path).unwrap();
        assert_eq!(shard.parameters(), [prefix]);
        assert_eq!(shard.load_quantized(prefix).unwrap(), weight);
    }
}

#[test]
fn any_dtype_is_written_as_it_is() {
    let folder = temp();
    let tensors: [(&str, Dtype, Vec<usize>, usize); 5] = [
        ("ids", Dtype::I64, vec![3], 24),
        ("mask", Dtype::BOOL, vec![2, 2], 4),
        ("wide", Dtype::F64, vec![2], 16),
        ("fp8", Dtype::F8_E4M3, vec![5], 5),
        ("scalar", Dtype::F32, vec![], 4),
    ];
    let mut writer = CheckpointWriter::create(folder.path(), DEFAULT_MAX_SHARD_BYTES).unwrap();
    for (key, dtype, shape, bytes) in &tensors {
        let bytes: Vec<u8> = (0..*bytes as u8).collect();
        writer.write_tensor(key, *dtype, shape, &bytes).unwrap();
    }
    writer.finish().unwrap();
    let read = Checkpoint::open(folder.path()).unwrap();
    for (key, dtype, shape, bytes) in &tensors {
        let info = read.tensor_info(key).unwrap();
        assert_eq!((info.dtype, info.shape), (*dtype, shape.as_slice()));
        let expected: Vec<u8> = (0..*bytes as u8).collect();
        assert_eq!(read.tensor_bytes(key).unwrap(), expected);
    }
}

#[test]
fn wrong_lengths_and_taken_names_are_refused_and_change_nothing() {
    let folder = temp();
    let mut writer = CheckpointWriter::create(folder.path(), DEFAULT_MAX_SHARD_BYTES).unwrap();
    writer.write_tensor("a", Dtype::F32, &[1], &[0; 4]).unwrap();
    let short = writer.write_tensor("b", Dtype::F32, &[2], &[0; 4]);
    assert_eq!(
        short,
        Err(Nf4Error::Length {
            tensor: "b".into(),
            expected: 8,
            given: 4
        })
    );
    let overflowing = writer.write_tensor("b", Dtype::F32, &[usize::MAX, 2], &[]);
    assert!(matches!(overflowing, Err(Nf4Error::ElementCount { .. })));
    for taken in ["a", "__metadata__"] {
        let error = writer.write_tensor(taken, Dtype::F32, &[1], &[1; 4]);
        assert!(matches!(&error, Err(Nf4Error::NameTaken { name, .. }) if name == taken));
    }
    // One of the tensors of `x` is there already.
    writer
        .write_tensor("x.absmax", Dtype::F32, &[1], &[0; 4])
        .unwrap();
    let error = writer.write_nf4("x", &weight(), Dtype::U8, false);
    assert!(matches!(&error, Err(Nf4Error::NameTaken { name, .. }) if name == "x.absmax"));
    writer.finish().unwrap();
    let read = Checkpoint::open(folder.path()).unwrap();
    assert!(read.keys().eq(["a", "x.absmax"]));
    assert_eq!(read.tensor_bytes("a").unwrap(), [0; 4]);
}

#[rstest]
#[case("../config.json")]
#[case("/config.json")]
#[case("")]
#[case(".")]
#[case(SINGLE_FILE)]
#[case(INDEX_FILE)]
#[case("model-00001-of-00002.safetensors")]
fn other_files_stay_inside_and_off_the_weights(#[case] name: &str) {
    let parent = temp();
    let mut writer =
        CheckpointWriter::create(parent.path().join("out"), DEFAULT_MAX_SHARD_BYTES).unwrap();
    let error = writer.write_file(name, b"{}");
    assert!(
        matches!(&error, Err(Nf4Error::NameTaken { .. })),
        "{error:?}"
    );
    drop(writer);
    assert_eq!(file_names(parent.path()), [""; 0]);
}

#[test]
fn other_files_are_written_once_and_into_folders() {
    let folder = temp();
    let mut writer = CheckpointWriter::create(folder.path(), DEFAULT_MAX_SHARD_BYTES).unwrap();
    writer.write_file("config.json", b"{}").unwrap();
    writer.write_file("templates/a.jinja", b"a").unwrap();
    assert!(writer.write_file("config.json", b"[]").is_err());
    writer.finish().unwrap();
    let names = ["config.json", SINGLE_FILE, "templates"];
    assert_eq!(file_names(folder.path()), names);
    assert_eq!(fs::read(folder.path().join("config.json")).unwrap(), b"{}");
    let template = folder.path().join("templates/a.jinja");
    assert_eq!(fs::read(template).unwrap(), b"a");
}

/// Also while shards are written: nothing has a final name before the end.
#[test]
fn a_dropped_writer_leaves_nothing() {
    let parent = temp();
    let folder = parent.path().join("new");
    let mut writer = CheckpointWriter::create(&folder, 100).unwrap();
    for key in ["a", "b", "c"] {
        writer
            .write_tensor(key, Dtype::U8, &[80], &[1; 80])
            .unwrap();
    }
    writer.write_file("config.json", b"{}").unwrap();
    let visible = |name: &String| !name.starts_with('.');
    assert_eq!(file_names(&folder).into_iter().filter(visible).count(), 0);
    drop(writer);
    assert!(!folder.exists());
}

/// The name of one of the files is taken by a folder, so that the last step fails half-way.
#[test]
fn a_failed_last_step_takes_back_what_it_put_in_place() {
    let parent = temp();
    let folder = parent.path().join("new");
    let mut writer = CheckpointWriter::create(&folder, 100).unwrap();
    for key in ["a", "b"] {
        writer
            .write_tensor(key, Dtype::U8, &[80], &[1; 80])
            .unwrap();
    }
    let obstacle = folder.join("model-00002-of-00002.safetensors");
    fs::create_dir(&obstacle).unwrap();
    let error = writer.finish();
    assert!(
        matches!(&error, Err(Nf4Error::Io { path, .. }) if *path == obstacle),
        "{error:?}"
    );
    let left = ["model-00002-of-00002.safetensors"];
    assert_eq!(file_names(&folder), left);
}

#[test]
fn a_folder_that_is_not_empty_is_refused_and_left_alone() {
    let folder = temp();
    fs::write(folder.path().join("notes.txt"), "mine").unwrap();
    let error = CheckpointWriter::create(folder.path(), DEFAULT_MAX_SHARD_BYTES).err();
    assert_eq!(
        error,
        Some(Nf4Error::FolderNotEmpty {
            path: folder.path().into()
        })
    );
    assert_eq!(file_names(folder.path()), ["notes.txt"]);
}

#[test]
fn a_file_in_the_place_of_the_folder_is_refused_and_left_alone() {
    let folder = temp();
    let path = folder.path().join("file");
    fs::write(&path, "mine").unwrap();
    let error = CheckpointWriter::create(&path, DEFAULT_MAX_SHARD_BYTES).err();
    assert!(matches!(error, Some(Nf4Error::Io { .. })), "{error:?}");
    assert_eq!(fs::read(path).unwrap(), b"mine");
}

/// An index that stayed would hide the new file, old shards would be dead weight.
#[test]
fn overwriting_replaces_the_weights_and_keeps_other_files() {
    let folder = temp();
    let write = |max_shard_bytes, value: u8| {
        let mut writer = CheckpointWriter::overwrite(folder.path(), max_shard_bytes).unwrap();
        for key in ["a", "b"] {
            writer
                .write_tensor(key, Dtype::U8, &[80], &[value; 80])
                .unwrap();
        }
        writer.write_file("config.json", &[b'0' + value]).unwrap();
        writer
    };
    fs::write(folder.path().join("notes.txt"), "mine").unwrap();
    write(100, 1).finish().unwrap();
    // Given up: what was there stays.
    drop(write(1000, 2));
    let shards = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX_FILE,
        "notes.txt",
    ];
    assert_eq!(file_names(folder.path()), shards);
    let open = || Checkpoint::open(folder.path()).unwrap();
    assert_eq!(open().tensor_bytes("b").unwrap(), [1; 80]);

    write(1000, 3).finish().unwrap();
    assert_eq!(
        file_names(folder.path()),
        ["config.json", SINGLE_FILE, "notes.txt"]
    );
    assert_eq!(open().tensor_bytes("b").unwrap(), [3; 80]);
    assert_eq!(fs::read(folder.path().join("config.json")).unwrap(), b"3");
}

/// Temporary files are readable by their owner only; a model is for everyone whom the umask lets.
#[cfg(unix)]
#[test]
fn files_get_the_usual_permissions() {
    use std::os::unix::fs::PermissionsExt;
    let folder = temp();
    let usual = folder.path().join("usual");
    fs::write(&usual, "").unwrap();
    let mut writer = CheckpointWriter::overwrite(folder.path(), DEFAULT_MAX_SHARD_BYTES).unwrap();
    writer.write_tensor("a", Dtype::U8, &[1], &[1]).unwrap();
    let written = writer.finish().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&written.files[0]), mode(&usual));
}

/// A disk that is full and has room again, which a limit on the size of files stands for: it is
/// set in a process of its own, which runs this test.
#[cfg(unix)]
mod full_disk {
    use std::io::ErrorKind;
    use std::process::Command;

    use burn_nf4::peft::{Adapter, DenseTensor, LoraConfig, LoraModule, TargetModules};

    use super::*;

    const CHILD: &str = "NF4_FULL_DISK";

    #[test]
    fn a_writer_that_failed_stays_failed() {
        if std::env::var_os(CHILD).is_some() {
            for max_shard_bytes in [100, DEFAULT_MAX_SHARD_BYTES] {
                large_tensor(max_shard_bytes);
                large_file(max_shard_bytes);
            }
            large_shard();
            return large_adapter();
        }
        let name = "full_disk::a_writer_that_failed_stays_failed";
        let output = Command::new("bash")
            // 64 KiB; a process that ignores the signal gets an error instead.
            .args([
                "-c",
                "ulimit -f 64; trap '' XFSZ; exec \"$0\" --exact \"$1\" --nocapture",
            ])
            .arg(std::env::current_exe().unwrap())
            .arg(name)
            .env(CHILD, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}{output:?}");
        assert!(said.contains("1 passed"), "{said}");
    }

    static LARGE: [u8; 100_000] = [1; 100_000];

    #[track_caller]
    fn assert_full(error: &Nf4Error, at: &Path) {
        match error {
            Nf4Error::Io { path, source } => {
                assert_eq!(path, at);
                assert_eq!(source.kind(), ErrorKind::FileTooLarge);
            }
            other => panic!("{other:?}"),
        }
    }

    /// Every call that could write is refused, and nothing is left behind.
    #[track_caller]
    fn assert_failed(mut writer: CheckpointWriter, folder: &Path, first: Nf4Error) {
        let failed = Nf4Error::WriterFailed {
            path: folder.into(),
            source: Box::new(first),
        };
        let refused = Err(failed.clone());
        assert_eq!(writer.write_tensor("t", Dtype::U8, &[1], &[1]), refused);
        assert_eq!(writer.write_nf4("w", &weight(), Dtype::U8, false), refused);
        let source = Checkpoint::open(hf("f32")).unwrap();
        assert_eq!(writer.copy(&source, "model.norm.weight"), refused);
        assert_eq!(writer.write_file("config.json", b"{}"), refused);
        let file = hf("f32").join("config.json");
        assert_eq!(writer.copy_file("config.json", &file), refused);
        assert_eq!(writer.finish().unwrap_err(), failed);
        assert!(!folder.exists());
        assert!(failed.to_string().contains("cannot go on"), "{failed}");
    }

    fn started(max_shard_bytes: usize) -> (TempDir, PathBuf, CheckpointWriter) {
        let parent = temp();
        let folder = parent.path().join("out");
        let mut writer = CheckpointWriter::create(&folder, max_shard_bytes).unwrap();
        writer.write_tensor("a", Dtype::U8, &[1], &[1]).unwrap();
        (parent, folder, writer)
    }

    fn large_tensor(max_shard_bytes: usize) {
        let (_parent, folder, mut writer) = started(max_shard_bytes);
        let error = writer.write_tensor("b", Dtype::U8, &[LARGE.len()], &LARGE);
        let error = error.unwrap_err();
        assert_full(&error, &folder);
        assert_failed(writer, &folder, error);
    }

    fn large_file(max_shard_bytes: usize) {
        let (_parent, folder, mut writer) = started(max_shard_bytes);
        let error = writer.write_file("tokenizer.json", &LARGE).unwrap_err();
        assert_full(&error, &folder.join("tokenizer.json"));
        assert_failed(writer, &folder, error);
    }

    fn large_adapter() {
        let parent = temp();

        let config = LoraConfig {
            r: 2,
            ..LoraConfig::new(TargetModules::list(["up_proj"]))
        };
        let mut adapter = Adapter::new(config).unwrap();
        let module = LoraModule {
            lora_a: DenseTensor::from_f32(&[0.5; 4], &[2, 2], FloatType::F32).unwrap(),
            lora_b: DenseTensor::from_f32(&[0.5; 32 * 1024], &[16 * 1024, 2], FloatType::F32)
                .unwrap(),
            magnitude: None,
            bias: None,
        };
        adapter.insert("up_proj", module).unwrap();
        let error = adapter.save(parent.path()).unwrap_err();
        assert_full(&error, &parent.path().join("adapter_model.safetensors"));
        assert_eq!(file_names(parent.path()), [""; 0]);
    }

    /// The tensors fit, and the file that they go into has a header too: it is no malformed file.
    fn large_shard() {
        let (_parent, folder, mut writer) = started(DEFAULT_MAX_SHARD_BYTES);
        let rest = 64 * 1024 - 2;
        writer
            .write_tensor("b", Dtype::U8, &[rest], &LARGE[..rest])
            .unwrap();
        assert_full(&writer.finish().unwrap_err(), &folder);
        assert!(!folder.exists());
    }
}

/// Nothing was written, so that nothing is lost.
#[test]
fn a_writer_goes_on_after_what_it_refused() {
    let folder = temp();
    let mut writer = CheckpointWriter::create(folder.path(), DEFAULT_MAX_SHARD_BYTES).unwrap();
    assert!(
        writer
            .copy_file("a", &folder.path().join("nowhere"))
            .is_err()
    );
    assert!(writer.write_file("../a", b"").is_err());
    assert!(writer.write_nf4("w", &weight(), Dtype::I32, false).is_err());
    assert!(writer.write_tensor("t", Dtype::U8, &[2], &[1]).is_err());
    writer.write_tensor("t", Dtype::U8, &[1], &[1]).unwrap();
    writer.finish().unwrap();
    assert!(Checkpoint::open(folder.path()).unwrap().keys().eq(["t"]));
}
