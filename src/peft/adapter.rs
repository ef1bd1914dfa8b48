//! An adapter in host memory, and its folder.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::serialize_to_file;

use super::config::LoraConfig;
use super::keys::{Part, full_key, is_full, is_saved};
use super::matcher::ModuleMatcher;
use super::tensor::DenseTensor;
use crate::error::Nf4Error;

/// The file of an adapter's settings.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// The file of an adapter's tensors.
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";

/// A LoRA adapter: its settings, and the tensors of each adapted module, bit for bit as stored.
///
/// Modules are named by their path in the base model, such as
/// `model.layers.0.self_attn.q_proj`.
///
/// ```no_run
/// use burn_nf4::peft::Adapter;
///
/// let adapter = Adapter::open("tiny-llama-lora")?;
/// for (path, module) in adapter.modules() {
///     println!("{path}: rank {}, factor {}", module.rank(), adapter.scale(path)?);
/// }
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Adapter {
    config: LoraConfig,
    pub(super) matcher: ModuleMatcher,
    pub(super) modules: BTreeMap<String, LoraModule>,
    pub(super) embeddings: BTreeMap<String, LoraModule>,
    pub(super) full: BTreeMap<String, DenseTensor>,
}

/// The tensors of one adapted module.
///
/// An embedding is taken as the linear layer from a token to its vector: `in_features` is the size
/// of the vocabulary and `out_features` that of a vector, so that its table is `[in_features,
/// out_features]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraModule {
    /// `[r, in_features]`.
    pub lora_a: DenseTensor,
    /// `[out_features, r]`.
    pub lora_b: DenseTensor,
    /// `[out_features]`, with DoRA.
    pub magnitude: Option<DenseTensor>,
    /// The trained bias of the base layer, `[out_features]`.
    pub bias: Option<DenseTensor>,
}

impl LoraModule {
    /// Rank of the branch.
    pub fn rank(&self) -> usize {
        self.lora_b.shape().get(1).copied().unwrap_or(0)
    }

    /// `[out_features, in_features]` of the adapted weight.
    pub fn dims(&self) -> [usize; 2] {
        let size = |tensor: &DenseTensor, axis| tensor.shape().get(axis).copied().unwrap_or(0);
        [size(&self.lora_b, 0), size(&self.lora_a, 1)]
    }

    fn parts(&self, is_embedding: bool) -> impl Iterator<Item = (Part, &DenseTensor)> {
        let [a, b] = Part::factors(is_embedding);
        let optional = [(Part::Magnitude, &self.magnitude), (Part::Bias, &self.bias)];
        let optional = optional.into_iter();
        [(a, &self.lora_a), (b, &self.lora_b)]
            .into_iter()
            .chain(optional.filter_map(|(part, tensor)| Some((part, tensor.as_ref()?))))
    }

    /// Shapes agree with each other and with the rank, and everything is finite.
    fn check(&self, path: &str, rank: usize, is_embedding: bool) -> Result<(), Nf4Error> {
        let [d_output, d_input] = self.dims();
        for (part, tensor) in self.parts(is_embedding) {
            let expected: &[usize] = match part {
                Part::A | Part::EmbeddingA => &[rank, d_input],
                Part::B | Part::EmbeddingB => &[d_output, rank],
                Part::Magnitude | Part::Bias => &[d_output],
            };
            tensor.check_shape(expected, &part.key(path))?;
            if expected.contains(&0) {
                return Err(Nf4Error::ElementCount {
                    tensor: part.key(path),
                    shape: expected.to_vec(),
                });
            }
            tensor.check_finite(&part.key(path))?;
        }
        Ok(())
    }
}

impl Adapter {
    /// An adapter without tensors, to be filled by [`insert_layer`](Self::insert_layer).
    ///
    /// # Errors
    /// Those of [`LoraConfig::check`].
    pub fn new(config: LoraConfig) -> Result<Self, Nf4Error> {
        config.check()?;
        Ok(Self {
            matcher: config.matcher()?,
            config,
            modules: BTreeMap::new(),
            embeddings: BTreeMap::new(),
            full: BTreeMap::new(),
        })
    }

    /// Writes the folder as PEFT does, creating it where it is not there.
    ///
    /// Each file is written beside the old one first and then put in its place, so that a process
    /// that ends midway leaves whole files.
    ///
    /// # Errors
    /// [`Nf4Error::Io`].
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<(), Nf4Error> {
        let folder = folder.as_ref();
        fs::create_dir_all(folder).map_err(Nf4Error::io(folder))?;
        let mut tensors: Vec<(String, &DenseTensor)> = Vec::new();
        for (is_embedding, modules) in [(false, &self.modules), (true, &self.embeddings)] {
            for (path, module) in modules {
                let parts = module.parts(is_embedding);
                let path = self.matcher.named(path);
                tensors.extend(parts.map(|(part, tensor)| (part.key(&path), tensor)));
            }
        }
        let full = self.full.iter();
        tensors.extend(full.map(|(parameter, tensor)| (self.stored_key(parameter), tensor)));

        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let file = folder.join(ADAPTER_FILE);
        replace(&file, |path| {
            // safetensors makes files that only their owner can read.
            let usual = fs::File::create(path).and_then(|file| file.metadata());
            let usual = usual.map_err(Nf4Error::io(&file))?.permissions();
            serialize_to_file(tensors, Some(metadata), path)
                .map_err(Nf4Error::safetensors(&file))?;
            fs::set_permissions(path, usual).map_err(Nf4Error::io(&file))
        })?;
        let file = folder.join(CONFIG_FILE);
        replace(&file, |path| {
            fs::write(path, self.config.to_json()).map_err(Nf4Error::io(&file))
        })
    }

    /// The settings.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The compiled settings: which modules are adapted, and how.
    pub fn matcher(&self) -> &ModuleMatcher {
        &self.matcher
    }

    /// The factor of a module's branch.
    ///
    /// # Errors
    /// Those of [`ModuleMatcher::scale`].
    pub fn scale(&self, module: &str) -> Result<f64, Nf4Error> {
        self.matcher.scale(module)
    }

    /// The adapted modules by path, sorted.
    pub fn modules(&self) -> impl Iterator<Item = (&str, &LoraModule)> {
        self.modules
            .iter()
            .map(|(path, module)| (path.as_str(), module))
    }

    /// The tensors of a module.
    pub fn module(&self, path: &str) -> Option<&LoraModule> {
        self.modules.get(path)
    }

    /// Sets the tensors of a module.
    ///
    /// # Errors
    /// [`Nf4Error::NotAdapted`] if the settings do not select it, [`Nf4Error::Shape`] if a tensor
    /// does not fit the others or the rank, [`Nf4Error::NonFinite`] if one holds a NaN or an
    /// infinity, [`Nf4Error::Config`] if it has a magnitude without `use_dora` or the other way
    /// round, or a bias without `bias`.
    pub fn insert(&mut self, path: &str, module: LoraModule) -> Result<(), Nf4Error> {
        self.check_module(path, &module, false)?;
        self.embeddings.remove(path);
        self.modules.insert(path.into(), module);
        Ok(())
    }

    /// The adapted embeddings by path, sorted.
    pub fn embeddings(&self) -> impl Iterator<Item = (&str, &LoraModule)> {
        self.embeddings
            .iter()
            .map(|(path, module)| (path.as_str(), module))
    }

    /// The tensors of an embedding.
    pub fn embedding(&self, path: &str) -> Option<&LoraModule> {
        self.embeddings.get(path)
    }

    /// Sets the tensors of an embedding, which has no bias.
    ///
    /// # Errors
    /// Those of [`insert`](Self::insert).
    pub fn insert_embedding(&mut self, path: &str, module: LoraModule) -> Result<(), Nf4Error> {
        self.check_module(path, &module, true)?;
        self.modules.remove(path);
        self.embeddings.insert(path.into(), module);
        Ok(())
    }

    fn check_module(
        &self,
        path: &str,
        module: &LoraModule,
        is_embedding: bool,
    ) -> Result<(), Nf4Error> {
        if !self.matcher.is_target(path)? {
            return Err(Nf4Error::NotAdapted {
                module: path.into(),
            });
        }
        if module.magnitude.is_some() != self.config.use_dora {
            return Err(Nf4Error::Config {
                field: "use_dora",
                expected: "true with a magnitude, false without",
                given: format!("{} for `{path}`", self.config.use_dora),
            });
        }
        if module.bias.is_some() && is_embedding {
            return Err(Nf4Error::Config {
                field: "bias",
                expected: "none for an embedding",
                given: format!("a bias for `{path}`"),
            });
        }
        if module.bias.is_some() && self.config.bias == super::LoraBias::None {
            return Err(Nf4Error::Config {
                field: "bias",
                expected: "all or lora_only with a trained bias",
                given: format!("none, with a bias for `{path}`"),
            });
        }
        module.check(path, self.matcher.rank(path)?, is_embedding)
    }

    /// Whether there is a branch of a module.
    pub(super) fn has_branch(&self, path: &str) -> bool {
        self.modules.contains_key(path) || self.embeddings.contains_key(path)
    }

    fn full_key(&self, parameter: &str) -> String {
        full_key(parameter, |module| self.has_branch(module))
    }

    /// [`full_key`](Self::full_key), under the name that the settings have for the parameter.
    fn stored_key(&self, parameter: &str) -> String {
        let has_branch = parameter
            .rsplit_once('.')
            .is_some_and(|(module, _)| self.has_branch(module));
        full_key(&self.matcher.named(parameter), |_| has_branch)
    }

    /// The parameters of the base model that the adapter replaces as a whole, by name, sorted:
    /// those of `modules_to_save`, biases with `bias` `all`, and the embedding and the head where
    /// PEFT saved them along, resized or under a branch.
    pub fn full_tensors(&self) -> impl Iterator<Item = (&str, &DenseTensor)> {
        self.full
            .iter()
            .map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The tensor that replaces a parameter of the base model, such as `lm_head.weight`.
    pub fn full_tensor(&self, parameter: &str) -> Option<&DenseTensor> {
        self.full.get(parameter)
    }

    /// Whether a parameter belongs to a module of `modules_to_save`, which the adapter then has a
    /// copy of: the copy alone is replaced, also where the base model ties it to another. Without
    /// that the base model's own parameter is replaced, and with it all that is tied to it.
    pub fn is_saved(&self, parameter: &str) -> bool {
        is_saved(&self.matcher.named(parameter), &self.config)
    }

    /// Replaces a parameter of the base model.
    ///
    /// # Errors
    /// [`Nf4Error::NotAdapted`] if the settings do not have it saved, [`Nf4Error::NonFinite`] if
    /// it holds a NaN or an infinity.
    pub fn insert_full(&mut self, parameter: &str, tensor: DenseTensor) -> Result<(), Nf4Error> {
        let module = parameter.rsplit_once('.').map(|(module, _)| module);
        let has_branch = module.is_some_and(|module| self.has_branch(module));
        if !is_full(parameter, &self.config, has_branch) {
            return Err(Nf4Error::NotAdapted {
                module: parameter.into(),
            });
        }
        tensor.check_finite(&self.full_key(parameter))?;
        self.full.insert(parameter.into(), tensor);
        Ok(())
    }
}

/// Writes a new file and puts it in the place of the old one.
fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<(), Nf4Error>) -> Result<(), Nf4Error> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let written =
        write(&partial).and_then(|()| fs::rename(&partial, path).map_err(Nf4Error::io(path)));
    if written.is_err() {
        // What is left of a failed write is of no use; the error says why it failed.
        let _ = fs::remove_file(&partial);
    }
    written
}
