//! Text to tokens and back.

pub mod chat;
mod jinja;
pub mod message;
mod methods;
pub mod pipeline;
pub(crate) mod plain_text;
mod python;
pub mod special_tokens;

pub use chat::{Chat, Conversation};
pub use message::Message;

use std::path::Path;

use tokenizers::Tokenizer;

use crate::error::ModelError;
use crate::json::fields::Fields;
use crate::text::chat::Ending;
use crate::text::pipeline::Class;
use crate::text::special_tokens::SpecialTokens;

/// A tokenizer and the chat templates of its folder.
pub struct Text {
    /// As `tokenizer.json` describes it.
    pub tokenizer: Tokenizer,
    /// The chat templates.
    pub chat: Chat,
    /// The token that ends a text, if the tokenizer names one.
    pub eos: Option<u32>,
}

impl Text {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and the chat templates.
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        let config = Fields::read_or_empty(&folder.join("tokenizer_config.json"))?;
        let class = Class::of(folder, &config)?;
        let tokens = SpecialTokens::from_folder(folder, &config, class.default_tokens())?;
        let mut tokenizer = class.open(folder, &config)?;
        tokens.add_to(&mut tokenizer);
        let eos = tokens
            .get("eos_token")
            .and_then(|eos| tokenizer.token_to_id(eos));
        Ok(Self {
            tokenizer,
            chat: Chat::from_folder(folder, &config, tokens.named)?,
            eos,
        })
    }

    /// The tokens of a text, with the special ones that the tokenizer adds.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        self.encode_with(text, true)
    }

    /// The tokens of a conversation. Its template brings the special tokens itself.
    pub fn encode_chat(
        &self,
        conversation: &Conversation,
        ending: Ending,
    ) -> Result<Vec<u32>, ModelError> {
        self.encode_with(&self.chat.render(conversation, ending)?, false)
    }

    /// The text of tokens, without the special ones.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn decode(&self, tokens: &[u32]) -> Result<String, ModelError> {
        let decoded = self.tokenizer.decode(tokens, true);
        decoded.map_err(|error| ModelError::Tokenizer(error.to_string()))
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>, ModelError> {
        let encoding = self
            .tokenizer
            .encode(text, special)
            .map_err(|error| ModelError::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }
}
