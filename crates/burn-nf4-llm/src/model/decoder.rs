//! The whole model.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Int, Tensor};
use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::is_expert;
use burn_nf4::format::QuantConfig;
use burn_nf4::linear_layers;
use burn_nf4::model::{LinearLayers, QuantizeLayers, TiedHead};
use burn_nf4::nn::AnyLinear;
use burn_nf4::op::{MatmulOptions, matmul, reads_tables};

use crate::model::cache::{KvCache, element_bytes};
use crate::model::config::DecoderConfig;
use crate::model::layer::{DecoderLayer, Residual};
use crate::model::norm::RmsNorm;
use crate::model::pass::Pass;
use crate::model::rotation::RopeTables;
use crate::model::scale::{EmbeddingScale, scaled, soft_capped};

/// The path of the embedding in a checkpoint.
pub const EMBEDDING: &str = "model.embed_tokens";

/// The path of the head.
pub const HEAD: &str = "lm_head";

/// How the name of a router ends.
pub(super) const ROUTER: &str = ".mlp.gate";

/// The model: an embedding, a stack of layers and a head.
#[derive(Module, Debug)]
pub struct Decoder {
    /// `[vocab_size, hidden_size]`; the head too, where that is tied to it.
    pub embed_tokens: Param<Tensor<2>>,
    /// The layers, from the embedding on.
    pub layers: Vec<DecoderLayer>,
    /// The norm before the head.
    pub norm: RmsNorm,
    /// None where the head is tied to the embeddings. A checkpoint that holds another head than the
    /// table has its own, even if its config says that they are tied.
    pub lm_head: Option<AnyLinear>,
    /// The factor of the embeddings, if there is one.
    #[module(skip)]
    pub embedding_scale: Option<EmbeddingScale>,
    /// Logits are divided by it.
    pub logits_scaling: f64,
    /// `c` of `c tanh(logit / c)`, in place of the logit.
    pub logits_softcap: Option<f64>,
}

/// Fields that are no part of a name in checkpoints: what they hold belongs to the module around them.
const UNNAMED: [&str; 3] = [".norms.", ".qkv.", ".gate_up."];

linear_layers!(Decoder { layers, lm_head } {
    fn checkpoint_name(path: &str) -> String {
        match path {
            "embed_tokens" => format!("{EMBEDDING}.weight"),
            path if path.starts_with(HEAD) => path.into(),
            path => {
                let path = UNNAMED.iter().fold(path.to_string(), |path, part| path.replace(part, "."));
                format!("model.{path}")
            }
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

impl Decoder {
    /// Tables for this model on its device.
    pub fn rope_tables(&self, config: &DecoderConfig) -> RopeTables {
        let dtype = match config.rotates_in_f32 {
            true => DType::F32,
            false => self.dtype(),
        };
        RopeTables::new(&config.ropes, &self.device(), dtype)
    }

    /// The type that is computed in.
    fn dtype(&self) -> DType {
        self.norm.weight.dtype()
    }

    /// The device of the weights.
    pub fn device(&self) -> Device {
        self.embed_tokens.val().device()
    }

    /// What the layers share when they see `length` tokens after what the cache holds.
    pub fn pass(&self, length: usize, rope: &mut RopeTables, cache: Option<&KvCache>) -> Pass {
        let (start, padding) = cache.map_or((0, &[][..]), |cache| (cache.len(), cache.padding()));
        let rotations = rope.rotations(start, length, padding);
        let windows = self.layers.iter().map(|layer| layer.self_attn.window);
        Pass::new(rotations, windows, start, length, padding, &self.device())
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
        let x = table
            .select(0, ids.reshape([batch * length]))
            .cast(self.dtype())
            .reshape([batch, length, hidden_size]);
        match self.embedding_scale {
            Some(scale) => scale.apply(x),
            None => x,
        }
    }

    /// The output of the last layer, before the last norm.
    ///
    /// A cache must not be carried on where [`recomputes_keys`](crate::model::rope::RopeConfig::recomputes_keys) holds and the
    /// [regime](crate::model::rope::RopeConfig::regime) of the text changes: [`generate`](crate::generate::generate) begins
    /// another one there.
    ///
    /// # Shapes
    /// - `ids`: `[batch, length]`
    /// - returns `[batch, length, hidden_size]`
    pub fn hidden(
        &self,
        ids: Tensor<2, Int>,
        rope: &mut RopeTables,
        mut cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let length = ids.dims()[1];
        let pass = self.pass(length, rope, cache.as_deref());
        let x = self.through_layers(ids, &pass, cache.as_deref_mut());
        if let Some(cache) = cache {
            cache.advance(length);
        }
        x
    }

    /// The output of the last layer for tokens whose [`Pass`] is made.
    fn through_layers(
        &self,
        ids: Tensor<2, Int>,
        pass: &Pass,
        mut cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let mut x = Residual::new(self.embed(ids));
        for (index, layer) in self.layers.iter().enumerate() {
            let layer_cache = cache.as_deref_mut().map(|cache| &mut cache.layers[index]);
            x = layer.add_to(x, pass, layer_cache);
        }
        x.sum()
    }

    /// The logits of one token a row, `[batch, vocab_size]`, at a position that the device alone may know.
    /// The shapes are the same at every position, and the host reads and writes nothing: what it takes to
    /// capture a step in a graph. The cache is not [advanced](KvCache::advance).
    ///
    /// # Shapes
    /// - `ids`: `[batch, 1]`
    /// - `position`: `[1]`, the positions that the cache holds
    /// - `starts`: `[batch]`, the padding of each row, if there is any
    ///
    /// # Panics
    /// If `rope` was not [reserved](RopeTables::reserve), or the cache has no room reserved and filled.
    pub(crate) fn next_logits_at(
        &self,
        ids: Tensor<2, Int>,
        position: Tensor<1, Int>,
        starts: Option<Tensor<1, Int>>,
        rope: &RopeTables,
        cache: &mut KvCache,
    ) -> Tensor<2> {
        let rows = ids.dims()[0];
        let positions = match &starts {
            Some(starts) => position.clone().expand([rows]) - starts.clone(),
            None => position.clone(),
        };
        let rotations = rope.rotations_at(&positions);
        let windows = self.layers.iter().map(|layer| layer.self_attn.window);
        let pass = Pass::at(position, rotations, windows, starts, rows, cache.room());
        let hidden = self.through_layers(ids, &pass, Some(cache));
        self.head(hidden).squeeze_dim(1)
    }

    /// The logits of every position of `x`, in the dtype of the model.
    ///
    /// # Shapes
    /// - `x`: `[batch, length, hidden_size]`, as [`hidden`](Self::hidden) returns it
    /// - returns `[batch, length, vocab_size]`
    pub fn head(&self, x: Tensor<3>) -> Tensor<3> {
        let x = self.norm.forward(x);
        let logits = match &self.lm_head {
            Some(head) => head.forward(x),
            None => {
                let table = self.embed_tokens.val().unsqueeze();
                matmul(x, table, None, MatmulOptions::TRANSPOSE_RHS).expect("the table fits")
            }
        };
        soft_capped(
            scaled(logits, 1.0 / self.logits_scaling),
            self.logits_softcap,
        )
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

    /// The model with its head in 4 bit too: one that is tied to the table becomes one of its own, and the
    /// table stays as it is for the embeddings.
    ///
    /// # Errors
    /// Those of [`LinearLayers::quantize`].
    pub fn quantize_head(self, config: QuantConfig) -> Result<Self, Nf4Error> {
        self.quantize(&QuantizeLayers {
            config,
            // All but the head.
            skip_modules: vec!["model".into()],
            heads: true,
            ..QuantizeLayers::default()
        })
    }

    /// On the CPU (Flex) the model with its table of embeddings, and a head of floats, in 16 bit where that
    /// loses nothing: a token reads half as much. What is computed is the same, in the type of the other
    /// weights. So it is with a published checkpoint of 16 bit that was loaded in f32. On other devices, and
    /// with autodiff, the model is as it was.
    ///
    /// For a model that is done: what is merged or put on it later would be rounded to that type.
    pub fn with_exact_tables(mut self) -> Self {
        if !reads_tables(&self.device()) || self.dtype() != DType::F32 {
            return self;
        }
        self.embed_tokens = self.embed_tokens.map(|table| match exact(&table) {
            Some(exact) => exact,
            None => table,
        });
        if let Some(AnyLinear::Dense(head)) = &self.lm_head
            && let Some(weight) = exact(&head.weight.val().transpose())
        {
            let bias = head.bias.as_ref().map(Param::val);
            self.lm_head = Some(AnyLinear::from_weight(weight, bias));
        }
        self
    }

    /// The layers that are adapted unless others are asked for, by the ends of their names: all linear ones
    /// of attention and MLPs, as PEFT's `all-linear` has them, but for experts and routers, of which there
    /// are many, or which are better left alone. So there are none of the MLPs of a mixture.
    pub fn default_target_modules(&self) -> Vec<String> {
        let (mut targets, mut of_experts) = (Vec::new(), Vec::new());
        for (name, _) in self.linears() {
            let end = name.rsplit('.').next().unwrap_or_default().to_string();
            let names = if is_expert(&name) {
                &mut of_experts
            } else {
                &mut targets
            };
            if name != HEAD && !name.ends_with(ROUTER) && !names.contains(&end) {
                names.push(end);
            }
        }
        targets.retain(|name| !of_experts.contains(name));
        targets
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

/// An f32 matrix in the type of 16 bit that has all its values, if there is one.
fn exact(matrix: &Tensor<2>) -> Option<Tensor<2>> {
    if matrix.dtype() != DType::F32 {
        return None;
    }
    [DType::BF16, DType::F16].into_iter().find_map(|dtype| {
        let cast = matrix.clone().cast(dtype);
        let same = cast.clone().cast(DType::F32).equal(matrix.clone()).all();
        same.into_scalar::<bool>().then_some(cast)
    })
}
