//! The parameters of a module, found without making or reading any of them.

use std::fmt;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Bool, DType, Device, Int, Shape, Tensor};
use burn_store::burn_pack::{Bytes, Tensor as PackTensor};
use burn_store::{ModuleAdapter, ModuleContext, PyTorchToBurnAdapter};
use safetensors::Dtype;

use super::elements::{FLOATS, dtype_names};
use crate::error::TensorForm;
use crate::format::WeightForm;

/// A parameter of a module.
#[derive(Debug, Clone)]
pub(crate) struct Parameter {
    /// Its path; of a packed weight, that of the weight and not of the tensor in it.
    pub path: String,
    /// The path that PyTorch uses for it, where that is another one.
    pub pytorch_path: Option<String>,
    /// Whether PyTorch stores it transposed.
    pub transposed: bool,
    pub device: Device,
    pub kind: Kind,
}

/// What a parameter can hold.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Kind {
    Packed(WeightForm),
    Float(Vec<usize>),
    Int(Vec<usize>),
    Bool(Vec<usize>),
}

/// Dtypes that an integer parameter takes.
pub(super) const INTS: [Dtype; 8] = [
    Dtype::I64,
    Dtype::I32,
    Dtype::I16,
    Dtype::I8,
    Dtype::U64,
    Dtype::U32,
    Dtype::U16,
    Dtype::U8,
];

impl Parameter {
    /// What a checkpoint must hold for it.
    pub fn expected(&self) -> TensorForm {
        let dense = |dtypes: &[Dtype], shape: &[usize]| TensorForm {
            dtype: dtype_names(dtypes),
            shape: self.stored_shape(shape),
            quantized: false,
        };
        match &self.kind {
            Kind::Packed(form) => form_of_weight(form),
            Kind::Float(shape) => dense(&FLOATS, shape),
            Kind::Int(shape) => dense(&INTS, shape),
            Kind::Bool(shape) => dense(&[Dtype::BOOL], shape),
        }
    }

    /// The path, with the name that PyTorch uses for the parameter.
    #[cfg(feature = "peft")]
    pub fn stored_path(&self) -> &str {
        self.pytorch_path.as_deref().unwrap_or(&self.path)
    }

    /// A shape as PyTorch stores it.
    pub fn stored_shape(&self, shape: &[usize]) -> Vec<usize> {
        match self.transposed {
            false => shape.to_vec(),
            true => shape.iter().rev().copied().collect(),
        }
    }
}

/// A quantized weight, to be told of.
pub(super) fn form_of_weight(form: &WeightForm) -> TensorForm {
    TensorForm {
        dtype: form.to_string(),
        shape: form.shape.clone(),
        quantized: true,
    }
}

/// Lists the parameters of a module.
pub(crate) fn parameters_of<M: Module>(module: &M, skip_enum_variants: bool) -> Vec<Parameter> {
    let mut walk = Walk {
        path: ParameterPath::new(skip_enum_variants),
        found: Vec::new(),
    };
    module.visit(&mut walk);
    walk.found
}

/// Where a visitor or a mapper is in a module.
#[derive(Debug, Default)]
pub(crate) struct ParameterPath {
    path: Vec<String>,
    containers: Vec<String>,
    skip_enum_variants: bool,
}

impl ParameterPath {
    pub fn new(skip_enum_variants: bool) -> Self {
        Self {
            skip_enum_variants,
            ..Self::default()
        }
    }

    pub fn enter(&mut self, name: &str, container_type: &str) {
        self.containers.push(container_type.into());
        if self.names(container_type) {
            self.path.push(name.into());
        }
    }

    pub fn exit(&mut self, container_type: &str) {
        self.containers.pop();
        if self.names(container_type) {
            self.path.pop();
        }
    }

    fn names(&self, container_type: &str) -> bool {
        !(self.skip_enum_variants && container_type.starts_with("Enum:"))
    }

    /// Whether this is inside of a module of such a type, as Burn names it: `Struct:Linear`.
    #[cfg(feature = "peft")]
    pub fn is_in(&self, container_type: &str) -> bool {
        self.containers.iter().any(|inner| inner == container_type)
    }

    /// The integer parameter that is here.
    pub fn int_kind(&self, shape: Vec<usize>) -> Kind {
        let name = self.path.last().map_or("", String::as_str);
        match WeightForm::from_packed_name(name) {
            Some(form) => Kind::Packed(form),
            None => Kind::Int(shape),
        }
    }

    /// The parameter that is here.
    pub fn parameter(&self, device: Device, kind: Kind) -> Parameter {
        let depth = match kind {
            Kind::Packed(_) => self.path.len() - 1,
            _ => self.path.len(),
        };
        let path = self.path[..depth].join(".");
        let context = ModuleContext::new(&self.containers);
        let pytorch_name = self.path[..depth].last().and_then(|name| {
            PyTorchToBurnAdapter.get_alternative_param_name(name, context.module_type()?)
        });
        let pytorch_path = pytorch_name.map(|name| match path.rsplit_once('.') {
            Some((parent, _)) => format!("{parent}.{name}"),
            None => name,
        });
        // What Burn's adapter does to a matrix of this name tells whether it is transposed.
        let probe = PackTensor::new(
            path.clone(),
            DType::U8,
            Shape::from([1, 2]),
            None,
            Bytes::from_bytes_vec(vec![0; 2]),
        );
        let transposed = match &kind {
            Kind::Float(shape) if shape.len() == 2 => {
                PyTorchToBurnAdapter.adapt(probe, context).shape == Shape::from([2, 1])
            }
            _ => false,
        };
        Parameter {
            path,
            pytorch_path,
            transposed,
            device,
            kind,
        }
    }
}

impl fmt::Display for ParameterPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path.join("."))
    }
}

/// Collects parameters.
struct Walk {
    path: ParameterPath,
    found: Vec<Parameter>,
}

impl Walk {
    fn found(&mut self, device: Device, kind: Kind) {
        self.found.push(self.path.parameter(device, kind));
    }
}

impl ModuleVisitor for Walk {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, container_type: &str) {
        self.path.exit(container_type);
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.found(
            param.lazy_device(),
            Kind::Float(param.lazy_shape().to_vec()),
        );
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let kind = self.path.int_kind(param.lazy_shape().to_vec());
        self.found(param.lazy_device(), kind);
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.found(param.lazy_device(), Kind::Bool(param.lazy_shape().to_vec()));
    }
}
