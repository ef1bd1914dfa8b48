//! A model as a Hugging Face folder.

use std::path::Path;

use burn::module::{ModuleVisitor, Param};
use burn::tensor::{Bool, DType, Int, Tensor, TensorData};
use serde_json::{Map, Value};

use super::check::{check_materialized, check_model, check_types, refuse_branches};
use super::layers::LinearLayers;
use super::names::of_linear;
use super::stack::{Stacks, module_of};
use crate::checkpoint::convert::{
    ClaimFile, ModelConfig, Quantized, copy_other_files, ignore_entry, is_embedding, is_head,
    skip_entry_of, start_writer,
};
use crate::checkpoint::names::module_of_weight;
use crate::checkpoint::parameters::{Kind, ParameterPath};
use crate::checkpoint::stored_form::StoredForm;
use crate::checkpoint::{Checkpoint, CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, Dtype, Written};
use crate::error::Nf4Error;
use crate::format::{
    BlockTensor, FloatType, PackedLayout, QuantConfig, WeightForm, check_header_words, check_len,
};
use crate::nn::in_floats;
use crate::peft::is_tied_by_name;

/// How to write the folder of a model.
///
/// `config.json` gets a `quantization_config` with the form of the quantized layers and a list of the
/// linear layers that are not, or loses the one that it has. transformers needs the other entries too,
/// `architectures` among them: give a `source` that has them, or the entries. Without either there is no
/// `config.json`, unless there are quantized layers, and the folder is for
/// [`load_checkpoint`](LinearLayers::load_checkpoint).
///
/// The `quantization_config` has one form for all: NF4 and FP4 are bitsandbytes', NVFP4, MXFP4 and FP8 by rows
/// compressed-tensors', FP8 in tiles is DeepSeek's, and MXFP4 is gpt-oss' where it is whole
/// [stacks](LinearLayers::stacked) of experts and nothing else. A model with weights of two types is refused
/// before anything is written, but for NF4 beside FP4: quantize all to one type, or decode those of the other.
#[derive(Debug, Clone)]
pub struct SaveFolder<'a> {
    /// Where `config.json`, the tokenizer and all other files come from.
    pub source: Option<&'a Checkpoint>,
    /// The entries of `config.json`, in place of those of the source.
    pub model_config: Option<Map<String, Value>>,
    /// The dtype under which codes are stored: U8, and of NF4 and FP4 also BF16, F16 or F32.
    pub storage: Dtype,
    /// What transformers computes in (`bnb_4bit_compute_dtype`); `None` for the dtype that the first
    /// quantized weight had.
    pub compute_dtype: Option<FloatType>,
    /// The most bytes of tensors in a file, but for a weight that is larger.
    pub max_shard_bytes: usize,
    /// Whether to write into a folder that is not empty.
    pub overwrite: bool,
}

impl Default for SaveFolder<'_> {
    fn default() -> Self {
        Self {
            source: None,
            model_config: None,
            storage: Dtype::U8,
            compute_dtype: None,
            max_shard_bytes: DEFAULT_MAX_SHARD_BYTES,
            overwrite: false,
        }
    }
}

pub(super) fn save<M: LinearLayers>(
    model: &M,
    folder: &Path,
    options: &SaveFolder<'_>,
) -> Result<Written, Nf4Error> {
    check_model(model)?;
    check_materialized(model)?;
    refuse_branches(model, "to save: merge it, or take it off")?;
    check_types(model)?;
    let mut config = match (&options.model_config, options.source) {
        (Some(entries), _) => Some(ModelConfig::from_entries(entries.clone())),
        (None, Some(source)) => ModelConfig::read(source)?,
        (None, None) => None,
    };
    let writer = match options.source {
        Some(source) => start_writer(source, folder, options.max_shard_bytes, options.overwrite)?,
        None if options.overwrite => CheckpointWriter::overwrite(folder, options.max_shard_bytes)?,
        None => CheckpointWriter::create(folder, options.max_shard_bytes)?,
    };
    // Where transformers would not see a tie by the names, the head is written too.
    let tied = model.tied_head();
    let copied = tied
        .as_ref()
        .filter(|tied| !is_tied_by_name(&tied.embedding, &tied.head));
    let mut saver = Saver {
        path: ParameterPath::new(true),
        name: M::checkpoint_name,
        storage: options.storage,
        copy: copied.map(|tied| {
            let [table, head] =
                [&tied.embedding, &tied.head].map(|module| of_linear(module, "weight"));
            (table, head)
        }),
        stacks: Stacks::of(model),
        writer,
        floats: Vec::new(),
        quantized: Vec::new(),
        kept: Vec::new(),
        failed: None,
    };
    model.visit(&mut saver);
    if let Some(error) = saver.failed {
        return Err(error);
    }
    let mut writer = saver.writer;
    if let Some(source) = options.source {
        copy_other_files(&mut writer, source, ClaimFile::Replaced)?;
    }

    for (name, layer) in model.linears() {
        if !layer.is_quantized() {
            // Of experts in floats beside packed ones the whole is named.
            let place = model.stacked(&of_linear(&name, "weight"));
            let experts = place.filter(|_| saver.stacks.are_packed());
            saver
                .kept
                .push(experts.map_or(name, |place| module_of(&place.stack).into()));
        }
    }
    saver.kept.extend(copied.map(|tied| tied.head.clone()));
    saver.kept.sort();
    saver.kept.dedup();
    if let Some((_, quantization, dtype)) = saver.quantized.first() {
        let config = config.get_or_insert_with(|| ModelConfig::from_entries(Map::new()));
        let compute_dtype = options.compute_dtype.unwrap_or(*dtype);
        let keys = saver
            .quantized
            .iter()
            .map(|(key, ..)| key.clone())
            .collect();
        let ignore = ignore_entry(&keys, saver.kept.iter().cloned());
        let skip_entry = skip_entry_of(&keys, saver.kept.into_iter());
        config.set_quantized(&Quantized {
            config: *quantization,
            storage: options.storage,
            compute_dtype,
            skip_entry: skip_entry.as_deref(),
            ignore: &ignore,
            embeddings: keys.iter().any(|key| is_embedding(module_of_weight(key))),
            expert_stacks: saver.stacks.are_packed(),
        });
    } else if let Some(config) = config.as_mut().filter(|config| !config.claims().is_empty()) {
        config.set_dense();
    }
    if let Some(mut config) = config {
        if let [dtype] = saver.floats.as_slice() {
            config.set_dtype(*dtype);
        }
        let head = model.head_name();
        let is_head = |name: &str| is_head(name) || head.as_deref() == Some(name);
        let has_own_head = model.linears().iter().any(|(name, _)| is_head(name));
        match (&tied, config.ties_embeddings()) {
            (None, Some(true)) if has_own_head => config.set_tied(false),
            (Some(_), Some(false)) => config.set_tied(true),
            _ => {}
        }
        config.write(&mut writer)?;
    }
    writer.finish()
}

/// Writes each parameter that it visits.
struct Saver {
    path: ParameterPath,
    name: fn(&str) -> String,
    storage: Dtype,
    /// A parameter to write under a second name too.
    copy: Option<(String, String)>,
    /// Parameters to write as one tensor.
    stacks: Stacks,
    writer: CheckpointWriter,
    /// The dtypes of parameters of floats.
    floats: Vec<FloatType>,
    /// Weights in 4 bit, by key.
    quantized: Vec<(String, QuantConfig, FloatType)>,
    /// Linear layers of floats that are no [`AnyLinear`](crate::nn::AnyLinear).
    kept: Vec<String>,
    /// The first error.
    failed: Option<Nf4Error>,
}

impl Saver {
    fn attempt(&mut self, write: impl FnOnce(&mut Self) -> Result<(), Nf4Error>) {
        if self.failed.is_none() {
            self.failed = write(self).err();
        }
    }

    fn note_type(&mut self, dtype: DType, name: &str) {
        if let Ok(dtype) = FloatType::from_dtype(dtype, name)
            && !self.floats.contains(&dtype)
        {
            self.floats.push(dtype);
        }
    }

    fn write(&mut self, name: &str, data: &TensorData, shape: &[usize]) -> Result<(), Nf4Error> {
        let dtype = stored_dtype(data.dtype()).ok_or_else(|| Nf4Error::Dtype {
            tensor: name.into(),
            expected: "one that safetensors has".into(),
            given: format!("{:?}", data.dtype()),
        })?;
        let mut bytes = data.as_bytes().to_vec();
        if cfg!(target_endian = "big") {
            let size = dtype.bitsize() / 8;
            bytes.chunks_exact_mut(size).for_each(<[u8]>::reverse);
        }
        self.writer.write_tensor(name, dtype, shape, &bytes)
    }
}

impl ModuleVisitor for Saver {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, container_type: &str) {
        self.path.exit(container_type);
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.attempt(|saver| {
            let value = in_floats(param.val()).detach();
            let kind = Kind::Float(value.dims().to_vec());
            let parameter = saver.path.parameter(value.device(), kind);
            let name = (saver.name)(parameter.stored_path());
            if let Some(place) = saver.stacks.take(&name) {
                let data = value.into_data();
                saver.note_type(data.dtype(), &name);
                return match saver.stacks.add(&place, data) {
                    Some((data, shape)) => saver.write(&place.stack, &data, &shape),
                    None => Ok(()),
                };
            }
            let shape = parameter.stored_shape(&value.dims());
            let is_matrix = parameter.transposed;
            let data = match is_matrix {
                true => value.swap_dims(0, 1).into_data(),
                false => value.into_data(),
            };
            saver.note_type(data.dtype(), &name);
            if let (true, Some(module)) = (is_matrix, name.strip_suffix(".weight")) {
                saver.kept.push(module.into());
            }
            if let Some((_, head)) = saver.copy.take_if(|(table, _)| *table == name) {
                saver.write(&head, &data, &shape)?;
            }
            saver.write(&name, &data, &shape)
        });
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.attempt(|saver| {
            let value = param.val();
            let kind = saver.path.int_kind(value.dims().to_vec());
            let parameter = saver.path.parameter(value.device(), kind);
            let name = (saver.name)(parameter.stored_path());
            let Kind::Packed(form) = parameter.kind else {
                return saver.write(&name, &value.to_data(), &value.dims());
            };
            let weight =
                packed_weight(value.reshape([-1]), &form).map_err(|error| error.with_key(&name))?;
            if let Some(place) = saver.stacks.take(&name) {
                if let Some(stack) = saver.stacks.add_packed(&place, &weight)? {
                    let written =
                        saver
                            .writer
                            .write_parts(&place.stack, stack.parts(), StoredForm::Blocks);
                    written?;
                    saver.quantized.push((place.stack, form.config, form.dtype));
                }
                return Ok(());
            }
            let (storage, transposed) = (saver.storage, form.transposed);
            saver
                .writer
                .write_nf4(&name, &weight, storage, transposed)?;
            saver.quantized.push((name, form.config, form.dtype));
            Ok(())
        });
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.attempt(|saver| {
            let value = param.val();
            let kind = Kind::Bool(value.dims().to_vec());
            let parameter = saver.path.parameter(value.device(), kind);
            let name = (saver.name)(parameter.stored_path());
            // A store of a device may be wider than a byte.
            let values: Vec<bool> = value.to_data().iter::<bool>().collect();
            let bytes: Vec<u8> = values.into_iter().map(u8::from).collect();
            saver
                .writer
                .write_tensor(&name, Dtype::BOOL, &value.dims(), &bytes)
        });
    }
}

/// The weight of a packed tensor, which a module mapper may have replaced by another.
fn packed_weight(packed: Tensor<1, Int>, form: &WeightForm) -> Result<BlockTensor, Nf4Error> {
    let layout = PackedLayout::for_shape(&form.shape, form.config)?;
    let data = packed.into_data();
    if data.dtype() != DType::U32 {
        return Err(Nf4Error::Dtype {
            tensor: "packed weight".into(),
            expected: "U32".into(),
            given: format!("{:?}", data.dtype()),
        });
    }
    let words: &[u32] = bytemuck::cast_slice(data.as_bytes());
    check_len("packed weight", layout.words(), words.len())?;
    check_header_words(&layout.form_header(form), &words[layout.header_start()..])?;
    BlockTensor::from_image(words, &layout, &form.stored_shape(), form.dtype)
}

/// The dtype under which numbers of a tensor are stored.
fn stored_dtype(dtype: DType) -> Option<Dtype> {
    Some(match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 | DType::Flex32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::I16 => Dtype::I16,
        DType::I8 => Dtype::I8,
        DType::U64 => Dtype::U64,
        DType::U32 => Dtype::U32,
        DType::U16 => Dtype::U16,
        DType::U8 => Dtype::U8,
        _ => return None,
    })
}
