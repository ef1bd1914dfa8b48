//! A small Llama as a user would write it: two levels of modules, and a head that may be tied.

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, LinearConfig, RmsNorm, RmsNormConfig};
use burn::tensor::activation::{silu, softmax};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_nf4::checkpoint::CheckpointStore;
use burn_nf4::linear_layers;
use burn_nf4::model::{LinearLayers, TiedHead};
use burn_nf4::nn::AnyLinear;
use serde_json::Value;

#[derive(Module, Debug)]
pub struct Toy {
    pub embed_tokens: Embedding,
    pub layers: Vec<Block>,
    pub norm: RmsNorm,
    /// None where the head is the table of the embedding.
    pub lm_head: Option<AnyLinear>,
}

#[derive(Module, Debug)]
pub struct Block {
    pub input_layernorm: RmsNorm,
    pub self_attn: Attention,
    pub post_attention_layernorm: RmsNorm,
    pub mlp: Mlp,
}

#[derive(Module, Debug)]
pub struct Attention {
    pub q_proj: AnyLinear,
    pub k_proj: AnyLinear,
    pub v_proj: AnyLinear,
    pub o_proj: AnyLinear,
    pub head_dim: usize,
}

#[derive(Module, Debug)]
pub struct Mlp {
    pub gate_proj: AnyLinear,
    pub up_proj: AnyLinear,
    pub down_proj: AnyLinear,
}

linear_layers!(Attention {
    q_proj,
    k_proj,
    v_proj,
    o_proj
});
linear_layers!(Mlp {
    gate_proj,
    up_proj,
    down_proj
});
linear_layers!(Block { self_attn, mlp });
linear_layers!(Toy { layers, lm_head } {
    fn checkpoint_name(path: &str) -> String {
        match path.starts_with("lm_head") {
            true => path.into(),
            false => format!("model.{path}"),
        }
    }

    fn tied_head(&self) -> Option<TiedHead> {
        self.lm_head.is_none().then(|| TiedHead {
            head: "lm_head".into(),
            embedding: "model.embed_tokens".into(),
        })
    }

    fn untie_head(mut self) -> Self {
        self.lm_head = Some(AnyLinear::from_weight(self.embed_tokens.weight.val(), None));
        self
    }
});

impl Toy {
    /// A model of the sizes of a `config.json`, to be loaded.
    pub fn new(config: &Value, device: &Device) -> Self {
        let size = |key: &str| config[key].as_u64().expect("a size") as usize;
        let (hidden, inner) = (size("hidden_size"), size("intermediate_size"));
        let head_dim = size("head_dim");
        let q = size("num_attention_heads") * head_dim;
        let kv = size("num_key_value_heads") * head_dim;
        let eps = config["rms_norm_eps"].as_f64().expect("a number");
        let linear = |d_input, d_output, bias: &str| -> AnyLinear {
            let bias = config[bias].as_bool().unwrap_or(false);
            let layer = LinearConfig::new(d_input, d_output).with_bias(bias);
            layer.init(device).into()
        };
        let norm = || RmsNormConfig::new(hidden).with_epsilon(eps).init(device);
        let block = |_| Block {
            input_layernorm: norm(),
            self_attn: Attention {
                q_proj: linear(hidden, q, "attention_bias"),
                k_proj: linear(hidden, kv, "attention_bias"),
                v_proj: linear(hidden, kv, "attention_bias"),
                o_proj: linear(q, hidden, "attention_bias"),
                head_dim,
            },
            post_attention_layernorm: norm(),
            mlp: Mlp {
                gate_proj: linear(hidden, inner, "mlp_bias"),
                up_proj: linear(hidden, inner, "mlp_bias"),
                down_proj: linear(inner, hidden, "mlp_bias"),
            },
        };
        let vocab = size("vocab_size");
        let is_tied = config["tie_word_embeddings"].as_bool() == Some(true);
        Self {
            embed_tokens: EmbeddingConfig::new(vocab, hidden).init(device),
            layers: (0..size("num_hidden_layers")).map(block).collect(),
            norm: norm(),
            lm_head: (!is_tied).then(|| linear(hidden, vocab, "none")),
        }
    }

    /// The model of a folder.
    pub fn open(folder: &Path, device: &Device) -> Self {
        let model = Self::new(&crate::stored::config_of(folder), device);
        let store = CheckpointStore::open(folder).expect("valid");
        model.load_checkpoint(store).expect("it fits")
    }

    /// # Shapes
    /// - `ids`: `[batch, length]`
    /// - returns `[batch, length, vocabulary]`
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let mut x = self.embed_tokens.forward(ids);
        for block in &self.layers {
            let y = block
                .self_attn
                .forward(block.input_layernorm.forward(x.clone()));
            let x1 = x + y;
            let y = block.post_attention_layernorm.forward(x1.clone());
            let gate = silu(block.mlp.gate_proj.forward(y.clone()));
            let up = block.mlp.up_proj.forward(y);
            x = x1 + block.mlp.down_proj.forward(gate * up);
        }
        let x = self.norm.forward(x);
        match &self.lm_head {
            Some(head) => head.forward(x),
            None => x.matmul(self.embed_tokens.weight.val().transpose().unsqueeze()),
        }
    }

    /// The logits for tokens.
    pub fn logits(&self, ids: &[i64], shape: [usize; 2], device: &Device) -> Vec<f32> {
        let ids = Tensor::from_data(TensorData::new(ids.to_vec(), shape), device);
        self.forward(ids).into_data().iter::<f32>().collect()
    }

    /// A linear layer by its name.
    pub fn linear(&self, name: &str) -> &AnyLinear {
        let found = self.linears().into_iter().find(|(path, _)| path == name);
        found.unwrap_or_else(|| panic!("no `{name}`")).1
    }
}

impl Attention {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, length, _] = x.dims();
        let heads = |y: Tensor<3>| {
            let count = y.dims()[2] / self.head_dim;
            y.reshape([batch, length, count, self.head_dim])
                .swap_dims(1, 2)
        };
        let q = rotated(heads(self.q_proj.forward(x.clone())));
        let k = rotated(heads(self.k_proj.forward(x.clone())));
        let v = heads(self.v_proj.forward(x));
        let groups = q.dims()[1] / k.dims()[1];
        let repeated = |y: Tensor<4>| {
            let [batch, count, length, size] = y.dims();
            let y = y.reshape([batch, count, 1, length, size]);
            y.expand([batch, count, groups, length, size]).reshape([
                batch,
                count * groups,
                length,
                size,
            ])
        };
        let (k, v) = (repeated(k), repeated(v));
        let scores = q.matmul(k.transpose()) / (self.head_dim as f64).sqrt();
        let options = (&scores.device(), scores.dtype());
        let mask = Tensor::<2>::ones([length, length], options).triu(1) * -1e30;
        let y = softmax(scores + mask.unsqueeze(), 3).matmul(v);
        let [_, count, ..] = y.dims();
        let y = y
            .swap_dims(1, 2)
            .reshape([batch, length, count * self.head_dim]);
        self.o_proj.forward(y)
    }
}

/// Rotary embeddings with a base of 10,000.
fn rotated(x: Tensor<4>) -> Tensor<4> {
    let [_, _, length, size] = x.dims();
    let half = size / 2;
    let angle = |position: usize, index: usize| {
        position as f32 * 10_000f32.powf(-((2 * index) as f32) / size as f32)
    };
    let table = |of: fn(f32) -> f32| {
        let values: Vec<f32> = (0..length)
            .flat_map(|position| (0..size).map(move |index| of(angle(position, index % half))))
            .collect();
        let table = TensorData::new(values, [1, 1, length, size]);
        Tensor::<4>::from_data(table, (&x.device(), x.dtype()))
    };
    let (cos, sin) = (table(f32::cos), table(f32::sin));
    let (first, second) = (
        x.clone().narrow(3, 0, half),
        x.clone().narrow(3, half, half),
    );
    x * cos + Tensor::cat(vec![-second, first], 3) * sin
}

/// A file or folder of the fixtures.
pub fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(path)
}

/// The tensors of a single-file folder.
pub fn tensors(folder: &Path) -> crate::stored::Tensors {
    let path = folder.join("model.safetensors");
    crate::stored::read(&burn_nf4::checkpoint::SafetensorsFile::open(path).expect("valid"))
}

pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}
