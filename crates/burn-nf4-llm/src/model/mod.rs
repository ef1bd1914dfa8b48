//! A Llama-family language model.

pub mod attention;
pub mod cache;
pub mod config;
mod init;
mod load;
pub mod rope;
mod rope_fields;
mod rotation;

pub use config::LlamaConfig;
pub use init::random;
pub use load::load;
pub use rotation::{RopeTables, Rotation};

use burn::module::{Module, Param};
use burn::tensor::activation::silu;
use burn::tensor::{DType, Device, Int, Tensor};
use burn_nf4::linear_layers;
use burn_nf4::model::{LinearLayers, TiedHead};
use burn_nf4::nn::AnyLinear;
use burn_nf4::op::{MatmulOptions, matmul};

use crate::model::attention::{Attention, Pass};
use crate::model::cache::{KvCache, LayerCache, element_bytes};

/// The path of the embedding in a checkpoint.
pub const EMBEDDING: &str = "model.embed_tokens";

/// The path of the head.
pub const HEAD: &str = "lm_head";

/// The model: an embedding, a stack of layers and a head.
#[derive(Module, Debug)]
pub struct Llama {
    /// `[vocab_size, hidden_size]`; the head too, where that is tied to it.
    pub embed_tokens: Param<Tensor<2>>,
    /// The layers, from the embedding on.
    pub layers: Vec<DecoderLayer>,
    /// The normalisation before the head.
    pub norm: RmsNorm,
    /// None where the head is tied to the embeddings. A checkpoint that holds another head than the
    /// table has its own, even if its config says that they are tied.
    pub lm_head: Option<AnyLinear>,
    /// How many tokens back a token sees, if not all.
    pub sliding_window: Option<usize>,
}

/// One layer: attention and a gated feed-forward block.
#[derive(Module, Debug)]
pub struct DecoderLayer {
    /// Before attention.
    pub input_layernorm: RmsNorm,
    /// Attention.
    pub self_attn: Attention,
    /// Before the MLP.
    pub post_attention_layernorm: RmsNorm,
    /// The MLP.
    pub mlp: Mlp,
}

/// `down(silu(gate(x)) up(x))`.
#[derive(Module, Debug)]
pub struct Mlp {
    /// To be activated.
    pub gate_proj: AnyLinear,
    /// To be multiplied with that.
    pub up_proj: AnyLinear,
    /// Back to the hidden size.
    pub down_proj: AnyLinear,
}

linear_layers!(Mlp {
    gate_proj,
    up_proj,
    down_proj
});
linear_layers!(DecoderLayer { self_attn, mlp });
linear_layers!(Llama { layers, lm_head } {
    fn checkpoint_name(path: &str) -> String {
        match path {
            "embed_tokens" => format!("{EMBEDDING}.weight"),
            path if path.starts_with(HEAD) => path.into(),
            path => format!("model.{path}"),
        }
    }

    fn tied_head(&self) -> Option<TiedHead> {
        self.lm_head.is_none().then(|| TiedHead {
            head: HEAD.into(),
            embedding: EMBEDDING.into(),
        })
    }

    fn untie_head(mut self) -> Self {
        if self.lm_head.is_none() {
            self.lm_head = Some(AnyLinear::from_weight(self.embed_tokens.val(), None));
        }
        self
    }
});

/// Root-mean-square normalisation, in f32 whatever the dtype of the model, as in transformers.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[hidden_size]`.
    pub weight: Param<Tensor<1>>,
    /// Added to the mean of the squares.
    pub eps: f64,
}

impl RmsNorm {
    /// `x / rms(x) * weight`, in f32 inside.
    ///
    /// # Shapes
    /// - `x`: `[batch, tokens, hidden_size]`
    /// - returns the same
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let dtype = x.dtype();
        // Before the arithmetic: a reshape in the middle of it ends what Burn fuses to one kernel.
        let weight = self.weight.val().unsqueeze();
        let x = x.cast(DType::F32);
        let variance = x.clone().square().mean_dim(2);
        let normed = x * (variance + self.eps).sqrt().recip();
        normed.cast(dtype) * weight
    }
}

impl Mlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = self.gate_proj.forward(x.clone());
        let up = self.up_proj.forward(x);
        self.down_proj.forward(silu(gate) * up)
    }
}

impl DecoderLayer {
    /// # Shapes
    /// - `x`: `[batch, length, hidden_size]`, and so the result
    pub fn forward(&self, x: Tensor<3>, pass: &Pass, cache: Option<&mut LayerCache>) -> Tensor<3> {
        let normed = self.input_layernorm.forward(x.clone());
        let x = x + self.self_attn.forward(normed, pass, cache);
        let normed = self.post_attention_layernorm.forward(x.clone());
        x + self.mlp.forward(normed)
    }
}

impl Llama {
    /// Tables for this model on its device.
    pub fn rope_tables(&self, config: &LlamaConfig) -> RopeTables {
        let device = self.device();
        RopeTables::new(config.rope.clone(), &device, self.embed_tokens.dtype())
    }

    /// The device of the weights.
    pub fn device(&self) -> Device {
        self.embed_tokens.val().device()
    }

    /// What the layers share when they see `length` tokens after what the cache holds.
    pub fn pass(&self, length: usize, rope: &mut RopeTables, cache: Option<&KvCache>) -> Pass {
        let (start, padding) = cache.map_or((0, &[][..]), |cache| (cache.len(), cache.padding()));
        let rotation = rope.rotation(start, length, padding);
        let device = self.device();
        Pass::new(
            rotation,
            start,
            length,
            padding,
            self.sliding_window,
            &device,
        )
    }

    /// The embeddings of tokens.
    ///
    /// # Shapes
    /// - `ids`: `[batch, length]`
    /// - returns `[batch, length, hidden_size]`
    pub fn embed(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [batch, length] = ids.dims();
        let table = self.embed_tokens.val();
        let hidden_size = table.dims()[1];
        table
            .select(0, ids.reshape([batch * length]))
            .reshape([batch, length, hidden_size])
    }

    /// The output of the last layer, before the last normalisation.
    pub fn hidden(
        &self,
        ids: Tensor<2, Int>,
        rope: &mut RopeTables,
        mut cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let length = ids.dims()[1];
        let pass = self.pass(length, rope, cache.as_deref());
        let mut x = self.embed(ids);
        for (index, layer) in self.layers.iter().enumerate() {
            let layer_cache = cache.as_deref_mut().map(|cache| &mut cache.layers[index]);
            x = layer.forward(x, &pass, layer_cache);
        }
        if let Some(cache) = cache {
            cache.advance(length);
        }
        x
    }

    /// The logits of every position of `x`, in the dtype of the model.
    pub fn head(&self, x: Tensor<3>) -> Tensor<3> {
        let x = self.norm.forward(x);
        match &self.lm_head {
            Some(head) => head.forward(x),
            None => {
                let table = self.embed_tokens.val().unsqueeze();
                matmul(x, table, None, MatmulOptions::TRANSPOSE_RHS).expect("the table fits")
            }
        }
    }

    /// The logits of the last position, `[batch, vocab_size]`.
    pub fn next_logits(
        &self,
        ids: Tensor<2, Int>,
        rope: &mut RopeTables,
        cache: &mut KvCache,
    ) -> Tensor<2> {
        let hidden = self.hidden(ids, rope, Some(cache));
        let [_, length, _] = hidden.dims();
        self.head(hidden.narrow(1, length - 1, 1)).squeeze_dim(1)
    }

    /// Bytes of packed weights and of float weights on the device.
    pub fn size_bytes(&self) -> (usize, usize) {
        let embedding = self.embed_tokens.val();
        let embedding = embedding.shape().num_elements() * element_bytes(embedding.dtype());
        let linears = self.linears();
        let packed = linears.iter().map(|(_, layer)| layer.packed_bytes());
        let float = linears.iter().map(|(_, layer)| layer.float_bytes());
        (packed.sum(), embedding + float.sum::<usize>())
    }
}
