//! A checkpoint as a store that modules load from.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use burn_store::burn_pack::Tensor as PackTensor;
use burn_store::{ApplyError, ApplyResult, KeyRemapper, ModuleSnapshot, ModuleStore};
use fancy_regex::Regex;

use super::folder::Checkpoint;
use super::matching::{Allowed, match_up};
use super::parameters::parameters_of;
use super::progress::{Counter, Progress};
#[cfg(feature = "peft")]
use super::shard_plan::ShardPlan;
use super::source::{Entry, EntryKind, ReadAs, deferred, entries};
use super::unstack::{StackLayout, Unstack};
use crate::error::Nf4Error;
use crate::format::FloatType;

/// A checkpoint as a store that any Burn module loads from, by path.
///
/// Quantized weights go to the [`BlockWeight`](crate::BlockWeight)s of the module, as they are, and
/// dense tensors to its other parameters, in PyTorch's layout: the weight of a
/// [`Linear`](burn::nn::Linear) is transposed, a norm's `weight` and `bias` are its `gamma` and
/// `beta`. Each is read when its turn comes, so that beside the module one is in memory at a time.
///
/// Everything is compared before anything is loaded: if a tensor is missing, unexpected or of
/// another shape or dtype, the module stays as it was and the error lists all of them.
///
/// ```no_run
/// use burn::module::Module;
/// use burn::nn::{Embedding, EmbeddingConfig};
/// use burn::tensor::Device;
/// use burn_nf4::checkpoint::CheckpointStore;
/// use burn_nf4::nn::{QuantLinear, QuantLinearConfig};
/// use burn_store::ModuleSnapshot;
///
/// #[derive(Module, Debug)]
/// struct Model {
///     embed_tokens: Embedding,
///     lm_head: QuantLinear,
/// }
///
/// let device = Device::default();
/// let mut model = Model {
///     embed_tokens: EmbeddingConfig::new(32000, 2048).init(&device),
///     lm_head: QuantLinearConfig::new(2048, 32000).with_bias(false).init(&device)?,
/// };
/// let mut store = CheckpointStore::open("folder")?
///     .with_key_remapping("^model\\.", "")?
///     .on_progress(|progress| println!("{}", progress.parameter));
/// model.load_from(&mut store)?;
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
pub struct CheckpointStore {
    checkpoint: Arc<Checkpoint>,
    remapper: KeyRemapper,
    /// Paths in the module by remapped key, where they differ; without one the tensor is left out.
    places: BTreeMap<String, Option<String>>,
    allowed: Allowed,
    /// Parameters whose keys match are left out.
    ignored: Vec<Regex>,
    /// Stacks of matrices that are taken apart.
    unstacked: Vec<Unstack>,
    dtype: Option<FloatType>,
    #[cfg(feature = "peft")]
    shards: Option<ShardPlan>,
    /// The words of packed weights that are read, by the paths of those that are not read whole.
    words: BTreeMap<String, Range<usize>>,
    skip_enum_variants: bool,
    report: Arc<Mutex<Report>>,
    /// Everything, by remapped key, once it was asked for.
    tensors: Option<BTreeMap<String, PackTensor>>,
}

/// What errors call the patterns of [`CheckpointStore::ignore`].
const IGNORE: &str = "ignore";

type Callback = Box<dyn FnMut(Progress<'_>) + Send>;

/// How far a load is, if somebody is told, and whether it failed.
#[derive(Default)]
struct Report {
    counter: Option<Counter<Callback>>,
    /// The first error of a read.
    failed: Option<Nf4Error>,
}

impl CheckpointStore {
    /// Opens a file or folder. The files are mapped and must not change meanwhile: see
    /// [`SafetensorsFile::open`](super::SafetensorsFile::open). To read them into memory instead,
    /// make the store [`new`](Self::new) from [`Checkpoint::read`].
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Nf4Error> {
        Ok(Self::new(Arc::new(Checkpoint::open(path)?)))
    }

    /// A store of a checkpoint that is open.
    pub fn new(checkpoint: Arc<Checkpoint>) -> Self {
        Self {
            checkpoint,
            remapper: KeyRemapper::new(),
            places: BTreeMap::new(),
            allowed: Allowed::default(),
            ignored: Vec::new(),
            unstacked: Vec::new(),
            dtype: None,
            #[cfg(feature = "peft")]
            shards: None,
            words: BTreeMap::new(),
            skip_enum_variants: false,
            report: Arc::default(),
            tensors: None,
        }
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    /// Replaces a regular expression in every parameter's key, after those given before.
    /// `$1` stands for the first group.
    ///
    /// # Errors
    /// [`Nf4Error::Pattern`] if it is not a regular expression.
    pub fn with_key_remapping(mut self, from: &str, to: &str) -> Result<Self, Nf4Error> {
        self.remapper = self
            .remapper
            .add_pattern(from, to)
            .map_err(|error| pattern_error("key remapping", from, &error))?;
        self.tensors = None;
        Ok(self)
    }

    /// Sets how keys are renamed. The key of a quantized weight is that of the parameter; its
    /// other tensors follow.
    pub fn remap(mut self, remapper: KeyRemapper) -> Self {
        self.remapper = remapper;
        self.tensors = None;
        self
    }

    /// Whether parameters that the checkpoint lacks keep their values, and tensors that the
    /// module lacks are left out. Mismatched ones are errors still.
    pub fn allow_partial(mut self, allow: bool) -> Self {
        self.allowed = Allowed {
            missing: allow,
            unexpected: allow,
        };
        self
    }

    /// Whether parameters that the checkpoint lacks keep their values, such as those of adapters.
    pub fn allow_missing(mut self, allow: bool) -> Self {
        self.allowed.missing = allow;
        self
    }

    /// Whether tensors that the module lacks are left out.
    pub fn allow_unexpected(mut self, allow: bool) -> Self {
        self.allowed.unexpected = allow;
        self
    }

    /// Leaves out parameters whose keys match a regular expression, such as buffers that are computed, or
    /// the part of a model that is not wanted. More than one may be given.
    ///
    /// # Errors
    /// [`Nf4Error::Pattern`] if it is not a regular expression.
    pub fn ignore(mut self, pattern: &str) -> Result<Self, Nf4Error> {
        let pattern =
            Regex::new(pattern).map_err(|error| pattern_error(IGNORE, pattern, &error))?;
        self.ignored.push(pattern);
        self.tensors = None;
        Ok(self)
    }

    /// Takes tensors of stacked matrices apart, `[matrices, parts * rows, columns]`: each matrix
    /// is split by rows into as many parts as names are given, and the parts are read as if each were a
    /// tensor. A tensor is such a stack if its remapped key matches the regular expression; in the names
    /// `$1` stands for its first group and `{}` for the index of the matrix.
    ///
    /// Of packed stacks those whose parts are made of whole blocks are taken apart, as they are: NVFP4, MXFP4
    /// and FP8 by rows, and FP8 in tiles where a part has a multiple of 128 rows. Others (NF4 and FP4, whose
    /// blocks do not follow the rows), and stacks of another shape, stay whole.
    ///
    /// ```
    /// use burn_nf4::checkpoint::CheckpointStore;
    ///
    /// # fn open(store: CheckpointStore) -> Result<CheckpointStore, burn_nf4::Nf4Error> {
    /// // `experts.gate_up_proj` is read as `experts.0.gate_proj.weight`, `experts.0.up_proj.weight`, …
    /// store.unstack(
    ///     r"^(.*\.experts)\.gate_up_proj$",
    ///     &["$1.{}.gate_proj.weight", "$1.{}.up_proj.weight"],
    /// )
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Nf4Error::Pattern`] if it is not a regular expression, [`Nf4Error::Config`] without a name.
    pub fn unstack(self, pattern: &str, parts: &[&str]) -> Result<Self, Nf4Error> {
        self.with_unstacked(pattern, parts, StackLayout::Following)
    }

    /// As [`unstack`](Self::unstack), but the rows of the parts take turns: of two parts the first has the
    /// even rows and the second the odd ones. FP8 in tiles stays whole.
    ///
    /// # Errors
    /// Those of [`unstack`](Self::unstack).
    pub fn unstack_interleaved(self, pattern: &str, parts: &[&str]) -> Result<Self, Nf4Error> {
        self.with_unstacked(pattern, parts, StackLayout::Interleaved)
    }

    /// As [`unstack`](Self::unstack) of stacks that lie the other way, as gpt-oss has them: matrices are
    /// transposed, `[matrices, columns, rows * parts]`, and a row of each part comes in turn. Stacks of
    /// vectors, `[matrices, rows * parts]`, such as biases, are taken apart in the same way. Packed stacks
    /// are not transposed: they are taken apart as by [`unstack_interleaved`](Self::unstack_interleaved).
    ///
    /// ```
    /// use burn_nf4::checkpoint::CheckpointStore;
    ///
    /// # fn open(store: CheckpointStore) -> Result<CheckpointStore, burn_nf4::Nf4Error> {
    /// store.unstack_columns(
    ///     r"^(.*\.experts)\.gate_up_proj_bias$",
    ///     &["$1.{}.gate_proj.bias", "$1.{}.up_proj.bias"],
    /// )
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`unstack`](Self::unstack).
    pub fn unstack_columns(self, pattern: &str, parts: &[&str]) -> Result<Self, Nf4Error> {
        self.with_unstacked(pattern, parts, StackLayout::Transposed)
    }

    fn with_unstacked(
        mut self,
        pattern: &str,
        parts: &[&str],
        layout: StackLayout,
    ) -> Result<Self, Nf4Error> {
        let pattern =
            Regex::new(pattern).map_err(|error| pattern_error("unstack", pattern, &error))?;
        if parts.is_empty() {
            return Err(Nf4Error::Config {
                field: "unstack",
                expected: "a name for each part of a matrix",
                given: "none".into(),
            });
        }
        self.unstacked.push(Unstack::new(pattern, parts, layout));
        self.tensors = None;
        Ok(self)
    }

    /// Converts dense floats to a type, rather than load each as it is stored.
    pub fn with_dtype(mut self, dtype: FloatType) -> Self {
        self.dtype = Some(dtype);
        self.tensors = None;
        self
    }

    /// Whether the names of enum variants in the module are no part of a path.
    pub fn skip_enum_variants(mut self, skip: bool) -> Self {
        self.skip_enum_variants = skip;
        self
    }

    /// Calls a function after each parameter that is loaded into a module.
    pub fn on_progress(self, callback: impl FnMut(Progress<'_>) + Send + 'static) -> Self {
        let callback: Callback = Box::new(callback);
        self.report().counter = Some(Counter::new(0, 0, callback));
        self
    }

    /// The parameters of the checkpoint, by their paths in the module.
    pub(crate) fn entries(&self) -> Result<Vec<Entry>, Nf4Error> {
        let mut keys = self.checkpoint.parameters();
        for pattern in &self.ignored {
            let mut kept = Vec::with_capacity(keys.len());
            for key in keys {
                match pattern.is_match(key) {
                    Ok(true) => {}
                    Ok(false) => kept.push(key),
                    Err(error) => return Err(pattern_error(IGNORE, pattern.as_str(), &error)),
                }
            }
            keys = kept;
        }
        let mut entries = entries(&self.checkpoint, &keys, &self.remapper)?;
        for unstack in &self.unstacked {
            let mut apart = Vec::with_capacity(entries.len());
            for entry in entries {
                match unstack.parts(&entry)? {
                    Some(parts) => apart.extend(parts),
                    None => apart.push(entry),
                }
            }
            entries = apart;
        }
        entries.retain_mut(|entry| match self.places.get(&entry.path) {
            None => true,
            Some(None) => false,
            Some(Some(path)) => {
                entry.path.clone_from(path);
                true
            }
        });
        Ok(entries)
    }

    /// Sets the paths in the module of remapped keys; a tensor that gets none is left out.
    #[cfg(feature = "peft")]
    pub(crate) fn with_places(mut self, places: BTreeMap<String, Option<String>>) -> Self {
        self.places = places;
        self.tensors = None;
        self
    }

    /// Has a model be loaded of whose packed weights this rank keeps a part: see
    /// [`ShardedWeights::new`](crate::parallel::ShardedWeights::new), which is to be called for each unit of the
    /// plan. By [`LinearLayers::load_checkpoint`](crate::model::LinearLayers::load_checkpoint) only.
    #[cfg(feature = "peft")]
    pub fn shard(mut self, plan: ShardPlan) -> Self {
        self.shards = Some(plan);
        self
    }

    #[cfg(feature = "peft")]
    pub(crate) fn shards(&self) -> Option<&ShardPlan> {
        self.shards.as_ref()
    }

    /// Sets which words of packed weights are read, by their paths in the module.
    #[cfg(feature = "peft")]
    pub(crate) fn with_words(mut self, words: BTreeMap<String, Range<usize>>) -> Self {
        self.words = words;
        self
    }

    /// What dense floats are converted to.
    #[cfg(feature = "peft")]
    pub(crate) fn dtype(&self) -> Option<FloatType> {
        self.dtype
    }

    fn report(&self) -> std::sync::MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A tensor of which the report is told when it is read.
    fn reported(
        &self,
        entry: &Entry,
        name: String,
        read_as: ReadAs,
    ) -> Result<Option<PackTensor>, Nf4Error> {
        let (report, key, size_bytes) = (self.report.clone(), entry.key.clone(), entry.size_bytes);
        let done = move |error| {
            let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
            match error {
                None => {
                    if let Some(counter) = &mut report.counter {
                        counter.done(&key, size_bytes);
                    }
                }
                Some(_) if report.failed.is_some() => {}
                failed => report.failed = failed,
            }
        };
        deferred(&self.checkpoint, entry, name, read_as, done)
    }
}

impl fmt::Debug for CheckpointStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckpointStore")
            .field("path", &self.checkpoint.path())
            .field("remapper", &self.remapper)
            .field("allowed", &self.allowed)
            .field("ignored", &self.ignored)
            .field("unstacked", &self.unstacked)
            .field("dtype", &self.dtype)
            .field("skip_enum_variants", &self.skip_enum_variants)
            .finish_non_exhaustive()
    }
}

impl ModuleStore for CheckpointStore {
    type Error = Nf4Error;

    /// Always [`Nf4Error::ReadOnly`].
    fn collect_from<M: ModuleSnapshot>(&mut self, _module: &M) -> Result<(), Nf4Error> {
        Err(Nf4Error::ReadOnly {
            path: self.checkpoint.path().into(),
        })
    }

    /// Loads every parameter of the module.
    ///
    /// # Errors
    /// - [`Nf4Error::Misfit`] with every tensor that is missing, unexpected or mismatched, unless
    ///   that is allowed, [`Nf4Error::SamePath`] for two of one path; nothing has been loaded then
    /// - those of [`Checkpoint::load_weight`] for a quantized weight that is broken
    /// - [`Nf4Error::NonFinite`] for a finite value that the dtype to convert to cannot hold,
    ///   [`Nf4Error::FileChanged`]; other parameters have been loaded then
    /// - [`Nf4Error::DeviceDtype`] if a parameter's device has no such type
    /// - [`Nf4Error::Load`] if a parameter could not be loaded, as when the progress callback
    ///   panics; others have been loaded then
    fn apply_to<M: ModuleSnapshot>(&mut self, module: &mut M) -> Result<ApplyResult, Nf4Error> {
        let parameters = parameters_of(module, self.skip_enum_variants);
        let entries = self.entries()?;
        let path = self.checkpoint.path();
        let matched = match_up(&parameters, &entries, self.allowed, path)?;

        let mut tensors = Vec::with_capacity(matched.pairs.len());
        let mut size_bytes = 0;
        for &(parameter, entry) in &matched.pairs {
            let name = match &entry.kind {
                EntryKind::Packed(form) => format!("{}.{}", parameter.path, form.packed_name()),
                EntryKind::Dense { .. } => parameter.path.clone(),
            };
            let read_as = ReadAs {
                dtype: self.dtype,
                transposed: parameter.transposed,
                words: self.words.get(&parameter.path).cloned(),
            };
            let Some(tensor) = self.reported(entry, name, read_as)? else {
                continue;
            };
            if let Ok(dtype) = FloatType::from_dtype(tensor.dtype, &entry.key) {
                dtype.check_device(&parameter.device)?;
            }
            size_bytes += entry.size_bytes;
            tensors.push(tensor);
        }
        {
            let mut report = self.report();
            if let Some(counter) = &mut report.counter {
                counter.restart(tensors.len(), size_bytes);
            }
            report.failed = None;
        }
        let mut result = module.apply(tensors, None, None, self.skip_enum_variants);
        let unused = matched.unexpected.iter().map(|entry| entry.path.clone());
        result.unused.extend(unused);
        match (self.report().failed.take(), result.errors.first()) {
            (Some(error), _) => Err(error),
            (None, Some(error)) => Err(load_error(error)),
            (None, None) => Ok(result),
        }
    }

    /// The tensor of a remapped key, in the layout of the checkpoint; that of a quantized weight
    /// `P` is the packed one, under `P` and its [name](crate::format::WeightForm::packed_name).
    fn get_tensor(&mut self, name: &str) -> Result<Option<&PackTensor>, Nf4Error> {
        Ok(self.get_all_tensors()?.get(name))
    }

    /// All tensors, as of [`get_tensor`](Self::get_tensor), but for those of dtypes that Burn
    /// does not have.
    fn get_all_tensors(&mut self) -> Result<&BTreeMap<String, PackTensor>, Nf4Error> {
        let tensors = match self.tensors.take() {
            Some(tensors) => tensors,
            None => {
                let mut tensors = BTreeMap::new();
                for entry in self.entries()? {
                    let name = match &entry.kind {
                        EntryKind::Packed(form) => format!("{}.{}", entry.path, form.packed_name()),
                        EntryKind::Dense { .. } => entry.path.clone(),
                    };
                    let read_as = ReadAs {
                        dtype: self.dtype,
                        ..ReadAs::default()
                    };
                    let tensor = deferred(&self.checkpoint, &entry, name.clone(), read_as, |_| {})?;
                    tensors.extend(tensor.map(|tensor| (name, tensor)));
                }
                tensors
            }
        };
        Ok(self.tensors.insert(tensors))
    }

    fn keys(&mut self) -> Result<Vec<String>, Nf4Error> {
        Ok(self.get_all_tensors()?.keys().cloned().collect())
    }
}

fn pattern_error(field: &'static str, pattern: &str, error: &dyn fmt::Display) -> Nf4Error {
    Nf4Error::Pattern {
        field,
        pattern: pattern.into(),
        message: error.to_string(),
    }
}

fn load_error(error: &ApplyError) -> Nf4Error {
    let (key, message) = match error {
        ApplyError::ShapeMismatch { path, .. } | ApplyError::DTypeMismatch { path, .. } => {
            (path, error.to_string())
        }
        ApplyError::AdapterError { path, message } | ApplyError::LoadError { path, message } => {
            (path, message.clone())
        }
    };
    Nf4Error::Load {
        key: key.clone(),
        message,
    }
}
