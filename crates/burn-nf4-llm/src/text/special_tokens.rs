//! The special tokens that lie beside a tokenizer.
//!
//! As `_from_pretrained` of transformers 5.24.0 collects them.

use std::path::Path;

use serde_json::Value;
use tokenizers::{AddedToken, Tokenizer};

use crate::error::ModelError;
use crate::json::fields::{Fields, spelled};

/// The special tokens of a folder.
#[derive(Debug, Default)]
pub struct SpecialTokens {
    /// By their names, such as `bos_token`.
    pub named: Vec<(String, String)>,
    /// Those that the tokenizer must know, in the order in which it learns them.
    added: Vec<AddedToken>,
}

impl SpecialTokens {
    /// Reads them from `tokenizer_config.json`, and from `special_tokens_map.json` and
    /// `added_tokens.json` where the former does not list the tokens that were added. `defaults` are those of the class.
    pub fn from_folder(
        folder: &Path,
        config: &Fields,
        defaults: &[(&str, &str)],
    ) -> Result<Self, ModelError> {
        let mut tokens = Self::default();
        for (name, token) in defaults {
            tokens.set(name, (*token).into());
        }
        let mut extra = Vec::new();
        let decoder = config.object("added_tokens_decoder")?;
        tokens.read_named(config, &mut extra)?;
        match decoder {
            Some(decoder) => tokens.added = tokens_by_id(&decoder)?,
            None => {
                let map = Fields::read_or_empty(&folder.join("special_tokens_map.json"))?;
                tokens.read_named(&map, &mut extra)?;
                let ids = Fields::read_or_empty(&folder.join("added_tokens.json"))?;
                tokens.added = tokens_of_ids(&ids, &tokens.special(&extra))?;
            }
        }
        let special = tokens.special(&extra);
        for content in special {
            if !tokens.added.iter().any(|token| token.content == content) {
                tokens.added.push(AddedToken::from(content, true));
            }
        }
        Ok(tokens)
    }

    /// The named tokens and the further ones.
    fn special(&self, extra: &[String]) -> Vec<String> {
        let named = self.named.iter().map(|(_, token)| token);
        named.chain(extra).cloned().collect()
    }

    /// The fields whose name ends in `_token` and that hold one, and the further tokens.
    fn read_named(&mut self, fields: &Fields, extra: &mut Vec<String>) -> Result<(), ModelError> {
        let names: Vec<&str> = fields.names().collect();
        for name in names.into_iter().filter(|name| name.ends_with("_token")) {
            match fields.value(name) {
                // An explicit `null` takes a default away.
                Some(Value::Null) => self.named.retain(|(known, _)| known != name),
                Some(value) => {
                    if let Some(token) = content(value) {
                        self.set(name, token);
                    }
                }
                None => {}
            }
        }
        // The newer name has precedence, unless it holds nothing.
        for name in ["extra_special_tokens", "additional_special_tokens"] {
            let found = match fields.value(name) {
                Some(Value::Array(tokens)) => tokens.iter().filter_map(content).collect(),
                Some(Value::Object(tokens)) => {
                    for (name, value) in tokens {
                        if let Some(token) = content(value) {
                            self.set(name, token);
                        }
                    }
                    Vec::new()
                }
                None | Some(Value::Null) => Vec::new(),
                Some(other) => {
                    return Err(fields.unsupported(
                        name,
                        spelled(other),
                        "a list or an object of tokens",
                    ));
                }
            };
            if !found.is_empty() {
                extra.extend(found);
                break;
            }
        }
        Ok(())
    }

    /// Names a token.
    fn set(&mut self, name: &str, token: String) {
        match self.named.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = token,
            None => self.named.push((name.into(), token)),
        }
    }

    /// The token of a name.
    pub fn get(&self, name: &str) -> Option<&str> {
        let found = self.named.iter().find(|(known, _)| known == name);
        found.map(|(_, token)| token.as_str())
    }

    /// Adds the tokens to a tokenizer that does not have them as such.
    pub fn add_to(&self, tokenizer: &mut Tokenizer) {
        let known: Vec<String> = tokenizer
            .get_added_tokens_decoder()
            .into_values()
            .map(|token| token.content)
            .collect();
        for token in &self.added {
            if known.contains(&token.content) {
                continue;
            }
            match token.special {
                true => tokenizer.add_special_tokens(std::slice::from_ref(token)),
                false => tokenizer.add_tokens(std::slice::from_ref(token)),
            };
        }
    }
}

/// The text of a token, which may be written as an object.
fn content(value: &Value) -> Option<String> {
    let text = value.as_str().or_else(|| value.get("content")?.as_str());
    text.map(String::from)
}

/// The tokens of `added_tokens_decoder` in the order of their ids.
fn tokens_by_id(decoder: &Fields) -> Result<Vec<AddedToken>, ModelError> {
    let mut tokens = Vec::new();
    for id in decoder.names() {
        let Some(fields) = decoder.object(id)? else {
            return Err(decoder.unsupported(id, "null", "a token"));
        };
        let number: u32 = id
            .parse()
            .map_err(|_| decoder.unsupported(id, "not a number", "token ids as names"))?;
        let flag = |name| Ok::<bool, ModelError>(fields.get(name)?.unwrap_or(false));
        let special = flag("special")?;
        let token = AddedToken::from(fields.required::<String>("content")?, special)
            .single_word(flag("single_word")?)
            .lstrip(flag("lstrip")?)
            .rstrip(flag("rstrip")?)
            .normalized(fields.get("normalized")?.unwrap_or(!special));
        tokens.push((number, token));
    }
    tokens.sort_by_key(|(id, _)| *id);
    Ok(tokens.into_iter().map(|(_, token)| token).collect())
}

/// The tokens of `added_tokens.json`, which has the id of each, in the order of their ids.
fn tokens_of_ids(ids: &Fields, special: &[String]) -> Result<Vec<AddedToken>, ModelError> {
    let mut tokens = Vec::new();
    for content in ids.names() {
        let special = special.iter().any(|token| token == content);
        let token = AddedToken::from(content, special).normalized(!special);
        tokens.push((ids.required::<u32>(content)?, token));
    }
    tokens.sort_by_key(|(id, _)| *id);
    Ok(tokens.into_iter().map(|(_, token)| token).collect())
}
