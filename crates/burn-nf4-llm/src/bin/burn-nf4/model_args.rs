//! Arguments of several commands: the model, its adapter, and how tokens are chosen.

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::Device;
use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{Checkpoint, CheckpointStore};
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::model::LinearLayers;
use burn_nf4::op::device_memory;
use burn_nf4::parallel::Rank;
use burn_nf4::peft::Adapter;
use burn_nf4_llm::ModelError;
use burn_nf4_llm::fetch;
use burn_nf4_llm::generate::Sampling;
use burn_nf4_llm::model::config::GenerationConfig;
use burn_nf4_llm::model::{Decoder, DecoderConfig, left_out, load};
use burn_nf4_llm::text::{StopStrings, Text};
use burn_nf4_llm::train::{Shards, model_fingerprint};
use clap::Args;

use crate::args::FloatArg;
use crate::device::{DeviceName, sync};
use crate::progress::{Bar, mebibytes, seconds};

/// Which model, where, and in which type.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// A folder, or a repository `org/name` to fetch from the Hugging Face hub.
    #[arg(long)]
    pub model: String,
    /// Where to run.
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// The type to compute in: f32 on the CPU, elsewhere the model's own.
    #[arg(long, value_enum)]
    pub dtype: Option<FloatArg>,
    /// Quantize the output head too, to NF4 with double quantization, whatever it is in the folder. The
    /// embeddings stay as they are, also where the head is tied to them.
    #[arg(long)]
    pub quantize_head: bool,
}

/// A model with all that belongs to it.
pub struct Opened {
    pub model: Decoder,
    pub config: DecoderConfig,
    pub text: Text,
}

/// All of a model but its weights, so that what does not fit it is told before they are loaded.
pub struct Prepared {
    folder: PathBuf,
    name: DeviceName,
    pub device: Device,
    dtype: FloatType,
    quantize_head: bool,
    pub config: DecoderConfig,
    pub generation: GenerationConfig,
    pub text: Text,
}

impl ModelArgs {
    /// Fetches the model if need be and opens it, for an autodiff device if it is to be trained.
    pub fn prepare(&self, train: bool) -> Result<Prepared, ModelError> {
        let device = self.device.open()?;
        let folder = fetch::folder(&self.model)?;
        let config = DecoderConfig::from_folder(&folder)?;
        let generation = GenerationConfig::from_folder(&folder)?;
        if let Some(warning) = generation.warn_of_fields().filter(|_| !train) {
            eprintln!("{warning}");
        }
        let text = Text::from_folder(&folder)?;
        let dtype = self.device.dtype(self.dtype, config.dtype, &device)?;
        Ok(Prepared {
            folder,
            name: self.device,
            device: if train { device.autodiff() } else { device },
            dtype,
            quantize_head: self.quantize_head,
            config,
            generation,
            text,
        })
    }
}

impl Prepared {
    /// What tells the model from others.
    pub fn fingerprint(&self) -> Result<u64, ModelError> {
        model_fingerprint(&Checkpoint::open(&self.folder)?)
    }

    /// The type that it computes in, and whether the head is quantized for it.
    pub fn computes_in(&self) -> String {
        let head = if self.quantize_head {
            ", head in 4 bit"
        } else {
            ""
        };
        format!("{}{head}", self.dtype.name())
    }

    /// Loads the weights.
    pub fn load(self) -> Result<Opened, ModelError> {
        let model = self.load_on(&self.device, None, true)?.stack_experts()?;
        Ok(Opened {
            model,
            config: self.config,
            text: self.text,
        })
    }

    /// Loads the weights onto a device.
    ///
    /// - `shard`: whose part of the layers' packed weights to load, if not all
    /// - `tells`: whether people are told of it
    pub fn load_on(
        &self,
        device: &Device,
        shard: Option<&Rank>,
        tells: bool,
    ) -> Result<Decoder, ModelError> {
        let start = Instant::now();
        let config = &self.config;
        let mut model = self.load_model(device, shard, tells)?;
        let has_own_head = model.lm_head.is_some();
        if self.quantize_head {
            model = model.quantize_head(QuantConfig::default())?;
        }
        sync(device)?;
        if !tells {
            return Ok(model);
        }
        if config.tie_word_embeddings && has_own_head {
            eprintln!(
                "warning: config.json ties the head to the embeddings (tie_word_embeddings), but the \
                 model holds two different ones: both are used"
            );
        }
        let (packed, dense) = model.size_bytes();
        eprintln!(
            "loaded in {} on {:?} ({}): {} of packed weights, {} of float weights",
            seconds(start.elapsed()),
            self.name,
            self.dtype.name(),
            mebibytes(packed as u64),
            mebibytes(dense as u64),
        );
        Ok(model)
    }

    /// Refuses weights that the device has no room for.
    ///
    /// - `parts`: in how many parts packed weights are cut, of which the device has one
    fn check_memory(
        &self,
        checkpoint: &Checkpoint,
        device: &Device,
        parts: usize,
    ) -> Result<(), ModelError> {
        let Some(memory) = device_memory(device) else {
            return Ok(());
        };
        let left_out = left_out(checkpoint, &self.config);
        let mut needed = 0;
        for key in checkpoint.parameters() {
            if left_out.contains(&key) {
                continue;
            }
            needed += match checkpoint.is_quantized(key) {
                // The head is on all.
                true if key.contains(".layers.") => checkpoint.parameter_bytes(key) / parts,
                true => checkpoint.parameter_bytes(key),
                false => {
                    let elements: usize = checkpoint.tensor_info(key)?.shape.iter().product();
                    elements * self.dtype.size_bytes()
                }
            };
        }
        let needed = needed as u64;
        if needed <= memory.left() {
            return Ok(());
        }
        let left = mebibytes(memory.left());
        let expected = format!("at most the {left} that {device:?} has left");
        let given = format!("about {}", mebibytes(needed));
        Err(ModelError::setting(
            "the memory of the weights",
            given,
            expected,
        ))
    }

    fn load_model(
        &self,
        device: &Device,
        shard: Option<&Rank>,
        tells: bool,
    ) -> Result<Decoder, ModelError> {
        let config = &self.config;
        let mut store = CheckpointStore::open(&self.folder)?;
        if let Some(whole) = config.text_part_of.as_ref().filter(|_| tells) {
            let names = left_out(store.checkpoint(), config);
            let mut parts: Vec<&str> = names.iter().map(|name| part_of(name)).collect();
            parts.dedup();
            eprintln!(
                "the model is of text and images ({whole}): its text part is used, {} parameters are left \
                 out ({})",
                names.len(),
                parts.join(", "),
            );
        }
        self.check_memory(store.checkpoint(), device, shard.map_or(1, Rank::size))?;
        if tells {
            let bar = Bar::new("load");
            store = store.on_progress(move |progress| bar.show(progress));
        }
        if let Some(rank) = shard {
            store = store.shard(Shards::plan(config, rank));
        }
        load(store, config, self.dtype, device)
    }
}

/// The beginning of a parameter's name that tells the part of the model: `vision_tower`.
fn part_of(name: &str) -> &str {
    let from = if name.starts_with("model.") { 6 } else { 0 };
    let length = name[from..].find('.').unwrap_or(name.len() - from);
    &name[..from + length]
}

/// An adapter to put on the model.
#[derive(Args, Debug)]
pub struct AdapterArgs {
    /// A PEFT LoRA folder to put on the model.
    #[arg(long)]
    pub adapter: Option<PathBuf>,
    /// Apply an adapter even if it lacks layers that its settings name.
    #[arg(long, requires = "adapter")]
    pub allow_missing: bool,
}

impl AdapterArgs {
    /// Reads the adapter, if there is one.
    pub fn read(&self) -> Result<Option<Adapter>, ModelError> {
        let adapter = self.adapter.as_ref().map(Adapter::open_partial);
        Ok(adapter.transpose()?)
    }

    /// The model with the adapter that was read. Of one on a model of text and images the text part is used.
    pub fn apply(
        &self,
        adapter: Option<Adapter>,
        model: Decoder,
        config: &DecoderConfig,
    ) -> Result<Decoder, ModelError> {
        let (Some(mut adapter), Some(folder)) = (adapter, &self.adapter) else {
            return Ok(model);
        };
        if config.text_part_of.is_some() {
            let left_out;
            (adapter, left_out) = adapter.text_part();
            if !left_out.is_empty() {
                let mut parts: Vec<&str> = left_out.iter().map(|name| part_of(name)).collect();
                parts.dedup();
                eprintln!(
                    "the adapter is of text and images: its text part is used, {} modules are left out ({})",
                    left_out.len(),
                    parts.join(", "),
                );
            }
        }
        let device = model.device();
        if self.allow_missing {
            return Ok(model.apply_partial_adapter(&adapter, &device)?);
        }
        let adapted = model.apply_adapter(&adapter, &device);
        adapted.map_err(|error| lacking(folder, error))
    }
}

/// An error of an adapter, with what to do about it if it lacks something.
pub fn lacking(folder: &Path, error: Nf4Error) -> ModelError {
    match error {
        Nf4Error::AdapterLacks { missing } => ModelError::setting(
            "the adapter",
            format!("{}, without [{}]", folder.display(), missing.join(", ")),
            "all that its settings ask for, or --allow-missing to apply it without",
        ),
        other => other.into(),
    }
}

/// How tokens are chosen, and how many.
#[derive(Args, Debug)]
pub struct SamplingArgs {
    /// Most tokens to generate for a text.
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub max_tokens: usize,
    /// How freely tokens are drawn: 1 by the model's probabilities, less favours likely tokens. 0 draws nothing
    /// and takes the likeliest token each time.
    #[arg(long, value_name = "NUMBER", default_value_t = 0.0)]
    pub temperature: f32,
    /// Draw only among this many of the likeliest tokens; 0 for all.
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub top_k: usize,
    /// Draw only among the likeliest tokens, as many as reach this probability together; 1 for all.
    #[arg(long, value_name = "PROBABILITY", default_value_t = 1.0)]
    pub top_p: f32,
    /// Draw only among tokens that have at least this part of the probability of the likeliest one, such as
    /// 0.05; 0 for all [default: that of generation_config.json, else 0].
    #[arg(long, value_name = "PART")]
    pub min_p: Option<f32>,
    /// Above 1, make tokens less likely that the prompt or the text has already, such as 1.1; 1 for no penalty
    /// [default: that of generation_config.json, else 1].
    #[arg(long, value_name = "NUMBER")]
    pub repetition_penalty: Option<f32>,
    /// Seed of the draws: the same one gives the same text. The second row draws with the next seed, and so on.
    #[arg(long, value_name = "NUMBER", default_value_t = 42)]
    pub seed: u64,
    /// End a text before this string: `\n`, `\t` and `\\` are a line break, a tab and a backslash. May be given
    /// several times; the `stop_strings` of generation_config.json end a text too.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Launch each step of decoding anew, also where the device could record one and replay it, which is faster.
    #[arg(long)]
    pub eager: bool,
    /// Most memory for the keys and values of all rows, in MiB: what could need more is refused before it begins
    /// [default: what the device has].
    #[arg(long, value_name = "MIB")]
    pub max_cache: Option<u64>,
}

impl SamplingArgs {
    /// The bound of the cache, in bytes.
    pub fn max_cache_bytes(&self) -> Option<u64> {
        self.max_cache
            .map(|mebibytes| mebibytes.saturating_mul(1 << 20))
    }

    /// The settings, unless they cannot be served.
    pub fn check(&self) -> Result<(Sampling, StopStrings), ModelError> {
        let sampling = Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            seed: self.seed,
        };
        sampling.check()?;
        at_least(1, "--max-tokens", self.max_tokens)?;
        at_least(1, "--max-cache", self.max_cache.unwrap_or(1) as usize)?;
        let stop = self.stop.iter().map(|stop| unescaped(stop));
        Ok((sampling, StopStrings::new(stop)?))
    }

    /// The settings with what a model says where nothing else was asked for.
    pub fn of_model(&self, sampling: Sampling, generation: &GenerationConfig) -> Sampling {
        let draws = sampling.temperature > 0.0;
        let min_p = self.min_p.or(generation.min_p.filter(|_| draws));
        let penalty = self.repetition_penalty.or(generation.repetition_penalty);
        Sampling {
            min_p: min_p.unwrap_or(sampling.min_p),
            repetition_penalty: penalty.unwrap_or(sampling.repetition_penalty),
            ..sampling
        }
    }
}

/// A text in which `\n`, `\t` and `\\` stand for a line break, a tab and a backslash.
fn unescaped(text: &str) -> String {
    let mut unescaped = String::new();
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        let meant = match (letter, letters.peek()) {
            ('\\', Some('n')) => '\n',
            ('\\', Some('t')) => '\t',
            ('\\', Some('\\')) => '\\',
            _ => {
                unescaped.push(letter);
                continue;
            }
        };
        letters.next();
        unescaped.push(meant);
    }
    unescaped
}

/// The most rows of a batch: more than any device has memory for.
const MAX_ROWS: usize = 65_536;

/// Refuses more rows than can be.
pub fn check_rows(name: &str, given: usize) -> Result<(), ModelError> {
    at_least(1, name, given)?;
    match given > MAX_ROWS {
        true => Err(ModelError::setting(
            name,
            given,
            format!("at most {MAX_ROWS}"),
        )),
        false => Ok(()),
    }
}

/// Refuses a number that is too small.
pub fn at_least(least: usize, name: &str, given: usize) -> Result<(), ModelError> {
    match given < least {
        true => Err(ModelError::setting(
            name,
            given,
            format!("at least {least}"),
        )),
        false => Ok(()),
    }
}
