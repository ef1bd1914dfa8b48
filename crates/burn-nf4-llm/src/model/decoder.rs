//! The whole model.

use std::convert::Infallible;
use std::ops::ControlFlow;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Int, Tensor};
use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::is_expert;
use burn_nf4::format::QuantConfig;
use burn_nf4::linear_layers;
use burn_nf4::model::{LinearLayers, QuantizeLayers, StackPlace, TiedHead};
use burn_nf4::nn::AnyLinear;
use burn_nf4::op::{ExpertStack, MatmulOptions, MatmulStrategy, matmul, reads_tables};

use crate::model::cache::{KvCache, element_bytes};
use crate::model::config::DecoderConfig;
use crate::model::layer::{DecoderLayer, Mlp, Residual};
use crate::model::mixture::is_router;
use crate::model::norm::RmsNorm;
use crate::model::pass::Pass;
use crate::model::rotation::RopeTables;
use crate::model::scale::{EmbeddingScale, scaled, soft_capped};
use crate::model::stacks::place_of;

/// The path of the embedding in a checkpoint.
pub const EMBEDDING: &str = "model.embed_tokens";

/// The path of the head.
pub const HEAD: &str = "lm_head";

/// Most tokens of a prompt, those of all rows together, that go through the layers in one pass.
///
/// A longer prompt takes several passes, one after another: what is held meanwhile does not grow with its
/// length, but for the cache.
pub const PROMPT_CHUNK: usize = 8192;

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
const UNNAMED: [&str; 4] = [".norms.", ".qkv.", ".gate_up.", ".routing."];

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

    fn stacked(&self, name: &str) -> Option<StackPlace> {
        place_of(self, name)
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
    pub(crate) fn dtype(&self) -> DType {
        self.norm.weight.dtype()
    }

    /// The device of the weights.
    pub fn device(&self) -> Device {
        self.embed_tokens.val().device()
    }

    /// What the layers share when they see `length` tokens after what the cache holds.
    pub fn pass(&self, length: usize, rope: &mut RopeTables, cache: Option<&KvCache>) -> Pass {
        let end = cache.map_or(0, KvCache::len) + length;
        self.pass_within(end, length, rope, cache)
    }

    /// As [`pass`](Self::pass), of a text that goes on to the position `end`.
    fn pass_within(
        &self,
        end: usize,
        length: usize,
        rope: &mut RopeTables,
        cache: Option<&KvCache>,
    ) -> Pass {
        let (start, padding) = cache.map_or((0, &[][..]), |cache| (cache.len(), cache.padding()));
        let rotations = rope.rotations_within(end, start, length, padding);
        let windows = self.layers.iter().map(|layer| layer.self_attn.window);
        Pass::new(rotations, windows, start, length, padding, &self.device())
    }

    /// What the layers share in one pass over rows into which several texts are packed: a token sees its own
    /// text only, and the positions of each text begin at 0.
    ///
    /// - `ends`: for each row where its texts end, the last one at the length of all rows
    ///
    /// # Panics
    /// For ends that do not increase, or not up to the same length.
    pub fn packed_pass(&self, ends: &[Vec<usize>], rope: &mut RopeTables) -> Pass {
        let length = ends.first().and_then(|row| row.last()).copied();
        let length = length.unwrap_or(0);
        let rotations = rope.packed_rotations(ends);
        let windows = self.layers.iter().map(|layer| layer.self_attn.window);
        Pass::packed(rotations, windows, ends, length, &self.device())
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

    /// As [`hidden`](Self::hidden), in passes of at most `chunk` tokens of all rows together, one position
    /// at least. The angles of all of them are those of the whole text.
    ///
    /// `visit` gets the index in `ids` of the first position of each pass, and the output. Where it breaks
    /// off, the cache holds the passes so far.
    pub(crate) fn hidden_in_chunks<B>(
        &self,
        ids: &Tensor<2, Int>,
        chunk: usize,
        rope: &mut RopeTables,
        cache: &mut KvCache,
        mut visit: impl FnMut(usize, Tensor<3>) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        let [rows, length] = ids.dims();
        let end = cache.len() + length;
        cache.reserve(end);
        let positions = (chunk / rows.max(1)).max(1);
        for start in (0..length).step_by(positions) {
            let count = positions.min(length - start);
            let pass = self.pass_within(end, count, rope, Some(cache));
            let part = ids.clone().narrow(1, start, count);
            let x = self.through_layers(part, &pass, Some(cache));
            cache.advance(count);
            visit(start, x)?;
        }
        ControlFlow::Continue(())
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

    /// The logits of one token a row, `[batch, vocab_size]`, each at a position of its own, which the device
    /// alone may know. The shapes are the same at every position, and the host reads and writes nothing: what it takes to
    /// capture a step in a graph. The cache is not [advanced](KvCache::advance).
    ///
    /// # Shapes
    /// - `ids`: `[batch, 1]`
    /// - `position`: `[batch]`, the positions of each row that the cache holds
    ///
    /// # Panics
    /// If `rope` was not [reserved](RopeTables::reserve), or the cache has no room reserved and filled.
    pub(crate) fn next_logits_at(
        &self,
        ids: Tensor<2, Int>,
        position: Tensor<1, Int>,
        rope: &RopeTables,
        cache: &mut KvCache,
    ) -> Tensor<2> {
        let rotations = rope.rotations_at(&position);
        let windows = self.layers.iter().map(|layer| layer.self_attn.window);
        let pass = Pass::at(position, rotations, windows, cache.room());
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

    /// The logits of the last position, `[batch, vocab_size]`. More than [`PROMPT_CHUNK`] tokens go through
    /// the layers in several passes.
    ///
    /// # Shapes
    /// - `ids`: `[batch, length]`
    ///
    /// # Panics
    /// Without a token.
    pub fn next_logits(
        &self,
        ids: Tensor<2, Int>,
        rope: &mut RopeTables,
        cache: &mut KvCache,
    ) -> Tensor<2> {
        let mut last = None;
        let passed = self.hidden_in_chunks(&ids, PROMPT_CHUNK, rope, cache, |_, x| {
            last = Some(x);
            ControlFlow::<Infallible>::Continue(())
        });
        let ControlFlow::Continue(()) = passed;
        self.last_logits(last.expect("there is a token"))
    }

    /// The logits of the last position of a pass, `[batch, vocab_size]`.
    fn last_logits(&self, x: Tensor<3>) -> Tensor<2> {
        let [_, count, _] = x.dims();
        self.head(x.narrow(1, count - 1, 1)).squeeze_dim(1)
    }

    /// The model with the experts of mixtures [stacked](crate::model::MixtureMlp::stacked) for inference, on a
    /// device where that takes no more memory; the same on others. The last step before a model is used: what else
    /// changes it undoes this.
    ///
    /// # Errors
    /// Those of [`MixtureMlp::stacked`](crate::model::MixtureMlp::stacked).
    pub fn stack_experts(mut self) -> Result<Self, Nf4Error> {
        if !ExpertStack::has_views(&self.device()) {
            return Ok(self);
        }
        let layers = self.layers.into_iter().map(|mut layer| {
            if let Mlp::Mixture(mixture) = layer.mlp {
                layer.mlp = Mlp::Mixture(mixture.stacked()?);
            }
            Ok(layer)
        });
        self.layers = layers.collect::<Result<_, Nf4Error>>()?;
        Ok(self)
    }

    /// Whether the device alone sends so many tokens to experts, if there are any
    /// ([`MixtureMlp::is_grouped`](crate::model::MixtureMlp::is_grouped)): what it takes to capture a step.
    pub(crate) fn chooses_experts(&self, tokens: usize) -> bool {
        self.layers.iter().all(|layer| match &layer.mlp {
            Mlp::Mixture(mixture) => mixture.is_grouped(tokens),
            Mlp::Dense(_) => true,
        })
    }

    /// The model with its head in 4 bit too: one that is tied to the table becomes one of its own, and the
    /// table stays as it is for the embeddings.
    ///
    /// # Errors
    /// Those of [`LinearLayers::quantize`].
    pub fn quantize_head(self, config: QuantConfig) -> Result<Self, Nf4Error> {
        let mut model = self.quantize(&QuantizeLayers {
            config,
            // All but the head.
            skip_modules: vec!["model".into()],
            heads: true,
            ..QuantizeLayers::default()
        })?;
        model.lm_head = model
            .lm_head
            .map(|head| head.with_strategy(MatmulStrategy::Rule));
        Ok(model)
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
            if name != HEAD && !is_router(&name) && !names.contains(&end) {
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

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use burn::tensor::TensorData;
    use burn_nf4::format::FloatType;
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;
    use crate::generate::replay::tests::{fixture_model, model_in};
    use crate::model::random;

    fn ids(rows: usize, length: usize, device: &Device) -> Tensor<2, Int> {
        let ids = (0..rows * length).map(|i| ((i * 37 + i * i + 5) % 60) as i64);
        Tensor::from_data(TensorData::new(ids.collect(), [rows, length]), device)
    }

    /// That a prompt in passes has the logits of one pass, and leaves a cache that a text goes on from alike.
    fn assert_chunks_are_one_pass(model: &Decoder, config: &DecoderConfig, padding: &[usize]) {
        let (rows, length) = (padding.len(), 40);
        let device = model.device();
        let run = |positions: usize| {
            let mut rope = model.rope_tables(config);
            let mut cache = KvCache::new(config.layers.len(), padding.to_vec());
            let (mut passes, mut last) = (0, None);
            let prompt = ids(rows, length, &device);
            let chunk = positions * rows;
            let passed = model.hidden_in_chunks(&prompt, chunk, &mut rope, &mut cache, |_, x| {
                passes += 1;
                last = Some(x);
                ControlFlow::<()>::Continue(())
            });
            assert_eq!(passed, ControlFlow::Continue(()));
            let mut all = vec![model.last_logits(last.unwrap())];
            for _ in 0..2 {
                all.push(model.next_logits(ids(rows, 1, &device), &mut rope, &mut cache));
            }
            (Tensor::cat(all, 0), passes)
        };
        let (whole, one) = run(length);
        assert_eq!(one, 1);
        for (positions, expected) in [(1, 40), (7, 6), (39, 2)] {
            let (parts, passes) = run(positions);
            assert_eq!(passes, expected);
            let difference = (parts - whole.clone()).abs().max().into_scalar::<f32>();
            // The same products over other numbers of rows.
            assert!(difference < 2e-5, "{positions}: {difference:e}");
        }
    }

    /// Of every family and of the text part of a model of text and images, with windows of 12 tokens.
    #[rstest]
    fn a_prompt_in_passes_is_the_prompt_in_one(
        #[files("tests/fixtures/families/*/model")]
        #[files("tests/fixtures/vision/gemma3/model")]
        #[dirs]
        folder: PathBuf,
        #[values(&[0], &[0, 11, 3], &[5, 30])] padding: &[usize],
    ) {
        let (model, config) = model_in(&folder, &Device::default());
        assert_chunks_are_one_pass(&model, &config, padding);
    }

    /// Angles that change with the length of a text are those of all of it from the first pass on.
    #[rstest]
    #[case::dynamic(json!({"rope_type": "dynamic", "factor": 2.0}), "llama", 16)]
    #[case::longrope(
        json!({"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3],
               "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 16}),
        "phi3", 64
    )]
    fn passes_have_the_angles_of_the_whole_prompt(
        #[case] rope: Value,
        #[case] family: &str,
        #[case] positions: usize,
        #[values(&[0], &[0, 30])] padding: &[usize],
    ) {
        let mut rope = rope;
        rope["rope_theta"] = json!(10000.0);
        let config = json!({
            "model_type": family, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": positions, "original_max_position_embeddings": 16,
            "rope_parameters": rope, "torch_dtype": "float32", "pad_token_id": 0,
        });
        let config =
            DecoderConfig::from_json(config.to_string().as_bytes(), Path::new("config.json"));
        let config = config.unwrap();
        let model = random(
            &config,
            QuantConfig::default(),
            FloatType::F32,
            None,
            &Device::default(),
        )
        .unwrap();
        assert_chunks_are_one_pass(&model, &config, padding);
    }

    /// What was processed is held, and what is allocated does not grow.
    #[test]
    fn a_prompt_that_is_broken_off_leaves_what_was_processed() {
        let (model, config) = fixture_model("families/qwen3");
        let device = model.device();
        let mut rope = model.rope_tables(&config);
        let mut cache = KvCache::new(config.layers.len(), vec![0]);
        let prompt = ids(1, 300, &device);
        let mut bytes = Vec::new();
        let first = model.hidden_in_chunks(&prompt, 128, &mut rope, &mut cache, |start, x| {
            bytes.push((start, x.dims()[1]));
            match start {
                128 => ControlFlow::Break(start),
                _ => ControlFlow::Continue(()),
            }
        });
        assert_eq!(first, ControlFlow::Break(128));
        assert_eq!(bytes, [(0, 128), (128, 128)]);
        assert_eq!((cache.len(), cache.room()), (256, 512));
        let rest = prompt.clone().narrow(1, 256, 44);
        let ours = model.next_logits(rest, &mut rope, &mut cache);
        let mut whole = KvCache::new(config.layers.len(), vec![0]);
        let theirs = model.next_logits(prompt, &mut rope, &mut whole);
        let difference = (ours - theirs).abs().max().into_scalar::<f32>();
        assert!(difference < 2e-5, "{difference:e}");
    }
}
