//! A checkpoint into a model, whichever of its layers are in 4 bit.

use std::collections::BTreeMap;

use burn::nn::LinearConfig;
use burn::tensor::{Device, Tensor};
use burn_store::ModuleStore;

use super::check::{check_model, refuse_branches, untied};
use super::layers::LinearLayers;
use super::names::{module_name, of_linear};
use crate::checkpoint::CheckpointStore;
use crate::checkpoint::convert::check_source;
use crate::checkpoint::parameters::parameters_of;
use crate::checkpoint::source::{Entry, EntryKind};
use crate::error::{Nf4Error, TensorMisfit};
use crate::nn::{AnyLinear, QuantLinear};
use crate::op::{BlockWeight, MatmulStrategy};

pub(super) fn load<M: LinearLayers>(model: M, store: CheckpointStore) -> Result<M, Nf4Error> {
    check_model(&model)?;
    check_source(store.checkpoint())?;
    refuse_branches(&model, "to load a base model into")?;
    let entries: BTreeMap<String, Entry> = store
        .entries()?
        .into_iter()
        .map(|entry| (entry.path.clone(), entry))
        .collect();
    let tie = Tie::of(&model, &entries, &store)?;
    let mut model = match tie {
        Tie::Two => untied(model)?,
        _ => model,
    };
    model = model.map_linears("", &mut |path, layer| {
        let name = of_linear(&module_name::<M>(path), "weight");
        Ok(match entries.get(&name).map(|entry| &entry.kind) {
            Some(kind) => in_form_of(layer, kind)?,
            None => layer,
        })
    })?;

    let shards = store.shards().map(|plan| plan.cut(model.clone()));
    let shards = shards.transpose()?;
    let store = match shards {
        None => store,
        Some((cut, words)) => {
            model = cut;
            store.with_words(words)
        }
    };

    let mut places = BTreeMap::new();
    let mut names = BTreeMap::new();
    for parameter in parameters_of(&model, true) {
        let name = M::checkpoint_name(parameter.stored_path());
        if name != parameter.path {
            names.insert(parameter.path.clone(), name.clone());
            places.insert(name, Some(parameter.path));
        }
    }
    match tie {
        Tie::Table { head } => drop(places.insert(head, None)),
        Tie::Head { head, table } => {
            let path = places.get(&table).cloned().flatten().unwrap_or(table);
            places.insert(head, Some(path));
        }
        Tie::AsIs | Tie::Two => {}
    }
    let mut store = store.with_places(places).skip_enum_variants(true);
    match store.apply_to(&mut model) {
        Ok(_) => Ok(model),
        Err(error) => Err(with_names(error, &names)),
    }
}

/// What is missing, by the name that the checkpoint would have for it.
fn with_names(mut error: Nf4Error, names: &BTreeMap<String, String>) -> Nf4Error {
    if let Nf4Error::Misfit { tensors, .. } = &mut error {
        for TensorMisfit { key, given, .. } in &mut *tensors {
            if let (None, Some(name)) = (&given, names.get(key)) {
                key.clone_from(name);
            }
        }
        tensors.sort_by(|a, b| a.key.cmp(&b.key));
    }
    error
}

/// A layer of the same size that is yet to be loaded, in the form that the checkpoint has it in. Where
/// that is of another shape it stays dense, to be told of as a misfit.
fn in_form_of(layer: AnyLinear, kind: &EntryKind) -> Result<AnyLinear, Nf4Error> {
    let (dims, device, strategy, bias) = match layer {
        AnyLinear::Dense(layer) => {
            let shape = layer.weight.lazy_shape();
            let device = layer.weight.lazy_device();
            let strategy = MatmulStrategy::Auto;
            ([shape[1], shape[0]], device, strategy, layer.bias)
        }
        AnyLinear::Nf4(layer) => {
            let (dims, device) = (layer.dims(), layer.weight.device());
            (dims, device, layer.strategy, layer.bias)
        }
        adapted => return Ok(adapted),
    };
    let [d_output, d_input] = dims;
    match kind {
        EntryKind::Packed(form) if form.shape == dims => Ok(AnyLinear::Nf4(QuantLinear {
            weight: BlockWeight::zeros_of(form.clone(), &device)?,
            bias,
            strategy,
        })),
        _ => {
            let config = LinearConfig::new(d_input, d_output).with_bias(false);
            let mut dense = config.init(&device);
            dense.bias = bias;
            Ok(AnyLinear::Dense(dense))
        }
    }
}

/// Where a head that can be the embedding's table comes from, as transformers' `tie_weights` has it.
enum Tie {
    /// As the model has it.
    AsIs,
    /// Both are there and are two.
    Two,
    /// Both are there and are one.
    Table { head: String },
    /// The head is there, and is the table too.
    Head { head: String, table: String },
}

impl Tie {
    fn of<M: LinearLayers>(
        model: &M,
        entries: &BTreeMap<String, Entry>,
        store: &CheckpointStore,
    ) -> Result<Self, Nf4Error> {
        let Some(tied) = model.tied_head() else {
            return Ok(Self::AsIs);
        };
        let head = of_linear(&tied.head, "weight");
        let table = of_linear(&tied.embedding, "weight");
        let is_dense = |entry: &Entry| matches!(entry.kind, EntryKind::Dense { .. });
        Ok(match (entries.get(&table), entries.get(&head)) {
            (Some(of_table), Some(of_head)) => {
                let parameters = parameters_of(model, true);
                let device = parameters
                    .iter()
                    .find(|parameter| M::checkpoint_name(parameter.stored_path()) == table)
                    .map(|parameter| &parameter.device);
                match device {
                    Some(device) if are_equal(of_table, of_head, store, device)? => {
                        Self::Table { head }
                    }
                    _ => Self::Two,
                }
            }
            // A packed head cannot give embeddings: the table is missing.
            (None, Some(of_head)) if is_dense(of_head) => Self::Head { head, table },
            (None, Some(_)) => Self::Two,
            (_, None) => Self::AsIs,
        })
    }
}

/// Whether two parameters are the same floats, in the type that both are cast to.
fn are_equal(
    a: &Entry,
    b: &Entry,
    store: &CheckpointStore,
    device: &Device,
) -> Result<bool, Nf4Error> {
    match (&a.kind, &b.kind) {
        (EntryKind::Dense { shape, .. }, EntryKind::Dense { shape: other, .. })
            if shape == other && shape.len() == 2 => {}
        _ => return Ok(false),
    }
    let read = |entry: &Entry| -> Result<Tensor<2>, Nf4Error> {
        store
            .checkpoint()
            .load_tensor(&entry.key, store.dtype(), device)
    };
    let (a, b) = (read(a)?, read(b)?);
    Ok(a.dtype() == b.dtype() && a.equal(b).all().into_scalar::<bool>())
}
