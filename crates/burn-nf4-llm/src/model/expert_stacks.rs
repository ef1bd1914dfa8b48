//! The weights of a mixture's experts in one tensor each, for products that the device chooses the experts of.

use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
    ParamId,
};
use burn::tensor::{Device, Int, Tensor};
use burn_nf4::Nf4Error;
use burn_nf4::nn::{AnyLinear, QuantLinear};
use burn_nf4::op::{
    Activation, ExpertPart, ExpertStack, GatedExperts, MAX_EXPERTS, MatmulStrategy,
    grouped_gated_linear, grouped_linear,
};

use crate::model::mlp::{GateUpProjections, GatedMlp, SeparateGateUp};

/// The projections of an expert: to the gate, to what it opens, and back.
const PROJECTIONS: usize = 3;

/// The stacks that the weights of experts are views of, if they are stacked.
///
/// As a module it is empty, for the experts hold all parameters, and whatever may change these leaves none.
#[derive(Debug, Clone, Default)]
pub(crate) struct StackedExperts(Option<Box<ExpertStacks>>);

/// The weights of all experts, and their biases.
#[derive(Debug, Clone)]
pub(super) struct ExpertStacks {
    stacks: [StackedLinear; PROJECTIONS],
    activation: Activation,
    /// Of the layers whose weights they are, by expert.
    ids: Vec<[LayerIds; PROJECTIONS]>,
}

/// One projection of all experts.
#[derive(Debug, Clone)]
struct StackedLinear {
    stack: ExpertStack,
    /// `[experts, out_features]`.
    bias: Option<Tensor<2>>,
}

/// Ids of the weight and of the bias.
type LayerIds = (ParamId, Option<ParamId>);

impl StackedExperts {
    /// The stacks, if they are of these experts as they are.
    pub fn of(&self, experts: &[GatedMlp]) -> Option<&ExpertStacks> {
        let stacks = self.0.as_deref()?;
        let are_same = |(expert, ids): (&GatedMlp, &[LayerIds; PROJECTIONS])| {
            expert.activation == stacks.activation
                && projections(expert).is_some_and(|layers| layers.map(ids_of) == *ids)
        };
        let is_same =
            experts.len() == stacks.ids.len() && experts.iter().zip(&stacks.ids).all(are_same);
        is_same.then_some(stacks)
    }
}

impl ExpertStacks {
    /// Whether experts can be stacked: all are packed in one way, and computed in the way that is best.
    pub fn can_hold(experts: &[GatedMlp]) -> bool {
        let layers: Option<Vec<_>> = experts.iter().map(projections).collect();
        let Some((first, layers)) = layers
            .as_ref()
            .and_then(|layers| Some((layers.first()?, layers)))
        else {
            return false;
        };
        let device = first[0].weight.device();
        let [gate, up, _] = first;
        let is_alike = |i: usize, layer: &QuantLinear| {
            !layer.weight.is_transposed()
                && layer.weight.form() == first[i].weight.form()
                && layer.bias.is_some() == first[i].bias.is_some()
                && matches!(layer.strategy, MatmulStrategy::Auto | MatmulStrategy::Rule)
        };
        let are_alike = |layers: &[&QuantLinear; PROJECTIONS]| {
            layers
                .iter()
                .enumerate()
                .all(|(i, layer)| is_alike(i, layer))
        };
        let activation = experts[0].activation;
        experts.len() <= MAX_EXPERTS
            && !device.is_autodiff()
            && gate.weight.form() == up.weight.form()
            && gate.bias.is_some() == up.bias.is_some()
            && experts.iter().all(|expert| expert.activation == activation)
            && layers.iter().all(are_alike)
    }

    /// Stacks the weights of experts, which become views of the stacks.
    ///
    /// # Errors
    /// Those of [`ExpertStack::new`]; [`Nf4Error::ElementCount`] if they [cannot be stacked](Self::can_hold).
    pub fn take(experts: &mut [GatedMlp]) -> Result<StackedExperts, Nf4Error> {
        let activation = experts.first().map(|expert| expert.activation);
        let stacks = [
            StackedLinear::take(experts, 0)?,
            StackedLinear::take(experts, 1)?,
            StackedLinear::take(experts, 2)?,
        ];
        let ids = experts.iter().filter_map(projections);
        let ids = ids.map(|layers| layers.map(ids_of)).collect();
        Ok(StackedExperts(activation.map(|activation| {
            Box::new(Self {
                stacks,
                activation,
                ids,
            })
        })))
    }

    /// What its experts give for each token.
    ///
    /// # Shapes
    /// - `x`: `[tokens, hidden_size]`; `ids`: `[tokens, per_token]`
    /// - returns `[tokens * per_token, hidden_size]`
    ///
    /// # Errors
    /// Those of [`grouped_gated_linear`].
    pub fn forward(&self, x: Tensor<2>, ids: Tensor<2, Int>) -> Result<Tensor<2>, Nf4Error> {
        let [gate, up, down] = self.stacks.each_ref().map(|stack| stack.part(&x));
        let experts = GatedExperts::Apart { gate, up };
        let inner = grouped_gated_linear(x, ids.clone(), experts, self.activation)?;
        grouped_linear(inner, ids, down.stack, down.bias)
    }
}

impl StackedLinear {
    /// Stacks one projection of all experts.
    fn take(experts: &mut [GatedMlp], projection: usize) -> Result<Self, Nf4Error> {
        let layers = experts.iter().filter_map(projections);
        let layers: Vec<_> = layers.map(|layers| layers[projection]).collect();
        let weights: Vec<_> = layers.iter().map(|layer| layer.weight.clone()).collect();
        let biases = layers.iter().map(|layer| layer.bias.as_ref());
        let biases: Option<Vec<_>> = biases.map(|bias| Some(bias?.val())).collect();
        let stack = ExpertStack::new(&weights)?;
        let layers = experts.iter_mut().filter_map(projections_mut);
        for (expert, layers) in layers.enumerate() {
            layers[projection].weight = stack.expert(expert)?;
        }
        let bias = biases.map(|biases| Tensor::stack(biases, 0));
        Ok(Self { stack, bias })
    }

    fn part(&self, x: &Tensor<2>) -> ExpertPart<'_> {
        ExpertPart {
            stack: &self.stack,
            bias: self.bias.clone().map(|bias| bias.cast(x.dtype())),
        }
    }
}

fn ids_of(layer: &QuantLinear) -> LayerIds {
    (layer.weight.id(), layer.bias.as_ref().map(|bias| bias.id))
}

/// The layers of an expert, by reference or by mutable reference, if all are packed ones without branches.
macro_rules! projections {
    ($gate_up:expr, $down_proj:expr) => {
        match ($gate_up, $down_proj) {
            (
                GateUpProjections::Separate(SeparateGateUp {
                    gate_proj: AnyLinear::Nf4(gate),
                    up_proj: AnyLinear::Nf4(up),
                }),
                AnyLinear::Nf4(down),
            ) => Some([gate, up, down]),
            _ => None,
        }
    };
}

fn projections(expert: &GatedMlp) -> Option<[&QuantLinear; PROJECTIONS]> {
    projections!(&expert.gate_up, &expert.down_proj)
}

fn projections_mut(expert: &mut GatedMlp) -> Option<[&mut QuantLinear; PROJECTIONS]> {
    projections!(&mut expert.gate_up, &mut expert.down_proj)
}

impl Module for StackedExperts {
    fn visit<V: ModuleVisitor>(&self, _visitor: &mut V) {}

    fn map<M: ModuleMapper>(self, _mapper: &mut M) -> Self {
        Self::default()
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        devices
    }

    fn to_device(self, _device: &Device) -> Self {
        Self::default()
    }

    fn fork(self, _device: &Device) -> Self {
        Self::default()
    }

    fn materialize(self) -> Self {
        self
    }

    fn valid(&self) -> Self {
        Self::default()
    }

    fn train(self) -> Self {
        Self::default()
    }
}

impl ModuleDisplayDefault for StackedExperts {
    fn content(&self, content: Content) -> Option<Content> {
        content.add_formatted(&self.0.is_some()).optional()
    }
}

impl ModuleDisplay for StackedExperts {}
