//! The parameters of a model outside of its linear layers, by the names of a checkpoint.

use std::collections::BTreeMap;

use burn::module::{ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Shape, Tensor};

use super::layers::LinearLayers;
use crate::checkpoint::parameters::{Kind, Parameter, ParameterPath};
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::nn::{AnyLinear, with_stable_id};
use crate::peft::DenseTensor;

/// What Burn's visitors are told that the parameters of an [`AnyLinear`] lie in.
pub(super) const ANY_LINEAR: &str = "Enum:AnyLinear";

/// The name of the module at a path.
pub(super) fn module_name<M: LinearLayers>(path: &str) -> String {
    let mut name = M::checkpoint_name(&format!("{path}.weight"));
    if let Some(module) = name.strip_suffix(".weight") {
        name.truncate(module.len());
    }
    name
}

/// A float parameter outside of the linear layers.
#[derive(Debug, Clone)]
pub(super) struct OtherFloat {
    pub name: String,
    /// As a checkpoint has it.
    pub shape: Vec<usize>,
    pub dtype: DType,
    pub device: Device,
    /// Whether Burn holds the transpose: the weight of a plain [`Linear`](burn::nn::Linear).
    pub transposed: bool,
    /// Without its graph, as Burn holds it.
    value: Tensor<1>,
}

impl OtherFloat {
    /// The module whose weight this matrix is, of an embedding as a rule.
    pub fn matrix_module(&self) -> Option<&str> {
        match self.shape.len() {
            2 => self.name.strip_suffix(".weight"),
            _ => None,
        }
    }

    /// A matrix, as a checkpoint has it.
    ///
    /// # Errors
    /// [`Nf4Error::NotAMatrix`].
    pub fn matrix(&self) -> Result<Tensor<2>, Nf4Error> {
        let &[rows, columns] = self.shape.as_slice() else {
            return Err(Nf4Error::NotAMatrix {
                tensor: self.name.clone(),
                shape: self.shape.clone(),
            });
        };
        let value = self.value.clone();
        Ok(match self.transposed {
            false => value.reshape([rows, columns]),
            true => value.reshape([columns, rows]).transpose(),
        })
    }

    /// The values, as a checkpoint has them. Waits for the device.
    ///
    /// # Errors
    /// [`Nf4Error::Dtype`] unless it is f16, bf16 or f32.
    pub fn to_dense(&self) -> Result<DenseTensor, Nf4Error> {
        let values = match self.transposed {
            false => self.value.clone(),
            true => {
                let elems = self.value.dims();
                self.matrix()?.reshape(elems)
            }
        };
        let dtype = FloatType::from_dtype(self.dtype, &self.name)?;
        let values: Vec<f32> = values.cast(DType::F32).into_data().iter::<f32>().collect();
        DenseTensor::from_f32(&values, &self.shape, dtype)
    }

    /// Values in a checkpoint's order as Burn holds them.
    pub fn in_burn_order(&self, values: Tensor<1>) -> Tensor<1> {
        match (self.transposed, self.shape.as_slice()) {
            (true, &[rows, columns]) => {
                let elems = values.dims();
                let values = values.reshape([rows, columns]).transpose();
                values.reshape(elems)
            }
            _ => values,
        }
    }
}

/// All float parameters of a model outside of its linear layers.
pub(super) fn other_floats<M: LinearLayers>(model: &M) -> Vec<OtherFloat> {
    struct Visitor {
        path: ParameterPath,
        found: Vec<(Parameter, DType, Tensor<1>)>,
    }

    impl ModuleVisitor for Visitor {
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.path.enter(name, container_type);
        }

        fn exit_module(&mut self, _name: &str, container_type: &str) {
            self.path.exit(container_type);
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if self.path.is_in(ANY_LINEAR) {
                return;
            }
            let value = param.val();
            let kind = Kind::Float(value.dims().to_vec());
            let parameter = self.path.parameter(value.device(), kind);
            let elems = value.shape().num_elements();
            // A detached leaf would still ask for a gradient, and so what is computed from it.
            let flat = value
                .clone()
                .reshape([elems])
                .detach()
                .set_require_grad(false);
            self.found.push((parameter, value.dtype(), flat));
        }
    }

    let mut visitor = Visitor {
        path: ParameterPath::new(true),
        found: Vec::new(),
    };
    model.visit(&mut visitor);
    let found = visitor.found.into_iter();
    found
        .map(|(parameter, dtype, value)| OtherFloat {
            name: M::checkpoint_name(parameter.stored_path()),
            shape: match &parameter.kind {
                Kind::Float(shape) => parameter.stored_shape(shape),
                _ => Vec::new(),
            },
            dtype,
            transposed: parameter.transposed,
            device: parameter.device,
            value,
        })
        .collect()
}

/// What becomes of a float parameter outside of the linear layers.
#[derive(Debug, Default)]
pub(super) struct Change {
    /// Its values, in its dtype, as Burn holds them.
    pub value: Option<Tensor<1>>,
    pub is_trained: bool,
}

/// Changes float parameters outside of the linear layers, by name.
pub(super) fn change_floats<M: LinearLayers>(model: M, changes: BTreeMap<String, Change>) -> M {
    struct Mapper {
        path: ParameterPath,
        changes: BTreeMap<String, Change>,
        name: fn(&str) -> String,
    }

    impl ModuleMapper for Mapper {
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.path.enter(name, container_type);
        }

        fn exit_module(&mut self, _name: &str, container_type: &str) {
            self.path.exit(container_type);
        }

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if self.path.is_in(ANY_LINEAR) {
                return param;
            }
            let kind = Kind::Float(param.lazy_shape().to_vec());
            let parameter = self.path.parameter(param.lazy_device(), kind);
            let name = (self.name)(parameter.stored_path());
            let Some(change) = self.changes.remove(&name) else {
                return param;
            };
            let param = match change.value {
                None => param,
                Some(value) => {
                    let shape = Shape::from(param.lazy_shape().to_vec());
                    param.map(|_| value.reshape(shape).detach())
                }
            };
            match change.is_trained {
                true => with_stable_id(param, &name).set_require_grad(true),
                false => param.set_require_grad(false),
            }
        }
    }

    if changes.is_empty() {
        return model;
    }
    model.map(&mut Mapper {
        path: ParameterPath::new(true),
        changes,
        name: M::checkpoint_name,
    })
}

/// The name of a parameter of a linear layer.
pub(super) fn of_linear(module: &str, parameter: &str) -> String {
    format!("{module}.{parameter}")
}

/// The names of all parameters that can be a part of an adapter or are asked for by one.
pub(super) struct ModelNames {
    /// Modules with a matrix: linear layers and embeddings.
    pub modules: Vec<String>,
    pub parameters: Vec<String>,
}

impl ModelNames {
    pub fn of<M: LinearLayers>(model: &M, others: &[OtherFloat]) -> Self {
        let mut names = Self {
            modules: Vec::new(),
            parameters: others.iter().map(|other| other.name.clone()).collect(),
        };
        let matrices = others.iter().filter_map(OtherFloat::matrix_module);
        names.modules.extend(matrices.map(String::from));
        for (module, layer) in model.linears() {
            names.parameters.push(of_linear(&module, "weight"));
            if layer.bias().is_some() {
                names.parameters.push(of_linear(&module, "bias"));
            }
            names.modules.push(module);
        }
        if let Some(tied) = model.tied_head() {
            names.parameters.push(of_linear(&tied.head, "weight"));
            names.modules.push(tied.head);
        }
        names
    }

    /// The module of every parameter.
    pub fn modules_of_parameters(&self) -> Vec<&str> {
        let parameters = self.parameters.iter().map(String::as_str);
        parameters
            .map(|name| name.rsplit_once('.').map_or(name, |(module, _)| module))
            .collect()
    }
}

/// The dtype that the model computes in, as far as its parameters tell: that of its embedding, or of
/// another parameter of floats.
pub(super) fn model_dtype<M: LinearLayers>(model: &M, others: &[OtherFloat]) -> Option<DType> {
    let matrix = others.iter().find(|other| other.shape.len() == 2);
    if let Some(other) = matrix.or(others.first()) {
        return Some(other.dtype);
    }
    let linears = model.linears();
    let mut dense = linears.iter().filter_map(|(_, layer)| match layer {
        AnyLinear::Dense(layer) => Some(layer.weight.dtype()),
        _ => None,
    });
    dense.next()
}
