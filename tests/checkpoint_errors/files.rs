//! Files that are no safetensors, or no files.

use super::*;

fn assert_not_safetensors(bytes: &[u8], words: &str) {
    let file = written(bytes);
    match SafetensorsFile::open(file.path()) {
        Err(Nf4Error::Safetensors { path, message }) => {
            assert_eq!(path, file.path());
            assert!(message.contains(words), "{message}");
        }
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("accepted a broken file"),
    }
}

/// Cut anywhere: in the length, in the header, in the data.
#[test]
fn truncated_file() {
    let whole = Draft::of(NESTED).to_bytes();
    let data_bytes: usize = Draft::of(NESTED).0.values().map(|t| t.bytes.len()).sum();
    let header_end = whole.len() - data_bytes;
    assert_not_safetensors(&[], "too few");
    assert_not_safetensors(&whole[..7], "too few");
    assert_not_safetensors(&whole[..8], "does not fit");
    assert_not_safetensors(&whole[..header_end - 1], "does not fit");
    assert_not_safetensors(&whole[..header_end], "0 follow the header");
    assert_not_safetensors(&whole[..whole.len() - 1], "follow the header");
    let longer: Vec<u8> = whole.iter().copied().chain([0]).collect();
    assert_not_safetensors(&longer, "follow the header");
}

fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], header.as_bytes(), data].concat()
}

#[rstest]
#[case::not_json("hello", 0)]
#[case::not_an_object("[]", 0)]
#[case::unknown_dtype(r#"{"w": {"dtype": "U9", "shape": [4], "data_offsets": [0, 4]}}"#, 4)]
#[case::shape_too_large(r#"{"w": {"dtype": "U8", "shape": [5], "data_offsets": [0, 4]}}"#, 4)]
#[case::shape_overflows(
    r#"{"w": {"dtype": "U8", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}"#,
    0
)]
#[case::backwards(r#"{"w": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}"#, 4)]
#[case::gap(r#"{"w": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}"#, 4)]
#[case::overlap(
    r#"{"v": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}"#,
    4
)]
#[case::beyond_the_end(r#"{"w": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}"#, 4)]
fn malformed_header(#[case] header: &str, #[case] data_bytes: usize) {
    assert_not_safetensors(&with_header(header, &vec![0; data_bytes]), "");
}

#[test]
fn header_that_claims_to_be_huge() {
    let mut bytes = Draft::of(NESTED).to_bytes();
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_not_safetensors(&bytes, "is over 100000000");
    bytes[..8].copy_from_slice(&(1u64 << 40).to_le_bytes());
    assert_not_safetensors(&bytes, "is over 100000000");
    bytes[..8].copy_from_slice(&(1u64 << 26).to_le_bytes());
    assert_not_safetensors(&bytes, "does not fit");

    // A sparse file that has the room, but not the right to it.
    let file = written(&100_000_001u64.to_le_bytes());
    file.as_file().set_len(100_000_009).unwrap();
    let error = SafetensorsFile::open(file.path()).unwrap_err();
    assert!(error.to_string().contains("is over 100000000"), "{error}");
}

/// Eight tensors that end eight bytes short of 2^64: the length of header and data wraps around
/// to the length of the file, which safetensors' own check takes for right.
#[cfg(target_pointer_width = "64")]
#[test]
fn offsets_that_wrap_around() {
    let each = (1u64 << 61) - 1;
    let tensors: Vec<String> = (0..8)
        .map(|i| {
            let (start, end) = (i * each, (i + 1) * each);
            format!(
                r#""t{i}": {{"dtype": "U8", "shape": [{each}], "data_offsets": [{start}, {end}]}}"#
            )
        })
        .collect();
    // 2^64 - 8, plus 8 bytes of length, plus the header: a file of the header's length alone.
    let header = format!("{{{}}}", tensors.join(", "));
    let whole = with_header(&header, &[]);
    assert_not_safetensors(&whole, "follow the header");
    // 2^64 - 1 as one more tensor of seven bytes, so that the sum is the header's length + 7.
    let seven = format!(
        r#""u": {{"dtype": "U8", "shape": [7], "data_offsets": [{}, {}]}}"#,
        8 * each,
        8 * each + 7
    );
    let header = format!("{{{}, {seven}}}", tensors.join(", "));
    assert_not_safetensors(&with_header(&header, &[]), "follow the header");
}

#[test]
fn unreadable_paths() {
    let folder = tempfile::tempdir().unwrap();
    let absent = folder.path().join("absent.safetensors");
    for path in [absent.as_path(), folder.path()] {
        let error = SafetensorsFile::open(path).unwrap_err();
        assert!(
            matches!(&error, Nf4Error::Io { path: named, .. } if named == path),
            "{error:?}"
        );
    }
}
