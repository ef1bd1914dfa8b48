//! The command `bench`: how fast a model of a known size is, with random weights.

use std::time::{Duration, Instant};

use burn::tensor::{Int, Tensor, TensorData};
use burn_nf4::model::LinearLayers;
use burn_nf4::op::{DenseProvider, set_dense_provider};
use burn_nf4::peft::{LoraConfig, TargetModules};
use burn_nf4_llm::ModelError;
use burn_nf4_llm::generate::{Request, Sampling, generate};
use burn_nf4_llm::model::cache::KvCache;
use burn_nf4_llm::model::{Decoder, DecoderConfig, random};
use burn_nf4_llm::train::data::Batch;
use burn_nf4_llm::train::schedule::{Decay, Schedule};
use burn_nf4_llm::train::{Settings, Trainer};
use clap::{Args, ValueEnum};

use crate::args::FloatArg;
use crate::device::DeviceName;
use crate::generate::how_steps_were_made;
use crate::model_args::{at_least, check_rows};

/// Tokens of the prompt.
const PROMPT: usize = 16;

/// Passes that are timed, after two that compile and tune.
const PASSES: usize = 5;
/// Training steps that are timed, after two.
const STEPS: usize = 3;
/// Rank of the branches in training, if none is asked for.
const RANK: usize = 16;

/// Time decoding, prompts and training steps with random weights: needs no checkpoint.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Whose sizes the model has.
    #[arg(long, value_enum, default_value_t = SizeName::Smollm2)]
    pub size: SizeName,
    /// Rows that are decoded; several give several measurements. By default 1 and 16, unless prompts or
    /// training are asked for.
    #[arg(long)]
    pub batch: Vec<usize>,
    /// Tokens generated for each row after the first.
    #[arg(long, default_value_t = 64)]
    pub tokens: usize,
    /// Time the pass over a prompt of so many tokens; may be given several times.
    #[arg(long, value_name = "TOKENS")]
    pub prefill: Vec<usize>,
    /// Time steps of QLoRA, AdamW on all linear layers but the head, of so many rows of so many tokens,
    /// such as 4x2048; may be given several times.
    #[arg(long, value_name = "ROWSxTOKENS", value_parser = parse_shape)]
    pub train: Vec<[usize; 2]>,
    /// Train without computing each layer twice: more memory, less time.
    #[arg(long)]
    pub keep_all: bool,
    /// Rank of a low-rank branch on every linear layer but the head: none without it, in training 16.
    #[arg(long)]
    pub rank: Option<usize>,
    /// Who computes products of many rows.
    #[arg(long, value_enum, default_value_t = ProviderName::Auto)]
    pub provider: ProviderName,
    /// Launch each step of decoding anew, also where the device could replay a recorded one.
    #[arg(long)]
    pub eager: bool,
    /// Where to run.
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// The type to compute in: f32 on the CPU, elsewhere bf16.
    #[arg(long, value_enum)]
    pub dtype: Option<FloatArg>,
}

/// `4x2048`.
fn parse_shape(text: &str) -> Result<[usize; 2], String> {
    let sizes: Option<Vec<usize>> = text.split('x').map(|size| size.parse().ok()).collect();
    match sizes.as_deref() {
        Some(&[rows, tokens]) if rows > 0 && tokens > 1 => Ok([rows, tokens]),
        _ => Err("expected rows and tokens, such as 4x2048".into()),
    }
}

/// See `burn_nf4::op::DenseProvider`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum ProviderName {
    /// cuBLASLt where it is there, else Burn.
    Auto,
    Cublaslt,
    Burn,
}

/// A model whose sizes are known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum SizeName {
    /// SmolLM2-135M.
    Smollm2,
    /// Llama-3.2-1B.
    Llama1b,
    /// Llama-3.1-8B.
    Llama8b,
}

impl SizeName {
    /// Its `config.json`, as far as it matters here.
    const fn config(self) -> &'static str {
        match self {
            Self::Smollm2 => {
                r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
                "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "rope_theta": 100000, "max_position_embeddings": 8192,
                "tie_word_embeddings": true, "torch_dtype": "bfloat16"}"#
            }
            Self::Llama1b => {
                r#"{"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048,
                "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                "num_key_value_heads": 8, "rope_theta": 500000, "max_position_embeddings": 8192,
                "tie_word_embeddings": true, "torch_dtype": "bfloat16"}"#
            }
            Self::Llama8b => {
                r#"{"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
                "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "rope_theta": 500000, "max_position_embeddings": 8192,
                "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#
            }
        }
    }
}

impl BenchArgs {
    pub fn run(&self) -> Result<(), ModelError> {
        at_least(1, "--tokens", self.tokens)?;
        for rows in &self.batch {
            check_rows("--batch", *rows)?;
        }
        for tokens in &self.prefill {
            at_least(1, "--prefill", *tokens)?;
        }
        at_least(1, "--rank", self.rank.unwrap_or(1))?;
        let config =
            DecoderConfig::from_json(self.size.config().as_bytes(), "config.json".as_ref())?;
        let device = self.device.open()?;
        let dtype = self.device.dtype(self.dtype, config.dtype, &device)?;
        let asked = !(self.prefill.is_empty() && self.train.is_empty());
        let batches = match self.batch.as_slice() {
            [] if !asked => &[1, 16],
            batches => batches,
        };
        set_dense_provider(match self.provider {
            ProviderName::Auto => DenseProvider::Auto,
            ProviderName::Cublaslt => DenseProvider::CublasLt,
            ProviderName::Burn => DenseProvider::Burn,
        });
        println!(
            "{:?}, random weights, {:?}, {}",
            self.size,
            self.device,
            dtype.name()
        );
        let longest = [PROMPT + self.tokens + 1]
            .into_iter()
            .filter(|_| !batches.is_empty())
            .chain(self.prefill.iter().copied())
            .chain(self.train.iter().map(|&[_, tokens]| tokens))
            .max();
        if let Some(warning) = config.warn_of_length("the longest text", longest.unwrap_or(0)) {
            eprintln!("{warning}");
        }
        if !(batches.is_empty() && self.prefill.is_empty()) {
            let model = random(&config, dtype, self.rank, &device)?;
            if let Some(rank) = self.rank {
                println!("with low-rank branches of rank {rank}");
            }
            for &rows in batches {
                self.decode(&model, &config, rows)?;
            }
            for &tokens in &self.prefill {
                prefill(&model, &config, tokens)?;
            }
        }
        if !self.train.is_empty() {
            let device = device.autodiff();
            let model = random(&config, dtype, None, &device)?;
            let mut trainer = self.trainer(model, &config)?;
            for &shape in &self.train {
                train(&mut trainer, &config, shape);
            }
        }
        Ok(())
    }

    fn decode(
        &self,
        model: &Decoder,
        config: &DecoderConfig,
        rows: usize,
    ) -> Result<(), ModelError> {
        let request = Request {
            prompts: vec![vec![1; PROMPT]; rows],
            // The first token is that of the prompt.
            max_tokens: self.tokens + 1,
            sampling: Sampling {
                temperature: 0.0,
                top_k: 0,
                top_p: 1.0,
                seed: 42,
                ..Sampling::greedy()
            },
            eos: Vec::new(),
            capture: !self.eager,
            max_batch: rows,
            ..Request::default()
        };
        // The first time a graphics card compiles kernels and measures which are fastest.
        let start = Instant::now();
        generate(model, config, &request, |_, _| Ok(()))?;
        let first = start.elapsed().as_secs_f64();
        let report = generate(model, config, &request, |_, _| Ok(()))?;
        println!(
            "batch {rows:3}: {:8.1} tokens/s of all rows, median {:.2} ms a step \
             ({first:.1} s the first time), {}",
            report.decode_rate(),
            milliseconds(report.step_time),
            how_steps_were_made(&report)
        );
        Ok(())
    }

    /// The training of all linear layers but the head.
    fn trainer(&self, model: Decoder, config: &DecoderConfig) -> Result<Trainer, ModelError> {
        let lora = LoraConfig {
            r: self.rank.unwrap_or(RANK),
            lora_alpha: 2.0 * self.rank.unwrap_or(RANK) as f64,
            ..LoraConfig::new(TargetModules::AllLinear)
        };
        let schedule = Schedule {
            peak: 1e-4,
            decay: Decay::Constant,
            warmup: 0,
            total: usize::MAX,
        };
        let settings = Settings {
            weight_decay: 0.01,
            ..Settings::new(schedule, &lora)?
        };
        let device = model.device();
        let model = model.with_lora(&lora, &device)?;
        Ok(Trainer::new(model, config, lora, settings, !self.keep_all))
    }
}

/// Tokens that differ.
fn tokens(count: usize, config: &DecoderConfig) -> Vec<i64> {
    let vocabulary = config.vocab_size as i64;
    (0..count as i64)
        .map(|index| (index * 7919 + 13) % vocabulary)
        .collect()
}

/// Times the pass over a prompt, up to the logits of its last token on the host.
fn prefill(model: &Decoder, config: &DecoderConfig, length: usize) -> Result<(), ModelError> {
    let mut rope = model.rope_tables(config);
    let mut times = Vec::new();
    for pass in 0..PASSES + 2 {
        let ids = TensorData::new(tokens(length, config), [1, length]);
        let ids = Tensor::<2, Int>::from_data(ids, &model.device());
        let mut cache = KvCache::new(config.layers.len(), vec![0]);
        let start = Instant::now();
        let logits = model.next_logits(ids, &mut rope, &mut cache).into_data();
        if pass >= 2 {
            times.push(start.elapsed());
        }
        assert_eq!(logits.shape()[1], config.vocab_size);
    }
    let median = median(times);
    println!(
        "prompt of {length}: {:.1} ms, {:.0} tokens/s",
        milliseconds(median),
        length as f64 / median.as_secs_f64()
    );
    Ok(())
}

/// Times steps of training.
fn train(trainer: &mut Trainer, config: &DecoderConfig, [rows, length]: [usize; 2]) {
    let batch = Batch {
        ids: tokens(rows * length, config),
        rows,
        length,
        lengths: vec![length; rows],
    };
    let mut times = Vec::new();
    for step in 0..STEPS + 2 {
        let start = Instant::now();
        let loss = trainer.step(std::slice::from_ref(&batch));
        if step >= 2 {
            times.push(start.elapsed());
        }
        assert!(loss.is_finite(), "the loss is {loss}");
    }
    let median = median(times);
    println!(
        "step of {rows} x {length}: {:.0} ms, {:.0} tokens/s",
        milliseconds(median),
        (rows * length) as f64 / median.as_secs_f64()
    );
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
