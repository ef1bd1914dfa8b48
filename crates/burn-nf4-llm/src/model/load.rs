//! From a checkpoint to a model.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use burn_nf4::checkpoint::{Checkpoint, Progress};
use burn_nf4::format::FloatType;
use burn_nf4::nn::AnyLinear;
use burn_nf4::nn::Nf4Linear;

use crate::error::{ModelError, TensorFaults};
use crate::model::attention::Attention;
use crate::model::config::LlamaConfig;
use crate::model::{DecoderLayer, LAYER_NORMS, Llama, Mlp, RmsNorm};

const TABLE: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Where the table of the embeddings and the head come from.
///
/// As `PreTrainedModel.tie_weights` of transformers 5.24.0 decides it: the flag of the config asks
/// for one matrix, and what the checkpoint holds has the last word.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Tie {
    /// Two matrices.
    Two,
    /// The table is the head too.
    Table,
    /// The head is the table too.
    Head,
    /// One matrix if both are equal.
    IfEqual,
}

impl Tie {
    fn of(checkpoint: &Checkpoint, config: &LlamaConfig) -> Self {
        match (checkpoint.contains(TABLE), checkpoint.contains(HEAD)) {
            _ if !config.tie_word_embeddings => Self::Two,
            (true, true) => Self::IfEqual,
            // A packed head cannot give embeddings: the table is missing.
            (false, true) if !checkpoint.is_quantized(HEAD) => Self::Head,
            _ => Self::Table,
        }
    }

    /// The matrices to be read.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Two | Self::IfEqual => &[TABLE, HEAD],
            Self::Table => &[TABLE],
            Self::Head => &[HEAD],
        }
    }
}

/// Builds the model and reads its weights onto the device, one at a time.
///
/// Float tensors are cast to `dtype`, the type to compute in; packed ones stay as they are. Nothing
/// is trainable. All that is missing, unexpected or of another form is listed in one error, before
/// anything is read; a checkpoint that its config.json says something else of is refused. Where the
/// config ties the head to the table and the checkpoint holds two different ones, the model has both, as
/// in transformers: see [`Llama::lm_head`].
pub fn load(
    checkpoint: &Checkpoint,
    config: &LlamaConfig,
    dtype: FloatType,
    device: &Device,
    mut on_progress: impl FnMut(Progress<'_>),
) -> Result<Llama, ModelError> {
    let tie = Tie::of(checkpoint, config);
    let parameters = parameters(config, tie);
    check(checkpoint, &parameters)?;
    if let Some(fault) = checkpoint.faults().into_iter().next() {
        return Err(fault.into());
    }
    let mut reader = Reader {
        checkpoint,
        dtype,
        device,
        on_progress: &mut on_progress,
        done: 0,
        total: parameters.len(),
        bytes_done: 0,
        bytes_total: checkpoint.size_bytes(),
    };
    Ok(reader.model(config, tie)?.no_grad())
}

/// The parameters of the model and their shapes.
fn parameters(config: &LlamaConfig, tie: Tie) -> Vec<(String, Vec<usize>)> {
    let hidden = config.hidden_size;
    let mut found = vec![("model.norm.weight".into(), vec![hidden])];
    for key in tie.keys() {
        found.push(((*key).into(), vec![config.vocab_size, hidden]));
    }
    for index in 0..config.num_hidden_layers {
        let layer = format!("model.layers.{index}");
        for norm in LAYER_NORMS {
            found.push((format!("{layer}.{norm}.weight"), vec![hidden]));
        }
        for (name, [d_output, d_input], bias) in linears(config) {
            found.push((format!("{layer}.{name}.weight"), vec![d_output, d_input]));
            if bias {
                found.push((format!("{layer}.{name}.bias"), vec![d_output]));
            }
        }
    }
    found
}

/// Name, `[d_output, d_input]` and bias of the linear layers of a layer.
pub fn linears(config: &LlamaConfig) -> [(&'static str, [usize; 2], bool); 7] {
    let hidden = config.hidden_size;
    let inner = config.intermediate_size;
    let q = config.num_attention_heads * config.head_dim;
    let kv = config.num_key_value_heads * config.head_dim;
    [
        ("self_attn.q_proj", [q, hidden], config.attention_bias),
        ("self_attn.k_proj", [kv, hidden], config.attention_bias),
        ("self_attn.v_proj", [kv, hidden], config.attention_bias),
        ("self_attn.o_proj", [hidden, q], config.attention_bias),
        ("mlp.gate_proj", [inner, hidden], config.mlp_bias),
        ("mlp.up_proj", [inner, hidden], config.mlp_bias),
        ("mlp.down_proj", [hidden, inner], config.mlp_bias),
    ]
}

/// Compares names, shapes and dtypes with the checkpoint's, without reading a weight.
fn check(checkpoint: &Checkpoint, parameters: &[(String, Vec<usize>)]) -> Result<(), ModelError> {
    let mut faults = TensorFaults {
        path: checkpoint.path().into(),
        ..TensorFaults::default()
    };
    for (key, expected) in parameters {
        if !checkpoint.contains(key) {
            faults.missing.push(format!("{key} {expected:?}"));
            continue;
        }
        let linear = key.ends_with("_proj.weight") || key == HEAD;
        let given = match checkpoint.is_quantized(key) {
            true if !linear => {
                let fault = format!("{key} is quantized, expected a float tensor {expected:?}");
                faults.mismatched.push(fault);
                continue;
            }
            true => checkpoint.weight_form(key)?.shape,
            false => {
                let info = checkpoint.tensor_info(key)?;
                let name = info.dtype.to_string();
                if !["F32", "F16", "BF16"].contains(&name.as_str()) {
                    let fault = format!("{key} has dtype {name}, expected F32, F16 or BF16");
                    faults.mismatched.push(fault);
                }
                info.shape.to_vec()
            }
        };
        if &given != expected {
            let fault = format!("{key} has shape {given:?}, expected {expected:?}");
            faults.mismatched.push(fault);
        }
    }
    let known = |key: &str| {
        parameters.iter().any(|(name, _)| name == key)
            // Buffers that transformers does not read either.
            || key.ends_with(".rotary_emb.inv_freq")
    };
    faults.unexpected = checkpoint
        .parameters()
        .into_iter()
        .filter(|key| !known(key))
        .map(String::from)
        .collect();
    faults.into_result()
}

/// Whether a head is the table of the embeddings, in the type that both were cast to.
fn is_table(head: &AnyLinear, table: &Tensor<2>) -> bool {
    match head {
        AnyLinear::Dense(head) => {
            let same = head.weight.val().transpose().equal(table.clone());
            same.all().into_scalar::<bool>()
        }
        _ => false,
    }
}

struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    dtype: FloatType,
    device: &'a Device,
    on_progress: &'a mut dyn FnMut(Progress<'_>),
    done: usize,
    total: usize,
    bytes_done: usize,
    bytes_total: usize,
}

impl Reader<'_> {
    fn model(&mut self, config: &LlamaConfig, tie: Tie) -> Result<Llama, ModelError> {
        let table = match tie {
            Tie::Head => HEAD,
            _ => TABLE,
        };
        let embed_tokens = self.tensor::<2>(table)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| self.layer(&format!("model.layers.{index}"), config))
            .collect::<Result<_, ModelError>>()?;
        let norm = self.norm("model.norm", config)?;
        let lm_head = match tie {
            Tie::Two => Some(self.projection("lm_head", false)?),
            Tie::IfEqual => {
                let head = self.projection("lm_head", false)?;
                (!is_table(&head, &embed_tokens)).then_some(head)
            }
            Tie::Table | Tie::Head => None,
        };
        Ok(Llama {
            embed_tokens: Param::from_tensor(embed_tokens),
            layers,
            norm,
            lm_head,
            sliding_window: config.sliding_window,
        })
    }

    fn layer(&mut self, path: &str, config: &LlamaConfig) -> Result<DecoderLayer, ModelError> {
        let [q, k, v, o, gate, up, down] =
            linears(config).map(|(name, _, bias)| self.projection(&format!("{path}.{name}"), bias));
        Ok(DecoderLayer {
            input_layernorm: self.norm(&format!("{path}.input_layernorm"), config)?,
            self_attn: Attention::new([q?, k?, v?, o?], config),
            post_attention_layernorm: self
                .norm(&format!("{path}.post_attention_layernorm"), config)?,
            mlp: Mlp {
                gate_proj: gate?,
                up_proj: up?,
                down_proj: down?,
            },
        })
    }

    fn norm(&mut self, path: &str, config: &LlamaConfig) -> Result<RmsNorm, ModelError> {
        Ok(RmsNorm {
            weight: Param::from_tensor(self.tensor(&format!("{path}.weight"))?),
            eps: config.rms_norm_eps,
        })
    }

    fn projection(&mut self, path: &str, bias: bool) -> Result<AnyLinear, ModelError> {
        let key = format!("{path}.weight");
        let bias = match bias {
            true => Some(self.tensor::<1>(&format!("{path}.bias"))?),
            false => None,
        };
        if !self.checkpoint.is_quantized(&key) {
            let weight = self.tensor::<2>(&key)?.transpose();
            return Ok(AnyLinear::Dense(Linear {
                weight: Param::from_tensor(weight),
                bias: bias.map(Param::from_tensor),
            }));
        }
        let weight = self.checkpoint.load_weight(&key, self.device)?;
        let bytes = weight.size_bytes();
        let layer = Nf4Linear::new(weight, bias)?;
        self.report(&key, bytes);
        Ok(AnyLinear::Nf4(layer))
    }

    /// A float tensor in the dtype of the model.
    fn tensor<const D: usize>(&mut self, key: &str) -> Result<Tensor<D>, ModelError> {
        let tensor = self
            .checkpoint
            .load_tensor(key, Some(self.dtype), self.device)?;
        let bytes = self.checkpoint.tensor_bytes(key)?.len();
        self.report(key, bytes);
        Ok(tensor)
    }

    fn report(&mut self, parameter: &str, bytes: usize) {
        self.done += 1;
        self.bytes_done += bytes;
        (self.on_progress)(Progress {
            parameter,
            parameters_done: self.done,
            parameters_total: self.total,
            bytes_done: self.bytes_done,
            bytes_total: self.bytes_total,
        });
    }
}
