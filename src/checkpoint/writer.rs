//! Writing a Hugging Face folder, one tensor in memory at a time.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::{Dtype, View};
use serde_json::{Map, json};

use super::folder::Checkpoint;
use super::header::{METADATA, stored_bytes};
use super::layout::{self, NewTensor};
use super::names::SINGLE_FILE;
use super::python_json;
use super::staging::Staging;
use super::stored_form::StoredForm;
use crate::error::Nf4Error;
use crate::format::{BlockTensor, WeightParts, check_len};

/// The size of shards that transformers 5 takes unless told otherwise, in bytes.
pub const DEFAULT_MAX_SHARD_BYTES: usize = 50_000_000_000;

/// Writes a folder as transformers does: `model.safetensors`, or shards and their index.
///
/// Tensors are handed over one by one, in the order in which they fill the shards. They wait in
/// a temporary file, not in memory, and nothing appears under its final name before
/// [`finish`](Self::finish); a writer that is dropped before leaves nothing behind. Once a write
/// has failed, as on a full disk, every further call fails with [`Nf4Error::WriterFailed`]:
/// the folder would lack something.
///
/// ```
/// use burn_nf4::checkpoint::{Checkpoint, CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, Dtype};
/// use burn_nf4::format::{BlockTensor, QuantConfig};
///
/// let weight: Vec<f32> = (0..128 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
/// let weight = BlockTensor::quantize(&weight, &[128, 64], QuantConfig::default())?;
///
/// # let folder = tempfile::tempdir().unwrap();
/// # let folder = folder.path().join("model");
/// let mut writer = CheckpointWriter::create(&folder, DEFAULT_MAX_SHARD_BYTES)?;
/// writer.write_nf4("model.up_proj.weight", &weight, Dtype::U8, false)?;
/// writer.write_tensor("model.norm.weight", Dtype::F32, &[1], &1f32.to_le_bytes())?;
/// writer.finish()?;
///
/// assert_eq!(Checkpoint::open(&folder)?.load_quantized("model.up_proj.weight")?, weight);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
#[derive(Debug)]
pub struct CheckpointWriter {
    staging: Staging,
    max_shard_bytes: usize,
    open: Spool,
    /// Closed shards: the file, and the keys in it.
    shards: Vec<(PathBuf, Vec<String>)>,
    /// The bytes of each tensor.
    written: HashMap<String, usize>,
    /// Weights of the model; a quantized one counts what it decodes to.
    parameter_elems: usize,
    /// The first write that failed.
    failed: Option<Nf4Error>,
}

/// What was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Written {
    /// The safetensors files, in order.
    pub files: Vec<PathBuf>,
    /// Tensors in them.
    pub tensors: usize,
    /// Bytes of the tensors.
    pub size_bytes: usize,
}

/// The tensors of a shard that is not full yet.
#[derive(Debug, Default)]
struct Spool {
    /// Made with the first tensor.
    file: Option<File>,
    tensors: Vec<Spooled>,
    size_bytes: usize,
}

#[derive(Debug)]
struct Spooled {
    key: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl CheckpointWriter {
    /// Starts a folder, which must be empty or not exist. A shard holds `max_shard_bytes` of
    /// tensors, or one weight that is larger.
    ///
    /// # Errors
    /// [`Nf4Error::FolderNotEmpty`], [`Nf4Error::Io`].
    pub fn create(folder: impl AsRef<Path>, max_shard_bytes: usize) -> Result<Self, Nf4Error> {
        Self::start(folder.as_ref(), max_shard_bytes, false)
    }

    /// As [`create`](Self::create), but the folder may hold files. They stay until
    /// [`finish`](Self::finish), which takes away the weights of an earlier checkpoint and
    /// replaces files of the same name.
    ///
    /// # Errors
    /// [`Nf4Error::Io`].
    pub fn overwrite(folder: impl AsRef<Path>, max_shard_bytes: usize) -> Result<Self, Nf4Error> {
        Self::start(folder.as_ref(), max_shard_bytes, true)
    }

    fn start(folder: &Path, max_shard_bytes: usize, overwrite: bool) -> Result<Self, Nf4Error> {
        Ok(Self {
            staging: Staging::create(folder, overwrite)?,
            max_shard_bytes,
            open: Spool::default(),
            shards: Vec::new(),
            written: HashMap::new(),
            parameter_elems: 0,
            failed: None,
        })
    }

    /// Adds the quantized weight `prefix`; its tensors all come into the same shard.
    ///
    /// NF4 and FP4 are stored as bitsandbytes does it, NVFP4 and MXFP4 as compressed-tensors
    /// (`prefix_packed`, `prefix_scale`, `prefix_global_scale`), FP8 with `prefix_scale_inv` for tiles and
    /// `prefix_scale` for rows. A scale of the tensor that multiplies is stored as its reciprocal, so that
    /// values may differ in the last bit of an f32.
    ///
    /// Of bitsandbytes' types, `storage` is the dtype under which the codes are stored (bitsandbytes' `quant_storage`),
    /// usually [`Dtype::U8`]; `transposed` marks a weight that is the transpose of the parameter,
    /// see [`SafetensorsFile::is_transposed`](super::SafetensorsFile::is_transposed). With those
    /// of the file that it was read from, a weight is written byte for byte as bitsandbytes
    /// 0.50.2 wrote it.
    ///
    /// # Errors
    /// [`Nf4Error::Dtype`] for a storage that is not one of U8, BF16, F16 and F32 or whose
    /// elements the codes do not fill, and of the other types for one that is not U8, [`Nf4Error::Config`]
    /// for a transposed weight of one of these, [`Nf4Error::NonFinite`] for a scale of the tensor that multiplies
    /// and has no finite reciprocal, such as zero, [`Nf4Error::NameTaken`] for a key that was written before,
    /// [`Nf4Error::Io`].
    pub fn write_nf4(
        &mut self,
        prefix: &str,
        weight: &BlockTensor,
        storage: Dtype,
        transposed: bool,
    ) -> Result<(), Nf4Error> {
        let form = StoredForm::new(prefix, weight.quant_type(), storage, transposed)?;
        self.write_parts(prefix, weight.parts(), form)
    }

    /// The same of the parts of a weight, wherever they lie.
    pub(crate) fn write_parts(
        &mut self,
        prefix: &str,
        weight: WeightParts<'_>,
        form: StoredForm,
    ) -> Result<(), Nf4Error> {
        let tensors = layout::tensors(prefix, weight, form)?;
        self.push(&tensors, weight.shape.iter().product())
    }

    /// Adds a tensor as it is: `bytes` are its elements, row-major and little-endian.
    ///
    /// # Errors
    /// [`Nf4Error::Length`], in bytes, if they are not as many as dtype and shape ask for,
    /// [`Nf4Error::NameTaken`] for a key that was written before or is `__metadata__`,
    /// [`Nf4Error::Io`].
    pub fn write_tensor(
        &mut self,
        key: &str,
        dtype: Dtype,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<(), Nf4Error> {
        let expected = stored_bytes(dtype, shape).ok_or_else(|| Nf4Error::ElementCount {
            tensor: key.into(),
            shape: shape.to_vec(),
        })?;
        check_len(key, expected, bytes.len())?;
        let tensor = NewTensor {
            key: key.into(),
            dtype,
            shape: shape.to_vec(),
            bytes: bytes.into(),
        };
        self.push(&[tensor], shape.iter().product())
    }

    /// Adds a parameter of another checkpoint without decoding anything; a quantized one with all
    /// the tensors it is made of.
    ///
    /// # Errors
    /// [`Nf4Error::MissingKey`], for a quantized one those of
    /// [`SafetensorsFile::load_quantized`](super::SafetensorsFile::load_quantized), [`Nf4Error::NameTaken`]
    /// for a key that was written before, [`Nf4Error::Io`].
    pub fn copy(&mut self, source: &Checkpoint, parameter: &str) -> Result<(), Nf4Error> {
        if !source.is_quantized(parameter) {
            let info = source.tensor_info(parameter)?;
            let bytes = source.tensor_bytes(parameter)?;
            return self.write_tensor(parameter, info.dtype, info.shape, bytes);
        }
        let elems = source.weight_form(parameter)?.shape.iter().product();
        let parts = source.keys_of(parameter);
        let tensors = parts
            .iter()
            .map(|&key| {
                let info = source.tensor_info(key)?;
                Ok(NewTensor {
                    key: key.into(),
                    dtype: info.dtype,
                    shape: info.shape.to_vec(),
                    bytes: source.tensor_bytes(key)?.into(),
                })
            })
            .collect::<Result<Vec<_>, Nf4Error>>()?;
        self.push(&tensors, elems)
    }

    /// Adds another file, such as `config.json`; `name` is relative to the folder.
    ///
    /// # Errors
    /// [`Nf4Error::NameTaken`] for a name that was given before, that belongs to the weights or
    /// leads out of the folder, [`Nf4Error::Io`].
    pub fn write_file(&mut self, name: &str, content: &[u8]) -> Result<(), Nf4Error> {
        self.attempt(|writer| {
            let path = writer.staging.reserve(name)?;
            fs::write(&path, content).map_err(Nf4Error::io(writer.staging.folder().join(name)))
        })
    }

    /// Adds a copy of a file; `name` is relative to the folder.
    ///
    /// # Errors
    /// As [`write_file`](Self::write_file).
    pub fn copy_file(&mut self, name: &str, source: &Path) -> Result<(), Nf4Error> {
        let mut from = File::open(source).map_err(Nf4Error::io(source))?;
        self.attempt(|writer| {
            let path = writer.staging.reserve(name)?;
            // By content: the permissions of a read-only cache are not wanted.
            let copied = File::create(&path).and_then(|mut to| std::io::copy(&mut from, &mut to));
            copied
                .map(|_| ())
                .map_err(Nf4Error::io(writer.staging.folder().join(name)))
        })
    }

    /// Writes what is left and gives every file its final name.
    ///
    /// # Errors
    /// [`Nf4Error::Io`], [`Nf4Error::Safetensors`] if the names and shapes in one shard exceed
    /// the format's limit of 100 MB. Nothing is left behind then, unless a folder was being
    /// overwritten and the error came while the files were put in place.
    pub fn finish(mut self) -> Result<Written, Nf4Error> {
        self.attempt(|writer| {
            if !writer.open.tensors.is_empty() || writer.shards.is_empty() {
                writer.close_shard()?;
            }
            Ok(())
        })?;
        let count = self.shards.len();
        let mut weight_map = BTreeMap::new();
        let mut shards = Vec::with_capacity(count);
        for (number, (path, keys)) in std::mem::take(&mut self.shards).into_iter().enumerate() {
            let name = match count {
                1 => SINGLE_FILE.into(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            weight_map.extend(keys.into_iter().map(|key| (key, name.clone())));
            shards.push((path, name));
        }
        let size_bytes: usize = self.written.values().sum();
        let metadata = json!({
            "total_parameters": self.parameter_elems,
            "total_size": size_bytes,
        });
        let index = Map::from_iter([
            ("metadata".to_string(), metadata),
            ("weight_map".to_string(), json!(weight_map)),
        ]);
        let files = shards
            .iter()
            .map(|(_, name)| self.staging.folder().join(name))
            .collect();
        // A map of values always has a text.
        let index = python_json::to_string_pretty(&index).unwrap_or_default() + "\n";
        self.staging.commit(&shards, &index)?;
        Ok(Written {
            files,
            tensors: self.written.len(),
            size_bytes,
        })
    }

    /// Adds tensors that must not be parted, as transformers' rule has it: one that is larger
    /// than a shard gets its own and leaves the open one open.
    fn push(&mut self, tensors: &[NewTensor<'_>], elems: usize) -> Result<(), Nf4Error> {
        let taken = |tensor: &&NewTensor<'_>| {
            tensor.key == METADATA || self.written.contains_key(&tensor.key)
        };
        if let Some(tensor) = tensors.iter().find(taken) {
            return Err(Nf4Error::NameTaken {
                path: self.staging.folder().into(),
                name: tensor.key.clone(),
            });
        }
        self.attempt(|writer| writer.place(tensors))?;
        for tensor in tensors {
            self.written.insert(tensor.key.clone(), tensor.bytes.len());
        }
        self.parameter_elems += elems;
        Ok(())
    }

    /// Runs something that writes. Once it has failed, nothing more is written.
    fn attempt<T>(
        &mut self,
        write: impl FnOnce(&mut Self) -> Result<T, Nf4Error>,
    ) -> Result<T, Nf4Error> {
        if let Some(first) = &self.failed {
            return Err(Nf4Error::WriterFailed {
                path: self.staging.folder().into(),
                source: Box::new(first.clone()),
            });
        }
        let result = write(self);
        // A name that is not free is refused before anything is written.
        if let Err(error) = &result
            && !matches!(error, Nf4Error::NameTaken { .. })
        {
            self.failed = Some(error.clone());
        }
        result
    }

    /// Puts tensors into the open shard, or into one of their own.
    fn place(&mut self, tensors: &[NewTensor<'_>]) -> Result<(), Nf4Error> {
        let bytes: usize = tensors.iter().map(|tensor| tensor.bytes.len()).sum();
        if bytes > self.max_shard_bytes {
            let open = std::mem::take(&mut self.open);
            self.spool(tensors)?;
            self.close_shard()?;
            self.open = open;
            return Ok(());
        }
        if self.open.size_bytes + bytes > self.max_shard_bytes {
            self.close_shard()?;
        }
        self.spool(tensors)
    }

    fn spool(&mut self, tensors: &[NewTensor<'_>]) -> Result<(), Nf4Error> {
        let fault = Nf4Error::io(self.staging.folder());
        let file = match &mut self.open.file {
            Some(file) => file,
            none => none.insert(tempfile::tempfile_in(self.staging.hidden()).map_err(&fault)?),
        };
        for tensor in tensors {
            file.write_all(&tensor.bytes).map_err(&fault)?;
            let end = self.open.size_bytes + tensor.bytes.len();
            self.open.tensors.push(Spooled {
                key: tensor.key.clone(),
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                bytes: self.open.size_bytes..end,
            });
            self.open.size_bytes = end;
        }
        Ok(())
    }

    /// Turns the spooled tensors into a shard.
    fn close_shard(&mut self) -> Result<(), Nf4Error> {
        let spool = std::mem::take(&mut self.open);
        let folder = self.staging.folder();
        let name = format!("shard-{}", self.shards.len());
        let path = self.staging.hidden().join(name);
        // An empty file cannot be mapped everywhere.
        let map = match &spool.file {
            Some(file) if spool.size_bytes > 0 => {
                // SAFETY: the file has no name and is this writer's alone, so nobody changes it
                // while it is mapped.
                Some(unsafe { Mmap::map(file) }.map_err(Nf4Error::io(folder))?)
            }
            _ => None,
        };
        let bytes: &[u8] = map.as_deref().unwrap_or_default();
        let views = spool.tensors.iter().map(|tensor| {
            let bytes = &bytes[tensor.bytes.clone()];
            (tensor.key.as_str(), MappedView { tensor, bytes })
        });
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        safetensors::serialize_to_file(views, Some(metadata), &path)
            .map_err(Nf4Error::safetensors(folder))?;
        fs::set_permissions(&path, self.staging.permissions()?).map_err(Nf4Error::io(folder))?;
        let keys = spool.tensors.into_iter().map(|tensor| tensor.key).collect();
        self.shards.push((path, keys));
        Ok(())
    }
}

struct MappedView<'a> {
    tensor: &'a Spooled,
    bytes: &'a [u8],
}

impl View for MappedView<'_> {
    fn dtype(&self) -> Dtype {
        self.tensor.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.bytes.into()
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}
