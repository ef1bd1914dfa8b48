//! What the flags of `tokenizer_config.json` change in `tokenizer.json`.
//!
//! As transformers 5.24.0 has it when there is a `tokenizer.json`: `add_bos_token` and
//! `add_eos_token` are not read, the file's own post-processor decides (`_from_pretrained`);
//! `LlamaTokenizer` builds its steps anew and reads `add_prefix_space` and `legacy`, other classes
//! that do so read `add_prefix_space`; most classes take the file as it is.

use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use crate::error::ModelError;
use crate::json::fields::Fields;
use crate::json::files::{parse_json, read};

/// How transformers builds the tokenizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Class {
    /// From the file as it is.
    File,
    /// As SentencePiece does it.
    Llama,
    /// With bytes as characters.
    Gpt2,
    /// As `Qwen2Tokenizer`.
    Qwen2,
}

impl Class {
    /// The class of a folder. The config of the model has a say: Mistral's tokenizers are always
    /// read from the file. So is a file with bytes as characters, which `LlamaTokenizer` is not for.
    pub fn of(folder: &Path, tokenizer: &Fields) -> Result<Self, ModelError> {
        let path = folder.join("tokenizer.json");
        if !path.exists() && folder.join("tokenizer.model").exists() {
            return Err(ModelError::Tokenizer(format!(
                "{}: there is no tokenizer.json, which transformers makes of tokenizer.model when \
                 it saves the tokenizer",
                folder.display()
            )));
        }
        let model = Fields::read_or_empty(&folder.join("config.json"))?;
        let class = match tokenizer.nullable::<String>("tokenizer_class")? {
            Some(class) => class,
            None => model.nullable("tokenizer_class")?.unwrap_or_default(),
        };
        if model.nullable::<String>("model_type")?.as_deref() == Some("mistral") {
            return Ok(Self::File);
        }
        Ok(match class.strip_suffix("Fast").unwrap_or(&class) {
            "LlamaTokenizer" => {
                let text = String::from_utf8(read(&path)?).unwrap_or_default();
                match text.contains("\"ByteLevel\"") {
                    true => Self::File,
                    false => Self::Llama,
                }
            }
            "GPT2Tokenizer" => Self::Gpt2,
            "Qwen2Tokenizer" => Self::Qwen2,
            _ => Self::File,
        })
    }

    /// The names that tokens have unless the config gives them others, or `null`.
    pub fn default_tokens(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Llama => &[
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
            ],
            Self::Gpt2 => &[
                ("bos_token", "<|endoftext|>"),
                ("eos_token", "<|endoftext|>"),
                ("unk_token", "<|endoftext|>"),
            ],
            Self::Qwen2 => &[
                ("eos_token", "<|endoftext|>"),
                ("unk_token", "<|endoftext|>"),
                ("pad_token", "<|endoftext|>"),
            ],
            Self::File => &[],
        }
    }

    /// Opens `tokenizer.json` under the flags of `tokenizer_config.json`.
    pub fn open(self, folder: &Path, config: &Fields) -> Result<Tokenizer, ModelError> {
        let path = folder.join("tokenizer.json");
        let mut text = read(&path)?;
        let prefix = config.nullable::<bool>("add_prefix_space")?;
        match self {
            Self::Llama => {
                let mut steps: Map<String, Value> = parse_json(&text, &path)?;
                let legacy = config.nullable("legacy")?.unwrap_or(false);
                if rebuild_llama(&mut steps, prefix.unwrap_or(true), legacy) {
                    text = Value::Object(steps).to_string().into_bytes();
                }
            }
            // The class would drop other steps of the file too, such as SmolLM2's cut between
            // digits. The model was trained with them, so they stay.
            Self::Gpt2 | Self::Qwen2 => {
                let mut steps: Map<String, Value> = parse_json(&text, &path)?;
                let prefix = prefix.unwrap_or(false);
                let step = steps.get_mut("pre_tokenizer");
                if step.is_some_and(|step| set_prefix_space(step, prefix)) {
                    text = Value::Object(steps).to_string().into_bytes();
                }
            }
            Self::File => {}
        }
        let mut tokenizer = Tokenizer::from_bytes(&text)
            .map_err(|error| ModelError::Tokenizer(format!("{}: {error}", path.display())))?;
        // What the file was trained or saved with; texts are neither truncated nor padded here.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| ModelError::Tokenizer(error.to_string()))?;
        let split = config.nullable("split_special_tokens")?.unwrap_or(false);
        tokenizer.set_encode_special_tokens(split);
        Ok(tokenizer)
    }
}

/// The steps of `LlamaTokenizer.__init__`. Says whether the file was of a kind that has them.
fn rebuild_llama(steps: &mut Map<String, Value>, prefix: bool, legacy: bool) -> bool {
    let Some(model) = steps.get_mut("model").and_then(Value::as_object_mut) else {
        return false;
    };
    // Files of older versions do not name the kind of their model, but BPE alone has merges.
    if !model.contains_key("merges") {
        return false;
    }
    for (key, value) in [
        ("dropout", Value::Null),
        ("unk_token", Value::Null),
        ("continuing_subword_prefix", Value::Null),
        ("end_of_word_suffix", Value::Null),
        ("fuse_unk", true.into()),
        ("byte_fallback", true.into()),
        ("ignore_merges", false.into()),
    ] {
        model.insert(key.into(), value);
    }
    let scheme = match (prefix, legacy) {
        (false, _) => "never",
        (true, true) => "always",
        (true, false) => "first",
    };
    let pre_tokenizer = json!({
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false,
    });
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    let decoder = json!({ "type": "Sequence", "decoders": decoders });
    steps.insert("normalizer".into(), Value::Null);
    steps.insert("pre_tokenizer".into(), pre_tokenizer);
    steps.insert("decoder".into(), decoder);
    true
}

/// Sets the flag of the step for bytes, alone or among others. Says whether that changed anything.
fn set_prefix_space(step: &mut Value, prefix: bool) -> bool {
    if step["type"] == "ByteLevel" {
        let changed = step["add_prefix_space"] != prefix;
        step["add_prefix_space"] = prefix.into();
        return changed;
    }
    let steps = step.get_mut("pretokenizers").and_then(Value::as_array_mut);
    let changed = steps
        .into_iter()
        .flatten()
        .map(|step| set_prefix_space(step, prefix));
    // Every one of them is set.
    changed.fold(false, |any, changed| any | changed)
}
