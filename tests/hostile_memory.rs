//! Files that claim to be large take no memory: no request to the allocator while one is read is
//! larger than the file itself, and all together stay within a few times of it. The counting
//! allocator sees everything but the map.
#![cfg(feature = "checkpoint")]
#![cfg(feature = "flex")]

mod counting;
mod stored;

use std::fs::{self, File};
use std::path::Path;

use burn::tensor::Device;
use burn_nf4::checkpoint::{Checkpoint, Dtype, INDEX_FILE, SINGLE_FILE};
use burn_nf4::format::{BlockTensor, QuantConfig};
use counting::{alone, largest_bytes, peak_bytes};
use rstest::rstest;
use stored::{Stored, Tensors};

/// What an error and the buffers of a read take for small files: the map of 256 scales, messages,
/// names.
const SMALL_BYTES: usize = 16 * 1024;

/// What the entries of a header take beside its text: keys, shapes and tree nodes of tensors
/// without elements, of which the text has 50 bytes each.
const ENTRIES: usize = 5;

/// Opens a folder and reads all that can be read, and returns what that took.
#[track_caller]
fn assert_within(folder: &Path, file_bytes: usize) -> bool {
    let device = Device::flex();
    let (largest, (peak, loaded)) = largest_bytes(|| {
        peak_bytes(|| {
            let Ok(checkpoint) = Checkpoint::open(folder) else {
                return false;
            };
            let mut all = true;
            for prefix in checkpoint.quantized_weights() {
                all &= checkpoint.load_quantized(prefix).is_ok();
                all &= checkpoint.load_weight(prefix, &device).is_ok();
            }
            all
        })
    });
    assert!(
        largest <= file_bytes + SMALL_BYTES,
        "a request of {largest} bytes for a file of {file_bytes}"
    );
    assert!(
        peak <= ENTRIES * file_bytes + SMALL_BYTES,
        "{peak} bytes at once for a file of {file_bytes}"
    );
    loaded
}

fn header_only(header: &str) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes
}

#[track_caller]
fn refused(bytes: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(SINGLE_FILE), bytes).unwrap();
    assert!(
        !assert_within(folder.path(), bytes.len()),
        "it was accepted"
    );
}

#[rstest]
#[case::header(&u64::MAX.to_le_bytes())]
#[case::header_of_the_largest_size(&100_000_000u64.to_le_bytes())]
#[case::tensor(&header_only(
    r#"{"a":{"dtype":"U8","shape":[1099511627776],"data_offsets":[0,1099511627776]}}"#
))]
fn lengths_that_are_not_there(#[case] bytes: &[u8]) {
    let _alone = alone();
    refused(bytes);
}

#[test]
fn shapes_of_a_million_dimensions() {
    let _alone = alone();
    let ones = "1,".repeat(1_000_000);
    refused(&header_only(&format!(
        r#"{{"a":{{"dtype":"U8","shape":[{ones}0],"data_offsets":[0,0]}}}}"#
    )));

    let weight = BlockTensor::quantize(&[0.5f32; 64], &[64], QuantConfig::flat()).unwrap();
    let mut tensors = stored::weight("w", &weight);
    let json =
        format!(r#"{{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[{ones}64]}}"#);
    let state = tensors.get_mut("w.quant_state.bitsandbytes__nf4").unwrap();
    state.shape = vec![json.len()];
    state.bytes = json.into_bytes();
    refused(&stored::to_bytes(&tensors));
}

#[test]
fn as_many_tensors_as_a_header_can_hold() {
    let _alone = alone();
    let lines: Vec<String> = (0..100_000)
        .map(|i| format!(r#""{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#))
        .collect();
    let bytes = header_only(&format!("{{{}}}", lines.join(",")));
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(SINGLE_FILE), &bytes).unwrap();
    assert!(assert_within(folder.path(), bytes.len()), "it is valid");
}

/// Each takes more room in JSON than in Python's.
#[test]
fn as_many_numbers_of_python_as_a_text_can_hold() {
    let _alone = alone();
    let numbers = "NaN,".repeat(200_000);
    let json = format!(r#"{{"x":[{numbers}0],"weight_map":{{}}}}"#);
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(INDEX_FILE), &json).unwrap();
    assert!(!assert_within(folder.path(), json.len()));

    let weight = BlockTensor::quantize(&[0.5f32; 64], &[64], QuantConfig::flat()).unwrap();
    let mut tensors = stored::weight("w", &weight);
    let state = tensors.get_mut("w.quant_state.bitsandbytes__nf4").unwrap();
    let text = String::from_utf8(state.bytes.clone()).unwrap();
    state.bytes = text
        .replacen('{', &format!(r#"{{"x":[{numbers}0],"#), 1)
        .into_bytes();
    state.shape = vec![state.bytes.len()];
    let bytes = stored::to_bytes(&tensors);
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(SINGLE_FILE), &bytes).unwrap();
    assert!(assert_within(folder.path(), bytes.len()), "it is valid");
}

/// A file of a terabyte that takes no space on disk.
#[test]
fn sparse_files() {
    let _alone = alone();
    for name in [SINGLE_FILE, INDEX_FILE] {
        let folder = tempfile::tempdir().unwrap();
        let file = File::create(folder.path().join(name)).unwrap();
        // Not every file system has files of this size.
        if file.set_len(1 << 40).is_ok() {
            assert!(!assert_within(folder.path(), 0), "{name}");
        }
    }
}

#[rstest]
#[case::weight("w", Dtype::U8, vec![1 << 20, 1])]
#[case::absmax("w.absmax", Dtype::U8, vec![1 << 20])]
#[case::quant_map("w.quant_map", Dtype::F32, vec![1 << 20])]
#[case::nested_absmax("w.nested_absmax", Dtype::F32, vec![1 << 20])]
#[case::nested_quant_map("w.nested_quant_map", Dtype::F32, vec![1 << 20])]
fn parts_that_are_too_long_are_not_copied(
    #[case] key: &str,
    #[case] dtype: Dtype,
    #[case] shape: Vec<usize>,
) {
    let _alone = alone();
    let weight = BlockTensor::quantize(&[0.5f32; 64], &[64], QuantConfig::default()).unwrap();
    let mut tensors: Tensors = stored::weight("w", &weight);
    let bytes = vec![0; shape.iter().product::<usize>() * dtype.bitsize() / 8];
    tensors.insert(
        key.into(),
        Stored {
            dtype,
            shape,
            bytes,
        },
    );
    let folder = tempfile::tempdir().unwrap();
    stored::write(folder.path(), &tensors);
    // As if the file had no more than the other tensors.
    assert!(!assert_within(folder.path(), 0));
}

#[rstest]
#[case::more_than_memory("[1099511627776]")]
#[case::overflow("[4294967296,4294967296,2]")]
#[case::ends_at_zero("[18446744073709551615,0]")]
fn a_shape_that_asks_for_more_than_the_codes(#[case] shape: &str) {
    let _alone = alone();
    let weight = BlockTensor::quantize(&[0.5f32; 64], &[64], QuantConfig::default()).unwrap();
    let mut tensors = stored::weight("w", &weight);
    let state = tensors.get_mut("w.quant_state.bitsandbytes__nf4").unwrap();
    let json = String::from_utf8(state.bytes.clone()).unwrap();
    let json = json.replace("[64]", shape);
    assert!(json.contains(shape));
    state.shape = vec![json.len()];
    state.bytes = json.into_bytes();
    let folder = tempfile::tempdir().unwrap();
    stored::write(folder.path(), &tensors);
    assert!(!assert_within(folder.path(), 0));
}
