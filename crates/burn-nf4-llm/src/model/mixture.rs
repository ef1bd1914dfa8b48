//! Mixtures of experts (arXiv 1701.06538, 2101.03961).

use burn::module::Module;
use burn::tensor::activation::softmax;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_nf4::nn::AnyLinear;
use burn_nf4::op::{RouteForm, grouped_pays, route};
use burn_nf4::{Nf4Error, linear_layers};

use crate::model::expert_stacks::{ExpertStacks, StackedExperts};
use crate::model::mlp::GatedMlp;
use crate::model::variants::linear_variants;

/// The feed-forward block of a layer with experts: a router sends each token to a few of them, whose
/// outputs are summed by their weights.
///
/// Only chosen experts compute. For few tokens, where the experts' weights are [stacked](Self::stacked), the device
/// alone knows which these are, and computes all of them in two launches. Else each computes for the tokens that
/// chose it, and which these are is read from the device once a layer.
#[derive(Module, Debug)]
pub struct MixtureMlp {
    /// The router: a score of each expert.
    pub routing: Router,
    /// The experts.
    pub experts: Vec<GatedMlp>,
    /// Experts that a token is sent to.
    pub experts_per_token: usize,
    /// Whether the weights of a token's experts are divided by their sum.
    pub normalises_weights: bool,
    pub(super) stacks: StackedExperts,
}

/// The layer that scores experts, under the name that the checkpoints of a family have for it.
#[derive(Module, Debug)]
pub enum Router {
    /// As in Qwen3-MoE.
    Gate(GateRouter),
    /// As in gpt-oss.
    Router(NamedRouter),
}

/// A router that is called `gate`.
#[derive(Module, Debug)]
pub struct GateRouter {
    /// To a score of each expert.
    pub gate: AnyLinear,
}

/// A router that is called `router`.
#[derive(Module, Debug)]
pub struct NamedRouter {
    /// To a score of each expert.
    pub router: AnyLinear,
}

linear_layers!(GateRouter { gate });
linear_layers!(NamedRouter { router });
linear_variants!(Router { Gate, Router });
linear_layers!(MixtureMlp { routing, experts });

/// Whether a linear layer is a router, by its name or path.
pub(super) fn is_router(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or_default();
    ["gate", "router"].contains(&last)
}

impl Router {
    /// The layer.
    pub fn linear(&self) -> &AnyLinear {
        match self {
            Self::Gate(GateRouter { gate }) => gate,
            Self::Router(NamedRouter { router }) => router,
        }
    }
}

impl MixtureMlp {
    /// The output for `x`.
    ///
    /// # Shapes
    /// - `x`: `[batch, length, hidden_size]`, and so the result
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let shape = x.dims();
        let [batch, length, hidden_size] = shape;
        let x = x.reshape([batch * length, hidden_size]);
        let logits = self.routing.linear().forward(x.clone());
        let grouped = match x.is_autodiff() {
            true => None,
            false => self.grouped(batch * length),
        };
        let y = match grouped {
            Some(stacks) => self.all_at_once(stacks, x, logits),
            None => self.one_by_one(x, logits),
        };
        y.reshape(shape)
    }

    /// The mixture with the weights of its experts in one tensor for gates, one for what they open and one for the
    /// way back, of which those of experts are views; on devices without [views](burn_nf4::op::ExpertStack::has_views)
    /// both are in memory. It stays as it is unless all are packed in one way, without branches and autodiff.
    ///
    /// While a stack is made, its weights are there twice; experts' biases, which are few, are from then on. A module
    /// mapper, another device and other layers in place of experts all undo it for [`forward`](Self::forward).
    ///
    /// # Errors
    /// [`Nf4Error::Device`] for weights on several devices, [`Nf4Error::Length`] and [`Nf4Error::Dtype`] for one in
    /// whose place a module mapper has put something else.
    pub fn stacked(mut self) -> Result<Self, Nf4Error> {
        self.stacks = match ExpertStacks::can_hold(&self.experts) {
            true => ExpertStacks::take(&mut self.experts)?,
            false => StackedExperts::default(),
        };
        Ok(self)
    }

    /// Whether so many tokens are sent to experts by the device alone, without waiting for it: the experts are
    /// [stacked](Self::stacked), and [few rows](grouped_pays) come together.
    pub fn is_grouped(&self, tokens: usize) -> bool {
        self.grouped(tokens).is_some()
    }

    fn grouped(&self, tokens: usize) -> Option<&ExpertStacks> {
        match grouped_pays(tokens, self.experts_per_token, self.experts.len()) {
            true => self.stacks.of(&self.experts),
            false => None,
        }
    }

    /// Experts that the device chooses.
    ///
    /// # Shapes
    /// - `x`: `[tokens, hidden_size]`, and so the result; `logits`: `[tokens, experts]`
    fn all_at_once(&self, stacks: &ExpertStacks, x: Tensor<2>, logits: Tensor<2>) -> Tensor<2> {
        let form = RouteForm::SoftmaxThenTopK {
            normalise: self.normalises_weights,
        };
        let y = route(logits, self.experts_per_token, form)
            .and_then(|(ids, weights)| Ok(weighted_sum(stacks.forward(x, ids)?, weights)));
        y.unwrap_or_else(|error| panic!("MixtureMlp::forward: {error}"))
    }

    /// Experts that the host knows.
    fn one_by_one(&self, x: Tensor<2>, logits: Tensor<2>) -> Tensor<2> {
        let [tokens, hidden_size] = x.dims();
        let probabilities = softmax(logits.cast(DType::F32), 1);
        let routes = Routes::of(&probabilities, self.experts_per_token);

        let weights = probabilities.gather(1, routes.experts(&x.device()));
        let weights = match self.normalises_weights {
            true => weights.clone() / weights.sum_dim(1),
            false => weights,
        };
        let outputs = routes.by_expert.iter().map(|(expert, chosen_by)| {
            let input = match tokens {
                1 => x.clone(),
                _ => x.clone().select(0, indices(chosen_by, &x.device())),
            };
            let rows = chosen_by.len();
            let y = self.experts[*expert].forward(input.reshape([1, rows, hidden_size]));
            y.reshape([rows, hidden_size])
        });
        let outputs = Tensor::cat(outputs.collect(), 0);
        // Back to the order of the tokens, in which all that belongs to one lies together.
        let outputs = outputs.select(0, indices(&routes.places, &x.device()));
        weighted_sum(outputs, weights)
    }
}

/// The sum of what the experts of each token give.
///
/// # Shapes
/// - `outputs`: `[tokens * per_token, hidden_size]`; `weights`: `[tokens, per_token]`
/// - returns `[tokens, hidden_size]`, of the dtype of `outputs`
fn weighted_sum(outputs: Tensor<2>, weights: Tensor<2>) -> Tensor<2> {
    let [tokens, per_token] = weights.dims();
    let [_, hidden_size] = outputs.dims();
    let dtype = outputs.dtype();
    let outputs = outputs.reshape([tokens, per_token, hidden_size]);
    // transformers rounds the weights and the products; the sum is rounded once here.
    let products = outputs * weights.cast(dtype).unsqueeze_dim(2);
    let sum = products.cast(DType::F32).sum_dim(1);
    sum.cast(dtype).reshape([tokens, hidden_size])
}

/// Which experts the tokens are sent to.
struct Routes {
    per_token: usize,
    /// The experts of each token, the likeliest first.
    chosen: Vec<usize>,
    /// The experts that any token is sent to, each with those tokens.
    by_expert: Vec<(usize, Vec<usize>)>,
    /// By entry of `chosen` its place among the tokens of all experts in turn.
    places: Vec<usize>,
}

impl Routes {
    /// To the likeliest of each token. Waits for the device.
    fn of(probabilities: &Tensor<2>, per_token: usize) -> Self {
        let [tokens, experts] = probabilities.dims();
        let values = probabilities.clone().detach().into_data();
        let values: Vec<f32> = values.iter::<f32>().collect();
        let mut chosen = Vec::with_capacity(tokens * per_token);
        let mut order: Vec<usize> = Vec::with_capacity(experts);
        for row in values.chunks_exact(experts) {
            order.clear();
            order.extend(0..experts);
            // The first of equal ones.
            let likelier = |a: &usize, b: &usize| row[*b].total_cmp(&row[*a]).then(a.cmp(b));
            order.select_nth_unstable_by(per_token - 1, likelier);
            order.truncate(per_token);
            order.sort_unstable_by(likelier);
            chosen.extend_from_slice(&order);
        }
        Self::through(chosen, per_token, experts)
    }

    fn through(chosen: Vec<usize>, per_token: usize, experts: usize) -> Self {
        let mut entries_of = vec![Vec::new(); experts];
        for (entry, &expert) in chosen.iter().enumerate() {
            entries_of[expert].push(entry);
        }
        let mut places = vec![0; chosen.len()];
        let entries = entries_of.iter().flatten();
        for (place, &entry) in entries.enumerate() {
            places[entry] = place;
        }
        let of_any = entries_of.into_iter().enumerate();
        let of_any = of_any.filter(|(_, entries)| !entries.is_empty());
        let token_of = |entry: usize| entry / per_token;
        Self {
            per_token,
            by_expert: of_any
                .map(|(expert, entries)| (expert, entries.into_iter().map(token_of).collect()))
                .collect(),
            chosen,
            places,
        }
    }

    /// `[tokens, per_token]`.
    fn experts(&self, device: &Device) -> Tensor<2, Int> {
        let shape = [self.chosen.len() / self.per_token, self.per_token];
        indices(&self.chosen, device).reshape(shape)
    }
}

fn indices(values: &[usize], device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = values.iter().map(|&value| value as i32).collect();
    let shape = [values.len()];
    Tensor::from_data(TensorData::new(values, shape), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_expert_has_its_tokens_and_each_token_finds_its_experts() {
        let routes = Routes::through(vec![3, 0, 0, 1, 3, 1], 2, 4);
        let expected = [(0, vec![0, 1]), (1, vec![1, 2]), (3, vec![0, 2])];
        assert_eq!(routes.by_expert, expected);
        let in_turn: Vec<usize> = vec![0, 0, 1, 1, 3, 3];
        let found: Vec<usize> = routes.places.iter().map(|&place| in_turn[place]).collect();
        assert_eq!(found, routes.chosen);
    }

    #[test]
    fn the_first_of_equally_likely_experts_is_taken_and_nan_chooses_something() {
        let rows = [[0.1, 0.3, 0.3, 0.3], [f32::NAN; 4]];
        let probabilities = Tensor::<2>::from_floats(rows, &Device::default());
        assert_eq!(Routes::of(&probabilities, 2).chosen, [1, 2, 0, 1]);
    }
}
