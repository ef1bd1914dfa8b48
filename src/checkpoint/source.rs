//! The parameters of a checkpoint as tensors that are read when they are asked for.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{BoolStore, Bytes, DType, Shape, TensorData};
use burn_store::burn_pack::{Error as PackError, Tensor as PackTensor};
use burn_store::{KeyRemapper, bridge};
use safetensors::Dtype;

use super::elements::float_type;
use super::folder::Checkpoint;
use super::parameters::form_of_weight;
use super::stored::{StoredTensor, TensorSource};
use super::stored_weight::Rows;
use super::weight::{find_weight, locate_weight};
use crate::error::{Nf4Error, TensorForm};
use crate::format::{FloatType, PackedLayout, WeightForm};

/// A parameter of a checkpoint.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub key: String,
    /// The key after remapping.
    pub path: String,
    pub kind: EntryKind,
    /// Bytes in the files.
    pub size_bytes: usize,
    /// What of the tensor it is, if it is not all of it.
    pub part: Option<Part>,
}

/// A part of a stored tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Part {
    /// Rows of a stack of matrices.
    Rows(Rows),
    /// Rows of a matrix that is stored transposed, or elements of a vector.
    Columns(Columns),
}

/// Of the numbers in some bytes each `step`-th, from `first` on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Columns {
    pub bytes: Range<usize>,
    pub first: usize,
    pub step: usize,
}

impl Part {
    /// The bytes of a part of this shape, in the order in which they are stored.
    fn of<'a>(&self, bytes: &'a [u8], shape: &[usize], elem_bytes: usize) -> Cow<'a, [u8]> {
        match self {
            Self::Rows(rows) => rows.of(bytes, shape.last().copied().unwrap_or(1) * elem_bytes),
            Self::Columns(Columns {
                bytes: at, step: 1, ..
            }) => bytes[at.clone()].into(),
            Self::Columns(Columns {
                bytes: at,
                first,
                step,
            }) => {
                let elems = bytes[at.clone()].chunks_exact(elem_bytes);
                let chosen = elems.skip(*first).step_by(*step).flatten();
                chosen.copied().collect::<Vec<u8>>().into()
            }
        }
    }
}

/// What a parameter of a checkpoint is.
#[derive(Debug, Clone)]
pub(crate) enum EntryKind {
    Packed(WeightForm),
    Dense { dtype: Dtype, shape: Vec<usize> },
}

impl Entry {
    /// What there is, for reports.
    pub fn given(&self) -> TensorForm {
        match &self.kind {
            EntryKind::Packed(form) => form_of_weight(form),
            EntryKind::Dense { dtype, shape } => TensorForm {
                dtype: dtype.to_string(),
                shape: shape.clone(),
                quantized: false,
            },
        }
    }
}

/// Lists parameters of a checkpoint, every quantized weight checked.
pub(super) fn entries(
    checkpoint: &Checkpoint,
    keys: &[&str],
    remapper: &KeyRemapper,
) -> Result<Vec<Entry>, Nf4Error> {
    // The remapper takes tensors only.
    let named = |key: &&str| {
        let nothing = Bytes::from_bytes_vec(Vec::new());
        PackTensor::new(key.to_string(), DType::U8, Shape::from([0]), None, nothing)
    };
    let (_, renamed) = remapper.remap(keys.iter().map(named).collect());
    let entry = |(path, key): (String, String)| {
        let kind = if checkpoint.is_quantized(&key) {
            EntryKind::Packed(checkpoint.weight_form(&key)?)
        } else {
            let info = checkpoint.tensor_info(&key)?;
            EntryKind::Dense {
                dtype: info.dtype,
                shape: info.shape.to_vec(),
            }
        };
        let size_bytes = checkpoint.parameter_bytes(&key);
        Ok(Entry {
            key,
            path,
            kind,
            size_bytes,
            part: None,
        })
    };
    renamed.into_iter().map(entry).collect()
}

/// How a parameter is to be read.
#[derive(Debug, Clone, Default)]
pub(super) struct ReadAs {
    /// The type to convert floats to.
    pub dtype: Option<FloatType>,
    /// Whether to transpose a dense matrix.
    pub transposed: bool,
    /// The words of a packed weight, if not all.
    pub words: Option<Range<usize>>,
}

/// A tensor that is read when it is asked for. `done` is called after each read, with its error if it
/// failed: burn-store keeps only the text of an error. `None` where Burn has no such dtype.
pub(super) fn deferred(
    checkpoint: &Arc<Checkpoint>,
    entry: &Entry,
    name: String,
    read_as: ReadAs,
    done: impl Fn(Option<Nf4Error>) + Send + Sync + 'static,
) -> Result<Option<PackTensor>, Nf4Error> {
    let (dtype, shape) = match &entry.kind {
        EntryKind::Packed(form) => {
            let layout = PackedLayout::for_shape(&form.shape, form.config)?;
            let words = read_as.words.as_ref();
            (DType::U32, vec![words.map_or(layout.words(), Range::len)])
        }
        EntryKind::Dense { dtype, shape } => {
            let mut shape = shape.clone();
            if read_as.transposed {
                shape.reverse();
            }
            match burn_dtype(*dtype, read_as.dtype) {
                Some(dtype) => (dtype, shape),
                None => return Ok(None),
            }
        }
    };
    let (checkpoint, key, kind) = (checkpoint.clone(), entry.key.clone(), entry.kind.clone());
    let part = entry.part.clone();
    let to = Shape::from(shape);
    let read = {
        let to = to.clone();
        move || -> Result<TensorData, Nf4Error> {
            let bytes = match &kind {
                EntryKind::Packed(form) => {
                    let words = match &part {
                        None => find_weight(&*checkpoint, &key)?.to_packed(form)?,
                        Some(Part::Rows(rows)) => rows_of_weight(&checkpoint, &key, *rows, form)?,
                        Some(Part::Columns(_)) => {
                            unreachable!("packed stacks are taken apart by rows")
                        }
                    };
                    match read_as.words.clone() {
                        Some(part) => Bytes::from_elems(words[part].to_vec()),
                        None => Bytes::from_elems(words),
                    }
                }
                EntryKind::Dense { shape, .. } => {
                    let mut stored = checkpoint.stored(&key)?;
                    let chosen;
                    if let Some(part) = &part {
                        chosen = part.of(stored.bytes, shape, stored.info.dtype.bitsize() / 8);
                        stored.info.shape = shape;
                        stored.bytes = &chosen;
                    }
                    let is_stored_transposed = matches!(part, Some(Part::Columns(_)));
                    let matrix = match (read_as.transposed, is_stored_transposed, shape.as_slice())
                    {
                        (true, false, &[rows, columns]) => Some([rows, columns]),
                        (false, true, &[rows, columns]) => Some([columns, rows]),
                        _ => None,
                    };
                    read_dense(&stored, &key, read_as.dtype, matrix)?
                }
            };
            Ok(TensorData::from_bytes(bytes, to.clone(), dtype))
        }
    };
    let provider = move || match read() {
        Ok(data) => {
            done(None);
            Ok(data)
        }
        Err(error) => {
            let text = error.to_string();
            done(Some(error));
            Err(PackError::ValidationError(text))
        }
    };
    Ok(Some(bridge::deferred(name, dtype, to, None, provider)))
}

/// The device image of rows of a stack of matrices.
fn rows_of_weight(
    checkpoint: &Checkpoint,
    key: &str,
    rows: Rows,
    form: &WeightForm,
) -> Result<Vec<u32>, Nf4Error> {
    let stack = locate_weight(checkpoint, key)?;
    match stack.rows(rows) {
        Some(matrix) => matrix.to_packed(form),
        None => Err(Nf4Error::Blocks {
            tensor: key.into(),
            format: form.config.quant_type.name(),
            shape: stack.shape.clone(),
            expected: "matrices of whole blocks".into(),
        }),
    }
}

fn read_dense(
    stored: &StoredTensor<'_>,
    key: &str,
    dtype: Option<FloatType>,
    transposed: Option<[usize; 2]>,
) -> Result<Bytes, Nf4Error> {
    if let Some(from) = float_type(stored.info.dtype) {
        let to = dtype.unwrap_or(from);
        return super::float::float_bytes(stored, key, from, to, transposed);
    }
    let mut bytes = stored.bytes.to_vec();
    if stored.info.dtype == Dtype::BOOL {
        // Anything but 0 and 1 would be no bool.
        bytes
            .iter_mut()
            .for_each(|byte| *byte = (*byte != 0).into());
    }
    if cfg!(target_endian = "big") {
        let size = stored.info.dtype.bitsize() / 8;
        bytes.chunks_exact_mut(size).for_each(<[u8]>::reverse);
    }
    Ok(Bytes::from_bytes_vec(bytes))
}

/// What Burn calls a dtype, floats converted to `float`.
fn burn_dtype(dtype: Dtype, float: Option<FloatType>) -> Option<DType> {
    Some(match dtype {
        Dtype::F16 => float.unwrap_or(FloatType::F16).into(),
        Dtype::BF16 => float.unwrap_or(FloatType::BF16).into(),
        Dtype::F32 => float.unwrap_or(FloatType::F32).into(),
        Dtype::F64 => DType::F64,
        Dtype::I64 => DType::I64,
        Dtype::I32 => DType::I32,
        Dtype::I16 => DType::I16,
        Dtype::I8 => DType::I8,
        Dtype::U64 => DType::U64,
        Dtype::U32 => DType::U32,
        Dtype::U16 => DType::U16,
        Dtype::U8 => DType::U8,
        Dtype::BOOL => DType::Bool(BoolStore::Native),
        _ => return None,
    })
}
