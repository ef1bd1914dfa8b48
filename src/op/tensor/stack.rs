//! The weights of experts on a device, in one tensor.

use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
    Param, ParamId,
};
use burn::tensor::{DType, Device, Int, Shape, Tensor, TensorData};

use super::check::check_device;
use super::linear::{expert_linear, linear};
use super::spec::WeightSpec;
use super::weight::BlockWeight;
use crate::error::Nf4Error;
use crate::format::{FloatType, QuantConfig, WeightForm, check_len, check_shape, matrix_dims};
use crate::stack_layout::StackLayout;

/// The packed weights of experts in one tensor, for products with those that rows are sent to
/// ([`grouped_linear`](crate::op::grouped_linear)).
///
/// Weights of one form lie one after the other, each as it is packed by itself, with its own tables and scales:
/// the image of expert `e` begins at word `e * layout().image_stride()`. A weight `[experts, n, k]` that was quantized
/// as a whole is taken as it is.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_nf4::BlockWeight;
/// use burn_nf4::format::QuantConfig;
/// use burn_nf4::op::ExpertStack;
///
/// let device = Device::default();
/// let expert = || {
///     let dense = Tensor::<2>::random([32, 64], Distribution::Default, &device);
///     BlockWeight::quantize(dense, QuantConfig::default())
/// };
/// let experts = [expert()?, expert()?, expert()?];
/// let stack = ExpertStack::new(&experts)?;
/// assert_eq!((stack.experts(), stack.matrix_dims()), (3, [32, 64]));
/// assert_eq!(stack.expert(1)?.to_host()?, experts[1].to_host()?);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// It is a Burn module. In a record, and to a visitor, the tensor of separate weights is named by their number and
/// form, such as `experts_8_packed_nf4_64_256_float32_256x128`; a whole weight is a
/// [`BlockWeight`]. Checkpoint readers fill the latter; the former is made from weights that they have read.
#[derive(Debug, Clone)]
pub struct ExpertStack {
    layout: StackLayout,
    parts: Parts,
}

#[derive(Debug, Clone)]
enum Parts {
    /// Images of this form, one after the other.
    Images {
        spec: WeightSpec,
        packed: Param<Tensor<1, Int>>,
    },
    /// One weight of three dimensions.
    Whole(BlockWeight),
}

/// What visitors and mappers are told that the tensor of separate weights lies in.
const CONTAINER: &str = "Struct:ExpertStack";

impl ExpertStack {
    /// Puts weights of one form one after the other, into memory of their own.
    ///
    /// # Shapes
    /// - `experts`: `[out_features, in_features]` each
    ///
    /// # Errors
    /// [`Nf4Error::ElementCount`] for no experts, [`Nf4Error::NotAMatrix`] for a weight of another rank,
    /// [`Nf4Error::Shape`] and [`Nf4Error::Dtype`] for one of another shape or form than the first,
    /// [`Nf4Error::Config`] for a transposed one, [`Nf4Error::Device`] for one on another device. Each names the
    /// expert. [`Nf4Error::Length`] for a weight whose tensor a mapper replaced by one of another length.
    pub fn new(experts: &[BlockWeight]) -> Result<Self, Nf4Error> {
        let Some(first) = experts.first() else {
            return Err(Nf4Error::ElementCount {
                tensor: "experts".into(),
                shape: vec![0],
            });
        };
        let device = first.device();
        let mut images = Vec::with_capacity(experts.len());
        for (i, expert) in experts.iter().enumerate() {
            let name = format!("experts[{i}]");
            check_form(&name, first.form(), expert.form())?;
            let packed = expert.checked_packed()?;
            check_device(&name, &packed.device(), &device)?;
            images.push(packed);
        }
        let spec = WeightSpec::new(first.form().clone())?;
        let layout = layout_of(&spec, experts.len())?;
        let packed = Param::initialized(ParamId::new(), in_a_row(images, &layout));
        let parts = Parts::Images { spec, packed };
        Ok(Self { layout, parts })
    }

    /// Takes a weight that holds all experts, quantized as a whole. Nothing is copied.
    ///
    /// # Shapes
    /// - `weight`: `[experts, out_features, in_features]`
    ///
    /// # Errors
    /// [`Nf4Error::Rank`] for a weight of another rank.
    pub fn from_whole(weight: BlockWeight) -> Result<Self, Nf4Error> {
        let &[experts, n, k] = weight.shape() else {
            return Err(Nf4Error::Rank {
                tensor: "experts".into(),
                expected: 3,
                shape: weight.shape().to_vec(),
            });
        };
        Ok(Self {
            layout: StackLayout::of_whole(*weight.layout(), experts, [n, k])?,
            parts: Parts::Whole(weight),
        })
    }

    /// Separate weights of zeros, to load a record into. Their memory is taken when they are first used.
    ///
    /// # Errors
    /// [`Nf4Error::ElementCount`] for no experts or an impossible shape, [`Nf4Error::Blocks`],
    /// [`Nf4Error::BlockSize`] and [`Nf4Error::Scales`] for one, or settings, that the type has not.
    pub fn zeros(
        experts: usize,
        [out_features, in_features]: [usize; 2],
        config: QuantConfig,
        dtype: FloatType,
        device: &Device,
    ) -> Result<Self, Nf4Error> {
        let spec = WeightSpec::new(WeightForm {
            shape: vec![out_features, in_features],
            dtype,
            config,
            transposed: false,
        })?;
        let layout = layout_of(&spec, experts)?;
        let of = spec.clone();
        let packed = Param::uninitialized(
            ParamId::new(),
            move |device, _| {
                let mut image = of.zero_words();
                image.resize(layout.image_stride(), 0);
                let mut words = image.repeat(experts);
                words.truncate(layout.words());
                let data = TensorData::new(words, [layout.words()]);
                Tensor::from_data(data, (device, DType::U32))
            },
            device.clone(),
            false,
            Shape::from([layout.words()]),
        );
        let parts = Parts::Images { spec, packed };
        Ok(Self { layout, parts })
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.layout.experts()
    }

    /// `[out_features, in_features]` of each.
    pub fn matrix_dims(&self) -> [usize; 2] {
        self.layout.matrix_dims()
    }

    /// Where the weights lie in the tensor.
    pub fn layout(&self) -> &StackLayout {
        &self.layout
    }

    /// What each weight is, or where all are one weight what that is.
    pub fn form(&self) -> &WeightForm {
        match &self.parts {
            Parts::Images { spec, .. } => &spec.form,
            Parts::Whole(weight) => weight.form(),
        }
    }

    /// The words of all weights, `[layout().words()]`, u32.
    pub fn packed(&self) -> Tensor<1, Int> {
        match &self.parts {
            Parts::Images { packed, .. } => packed.val(),
            Parts::Whole(weight) => weight.packed(),
        }
    }

    /// The device that holds the weights.
    pub fn device(&self) -> Device {
        match &self.parts {
            Parts::Images { packed, .. } => packed.lazy_device(),
            Parts::Whole(weight) => weight.device(),
        }
    }

    /// Bytes of device memory held.
    pub fn size_bytes(&self) -> usize {
        self.layout.words() * 4
    }

    /// The weight of an expert by itself: on Flex in memory of its own, elsewhere a view of the stack, whose memory
    /// is held until both are dropped.
    ///
    /// # Errors
    /// [`Nf4Error::RowRange`] if there is no such expert, [`Nf4Error::Config`] where all are one weight: the blocks
    /// of scales of a part need not begin with it. [`linear`](Self::linear) and
    /// [`BlockWeight::dequantize_index`] work on such a part.
    pub fn expert(&self, expert: usize) -> Result<BlockWeight, Nf4Error> {
        self.check_expert(expert)?;
        match &self.parts {
            Parts::Images { spec, .. } => {
                let words = spec.layout.words();
                let start = expert * self.layout.image_stride();
                let image = self.checked_packed()?.narrow(0, start, words);
                Ok(BlockWeight::from_packed(owned(image), spec.clone()))
            }
            Parts::Whole(weight) => Err(Nf4Error::Config {
                field: "experts",
                expected: "weights that were quantized one by one",
                given: format!("one weight of shape {:?}", weight.shape()),
            }),
        }
    }

    /// `y = x Wₑᵀ + b` with the weight of one expert, as [`linear`](crate::op::linear()) computes it, with gradients
    /// too: for many rows, whose experts are known to the host.
    ///
    /// # Shapes
    /// - `x`: `[..., in_features]`; `bias`: `[out_features]`
    /// - returns `[..., out_features]`
    ///
    /// # Errors
    /// [`Nf4Error::RowRange`] if there is no such expert, otherwise those of [`linear`](crate::op::linear()).
    pub fn linear<const D: usize>(
        &self,
        x: Tensor<D>,
        expert: usize,
        bias: Option<Tensor<1>>,
    ) -> Result<Tensor<D>, Nf4Error> {
        match &self.parts {
            Parts::Images { .. } => linear(x, &self.expert(expert)?, bias),
            Parts::Whole(weight) => expert_linear(x, weight, expert, bias),
        }
    }

    /// Whether an [expert](Self::expert) of a stack on this device is a view of it, and no copy.
    pub fn has_views(device: &Device) -> bool {
        #[cfg(feature = "flex")]
        return !crate::op::backends::flex::is_flex(device);
        #[cfg(not(feature = "flex"))]
        {
            let _ = device;
            true
        }
    }

    fn check_expert(&self, expert: usize) -> Result<(), Nf4Error> {
        if expert < self.experts() {
            return Ok(());
        }
        Err(Nf4Error::RowRange {
            start: expert,
            end: expert.saturating_add(1),
            rows: self.experts(),
        })
    }

    /// The words, which a module mapper may have replaced by others.
    pub(in crate::op) fn checked_packed(&self) -> Result<Tensor<1, Int>, Nf4Error> {
        let packed = match &self.parts {
            Parts::Images { packed, .. } => packed.val(),
            Parts::Whole(weight) => return weight.checked_packed(),
        };
        let given = packed.shape().num_elements();
        check_len("packed weights", self.layout.words(), given)?;
        if packed.dtype() != DType::U32 {
            return Err(Nf4Error::Dtype {
                tensor: "packed weights".into(),
                expected: "U32".into(),
                given: format!("{:?}", packed.dtype()),
            });
        }
        Ok(packed)
    }

    /// With other tensors.
    fn map_parts(
        self,
        of_images: impl FnOnce(Param<Tensor<1, Int>>) -> Param<Tensor<1, Int>>,
        of_whole: impl FnOnce(BlockWeight) -> BlockWeight,
    ) -> Self {
        let parts = match self.parts {
            Parts::Images { spec, packed } => Parts::Images {
                spec,
                packed: of_images(packed),
            },
            Parts::Whole(weight) => Parts::Whole(of_whole(weight)),
        };
        Self { parts, ..self }
    }
}

/// The name of the tensor of separate weights.
fn tensor_name(layout: &StackLayout, spec: &WeightSpec) -> String {
    format!("experts_{}_{}", layout.experts(), spec.form.packed_name())
}

/// Images one after the other, each where the layout has it.
fn in_a_row(images: Vec<Tensor<1, Int>>, layout: &StackLayout) -> Tensor<1, Int> {
    let gap = layout.image_stride() - layout.image().words();
    if gap == 0 {
        return Tensor::cat(images, 0);
    }
    let zeros = Tensor::zeros([gap], (&images[0].device(), DType::U32));
    let mut parts = Vec::with_capacity(2 * images.len());
    for image in images {
        if !parts.is_empty() {
            parts.push(zeros.clone());
        }
        parts.push(image);
    }
    Tensor::cat(parts, 0)
}

fn layout_of(spec: &WeightSpec, experts: usize) -> Result<StackLayout, Nf4Error> {
    let dims = matrix_dims("experts", &spec.form.shape)?;
    StackLayout::of_images(spec.layout, experts, dims)
}

/// Checks that a weight is of the form of the first one, and one that can be stacked.
fn check_form(name: &str, first: &WeightForm, form: &WeightForm) -> Result<(), Nf4Error> {
    matrix_dims(name, &form.shape)?;
    check_shape(name, &first.shape, &form.shape)?;
    if form.transposed {
        return Err(Nf4Error::Config {
            field: "experts",
            expected: "weights that are stored as they are used",
            given: format!("one stored as its transpose, {name}"),
        });
    }
    if first == form {
        return Ok(());
    }
    Err(Nf4Error::Dtype {
        tensor: name.into(),
        expected: first.to_string(),
        given: form.to_string(),
    })
}

/// In memory of its own on the CPU, where a part would be copied whenever it is used.
fn owned(part: Tensor<1, Int>) -> Tensor<1, Int> {
    #[cfg(feature = "flex")]
    return crate::op::backends::flex::copied(part);
    #[cfg(not(feature = "flex"))]
    part
}

impl Module for ExpertStack {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        match &self.parts {
            Parts::Images { spec, packed } => {
                let name = tensor_name(&self.layout, spec);
                visitor.enter_module(&name, CONTAINER);
                packed.visit(visitor);
                visitor.exit_module(&name, CONTAINER);
            }
            Parts::Whole(weight) => weight.visit(visitor),
        }
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        let layout = self.layout;
        let parts = match self.parts {
            Parts::Images { spec, packed } => {
                let name = tensor_name(&layout, &spec);
                mapper.enter_module(&name, CONTAINER);
                let packed = Module::map(packed, mapper);
                mapper.exit_module(&name, CONTAINER);
                Parts::Images { spec, packed }
            }
            Parts::Whole(weight) => Parts::Whole(weight.map(mapper)),
        };
        Self { layout, parts }
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        match &self.parts {
            Parts::Images { packed, .. } => packed.collect_devices(devices),
            Parts::Whole(weight) => weight.collect_devices(devices),
        }
    }

    fn to_device(self, device: &Device) -> Self {
        self.map_parts(|p| p.to_device(device), |w| w.to_device(device))
    }

    fn fork(self, device: &Device) -> Self {
        self.map_parts(|p| p.fork(device), |w| w.fork(device))
    }

    fn materialize(self) -> Self {
        self.map_parts(|p| p.materialize(), BlockWeight::materialize)
    }

    fn valid(&self) -> Self {
        self.clone().map_parts(|p| p.valid(), |w| w.valid())
    }

    fn train(self) -> Self {
        self.map_parts(|p| p.train(), BlockWeight::train)
    }
}

impl ModuleDisplayDefault for ExpertStack {
    fn content(&self, content: Content) -> Option<Content> {
        let [n, k] = self.matrix_dims();
        let text = format!("{} x [{n}, {k}], {}", self.experts(), self.form());
        content.add_formatted(&text).optional()
    }
}

impl ModuleDisplay for ExpertStack {}
