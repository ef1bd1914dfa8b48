//! Text to tokens and back, and the chat templates that are known.

use std::path::Path;

use serde::Deserialize;
use tokenizers::Tokenizer;

use crate::config::{parse, read};
use crate::error::ModelError;

/// A tokenizer and, where the folder has one that is known, its chat template.
pub struct Text {
    pub tokenizer: Tokenizer,
    chat: Result<ChatFormat, ModelError>,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// ChatML, with the system message that is put in front of a conversation without one.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatFormat {
    default_system: Option<&'static str>,
}

const SMOLLM2_SYSTEM: &str = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";

/// Templates are programs (Jinja); instead of running them, the known ones are recognised by their
/// text.
const PLAIN_CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

#[derive(Deserialize, Default)]
struct TokenizerConfig {
    chat_template: Option<serde_json::Value>,
}

impl Text {
    /// Reads `tokenizer.json` and `tokenizer_config.json`.
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("tokenizer.json");
        let tokenizer = Tokenizer::from_file(&path)
            .map_err(|error| ModelError::Tokenizer(format!("{}: {error}", path.display())))?;
        let path = folder.join("tokenizer_config.json");
        let config: TokenizerConfig = match path.exists() {
            true => parse(&read(&path)?, &path)?,
            false => TokenizerConfig::default(),
        };
        let template = config
            .chat_template
            .as_ref()
            .and_then(serde_json::Value::as_str);
        Ok(Self {
            tokenizer,
            chat: ChatFormat::recognise(template),
        })
    }

    /// The tokens of a text, with the special ones that the tokenizer adds.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        self.encode_with(text, true)
    }

    /// The tokens of a conversation, ready for the answer if `answer`.
    pub fn encode_chat(&self, messages: &[Message], answer: bool) -> Result<Vec<u32>, ModelError> {
        match &self.chat {
            // The template brings the special tokens itself.
            Ok(format) => self.encode_with(&format.render(messages, answer), false),
            Err(error) => Err(ModelError::Argument(error.to_string())),
        }
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>, ModelError> {
        let encoding = self
            .tokenizer
            .encode(text, special)
            .map_err(|error| ModelError::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }
}

impl ChatFormat {
    /// The format that a template of `tokenizer_config.json` describes.
    pub fn recognise(template: Option<&str>) -> Result<Self, ModelError> {
        let Some(template) = template else {
            return Err(ModelError::Argument(
                "tokenizer_config.json has no chat_template".into(),
            ));
        };
        // A line break inside a Jinja string may be written either way.
        let template = template.trim().replace('\n', "\\n");
        match template.as_str() {
            SMOLLM2 => Ok(Self {
                default_system: Some(SMOLLM2_SYSTEM),
            }),
            PLAIN_CHATML => Ok(Self {
                default_system: None,
            }),
            _ => Err(ModelError::Argument(
                "the chat_template of tokenizer_config.json is not one that is known here: \
                 ChatML, with or without the system message of SmolLM2"
                    .into(),
            )),
        }
    }

    /// The text of a conversation, ready for the answer if `answer`.
    pub fn render(&self, messages: &[Message], answer: bool) -> String {
        let turn = |role: &str, content: &str| format!("<|im_start|>{role}\n{content}<|im_end|>\n");
        let mut text = String::new();
        if let Some(system) = self.default_system
            && messages
                .first()
                .is_none_or(|message| message.role != "system")
        {
            text += &turn("system", system);
        }
        for message in messages {
            text += &turn(&message.role, &message.content);
        }
        if answer {
            text += "<|im_start|>assistant\n";
        }
        text
    }
}
