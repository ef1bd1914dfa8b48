//! The header of a safetensors file.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};

use super::json::{UniqueMap, shape};

/// Bytes of the length that precedes the header.
const PREFIX_BYTES: usize = 8;

/// A header, or an index, may be this long, in bytes (the limit of the safetensors format).
pub(super) const MAX_HEADER_BYTES: usize = 100_000_000;

/// The entry of a header that is no tensor.
pub(super) const METADATA: &str = "__metadata__";

/// A tensor's line of the header; the range lies within the file.
#[derive(Debug)]
pub(super) struct Entry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Range<usize>,
}

/// A line as it is written. A field that is there twice is an error of serde's.
#[derive(Deserialize)]
struct Line {
    dtype: Dtype,
    #[serde(deserialize_with = "shape")]
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// All lines, with ranges that begin at the end of the header.
struct Lines(BTreeMap<String, Entry>);

impl<'de> Deserialize<'de> for Lines {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(LinesVisitor)
    }
}

struct LinesVisitor;

impl<'de> Visitor<'de> for LinesVisitor {
    type Value = Lines;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Lines, A::Error> {
        let mut lines = BTreeMap::new();
        let mut metadata = None;
        while let Some(key) = map.next_key::<String>()? {
            let twice = || A::Error::custom(format!("`{key}` is there twice"));
            let within = |error: A::Error| A::Error::custom(format!("`{key}`: {error}"));
            if key == METADATA {
                // The crate and Python's library take null for none.
                let texts = map
                    .next_value::<Option<UniqueMap<String>>>()
                    .map_err(within)?;
                if metadata.replace(texts.is_some()).is_some() {
                    return Err(twice());
                }
                continue;
            }
            if lines.contains_key(&key) {
                return Err(twice());
            }
            let line = map.next_value::<Line>().map_err(within)?;
            let entry = line
                .check()
                .map_err(|what| within(A::Error::custom(what)))?;
            lines.insert(key, entry);
        }
        Ok(Lines(lines))
    }
}

impl Line {
    /// Checks the offsets against dtype and shape.
    fn check(self) -> Result<Entry, String> {
        let Self {
            dtype,
            shape,
            data_offsets: (start, end),
        } = self;
        match (end.checked_sub(start), stored_bytes(dtype, &shape)) {
            (Some(given), Some(expected)) if given == expected => Ok(Entry {
                dtype,
                shape,
                bytes: start..end,
            }),
            _ => Err(format!(
                "{dtype} of shape {shape:?} does not take the bytes {start}..{end}"
            )),
        }
    }
}

/// The bytes that a tensor takes; `None` where they cannot be counted or the last is not full.
pub(super) fn stored_bytes(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let bits = shape
        .iter()
        .try_fold(dtype.bitsize(), |bits, &dim| bits.checked_mul(dim))?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// What a file is that does not begin with the length of a header, if its first bytes tell.
fn other_format(file: &[u8]) -> String {
    let is = |what: &str| format!(": the file is {what}");
    match file {
        [b'P', b'K', 3, 4, ..] => is("a zip archive, as PyTorch writes them"),
        [0x80, 2..=5, ..] => is("pickled, as PyTorch's older files are"),
        [b'G', b'G', b'U', b'F', ..] => is("GGUF"),
        _ => match file
            .first_chunk::<PREFIX_BYTES>()
            .map(|text| str::from_utf8(text))
        {
            Some(Ok(text)) if !text.contains(char::is_control) => {
                format!(": the file begins with the text `{text}`")
            }
            _ => String::new(),
        },
    }
}

/// Finds every tensor of a file, or says what is wrong with it.
///
/// Not by the safetensors crate: it keeps the last of two tensors of one name, and adds up offsets
/// near `usize::MAX` without a check.
pub(super) fn read_header(file: &[u8]) -> Result<BTreeMap<String, Entry>, String> {
    let Some((prefix, rest)) = file.split_first_chunk::<PREFIX_BYTES>() else {
        return Err(format!("{} bytes are too few for a header", file.len()));
    };
    let declared = u64::from_le_bytes(*prefix);
    let len = usize::try_from(declared).unwrap_or(usize::MAX);
    if len > MAX_HEADER_BYTES {
        return Err(format!(
            "a header of {declared} bytes is over {MAX_HEADER_BYTES}{}",
            other_format(file)
        ));
    }
    let header = rest.get(..len).ok_or_else(|| {
        let given = file.len();
        format!("a header of {declared} bytes does not fit a file of {given}: it was cut short")
    })?;
    let Lines(mut entries) =
        serde_json::from_slice(header).map_err(|error| format!("invalid header: {error}"))?;

    // One after the other without a gap, each byte in one tensor.
    let mut in_order: Vec<(&Range<usize>, &str)> = entries
        .iter()
        .map(|(key, entry)| (&entry.bytes, key.as_str()))
        .collect();
    in_order.sort_unstable_by_key(|(bytes, _)| (bytes.start, bytes.end));
    let mut covered = 0;
    for (bytes, key) in in_order {
        if bytes.start != covered {
            return Err(format!(
                "invalid header: `{key}` begins at byte {}, the one before ends at {covered}",
                bytes.start
            ));
        }
        covered = bytes.end;
    }
    let data_bytes = rest.len() - header.len();
    if covered != data_bytes {
        let cut = if covered > data_bytes {
            ": the file was cut short"
        } else {
            ""
        };
        return Err(format!(
            "the tensors take {covered} bytes, but {data_bytes} follow the header{cut}"
        ));
    }
    let data_start = PREFIX_BYTES + header.len();
    for entry in entries.values_mut() {
        // Offsets ascend to `covered`, so both ends lie within the file.
        entry.bytes = data_start + entry.bytes.start..data_start + entry.bytes.end;
    }
    Ok(entries)
}
