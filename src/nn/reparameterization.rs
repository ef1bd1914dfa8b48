//! NF4 on the weights of unchanged Burn modules, by way of Burn's reparameterizations.

use std::collections::BTreeSet;

use burn::module::{Content, ParamId};
use burn::module::{
    Devices, LoraAdapter, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
    Param, ParamGroup, Reparameterization, Reparameterizer,
};
use burn::tensor::{DType, Device, Shape, Tensor};

use super::REPARAMETERIZATION;
use super::params::map_plain;
use crate::error::Nf4Error;
use crate::format::{FloatType, QuantConfig};
use crate::op::{BlockWeight, LowRank, effective_weight};

/// What visitors and mappers are told that the parts of a reparameterization lie in.
const CONTAINER: &str = "Struct:QuantReparameterization";
const LORA_CONTAINER: &str = "Struct:LoraAdapter";
const LORA_HOST: &str = "lora_host";

/// A packed weight in the place of the values of a parameter, `[in_features, out_features]`.
///
/// [`reparameterize_linears`] puts it on the weights of linear layers; to read it back:
/// `linear.weight.reparameterization::<QuantReparameterization>()`. The parameter's effective value,
/// [`Param::val`], is the decoded weight, in the dtype of the base, plus `s A B` after `apply_lora`.
///
/// The parameter's own tensor, [`Param::base`], has no values any more: it is a column of zeros,
/// `[in_features, 1]`, in the dtype to decode to. A cast of the module casts it, and so what is decoded.
#[derive(Debug, Clone)]
pub struct QuantReparameterization {
    weight: BlockWeight,
    /// What `apply_lora` adapts: Burn throws away an adapter that it has put on a parameter with a
    /// reparameterization, but keeps one on a parameter inside of that. A column of zeros like the
    /// base, so that `A` comes out as Burn makes it, and with the base's id.
    lora_host: Param<Tensor<2>>,
    lora: Option<LoraAdapter>,
}

impl QuantReparameterization {
    fn new(weight: BlockWeight, id: ParamId, base: Tensor<2>) -> Self {
        Self {
            weight,
            lora_host: Param::initialized(id, base),
            lora: None,
        }
    }

    /// The packed weight, `[out_features, in_features]`.
    pub fn weight(&self) -> &BlockWeight {
        &self.weight
    }

    /// The low-rank branch that `apply_lora` has added.
    pub fn lora(&self) -> Option<&LoraAdapter> {
        self.lora.as_ref()
    }

    fn effective(&self, base: DType, device: &Device) -> Result<Tensor<2>, Nf4Error> {
        let dtype = match base {
            // A quantizer went over the base, which has nothing to quantize.
            DType::QFloat(_) => self.weight.dtype(),
            dtype => FloatType::from_dtype(dtype, "base")?,
        };
        let branch = self.lora.as_ref().map(|lora| LowRank {
            a: lora.a.val(),
            b: lora.b.val(),
            scale: lora.scale,
        });
        effective_weight(&self.weight, branch, dtype, device)
    }

    /// The adapter with the shape of the weight that one on the host stands for.
    fn widen(&self, on_host: LoraAdapter) -> LoraAdapter {
        let out_features = self.weight.shape()[0];
        let [rank, _] = on_host.b.dims();
        let (device, dtype) = (on_host.b.device(), on_host.b.dtype());
        // Burn's `Lora` starts B at zero as well.
        let b = device.memory_persistent_allocations((), |()| {
            Tensor::zeros([rank, out_features], (&device, dtype))
        });
        LoraAdapter {
            a: on_host.a,
            b: Param::from_tensor(b),
            scale: on_host.scale,
        }
    }
}

impl Reparameterization for QuantReparameterization {
    const NAME: &'static str = "nf4";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        match self.effective(base.dtype(), &base.device()) {
            // Not a reshape: autodiff would keep its result.
            Ok(weight) => Tensor::from_dispatch(weight.into_dispatch()),
            Err(error) => panic!("QuantReparameterization: {error}"),
        }
    }
}

impl Module for QuantReparameterization {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        self.weight.visit(visitor);
        visitor.enter_module(LORA_HOST, CONTAINER);
        self.lora_host.visit(visitor);
        visitor.exit_module(LORA_HOST, CONTAINER);
        if let Some(lora) = &self.lora {
            visitor.enter_module(LoraAdapter::NAME, REPARAMETERIZATION);
            lora.visit(visitor);
            visitor.exit_module(LoraAdapter::NAME, REPARAMETERIZATION);
        }
    }

    fn map<M: ModuleMapper>(mut self, mapper: &mut M) -> Self {
        self.weight = self.weight.map(mapper);
        mapper.enter_module(LORA_HOST, CONTAINER);
        let host = map_plain(self.lora_host, mapper);
        mapper.exit_module(LORA_HOST, CONTAINER);
        self.lora_host = host.param;
        self.lora = match (self.lora.take(), host.adapter) {
            (None, None) => None,
            (None, Some(on_host)) => Some(self.widen(on_host)),
            // Burn nests no reparameterizations: a second adapter leaves the first in its place.
            (Some(lora), _) => Some(map_lora(lora, mapper)),
        };
        self
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        let devices = self.weight.collect_devices(devices);
        let devices = self.lora_host.collect_devices(devices);
        self.lora.collect_devices(devices)
    }

    fn to_device(self, device: &Device) -> Self {
        Self {
            weight: self.weight.to_device(device),
            lora_host: self.lora_host.to_device(device),
            lora: self.lora.to_device(device),
        }
    }

    fn fork(self, device: &Device) -> Self {
        Self {
            weight: self.weight.fork(device),
            lora_host: self.lora_host.fork(device),
            lora: self.lora.fork(device),
        }
    }

    fn materialize(self) -> Self {
        Self {
            weight: self.weight.materialize(),
            lora_host: self.lora_host.materialize(),
            lora: self.lora.materialize(),
        }
    }

    fn valid(&self) -> Self {
        Self {
            weight: self.weight.valid(),
            lora_host: self.lora_host.valid(),
            lora: self.lora.valid(),
        }
    }

    fn train(self) -> Self {
        Self {
            weight: Module::train(self.weight),
            lora_host: Module::train(self.lora_host),
            lora: Module::train(self.lora),
        }
    }
}

/// Maps the factors of an adapter, which are not to be adapted themselves.
fn map_lora<M: ModuleMapper>(lora: LoraAdapter, mapper: &mut M) -> LoraAdapter {
    let factor = |param, name, mapper: &mut M| {
        mapper.enter_module(name, LORA_CONTAINER);
        let param = map_plain(param, mapper).param;
        mapper.exit_module(name, LORA_CONTAINER);
        param
    };
    mapper.enter_module(LoraAdapter::NAME, REPARAMETERIZATION);
    let a = factor(lora.a, "a", mapper);
    let b = factor(lora.b, "b", mapper);
    mapper.exit_module(LoraAdapter::NAME, REPARAMETERIZATION);
    LoraAdapter { a, b, ..lora }
}

impl ModuleDisplayDefault for QuantReparameterization {
    fn content(&self, content: Content) -> Option<Content> {
        content
            .set_top_level_type("QuantReparameterization")
            .add("weight", &self.weight)
            .add("lora", &self.lora)
            .optional()
    }
}

impl ModuleDisplay for QuantReparameterization {}

/// Quantizes the weights of Burn's own [`Linear`](burn::nn::Linear) layers in a module, without
/// changing a type: the way without effort, for modules that were not written for this crate, such as
/// Burn's `TransformerEncoder`.
///
/// `group` selects among them by the path or the id of their weights; [`ParamGroup::all`] takes every
/// one. The weights are frozen and packed as [`QuantLinear::quantize`](super::QuantLinear::quantize) packs
/// them; biases and all other parameters stay as they are. A low-rank branch is then added by Burn's
/// own `apply_lora`, and [`Module::materialize`] makes dense weights again.
///
/// See [the module](super#nf4-on-unchanged-modules) for what it costs, compared with
/// [`QuantLinear`](super::QuantLinear), and for its limits.
///
/// # Errors
/// [`Nf4Error::Config`] if `group` selects no weight of a `Linear`, or one that has a reparameterization
/// already, which Burn does not nest; those of [`BlockWeight::quantize`], with the path of the weight.
///
/// ```
/// use burn::module::{Lora, Module, ParamGroup};
/// use burn::nn::LinearConfig;
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_nf4::format::QuantConfig;
/// use burn_nf4::nn::reparameterize_linears;
///
/// let device = Device::default().autodiff();
/// let model = LinearConfig::new(128, 256).init(&device);
/// let model = reparameterize_linears(model, QuantConfig::default(), ParamGroup::all())?;
/// let model = model.apply_lora(Lora::new(8, 16.0));
/// let x = Tensor::<2>::random([4, 128], Distribution::Default, &device);
/// assert_eq!(model.forward(x).dims(), [4, 256]);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
pub fn reparameterize_linears<M: Module>(
    module: M,
    config: QuantConfig,
    group: ParamGroup,
) -> Result<M, Nf4Error> {
    let mut taken = TakenPaths::default();
    module.visit(&mut taken);
    let mut mapper = LinearMapper {
        path: Path::default(),
        taken: taken.paths,
        config,
        group,
        found: false,
        error: None,
    };
    let module = module.map(&mut mapper);
    if let Some(error) = mapper.error {
        return Err(error);
    }
    if !mapper.found {
        return Err(Nf4Error::Config {
            field: "group",
            expected: "a group with the weight of at least one Linear",
            given: format!("{:?}", mapper.group),
        });
    }
    Ok(module)
}

/// Where a traversal is: names, and the types that they are fields of.
#[derive(Default)]
struct Path {
    names: Vec<String>,
    containers: Vec<String>,
}

impl Path {
    fn enter(&mut self, name: &str, container: &str) {
        self.names.push(name.into());
        self.containers.push(container.into());
    }

    fn exit(&mut self) {
        self.names.pop();
        self.containers.pop();
    }

    fn is_weight_of_linear(&self) -> bool {
        let name = self.names.last().map(String::as_str);
        let container = self.containers.last().map(String::as_str);
        (name, container) == (Some("weight"), Some("Struct:Linear"))
    }

    fn key(&self) -> String {
        self.names.join(".")
    }
}

/// Collects the paths of parameters that have a reparameterization: a mapper is shown them without.
#[derive(Default)]
struct TakenPaths {
    path: Path,
    paths: BTreeSet<String>,
}

impl ModuleVisitor for TakenPaths {
    fn enter_module(&mut self, name: &str, container: &str) {
        if container == REPARAMETERIZATION {
            self.paths.insert(self.path.key());
        }
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }
}

struct LinearMapper {
    path: Path,
    taken: BTreeSet<String>,
    config: QuantConfig,
    group: ParamGroup,
    found: bool,
    error: Option<Nf4Error>,
}

impl LinearMapper {
    fn quantize<const D: usize>(
        &self,
        key: &str,
        param: &Param<Tensor<D>>,
    ) -> Result<Param<Tensor<D>>, Nf4Error> {
        if self.taken.contains(key) {
            return Err(Nf4Error::Config {
                field: "group",
                expected: "weights without a reparameterization (apply_lora comes afterwards)",
                given: key.into(),
            });
        }
        let value = param.val();
        let (device, dtype) = (value.device(), value.dtype());
        FloatType::from_dtype(dtype, key)?;
        // A Tensor<2> by another name, without an operation that would be recorded.
        let value = Tensor::<2>::from_dispatch(value.detach().into_dispatch());
        let [d_input, _] = value.dims();
        let weight = BlockWeight::quantize(value.transpose(), self.config)
            .map_err(|error| error.with_key(key))?;
        let column = Tensor::<2>::zeros([d_input, 1], (&device, dtype));
        let base = Tensor::zeros(Shape::from([d_input, 1]), (&device, dtype));
        let parts = QuantReparameterization::new(weight, param.id, column);
        // A new parameter: its mappers of layout would be for a shape that this one does not have.
        let base = Param::initialized(param.id, base);
        Ok(base.apply_reparameterization(Attach(Some(parts))))
    }
}

impl ModuleMapper for LinearMapper {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.error.is_some() || D != 2 || !self.path.is_weight_of_linear() {
            return param;
        }
        let key = self.path.key();
        if !self.group.matches(&param.id, Some(&key)) {
            return param;
        }
        self.found = true;
        match self.quantize(&key, &param) {
            Ok(param) => param,
            Err(error) => {
                self.error = Some(error);
                param
            }
        }
    }
}

/// Puts a reparameterization on the one parameter that it meets: Burn has no other way to.
struct Attach(Option<QuantReparameterization>);

impl Reparameterizer for Attach {
    type Reparam = QuantReparameterization;

    fn reparameterize<const D: usize>(
        &mut self,
        _: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<QuantReparameterization>) {
        (param, self.0.take())
    }
}
