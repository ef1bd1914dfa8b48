//! A checkpoint: one safetensors file, or a folder of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use burn::tensor::{Device, Tensor};
use serde::Deserialize;

use super::block_settings::BlockSettings;
use super::file::{SafetensorsFile, read_text};
use super::float::{load_float, load_tensor};
use super::json::UniqueMap;
use super::names::is_file_name;
use super::naming::{Naming, block_weights, is_of_activations, is_part_of_block, keys_of_block};
use super::orientation::Orientation;
use super::python_json;
use super::resolve::{Weights, find_weights};
use super::stored::{StoredTensor, TensorInfo, TensorSource};
use super::weight::{
    PARTS, QUANT_TYPES, find_weight, is_quantized, is_transposed, load_quantized, load_weight,
    prefix_of_quant_state, quant_state_key, quantized_weights,
};
use crate::error::Nf4Error;
use crate::format::{BlockTensor, FloatElement, FloatType, PackedImage, WeightForm};
use crate::op::BlockWeight;

/// A safetensors checkpoint, opened for reading: a file, or a Hugging Face folder.
///
/// A folder holds `model.safetensors`, or several shards and `model.safetensors.index.json`,
/// which names them; the tensors of one quantized weight may lie in different shards.
/// [`open`](Self::open) maps the files, which must not change while the checkpoint is open;
/// [`read`](Self::read) reads them into memory.
///
/// ```no_run
/// use burn_nf4::checkpoint::Checkpoint;
///
/// let checkpoint = Checkpoint::open("Llama-3.1-8B-bnb-4bit")?;
/// for prefix in checkpoint.quantized_weights() {
///     let weight = checkpoint.load_quantized(prefix)?;
///     println!("{prefix}: {:?}", weight.shape());
/// }
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<SafetensorsFile>,
    /// The file that holds each key.
    file_of: BTreeMap<String, usize>,
    /// What `config.json` says of weights whose tensors do not say it, once it was asked for.
    block_settings: OnceLock<Result<BlockSettings, Nf4Error>>,
}

/// How a file is opened.
type Open<'a> = &'a dyn Fn(&Path) -> Result<SafetensorsFile, Nf4Error>;

#[derive(Deserialize)]
struct Index {
    weight_map: UniqueMap<String>,
}

impl Checkpoint {
    /// Maps the file, or the files of the folder, and checks their headers. They must not change
    /// while the checkpoint is open: see [`SafetensorsFile::open`].
    ///
    /// Of a folder the files are read that transformers 5.24 reads, with the same meaning: the one
    /// that `transformers_weights` in `config.json` names, else [`SINGLE_FILE`], else all the shards
    /// that [`INDEX_FILE`] names. What the shards hold counts, even where the index says otherwise.
    ///
    /// [`SINGLE_FILE`]: super::SINGLE_FILE
    /// [`INDEX_FILE`]: super::INDEX_FILE
    ///
    /// # Errors
    /// Those of [`SafetensorsFile::open`] for each file, and for a folder
    /// - [`Nf4Error::NoWeights`] if it holds neither file, with those that may hold the weights in
    ///   a form that is not read, such as `pytorch_model.bin`
    /// - [`Nf4Error::Index`] if the index is malformed, names a file outside of the folder or a
    ///   tensor that no shard holds, or if two shards hold one tensor with different values
    /// - [`Nf4Error::ModelConfig`] if `transformers_weights` does not name such a file
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Nf4Error> {
        Self::open_with(path.as_ref(), &|path| SafetensorsFile::open(path))
    }

    /// Reads the file, or the files of the folder, into memory: as [`open`](Self::open), but
    /// whatever happens to them after that does no harm.
    ///
    /// # Errors
    /// Those of [`open`](Self::open).
    pub fn read(path: impl AsRef<Path>) -> Result<Self, Nf4Error> {
        Self::open_with(path.as_ref(), &|path| SafetensorsFile::read(path))
    }

    fn open_with(path: &Path, open: Open<'_>) -> Result<Self, Nf4Error> {
        if !path.is_dir() {
            return Self::of_file(path, open(path)?);
        }
        match find_weights(path)? {
            Weights::Single(file) => Self::of_file(path, open(&file)?),
            Weights::Index(index) => Self::of_shards(path, &index, open),
        }
    }

    fn of_file(path: &Path, file: SafetensorsFile) -> Result<Self, Nf4Error> {
        Ok(Self {
            path: path.into(),
            file_of: file.keys().map(|key| (key.to_string(), 0)).collect(),
            files: vec![file],
            block_settings: OnceLock::new(),
        })
    }

    fn of_shards(folder: &Path, index: &Path, open: Open<'_>) -> Result<Self, Nf4Error> {
        let fault = |message: String| Nf4Error::Index {
            path: index.into(),
            message,
        };
        let Index {
            weight_map: UniqueMap(weight_map),
        } = python_json::from_slice(&read_text(index)?)
            .map_err(|error| fault(error.to_string()))?;
        if let Some((key, name)) = weight_map.iter().find(|(_, name)| !is_file_name(name)) {
            return Err(fault(format!(
                "`{key}` is said to lie in `{name}`, which is not the name of a file in the folder"
            )));
        }
        let names: BTreeSet<&String> = weight_map.values().collect();
        if names.is_empty() {
            return Err(fault("names no shard".into()));
        }

        let mut checkpoint = Self {
            path: folder.into(),
            files: Vec::with_capacity(names.len()),
            file_of: BTreeMap::new(),
            block_settings: OnceLock::new(),
        };
        for name in names {
            let file = open(&folder.join(name))?;
            for key in file.keys() {
                let Some(&first) = checkpoint.file_of.get(key) else {
                    checkpoint
                        .file_of
                        .insert(key.into(), checkpoint.files.len());
                    continue;
                };
                let first = &checkpoint.files[first];
                if !first.stored(key)?.is_same(&file.stored(key)?) {
                    let first = first.path().display();
                    return Err(fault(format!("`{key}` in `{name}` is not that in {first}")));
                }
            }
            checkpoint.files.push(file);
        }
        match weight_map.keys().find(|key| !checkpoint.contains(key)) {
            None => Ok(checkpoint),
            Some(key) => Err(fault(format!("names `{key}`, which no shard holds"))),
        }
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files.
    pub fn files(&self) -> &[SafetensorsFile] {
        &self.files
    }

    /// The names of all tensors, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.file_of.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, key: &str) -> bool {
        self.file_of.contains_key(key)
    }

    /// Bytes of all tensors together.
    pub fn size_bytes(&self) -> usize {
        self.keys()
            .filter_map(|key| self.find(key))
            .map(|stored| stored.bytes.len())
            .sum()
    }

    /// The parameters of the model, sorted: every tensor that is not a part of a quantized weight and no
    /// [scale of activations](Self::activation_scales), and every quantized weight once.
    pub fn parameters(&self) -> Vec<&str> {
        let quantized = self.quantized_weights();
        let of_blocks = self.block_weights();
        let is_part = |key: &str| {
            PARTS
                .iter()
                .filter_map(|part| key.strip_suffix(part))
                .any(|prefix| quantized.binary_search(&prefix).is_ok())
                || prefix_of_quant_state(key).is_some()
                || is_part_of_block(key, &of_blocks)
                || is_of_activations(self, key, &of_blocks)
        };
        let mut parameters: Vec<&str> = self.keys().filter(|key| !is_part(key)).collect();
        // Some have no tensor of their own name.
        parameters.extend(of_blocks.iter().filter(|weight| !self.contains(weight)));
        parameters.sort_unstable();
        parameters
    }

    /// The quantized parameters, sorted, each by its own name: `X.weight` where the files have
    /// `X.weight_packed`.
    pub fn quantized_weights(&self) -> Vec<&str> {
        quantized_weights(self, || self.keys())
    }

    /// Those in NVFP4, MXFP4 and FP8.
    pub(super) fn block_weights(&self) -> Vec<&str> {
        block_weights(self, self.keys())
    }

    /// Whether the parameter `prefix` is quantized: whether the tensors are there that make a
    /// [format](super#the-tensors-of-one-weight).
    pub fn is_quantized(&self, prefix: &str) -> bool {
        is_quantized(self, prefix)
    }

    /// Whether the parameter `prefix` is stored transposed, see
    /// [`SafetensorsFile::is_transposed`].
    ///
    /// # Errors
    /// [`Nf4Error::MissingKey`], or [`Nf4Error::Shape`] if the codes have neither form.
    pub fn is_transposed(&self, prefix: &str) -> Result<bool, Nf4Error> {
        is_transposed(self, prefix)
    }

    /// Reads the quantized parameter `prefix`, bit for bit as it is stored.
    ///
    /// # Errors
    /// Those of [`SafetensorsFile::load_quantized`].
    pub fn load_quantized(&self, prefix: &str) -> Result<BlockTensor, Nf4Error> {
        load_quantized(self, prefix)
    }

    /// The quantized parameter `prefix` as the image that is decoded, and how the parameter lies to it.
    ///
    /// # Errors
    /// Those of [`load_quantized`](Self::load_quantized).
    pub(crate) fn load_image(&self, prefix: &str) -> Result<(PackedImage, Orientation), Nf4Error> {
        let weight = find_weight(self, prefix)?;
        let orientation = match (weight.transposed, Naming::of(self, prefix)) {
            (true, _) => Orientation::Transposed,
            (false, Some(Naming::Blocks)) if weight.shape.len() > 2 => Orientation::TransposedStack,
            _ => Orientation::AsStored,
        };
        Ok((PackedImage::of(&weight.parts()), orientation))
    }

    /// Reads a plain float tensor and its shape. It must be stored as `T`: nothing is converted.
    ///
    /// # Errors
    /// [`Nf4Error::MissingKey`], or [`Nf4Error::Dtype`] if it is stored as another type.
    pub fn load_float<T: FloatElement>(&self, key: &str) -> Result<(Vec<T>, Vec<usize>), Nf4Error> {
        load_float(self, key)
    }

    /// Reads the quantized parameter `prefix` to a device, without a copy in host memory beside
    /// the one that is handed to the device.
    ///
    /// The parameter is loaded, not the stored matrix: where
    /// [`is_transposed`](Self::is_transposed) is true, the result is a weight that
    /// [knows it](BlockWeight::is_transposed).
    ///
    /// # Errors
    /// Those of [`SafetensorsFile::load_quantized`], and [`Nf4Error::NotAMatrix`] for a transposed
    /// weight of more than two dimensions.
    pub fn load_weight(&self, prefix: &str, device: &Device) -> Result<BlockWeight, Nf4Error> {
        load_weight(self, prefix, device)
    }

    /// What the quantized parameter `prefix` is, apart from its values: what a module must have
    /// there to load it into.
    ///
    /// # Errors
    /// Those of [`load_weight`](Self::load_weight).
    pub fn weight_form(&self, prefix: &str) -> Result<WeightForm, Nf4Error> {
        find_weight(self, prefix)?.form(prefix)
    }

    /// Reads a plain float tensor to a device: as `dtype`, rounded to nearest, or as it is stored.
    ///
    /// # Errors
    /// [`Nf4Error::MissingKey`], [`Nf4Error::Dtype`] unless it is stored as F16, BF16 or F32,
    /// [`Nf4Error::Rank`] if it does not have `D` dimensions, [`Nf4Error::NonFinite`] for a
    /// finite value that `dtype` cannot hold, [`Nf4Error::DeviceDtype`] if the device has no such
    /// type.
    pub fn load_tensor<const D: usize>(
        &self,
        key: &str,
        dtype: Option<FloatType>,
        device: &Device,
    ) -> Result<Tensor<D>, Nf4Error> {
        load_tensor(self, key, dtype, device)
    }

    /// The dtype and shape of a tensor, as stored.
    ///
    /// # Errors
    /// [`Nf4Error::MissingKey`].
    pub fn tensor_info(&self, key: &str) -> Result<TensorInfo<'_>, Nf4Error> {
        Ok(self.stored(key)?.info)
    }

    /// The bytes of a tensor as they are stored, little-endian.
    ///
    /// # Errors
    /// [`Nf4Error::MissingKey`], [`Nf4Error::FileChanged`].
    pub fn tensor_bytes(&self, key: &str) -> Result<&[u8], Nf4Error> {
        Ok(self.stored(key)?.bytes)
    }
}

impl Checkpoint {
    /// Bytes of a parameter: of its tensor, or of all the tensors of a quantized one.
    pub fn parameter_bytes(&self, parameter: &str) -> usize {
        self.keys_of(parameter)
            .into_iter()
            .filter_map(|key| self.find(key))
            .map(|stored| stored.bytes.len())
            .sum()
    }

    fn block_settings(&self) -> Result<&BlockSettings, Nf4Error> {
        let settings = self
            .block_settings
            .get_or_init(|| BlockSettings::read(self));
        settings.as_ref().map_err(Clone::clone)
    }

    /// The tensors that a parameter is made of: itself, and the parts of a quantized one.
    pub(super) fn keys_of<'a>(&'a self, parameter: &str) -> Vec<&'a str> {
        let states = QUANT_TYPES.map(|quant_type| quant_state_key("", quant_type));
        let mut keys = keys_of_block(self, parameter);
        if keys.is_empty() {
            let parts = std::iter::once("").chain(PARTS);
            let parts = parts.chain(states.iter().map(String::as_str));
            keys.extend(parts.map(|part| format!("{parameter}{part}")));
        }
        keys.iter()
            .filter_map(|key| self.file_of.get_key_value(key))
            .map(|(key, _)| key.as_str())
            .collect()
    }
}

impl TensorSource for Checkpoint {
    fn path(&self) -> &Path {
        &self.path
    }

    fn find(&self, key: &str) -> Option<StoredTensor<'_>> {
        self.files[*self.file_of.get(key)?].find(key)
    }

    fn block_dtype(&self) -> Result<FloatType, Nf4Error> {
        self.block_settings()?.dtype()
    }

    fn check_tile(&self) -> Result<(), Nf4Error> {
        self.block_settings()?.check_tile()
    }

    fn check_unchanged(&self, key: &str) -> Result<(), Nf4Error> {
        match self.file_of.get(key) {
            Some(&file) => self.files[file].check_unchanged(key),
            None => Ok(()),
        }
    }
}
