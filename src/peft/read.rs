//! The folder of an adapter, read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::adapter::{ADAPTER_FILE, Adapter, CONFIG_FILE, LoraModule};
use super::config::LoraConfig;
use super::keys::{Name, Part, Place};
use super::setting::TargetModules;
use super::tensor::DenseTensor;
use crate::checkpoint::{Dtype, SafetensorsFile, read_text};
use crate::error::Nf4Error;

/// What PEFT wrote before it wrote safetensors.
const PICKLE_FILE: &str = "adapter_model.bin";

impl Adapter {
    /// Reads the folder of an adapter.
    ///
    /// Every spelling of the keys that PEFT 0.21 and transformers 5.24 read is read. Whether the
    /// adapter has all that its settings ask for can only be told beside a base model: see
    /// [`check_base`](Self::check_base). Here it is refused if it has nothing at all.
    ///
    /// # Errors
    /// Those of [`LoraConfig::parse`] and [`SafetensorsFile::open`],
    /// [`Nf4Error::AdapterLacks`] for an adapter without a tensor, [`Nf4Error::PickledAdapter`] for
    /// one that is there as `adapter_model.bin` only, and naming the full key
    /// - [`Nf4Error::AdapterKeys`] for tensors that are missing beside others of their module, or
    ///   that the settings do not ask for, all of them together
    /// - [`Nf4Error::AdapterTensor`] for a tensor that DeepSpeed ZeRO-3 or FSDP left empty, that is a
    ///   part of a quantized weight or of an adapter with a name of its own, or that two keys
    ///   give different values
    /// - [`Nf4Error::Shape`] for a tensor that does not fit the others or the rank
    /// - [`Nf4Error::Dtype`] unless it is F16, BF16 or F32
    /// - [`Nf4Error::NonFinite`] if it holds a NaN or an infinity
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, Nf4Error> {
        let adapter = Self::open_partial(folder)?;
        let is_empty = adapter.modules().next().is_none()
            && adapter.embeddings().next().is_none()
            && adapter.full_tensors().next().is_none();
        match is_empty {
            false => Ok(adapter),
            true => Err(Nf4Error::AdapterLacks {
                missing: adapter.asked_for(),
            }),
        }
    }

    /// Reads the folder of an adapter, even of one without a tensor.
    ///
    /// # Errors
    /// Those of [`open`](Self::open) but for [`Nf4Error::AdapterLacks`].
    pub fn open_partial(folder: impl AsRef<Path>) -> Result<Self, Nf4Error> {
        let folder = folder.as_ref();
        let config_path = folder.join(CONFIG_FILE);
        let json = read_text(&config_path)?;
        let mut adapter = Self::new(LoraConfig::parse(&json, &config_path)?)?;
        let (path, pickle) = (folder.join(ADAPTER_FILE), folder.join(PICKLE_FILE));
        if !path.exists() && pickle.exists() {
            return Err(Nf4Error::PickledAdapter { path: pickle });
        }
        let file = SafetensorsFile::open(path)?;
        let mut reader = Reader {
            file: &file,
            modules: BTreeMap::new(),
            full: BTreeMap::new(),
        };
        reader.read(&adapter)?;
        for (path, parts) in reader.modules {
            parts.insert_into(&mut adapter, &path)?;
        }
        for (parameter, (_, tensor)) in reader.full {
            adapter.insert_full(&parameter, tensor)?;
        }
        Ok(adapter)
    }

    /// What the settings ask for, in their own words.
    fn asked_for(&self) -> Vec<String> {
        let config = self.config();
        let targets = match &config.target_modules {
            TargetModules::List(names) => names.clone(),
            TargetModules::Regex(pattern) => vec![pattern.clone()],
            TargetModules::AllLinear => vec!["all-linear".into()],
        };
        let saved = config.modules_to_save.iter().flatten().cloned();
        targets.into_iter().chain(saved).collect()
    }
}

/// A tensor, and the key that it came from.
type Keyed = (String, DenseTensor);

/// The tensors of a file while they are being sorted.
struct Reader<'a> {
    file: &'a SafetensorsFile,
    modules: BTreeMap<String, Parts>,
    full: BTreeMap<String, Keyed>,
}

impl Reader<'_> {
    fn read(&mut self, adapter: &Adapter) -> Result<(), Nf4Error> {
        let names: Vec<(&str, Name)> = self
            .file
            .keys()
            .map(|key| (key, Name::parse(key)))
            .collect();
        let branches: BTreeSet<String> = names
            .iter()
            .filter_map(|(_, name)| match name {
                Name::Part(module, _) => Some(module.clone()),
                _ => None,
            })
            .collect();
        let (config, matcher) = (adapter.config(), adapter.matcher());

        let mut unexpected = Vec::new();
        for (key, name) in names {
            self.check_quantized(key, &name)?;
            if let Name::Named(name) = &name {
                let reason = format!(
                    "is of an adapter with the name `{name}`; PEFT leaves the name out when it \
                     saves an adapter, and only `default` is read beside that"
                );
                return Err(refused(self.file, key, reason));
            }
            let of_base = matches!(&name, Name::Base(module, _) if matcher.is_target(module)?);
            let has_branch = |module: &str| branches.contains(module);
            match Place::of(name, config, matcher, has_branch)? {
                Place::Part(module, part) => {
                    self.check_gathered(key, part)?;
                    let Parts(parts) = self.modules.entry(module).or_default();
                    read_into(parts, part, self.file, key)?;
                }
                Place::Full(parameter) => {
                    if of_base && let Some((module, _)) = parameter.rsplit_once('.') {
                        // A layer that is under a branch asks for the branch.
                        self.modules.entry(module.into()).or_default();
                    }
                    self.check_filled(key)?;
                    read_into(&mut self.full, parameter, self.file, key)?;
                }
                Place::Unused => {}
                Place::Unexpected => unexpected.push(key.to_string()),
            }
        }
        let stray = self.modules.values().flat_map(Parts::stray);
        unexpected.extend(stray.map(String::from));
        unexpected.sort();
        let missing = self.modules.iter();
        let missing: Vec<String> = missing
            .flat_map(|(path, parts)| parts.missing(path, config.use_dora))
            .collect();
        if missing.is_empty() && unexpected.is_empty() {
            return Ok(());
        }
        Err(Nf4Error::AdapterKeys {
            path: self.file.path().into(),
            missing,
            unexpected,
        })
    }

    /// The layer under a branch, in the form that bitsandbytes has packed it into.
    fn check_quantized(&self, key: &str, name: &Name) -> Result<(), Nf4Error> {
        let Name::Base(_, parameter) = name else {
            return Ok(());
        };
        let dtype = self.file.tensor_info(key)?.dtype;
        if !parameter.starts_with("weight.") && !matches!(dtype, Dtype::U8 | Dtype::I8) {
            return Ok(());
        }
        let reason = "is a part of a quantized weight of the base model, which is not read from an \
                      adapter; save the adapter with `save_embedding_layers=False`";
        Err(refused(self.file, key, reason.into()))
    }

    /// PEFT warns of such tensors when it saves them (`_validate_lora_adapter_state_dict`).
    fn check_gathered(&self, key: &str, part: Part) -> Result<(), Nf4Error> {
        self.check_filled(key)?;
        let shape = self.file.tensor_info(key)?.shape;
        let is_vector = matches!(part, Part::Magnitude | Part::Bias);
        match is_vector || shape.len() > 1 {
            true => Ok(()),
            false => Err(self.not_gathered(key, shape)),
        }
    }

    fn check_filled(&self, key: &str) -> Result<(), Nf4Error> {
        let shape = self.file.tensor_info(key)?.shape;
        match shape.contains(&0) {
            false => Ok(()),
            true => Err(self.not_gathered(key, shape)),
        }
    }

    fn not_gathered(&self, key: &str, shape: &[usize]) -> Nf4Error {
        let reason = format!(
            "has shape {shape:?}: DeepSpeed ZeRO-3 or FSDP had not gathered the tensor when it was \
             saved, and its values are not in this file; save again with \
             `stage3_gather_16bit_weights_on_model_save`, under \
             `deepspeed.zero.GatheredParameters`, or with FSDP's full state dict"
        );
        refused(self.file, key, reason)
    }
}

fn refused(file: &SafetensorsFile, key: &str, reason: String) -> Nf4Error {
    Nf4Error::AdapterTensor {
        path: file.path().into(),
        key: key.into(),
        reason,
    }
}

/// Reads a tensor. PEFT itself writes some under two names, with the same values.
fn read_into<N: Ord>(
    tensors: &mut BTreeMap<N, Keyed>,
    name: N,
    file: &SafetensorsFile,
    key: &str,
) -> Result<(), Nf4Error> {
    let tensor = DenseTensor::read(file, key)?;
    if let Some((other, known)) = tensors.get(&name)
        && *known != tensor
    {
        let reason = format!("and `{other}` are the same tensor with different values");
        return Err(refused(file, key, reason));
    }
    tensors.insert(name, (key.into(), tensor));
    Ok(())
}

/// The tensors of a module while they are being collected.
#[derive(Default)]
struct Parts(BTreeMap<Part, Keyed>);

impl Parts {
    /// By the factors that are there; a stray one of the other kind makes no difference.
    fn is_embedding(&self) -> bool {
        let count = |is_embedding| {
            let factors = Part::factors(is_embedding);
            factors
                .iter()
                .filter(|part| self.0.contains_key(part))
                .count()
        };
        count(true) > count(false)
    }

    /// Factors of the other kind than the module's.
    fn stray(&self) -> impl Iterator<Item = &str> {
        let stray = Part::factors(!self.is_embedding()).into_iter();
        stray.filter_map(|part| self.0.get(&part).map(|(key, _)| key.as_str()))
    }

    /// The keys that must be there and are not.
    fn missing(&self, path: &str, use_dora: bool) -> Vec<String> {
        let factors = Part::factors(self.is_embedding()).into_iter();
        factors
            .chain(use_dora.then_some(Part::Magnitude))
            .filter(|part| !self.0.contains_key(part))
            .map(|part| part.key(path))
            .collect()
    }

    /// Puts the module into an adapter. No factor may be missing.
    fn insert_into(mut self, adapter: &mut Adapter, path: &str) -> Result<(), Nf4Error> {
        let is_embedding = self.is_embedding();
        let mut take = |part| self.0.remove(&part).map(|(_, tensor)| tensor);
        let [a, b] = Part::factors(is_embedding).map(&mut take);
        let (Some(lora_a), Some(lora_b)) = (a, b) else {
            return Ok(());
        };
        let module = LoraModule {
            lora_a,
            lora_b,
            magnitude: take(Part::Magnitude),
            bias: take(Part::Bias),
        };
        match is_embedding {
            false => adapter.insert(path, module),
            true => adapter.insert_embedding(path, module),
        }
    }
}
