//! What a merge makes of each parameter of the base model.

use std::collections::BTreeMap;

use crate::checkpoint::convert::{ModelConfig, is_head};
use crate::error::Nf4Error;
use crate::peft::adapter::{Adapter, LoraModule};
use crate::peft::base::{BaseNames, Ends};
use crate::peft::tensor::DenseTensor;

/// What a merge makes of each parameter of the base model.
pub(super) struct Plan<'a> {
    /// The parameters to write, sorted.
    pub outputs: Vec<Output<'a>>,
    /// Whether `config.json` has to say that the head has a weight of its own.
    pub unties: bool,
}

/// A parameter to write.
pub(super) struct Output<'a> {
    pub key: String,
    /// The parameter of the base model that it begins as.
    pub source: String,
    pub change: Change<'a>,
}

/// What the adapter does to a parameter: it is replaced first, and then the branch is added.
#[derive(Default, Clone, Copy)]
pub(super) struct Change<'a> {
    pub replace: Option<&'a DenseTensor>,
    pub branch: Option<Adapted<'a>>,
}

/// The branch of a module.
#[derive(Clone, Copy)]
pub(super) struct Adapted<'a> {
    pub path: &'a str,
    pub module: &'a LoraModule,
    /// Whether the weight is `[in_features, out_features]`.
    pub transposed: bool,
}

impl Change<'_> {
    pub fn is_none(&self) -> bool {
        self.replace.is_none() && self.branch.is_none()
    }
}

impl<'a> Plan<'a> {
    /// The base model must have all that the adapter changes.
    pub fn of(
        adapter: &'a Adapter,
        names: &BaseNames,
        config: Option<&ModelConfig>,
    ) -> Result<Self, Nf4Error> {
        let mut changes = changes(adapter, config);
        let mut unties = false;
        let mut left_out = None;
        if let Some(ends) = &names.ends {
            if ends.are_one && !separate(ends, adapter, &mut changes)? {
                left_out = Some(&ends.other).filter(|_| !ends.are_both_stored);
            } else {
                let changed = [&ends.stored, &ends.other];
                unties = changed.into_iter().any(|key| changes.contains_key(key))
                    && config.and_then(ModelConfig::ties_embeddings) != Some(false);
            }
        }
        let source = |key: &str| match &names.ends {
            Some(ends) if !ends.are_both_stored && ends.other == key => ends.stored.clone(),
            _ => key.to_string(),
        };
        let outputs = names
            .parameters()
            .filter(|&key| left_out.is_none_or(|left_out| left_out != key))
            .map(|key| Output {
                key: key.into(),
                source: source(key),
                change: changes.get(key).copied().unwrap_or_default(),
            });
        Ok(Self {
            outputs: outputs.collect(),
            unties,
        })
    }
}

fn changes<'a>(adapter: &'a Adapter, config: Option<&ModelConfig>) -> BTreeMap<String, Change<'a>> {
    // PEFT goes by the class of the layer and corrects the setting (`dispatch_default`).
    let fan_in_fan_out = config.map_or(adapter.config().fan_in_fan_out, |config| {
        config.conv1d_model().is_some()
    });
    let mut changes: BTreeMap<String, Change<'a>> = BTreeMap::new();
    let modules = adapter.modules().map(|(path, module)| Adapted {
        path,
        module,
        // Heads are linear layers in models of `Conv1D` too.
        transposed: fan_in_fan_out && !is_head(path),
    });
    let embeddings = adapter.embeddings().map(|(path, module)| Adapted {
        path,
        module,
        transposed: true,
    });
    for adapted in modules.chain(embeddings) {
        let key = format!("{}.weight", adapted.path);
        changes.entry(key).or_default().branch = Some(adapted);
        if let Some(bias) = &adapted.module.bias {
            let key = format!("{}.bias", adapted.path);
            changes.entry(key).or_default().replace = Some(bias);
        }
    }
    for (parameter, tensor) in adapter.full_tensors() {
        changes.entry(parameter.into()).or_default().replace = Some(tensor);
    }
    changes
}

/// Decides what becomes of two weights that are one in the base model, and returns whether they become
/// two.
///
/// In PEFT a branch and a copy of `modules_to_save` belong to one of the two modules, and a weight
/// that is neither goes into the one tensor that both share. (`merge_and_unload` then adds the branch
/// of one to both, which changes the model; here the merged model computes what the adapted one does.)
fn separate<'a>(
    ends: &Ends,
    adapter: &Adapter,
    changes: &mut BTreeMap<String, Change<'a>>,
) -> Result<bool, Nf4Error> {
    let get = |changes: &BTreeMap<String, Change<'a>>, key: &str| {
        changes.get(key).copied().unwrap_or_default()
    };
    let shared = |key: &str| !adapter.is_saved(key);
    for (key, other) in [(&ends.stored, &ends.other), (&ends.other, &ends.stored)] {
        let (change, of_other) = (get(changes, key), get(changes, other));
        match (change.replace, of_other.replace) {
            (Some(tensor), None) if shared(key) => {
                changes.entry(other.clone()).or_default().replace = Some(tensor);
            }
            (Some(tensor), Some(of_other))
                if shared(key) && shared(other) && tensor != of_other =>
            {
                return Err(Nf4Error::Config {
                    field: "tie_word_embeddings",
                    expected: "false for an adapter with two different weights",
                    given: format!("true, and the adapter has `{key}` and `{other}`"),
                });
            }
            _ => {}
        }
    }
    let (stored, other) = (get(changes, &ends.stored), get(changes, &ends.other));
    let are_two =
        stored.branch.is_some() || other.branch.is_some() || stored.replace != other.replace;
    if !are_two && !ends.are_both_stored {
        changes.remove(&ends.other);
    }
    Ok(are_two)
}
