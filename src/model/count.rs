//! How many parameters a module has, and how many bytes.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Bool, Int, Tensor};

use crate::checkpoint::parameters::{Kind, ParameterPath};

/// What a module holds, packed weights counted by the weights in them: a count of tensor elements would
/// miss them.
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::tensor::Device;
/// use burn_nf4::format::QuantConfig;
/// use burn_nf4::model::LinearLayers;
/// use burn_nf4::nn::{AnyLinear, QLoraLinearConfig};
///
/// let device = Device::default().autodiff();
/// let layer: AnyLinear = LinearConfig::new(512, 512).with_bias(false).init(&device).into();
/// let layer = layer.quantize(QuantConfig::default())?;
/// let count = layer.with_lora(&QLoraLinearConfig::new(8), &device)?.count_parameters();
/// assert_eq!(count.packed, 512 * 512);
/// assert_eq!(count.trainable, 8 * (512 + 512));
/// assert_eq!(count.total, count.packed + count.trainable);
/// assert!(count.packed_bytes < 512 * 512 * 6 / 10);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ParameterCount {
    /// All parameters.
    pub total: usize,
    /// Those that require a gradient.
    pub trainable: usize,
    /// Those in packed weights.
    pub packed: usize,
    /// Bytes of all tensors.
    pub size_bytes: usize,
    /// Bytes of packed weights, with their scales and tables.
    pub packed_bytes: usize,
}

impl ParameterCount {
    /// Counts the parameters of any module. A parameter that is used twice is counted twice, as in
    /// [`num_params`](Module::num_params). Parameters that are not initialised yet are now: without a
    /// value they have no dtype.
    pub fn of<M: Module>(module: &M) -> Self {
        let mut visitor = Visitor {
            path: ParameterPath::default(),
            count: Self::default(),
        };
        module.visit(&mut visitor);
        visitor.count
    }
}

struct Visitor {
    path: ParameterPath,
    count: ParameterCount,
}

impl ModuleVisitor for Visitor {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, container_type: &str) {
        self.path.exit(container_type);
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        let elems = value.shape().num_elements();
        self.count.total += elems;
        self.count.size_bytes += elems * value.dtype().size();
        if param.is_require_grad() {
            self.count.trainable += elems;
        }
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let value = param.val();
        let elems = value.shape().num_elements();
        let size_bytes = elems * value.dtype().size();
        self.count.size_bytes += size_bytes;
        match self.path.int_kind(value.dims().to_vec()) {
            Kind::Packed(form) => {
                let weights: usize = form.shape.iter().product();
                self.count.total += weights;
                self.count.packed += weights;
                self.count.packed_bytes += size_bytes;
            }
            _ => self.count.total += elems,
        }
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        let value = param.val();
        let elems = value.shape().num_elements();
        self.count.total += elems;
        self.count.size_bytes += elems * value.dtype().size();
    }
}
