//! JSON maps and lists of files that nobody vouches for.
//!
//! serde's maps keep the last of two values of one key, so that a file could show one thing to a
//! reader that keeps the first and another to one that keeps the last.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// A map without a key given twice. Errors in a value name its key.
#[derive(Debug)]
pub(super) struct UniqueMap<V>(pub BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<V>(PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for Entries<V> {
            type Value = BTreeMap<String, V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    if entries.contains_key(&key) {
                        return Err(A::Error::custom(format!("`{key}` is there twice")));
                    }
                    let value = map
                        .next_value()
                        .map_err(|error| A::Error::custom(format!("`{key}`: {error}")))?;
                    entries.insert(key, value);
                }
                Ok(entries)
            }
        }

        deserializer.deserialize_map(Entries(PhantomData)).map(Self)
    }
}

/// Dimensions a shape may have: as many as PyTorch's.
const MAX_DIMS: usize = 64;

/// Reads a shape, and stops where no tensor would have more dimensions: a list of numbers takes
/// four times the memory of its text.
pub(super) fn shape<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<usize>, D::Error> {
    struct Dims;

    impl<'de> Visitor<'de> for Dims {
        type Value = Vec<usize>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {MAX_DIMS} dimensions")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut dims = Vec::new();
            while dims.len() < MAX_DIMS {
                match seq.next_element()? {
                    Some(dim) => dims.push(dim),
                    None => return Ok(dims),
                }
            }
            match seq.next_element::<IgnoredAny>()? {
                Some(_) => Err(A::Error::invalid_length(MAX_DIMS + 1, &self)),
                None => Ok(dims),
            }
        }
    }

    deserializer.deserialize_seq(Dims)
}
