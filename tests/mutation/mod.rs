//! Random damage to real checkpoints: to bytes, to JSON values, to whole tensors.

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::stored::{self, Stored, Tensors};
use burn_nf4::checkpoint::Dtype;

/// The files of a folder.
pub type Files = Vec<(String, Vec<u8>)>;

/// Damages a folder in one to three places.
pub fn mutate(files: &mut Files, rng: &mut StdRng) {
    for _ in 0..rng.random_range(1..=3) {
        let Some(at) = (0..files.len()).collect::<Vec<_>>().choose(rng).copied() else {
            return;
        };
        let (name, bytes) = &mut files[at];
        let json = name.ends_with(".json");
        match rng.random_range(0..10) {
            0 | 1 => damage(bytes, rng),
            2..=4 if json => edit_json_text(bytes, rng),
            2..=4 => edit_header(bytes, rng),
            5..=8 if !json => edit_tensors(bytes, rng),
            5..=7 => rename_shards(bytes, rng),
            8 => damage(bytes, rng),
            _ => {
                files.remove(at);
            }
        }
    }
}

/// Flips, cuts, repeats and overwrites bytes, near the beginning more often than not.
fn damage(bytes: &mut Vec<u8>, rng: &mut StdRng) {
    if bytes.is_empty() {
        bytes.push(rng.random());
        return;
    }
    let near = if rng.random_bool(0.7) {
        bytes.len().min(4096)
    } else {
        bytes.len()
    };
    let at = rng.random_range(0..near);
    let len = rng.random_range(1..=64).min(bytes.len() - at);
    match rng.random_range(0..7) {
        0 | 1 => bytes[at] ^= 1 << rng.random_range(0..8),
        2 => bytes.truncate(at),
        3 => bytes[at..at + len].fill_with(|| rng.random()),
        4 => {
            let again = bytes[at..at + len].to_vec();
            bytes.splice(at..at, again);
        }
        5 => {
            bytes.drain(at..at + len);
        }
        _ => {
            let from = rng.random_range(0..bytes.len());
            let len = len.min(bytes.len() - from);
            bytes.copy_within(from..from + len, at);
        }
    }
}

/// Values at the edge of what a field can mean.
fn edge(rng: &mut StdRng) -> Value {
    let values = [
        json!(0),
        json!(1),
        json!(-1),
        json!(2),
        json!(64),
        json!(4096),
        json!(1u64 << 32),
        json!(u64::MAX),
        json!(u64::MAX - 1),
        json!(i64::MIN),
        json!(0.5),
        json!(1e308),
        json!("nf4"),
        json!("fp4"),
        json!("float16"),
        json!("bfloat16"),
        json!("U8"),
        json!("F32"),
        json!("BF16"),
        json!("F4"),
        json!("F8_E4M3"),
        json!("float"),
        json!("tensor_group"),
        json!("block"),
        json!("Linear"),
        json!("re:.*up$"),
        json!("re:("),
        json!(""),
        json!("../model.safetensors"),
        json!("model.safetensors.index.json"),
        json!(null),
        json!(true),
        json!([]),
        json!([1]),
        json!([0, 0]),
        json!([1, 64]),
        json!([64, 1]),
        json!({}),
    ];
    values.choose(rng).cloned().unwrap_or(Value::Null)
}

/// Changes one value somewhere inside.
fn edit_value(value: &mut Value, rng: &mut StdRng) {
    let deeper = rng.random_bool(0.85);
    match value {
        Value::Object(map) if deeper && !map.is_empty() => {
            let keys: Vec<String> = map.keys().cloned().collect();
            let key = &keys[rng.random_range(0..keys.len())];
            match rng.random_range(0..8) {
                0 => {
                    map.remove(key);
                }
                1 => {
                    let moved = map.remove(key).unwrap_or(Value::Null);
                    let other = &keys[rng.random_range(0..keys.len())];
                    let parts = [
                        ".absmax",
                        "_scale",
                        "_scale_2",
                        "_scale_inv",
                        "_packed",
                        "_scales",
                    ];
                    let part = parts[rng.random_range(0..parts.len())];
                    map.insert(format!("{other}{part}"), moved);
                }
                2 => {
                    let other = map[&keys[rng.random_range(0..keys.len())]].clone();
                    map.insert(key.clone(), other);
                }
                _ => edit_value(&mut map[key], rng),
            }
        }
        Value::Array(items) if deeper && !items.is_empty() => {
            let at = rng.random_range(0..items.len());
            match rng.random_range(0..6) {
                0 => {
                    items.remove(at);
                }
                1 => items.push(edge(rng)),
                2 => items.reverse(),
                _ => edit_value(&mut items[at], rng),
            }
        }
        Value::Number(number) if deeper => {
            let by = [1, -1, 2, 8, 64, 256][rng.random_range(0..6)];
            let near = number.as_i64().map(|n| n.wrapping_add(by));
            *value = near.map_or_else(|| edge(rng), Value::from);
        }
        _ => *value = edge(rng),
    }
}

/// Edits JSON text as values, or as text with a member repeated.
fn edited_json(text: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    let mut value: Value = serde_json::from_slice(text).ok()?;
    if rng.random_bool(0.15) {
        let (key, member) = value.as_object()?.iter().next()?;
        let again = format!("{{{}:{member},", Value::from(key.as_str()));
        return Some(value.to_string().replacen('{', &again, 1).into_bytes());
    }
    edit_value(&mut value, rng);
    Some(value.to_string().into_bytes())
}

fn edit_json_text(bytes: &mut Vec<u8>, rng: &mut StdRng) {
    match edited_json(bytes, rng) {
        Some(edited) => *bytes = edited,
        None => damage(bytes, rng),
    }
}

/// Edits the header of a file and sets the length before it anew, so that the header is read.
fn edit_header(bytes: &mut Vec<u8>, rng: &mut StdRng) {
    let header = bytes.split_first_chunk::<8>().and_then(|(prefix, rest)| {
        let len = usize::try_from(u64::from_le_bytes(*prefix)).ok()?;
        Some((len, edited_json(rest.get(..len)?, rng)?))
    });
    match header {
        Some((len, edited)) => {
            let data = bytes.split_off(8 + len);
            *bytes = (edited.len() as u64).to_le_bytes().to_vec();
            bytes.extend(edited);
            bytes.extend(data);
        }
        None => damage(bytes, rng),
    }
}

/// Gives keys of an index to other shards.
fn rename_shards(bytes: &mut Vec<u8>, rng: &mut StdRng) {
    let Ok(mut index) = serde_json::from_slice::<Value>(bytes) else {
        return damage(bytes, rng);
    };
    let Some(map) = index.get_mut("weight_map").and_then(Value::as_object_mut) else {
        return damage(bytes, rng);
    };
    let names: Vec<Value> = map.values().cloned().collect();
    for _ in 0..rng.random_range(1..=2) {
        if let (Some(at), Some(name)) = (
            (0..map.len()).collect::<Vec<_>>().choose(rng),
            names.choose(rng),
        ) && let Some(value) = map.values_mut().nth(*at)
        {
            *value = name.clone();
        }
    }
    *bytes = index.to_string().into_bytes();
}

/// The tensors of a valid file.
fn parsed(bytes: &[u8]) -> Option<Tensors> {
    let file = SafeTensors::deserialize(bytes).ok()?;
    let tensors = file.iter().map(|(name, view)| {
        let tensor = Stored {
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            bytes: view.data().to_vec(),
        };
        (name.to_string(), tensor)
    });
    Some(tensors.collect())
}

/// Edits the tensors of a file and writes it anew, so that the file itself is valid.
fn edit_tensors(bytes: &mut Vec<u8>, rng: &mut StdRng) {
    let Some(mut tensors) = parsed(bytes) else {
        return damage(bytes, rng);
    };
    let keys: Vec<String> = tensors.keys().cloned().collect();
    let states: Vec<String> = keys
        .iter()
        .filter(|key| key.contains("quant_state"))
        .cloned()
        .collect();
    let (Some(key), Some(other)) = (keys.choose(rng), keys.choose(rng)) else {
        return;
    };
    let kind = rng.random_range(0..12);
    match (kind, states.choose(rng)) {
        // What the state says, which everything else is checked against.
        (0..=3, Some(state)) => {
            let tensor = tensors.get_mut(state).expect("a key of it");
            edit_json_text(&mut tensor.bytes, rng);
            tensor.dtype = Dtype::U8;
            tensor.shape = vec![tensor.bytes.len()];
        }
        (4, _) => {
            tensors.remove(key);
        }
        (5, _) => {
            let tensor = tensors.remove(key).expect("a key of it");
            tensors.insert(other.clone(), tensor);
        }
        (6, _) => {
            let tensor = tensors[other].clone();
            tensors.insert(key.clone(), tensor);
        }
        (7, _) => {
            let tensor = tensors.get_mut(key).expect("a key of it");
            tensor.shape.reverse();
        }
        (8, _) => {
            let tensor = tensors.get_mut(key).expect("a key of it");
            let elems: usize = tensor.shape.iter().product();
            tensor.shape = match rng.random_range(0..4) {
                0 => vec![elems],
                1 => vec![1, elems],
                2 => vec![elems, 1],
                _ => vec![1, elems, 1],
            };
        }
        (9, _) => {
            // Another dtype of the same bytes.
            let tensor = tensors.get_mut(key).expect("a key of it");
            let dtypes = [
                Dtype::U8,
                Dtype::I8,
                Dtype::F16,
                Dtype::BF16,
                Dtype::F32,
                Dtype::I64,
                Dtype::F8_E4M3,
                Dtype::F8_E5M2,
            ];
            let dtype = dtypes[rng.random_range(0..dtypes.len())];
            let size = dtype.bitsize() / 8;
            if tensor.bytes.len().is_multiple_of(size) {
                tensor.dtype = dtype;
                tensor.shape = vec![tensor.bytes.len() / size, 1];
            }
        }
        (10, _) => {
            // Longer or shorter by an element.
            let tensor = tensors.get_mut(key).expect("a key of it");
            let size = (tensor.dtype.bitsize() / 8).max(1);
            let elems = tensor.bytes.len() / size;
            let elems = if rng.random_bool(0.5) {
                elems + 1
            } else {
                elems.saturating_sub(1)
            };
            tensor.bytes.resize(elems * size, 0);
            tensor.shape = match tensor.shape.as_slice() {
                [_, 1] => vec![elems, 1],
                _ => vec![elems],
            };
        }
        _ => {
            // Values: NaN and infinity among them.
            let tensor = tensors.get_mut(key).expect("a key of it");
            if let Some(at) = tensor.bytes.len().checked_sub(4) {
                let at = rng.random_range(0..=at) & !3;
                let value: u32 = match rng.random_range(0..3) {
                    0 => f32::NAN.to_bits(),
                    1 => f32::MAX.to_bits(),
                    _ => rng.random(),
                };
                tensor.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    *bytes = stored::to_bytes(&tensors);
}
