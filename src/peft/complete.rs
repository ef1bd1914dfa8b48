//! Whether an adapter has all that its settings ask for of a base model.

use std::collections::BTreeSet;

use super::adapter::Adapter;
use super::base::BaseNames;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::convert::{ModelConfig, is_embedding};
use crate::error::Nf4Error;

impl Adapter {
    /// Checks that the adapter has all that its settings ask for of a base model, and that the base
    /// model has all that the adapter changes.
    ///
    /// Without this a module that the adapter has no tensors for stays as it was before the training.
    /// PEFT warns of it (`Found missing adapter keys while loading the checkpoint`), and fails where
    /// the weight of a module of `modules_to_save` is not there. Merging and
    /// [`LinearLayers::apply_adapter`](crate::model::LinearLayers::apply_adapter) check this themselves;
    /// a program that goes layer by layer should call it first.
    ///
    /// ```no_run
    /// use burn_nf4::checkpoint::Checkpoint;
    /// use burn_nf4::peft::Adapter;
    ///
    /// let base = Checkpoint::open("tiny-llama-bnb-4bit")?;
    /// let adapter = Adapter::open("tiny-llama-lora")?;
    /// adapter.check_base(&base)?;
    /// # Ok::<(), burn_nf4::Nf4Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Nf4Error::BaseLacks`], [`Nf4Error::AdapterLacks`], and those of
    /// [`ModuleMatcher::is_target`](super::ModuleMatcher::is_target), [`Nf4Error::ModelConfig`].
    pub fn check_base(&self, base: &Checkpoint) -> Result<(), Nf4Error> {
        let config = ModelConfig::read(base)?;
        let names = BaseNames::of(base, config.as_ref())?;
        let adapter = self.for_base(names.parameters());
        adapter.check_fits(&names)?;
        adapter.check_complete(names.modules(), names.parameters())
    }

    /// The part of [`check_base`](Self::check_base) that asks for the adapter's tensors, for a model
    /// that was not read from a checkpoint.
    ///
    /// - `modules`: the paths of its linear layers and embeddings, such as
    ///   `model.layers.0.self_attn.q_proj`
    /// - `parameters`: the names of its parameters, such as `model.norm.weight`
    ///
    /// A branch is asked for on every module that the settings select, but for embeddings with
    /// `all-linear`; a weight for every parameter under a name of `modules_to_save`. Biases are not
    /// asked for, as PEFT does not miss them either.
    ///
    /// # Errors
    /// [`Nf4Error::AdapterLacks`] with all of them,
    /// those of [`ModuleMatcher::is_target`](super::ModuleMatcher::is_target).
    pub fn check_complete<'a>(
        &self,
        modules: impl IntoIterator<Item = &'a str>,
        parameters: impl IntoIterator<Item = &'a str>,
    ) -> Result<(), Nf4Error> {
        let mut missing = BTreeSet::new();
        for module in modules {
            let is_asked_for = self.matcher().is_target(module)?
                && !(self.matcher().takes_all_linear() && is_embedding(module));
            if is_asked_for && !self.has_branch(module) {
                missing.insert(module.to_string());
            }
        }
        let saved = parameters
            .into_iter()
            .filter(|parameter| self.is_saved(parameter) && self.full_tensor(parameter).is_none());
        missing.extend(saved.map(String::from));
        match missing.is_empty() {
            true => Ok(()),
            false => Err(Nf4Error::AdapterLacks {
                missing: missing.into_iter().collect(),
            }),
        }
    }

    /// Checks that the base model has all that the adapter changes.
    pub(super) fn check_fits(&self, base: &BaseNames) -> Result<(), Nf4Error> {
        let modules = self.modules().chain(self.embeddings());
        let weights = modules.flat_map(|(path, module)| {
            let bias = module.bias.as_ref().map(|_| format!("{path}.bias"));
            [Some(format!("{path}.weight")), bias]
        });
        let full = self.full_tensors().map(|(parameter, _)| parameter.into());
        let missing: BTreeSet<String> = weights
            .flatten()
            .chain(full)
            .filter(|parameter| !base.has(parameter))
            .collect();
        match missing.is_empty() {
            true => Ok(()),
            false => Err(Nf4Error::BaseLacks {
                missing: missing.into_iter().collect(),
            }),
        }
    }
}
