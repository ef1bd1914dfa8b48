//! One layer: attention and a feed-forward block, each added to what came in.

use burn::module::Module;
use burn::tensor::Tensor;
use burn_nf4::linear_layers;
use burn_nf4::op::Seed;

use crate::model::attention::Attention;
use crate::model::cache::LayerCache;
use crate::model::mixture::MixtureMlp;
use crate::model::mlp::GatedMlp;
use crate::model::norm::RmsNorm;
use crate::model::pass::Pass;
use crate::model::scale::scaled;
use crate::model::variants::linear_variants;

/// One layer.
#[derive(Module, Debug)]
pub struct DecoderLayer {
    /// The norms of attention and the MLP.
    pub norms: LayerNorms,
    /// Attention.
    pub self_attn: Attention,
    /// The MLP.
    pub mlp: Mlp,
    /// The output of attention and of the MLP is multiplied by it before it is added.
    pub residual_multiplier: f64,
}

linear_layers!(DecoderLayer { self_attn, mlp });

/// The feed-forward block of a layer.
#[allow(
    clippy::large_enum_variant,
    reason = "a model has few, and in most models all are of the larger kind"
)]
#[derive(Module, Debug)]
pub enum Mlp {
    /// One for all tokens.
    Dense(GatedMlp),
    /// A few of many for each token.
    Mixture(MixtureMlp),
}

linear_variants!(Mlp { Dense, Mixture });

impl Mlp {
    /// The output for `x`.
    ///
    /// # Shapes
    /// - `x`: `[batch, length, hidden_size]`, and so the result
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        match self {
            Self::Dense(mlp) => mlp.forward(x),
            Self::Mixture(mlp) => mlp.forward(x),
        }
    }
}

/// The norms of a layer, under the names that checkpoints have for them.
#[derive(Module, Debug)]
pub enum LayerNorms {
    /// Before attention and the MLP.
    Pre(PreNorms),
    /// Before and after each.
    Sandwich(SandwichNorms),
    /// After each.
    Post(PostNorms),
}

/// The input of attention and of the MLP is normalised (arXiv 2002.04745).
#[derive(Module, Debug)]
pub struct PreNorms {
    /// Before attention.
    pub input_layernorm: RmsNorm,
    /// Before the MLP.
    pub post_attention_layernorm: RmsNorm,
}

/// Input and output of attention and of the MLP are normalised (arXiv 2408.00118).
#[derive(Module, Debug)]
pub struct SandwichNorms {
    /// Before attention.
    pub input_layernorm: RmsNorm,
    /// After attention.
    pub post_attention_layernorm: RmsNorm,
    /// Before the MLP.
    pub pre_feedforward_layernorm: RmsNorm,
    /// After the MLP.
    pub post_feedforward_layernorm: RmsNorm,
}

/// The output of attention and of the MLP is normalised (arXiv 2501.00656).
#[derive(Module, Debug)]
pub struct PostNorms {
    /// After attention.
    pub post_attention_layernorm: RmsNorm,
    /// After the MLP.
    pub post_feedforward_layernorm: RmsNorm,
}

/// The norms of attention, or of the MLP.
struct BlockNorms<'a> {
    before: Option<&'a RmsNorm>,
    after: Option<&'a RmsNorm>,
}

impl LayerNorms {
    fn of_attention(&self) -> BlockNorms<'_> {
        let (before, after) = match self {
            Self::Pre(norms) => (Some(&norms.input_layernorm), None),
            Self::Sandwich(norms) => (
                Some(&norms.input_layernorm),
                Some(&norms.post_attention_layernorm),
            ),
            Self::Post(norms) => (None, Some(&norms.post_attention_layernorm)),
        };
        BlockNorms { before, after }
    }

    fn of_mlp(&self) -> BlockNorms<'_> {
        let (before, after) = match self {
            Self::Pre(norms) => (Some(&norms.post_attention_layernorm), None),
            Self::Sandwich(norms) => (
                Some(&norms.pre_feedforward_layernorm),
                Some(&norms.post_feedforward_layernorm),
            ),
            Self::Post(norms) => (None, Some(&norms.post_feedforward_layernorm)),
        };
        BlockNorms { before, after }
    }
}

impl BlockNorms<'_> {
    /// The output of a block, normalised where that is so.
    fn after(&self, y: Tensor<3>) -> Tensor<3> {
        match self.after {
            Some(norm) => norm.forward(y),
            None => y,
        }
    }
}

/// What layers pass on: a sum, to which the last output is still to be added. The next norm does it.
pub(crate) struct Residual {
    sum: Tensor<3>,
    output: Option<Tensor<3>>,
}

impl Residual {
    /// Of embeddings.
    pub fn new(x: Tensor<3>) -> Self {
        Self {
            sum: x,
            output: None,
        }
    }

    /// The sum.
    pub fn sum(self) -> Tensor<3> {
        match self.output {
            Some(output) => self.sum + output,
            None => self.sum,
        }
    }

    /// The sum, and the norm of it.
    fn normalised(self, norm: Option<&RmsNorm>) -> (Tensor<3>, Tensor<3>) {
        match (self.output, norm) {
            (Some(output), Some(norm)) => norm.add_forward(self.sum, output),
            (None, Some(norm)) => norm.forward_beside(self.sum),
            (output, None) => {
                let sum = Self { output, ..self }.sum();
                (sum.clone(), sum)
            }
        }
    }
}

impl DecoderLayer {
    /// Attention, then the MLP, each added to its input.
    ///
    /// # Shapes
    /// - `x`: `[batch, length, hidden_size]`, and so the result
    pub fn forward(&self, x: Tensor<3>, pass: &Pass, cache: Option<&mut LayerCache>) -> Tensor<3> {
        self.add_to(Residual::new(x), pass, cache).sum()
    }

    /// The same, with sums that norms make.
    pub(crate) fn add_to(
        &self,
        residual: Residual,
        pass: &Pass,
        cache: Option<&mut LayerCache>,
    ) -> Residual {
        let norms = self.norms.of_attention();
        let (sum, x) = residual.normalised(norms.before);
        let residual = self.added(sum, norms.after(self.self_attn.forward(x, pass, cache)));
        let norms = self.norms.of_mlp();
        let (sum, x) = residual.normalised(norms.before);
        self.added(sum, norms.after(self.mlp.forward(x)))
    }

    /// Where a backward pass begins that knows the gradient of the layer's output. The output itself is not
    /// computed where that can be.
    ///
    /// # Shapes
    /// - `x`, `grad`: `[batch, length, hidden_size]`
    pub fn seed(&self, x: Tensor<3>, pass: &Pass, grad: Tensor<3>) -> Seed {
        let norms = self.norms.of_attention();
        let (sum, x) = Residual::new(x).normalised(norms.before);
        let residual = self.added(sum, norms.after(self.self_attn.forward(x, pass, None)));
        let norms = self.norms.of_mlp();
        let (sum, x) = residual.normalised(norms.before);
        let of_sum = Seed::of(sum, grad.clone()).expect("the gradient fits");
        let of_output = match (&self.mlp, norms.after) {
            (Mlp::Dense(mlp), None) => mlp.seed(x, scaled(grad, self.residual_multiplier)),
            (mlp, _) => {
                let output = norms.after(mlp.forward(x));
                Seed::of(scaled(output, self.residual_multiplier), grad).expect("the gradient fits")
            }
        };
        of_sum.and(of_output)
    }

    fn added(&self, sum: Tensor<3>, output: Tensor<3>) -> Residual {
        Residual {
            sum,
            output: Some(scaled(output, self.residual_multiplier)),
        }
    }
}
