//! What a model must be before anything is done to it: what a wrong override of
//! [`LinearLayers`] would do in silence is an error here.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{ModuleVisitor, Param};
use burn::tensor::{Bool, Device, Int, Tensor};

use super::layers::LinearLayers;
use super::names::{ANY_LINEAR, of_linear};
use crate::checkpoint::parameters::{Kind, ParameterPath, parameters_of};
use crate::error::Nf4Error;
use crate::format::QuantType;
use crate::nn::REPARAMETERIZATION;

/// Checks all of a model that does not depend on what is to be done to it.
///
/// # Errors
/// [`Nf4Error::Config`] for a model that does not hand out all of its layers, that gives two parameters
/// one name, whose tie or head is not there, or that has layers with a reparameterization of Burn's.
pub(super) fn check_model<M: LinearLayers>(model: &M) -> Result<(), Nf4Error> {
    check_handed_out(model)?;
    check_names(model)?;
    let found = Walk::of(model).reparameterized.into_iter();
    refuse_reparameterized(found.filter(|(_, is_linear)| *is_linear))
}

/// Checks that a model hands out every [`AnyLinear`](crate::nn::AnyLinear) that it has, under the path
/// that leads there: another would stay as it is, and nobody would be told.
///
/// # Errors
/// [`Nf4Error::Config`].
pub(super) fn check_handed_out<M: LinearLayers>(model: &M) -> Result<(), Nf4Error> {
    let found = Walk::of(model).linears;
    let mut given = Vec::new();
    model.collect_linears("", &mut given);
    let given: BTreeSet<String> = given.into_iter().map(|(path, _)| path).collect();
    match found.symmetric_difference(&given).next() {
        None => Ok(()),
        Some(path) => Err(Nf4Error::Config {
            field: "linear_layers",
            expected: "every `AnyLinear` of the model, under the names of the fields that lead to it",
            given: match given.contains(path) {
                true => format!("`{path}`, where there is none"),
                false => format!("without `{path}`"),
            },
        }),
    }
}

/// Checks that the names of parameters tell them apart, and that the head and the tie are there.
///
/// # Errors
/// [`Nf4Error::Config`].
pub(super) fn check_names<M: LinearLayers>(model: &M) -> Result<(), Nf4Error> {
    let walk = Walk::of(model);
    let mut names: BTreeMap<String, String> = BTreeMap::new();
    let linears = walk.linears.iter().map(|path| of_linear(path, "weight"));
    let linears: BTreeSet<String> = linears.collect();
    for path in linears.iter().chain(&walk.others) {
        let name = M::checkpoint_name(path);
        if linears.contains(path) && !name.ends_with(".weight") {
            return Err(Nf4Error::Config {
                field: "checkpoint_name",
                expected: "a name that ends with `.weight` for the weight of a layer",
                given: format!("`{name}` for `{path}`"),
            });
        }
        if let Some(other) = names.insert(name.clone(), path.clone()) {
            return Err(Nf4Error::Config {
                field: "checkpoint_name",
                expected: "a name of its own for each parameter",
                given: format!("`{name}` for both `{other}` and `{path}`"),
            });
        }
    }
    let path_of = |module: &str| names.get(&of_linear(module, "weight"));
    let tied = model.tied_head();
    if let Some(tied) = &tied {
        let refuse = |expected, given| {
            Err(Nf4Error::Config {
                field: "tied_head",
                expected,
                given,
            })
        };
        if path_of(&tied.head).is_some() {
            let given = format!("`{}`, which is a layer of its own", tied.head);
            return refuse("a head that has no weight of its own", given);
        }
        if path_of(&tied.embedding).is_none_or(|path| linears.contains(path)) {
            let given = format!("`{}`, which it does not have", tied.embedding);
            return refuse("an embedding of the model, by its name", given);
        }
    }
    let is_tied = |head: &str| tied.as_ref().is_some_and(|tied| tied.head == head);
    match model.head_name() {
        Some(head)
            if !is_tied(&head) && path_of(&head).is_none_or(|path| !linears.contains(path)) =>
        {
            Err(Nf4Error::Config {
                field: "head_name",
                expected: "a linear layer that the model hands out, by its name",
                given: format!("`{head}`, which it does not have"),
            })
        }
        _ => Ok(()),
    }
}

/// Checks that no parameter has a reparameterization of Burn's, in linear layers or elsewhere.
///
/// # Errors
/// [`Nf4Error::Config`].
pub(super) fn check_materialized<M: LinearLayers>(model: &M) -> Result<(), Nf4Error> {
    refuse_reparameterized(Walk::of(model).reparameterized.into_iter())
}

/// A parameter with a reparameterization has another value than the one that it stores, and often another
/// shape.
fn refuse_reparameterized(mut found: impl Iterator<Item = (String, bool)>) -> Result<(), Nf4Error> {
    match found.next() {
        None => Ok(()),
        Some((path, _)) => Err(Nf4Error::unmaterialized("model", &path)),
    }
}

/// The model with a head of its own, where that was the table of the embedding.
///
/// # Errors
/// [`Nf4Error::Config`] if [`untie_head`](LinearLayers::untie_head) did not do that.
pub(super) fn untied<M: LinearLayers>(model: M) -> Result<M, Nf4Error> {
    let Some(tied) = model.tied_head() else {
        return Ok(model);
    };
    let model = model.untie_head();
    let has_head = model.linears().iter().any(|(name, _)| *name == tied.head);
    if has_head && model.tied_head().is_none() {
        return Ok(model);
    }
    Err(Nf4Error::Config {
        field: "untie_head",
        expected: "a model whose head is a layer of its own, handed out by its name",
        given: match has_head {
            true => format!("one whose `{}` is said to be tied still", tied.head),
            false => format!("one without a layer `{}`", tied.head),
        },
    })
}

/// # Errors
/// [`Nf4Error::Config`] for a model with branches.
pub(super) fn refuse_branches<M: LinearLayers>(
    model: &M,
    purpose: &'static str,
) -> Result<(), Nf4Error> {
    let linears = model.linears();
    match linears.iter().find(|(_, layer)| layer.has_branch()) {
        None => Ok(()),
        Some((name, _)) => Err(Nf4Error::Config {
            field: "model",
            expected: "one without branches",
            given: format!("one with a branch on `{name}`, {purpose}"),
        }),
    }
}

/// Checks that one `quantization_config` can say what all quantized weights are: bitsandbytes' types have
/// theirs together, each of the others has one of its own.
///
/// # Errors
/// [`Nf4Error::Config`].
pub(super) fn check_types<M: LinearLayers>(model: &M) -> Result<(), Nf4Error> {
    let mut first: Option<(String, QuantType)> = None;
    for parameter in parameters_of(model, true) {
        let Kind::Packed(form) = &parameter.kind else {
            continue;
        };
        let name = M::checkpoint_name(parameter.stored_path());
        let quant_type = form.config.quant_type;
        let (other, other_type) = first.get_or_insert_with(|| (name.clone(), quant_type));
        let are_bitsandbytes = quant_type.is_bitsandbytes() && other_type.is_bitsandbytes();
        if quant_type != *other_type && !are_bitsandbytes {
            return Err(Nf4Error::Config {
                field: "model",
                expected: "one whose quantized weights are all of one type, or NF4 and FP4",
                given: format!(
                    "one with `{name}` in {} and `{other}` in {}",
                    quant_type.name(),
                    other_type.name()
                ),
            });
        }
    }
    Ok(())
}

/// The paths in a model; no parameter is made or read.
#[derive(Default)]
struct Walk {
    path: ParameterPath,
    linears: BTreeSet<String>,
    /// Parameters outside of the linear layers, by the names that PyTorch has for them.
    others: Vec<String>,
    /// Parameters, each with whether it is one of a linear layer.
    reparameterized: Vec<(String, bool)>,
}

impl Walk {
    fn of<M: LinearLayers>(model: &M) -> Self {
        let mut walk = Self {
            path: ParameterPath::new(true),
            ..Self::default()
        };
        model.visit(&mut walk);
        walk
    }

    fn found(&mut self, device: Device, kind: Kind) {
        if !self.path.is_in(ANY_LINEAR) && !self.path.is_in(REPARAMETERIZATION) {
            let parameter = self.path.parameter(device, kind);
            self.others.push(parameter.stored_path().into());
        }
    }
}

impl ModuleVisitor for Walk {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        if container_type == REPARAMETERIZATION && !self.path.is_in(REPARAMETERIZATION) {
            let is_linear = self.path.is_in(ANY_LINEAR);
            self.reparameterized
                .push((self.path.to_string(), is_linear));
        }
        self.path.enter(name, container_type);
        if container_type == ANY_LINEAR {
            self.linears.insert(self.path.to_string());
        }
    }

    fn exit_module(&mut self, _name: &str, container_type: &str) {
        self.path.exit(container_type);
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let kind = Kind::Float(param.lazy_shape().to_vec());
        self.found(param.lazy_device(), kind);
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let kind = self.path.int_kind(param.lazy_shape().to_vec());
        self.found(param.lazy_device(), kind);
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.found(param.lazy_device(), Kind::Bool(param.lazy_shape().to_vec()));
    }
}
