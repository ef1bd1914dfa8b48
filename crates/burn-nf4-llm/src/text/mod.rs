//! Text to tokens and back.

mod answers;
pub mod chat;
mod jinja;
pub mod message;
mod methods;
pub mod pipeline;
pub(crate) mod plain_text;
mod python;
pub mod special_tokens;
pub mod stream;
mod token_bytes;

pub use chat::{Chat, Conversation};
pub use message::Message;
pub use stream::{StopStrings, TextStream};

use std::collections::HashSet;
use std::path::Path;
use std::sync::OnceLock;

use tokenizers::{Encoding, Tokenizer};

use crate::error::ModelError;
use crate::json::fields::Fields;
use crate::model::config::DecoderConfig;
use crate::text::chat::Ending;
use crate::text::pipeline::Class;
use crate::text::special_tokens::SpecialTokens;
use crate::text::token_bytes::TokenBytes;

/// A tokenizer and the chat templates of its folder.
pub struct Text {
    /// As `tokenizer.json` describes it. Not to be changed after the first [stream](Self::stream).
    pub tokenizer: Tokenizer,
    /// The chat templates.
    pub chat: Chat,
    /// The token that ends a text, if the tokenizer names one.
    pub eos: Option<u32>,
    /// Tokens that no text shows.
    special: HashSet<u32>,
    /// Found with the first stream.
    token_bytes: OnceLock<TokenBytes>,
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
        let special = tokenizer.get_added_tokens_decoder().into_iter();
        let special = special.filter(|(_, token)| token.special);
        Ok(Self {
            special: special.map(|(id, _)| id).collect(),
            tokenizer,
            chat: Chat::from_folder(folder, &config, tokens.named)?,
            eos,
            token_bytes: OnceLock::new(),
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

    /// Whether a token is special: texts do not show it.
    pub fn is_special(&self, token: u32) -> bool {
        self.special.contains(&token)
    }

    /// How its tokens stand for bytes.
    fn token_bytes(&self) -> Result<&TokenBytes, ModelError> {
        if let Some(known) = self.token_bytes.get() {
            return Ok(known);
        }
        let found = TokenBytes::of(&self.tokenizer)?;
        Ok(self.token_bytes.get_or_init(|| found))
    }

    /// The text of tokens as they come: see [`TextStream`].
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn stream<'a>(&'a self, stop: &'a StopStrings) -> Result<TextStream<'a>, ModelError> {
        TextStream::new(self, stop)
    }

    /// The special token that the chat template puts behind an answer, if there is one.
    pub fn end_of_turn(&self) -> Option<u32> {
        let behind = self.chat.behind_an_answer()?;
        let first = *self.encode_with(behind.trim_start(), false).ok()?.first()?;
        self.is_special(first).then_some(first)
    }

    /// All tokens that end a text: those of the model, which are the ones at which `generate` of transformers
    /// ends, and that of the tokenizer, which a tuned model's config may not name; in a chat the token behind
    /// an answer as well.
    pub fn ends(&self, config: &DecoderConfig, chat: bool) -> Vec<u32> {
        let mut ends = config.eos_token_ids.clone();
        let of_chat = chat.then(|| self.end_of_turn()).flatten();
        for id in self.eos.into_iter().chain(of_chat) {
            if !ends.contains(&id) {
                ends.push(id);
            }
        }
        ends
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>, ModelError> {
        Ok(self.encoding(text, special)?.get_ids().to_vec())
    }

    fn encoding(&self, text: &str, special: bool) -> Result<Encoding, ModelError> {
        let encoding = self.tokenizer.encode(text, special);
        encoding.map_err(|error| ModelError::Tokenizer(error.to_string()))
    }
}
