//! The bytes that each token puts into a text.

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::error::ModelError;

/// How the tokens of a tokenizer stand for bytes.
///
/// As `StopStringCriteria` of transformers 5.24.0 has it: a token has the bytes that it has within a text,
/// special tokens those of their names.
#[derive(Debug, Clone)]
pub struct TokenBytes {
    alphabet: Alphabet,
    /// Tokens of some text, and that text.
    context: (Vec<u32>, String),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Alphabet {
    /// A character of GPT-2's alphabet for each byte.
    Bytes,
    /// Text, and names such as `<0x0A>` for bytes.
    Fallback,
    Text,
}

/// What a token is within: its own text shows behind it.
const CONTEXT: &str = "abcdef";

impl TokenBytes {
    /// Those of a tokenizer.
    pub fn of(tokenizer: &Tokenizer) -> Result<Self, ModelError> {
        let decoder = serde_json::to_value(tokenizer.get_decoder()).unwrap_or_default();
        let alphabet = if has_type(&decoder, "ByteFallback") {
            Alphabet::Fallback
        } else if has_type(&decoder, "ByteLevel") {
            Alphabet::Bytes
        } else {
            Alphabet::Text
        };
        let context = tokenizer.encode(CONTEXT, false).map_err(failed)?;
        let context = context.get_ids().to_vec();
        let text = tokenizer.decode(&context, false).map_err(failed)?;
        Ok(Self {
            alphabet,
            context: (context, text),
        })
    }

    /// The bytes of a token; none if there is no such token.
    pub fn bytes(&self, tokenizer: &Tokenizer, id: u32) -> Result<Vec<u8>, ModelError> {
        let Some(token) = tokenizer.id_to_token(id) else {
            return Ok(Vec::new());
        };
        let own = match self.alphabet {
            Alphabet::Bytes => token.chars().map(byte_of).collect(),
            Alphabet::Fallback => named_byte(&token).map(|byte| vec![byte]),
            Alphabet::Text => None,
        };
        if let Some(bytes) = own {
            return Ok(bytes);
        }
        let (context, before) = &self.context;
        let ids = [context.as_slice(), &[id]].concat();
        let text = tokenizer.decode(&ids, false).map_err(failed)?;
        let own = text.strip_prefix(before.as_str());
        Ok(own.unwrap_or(&token).as_bytes().to_vec())
    }

    /// Whether a token is a byte whose character may depend on the tokens behind it, even if it is whole: a
    /// run of such tokens is decoded as one.
    pub fn is_of_run(&self, token: &str) -> bool {
        self.alphabet == Alphabet::Fallback && named_byte(token).is_some()
    }
}

fn failed(error: tokenizers::Error) -> ModelError {
    ModelError::Tokenizer(error.to_string())
}

fn has_type(decoder: &Value, name: &str) -> bool {
    match decoder {
        Value::Object(fields) => {
            fields.get("type").is_some_and(|kind| kind == name)
                || fields.values().any(|value| has_type(value, name))
        }
        Value::Array(items) => items.iter().any(|item| has_type(item, name)),
        _ => false,
    }
}

/// The byte of a name such as `<0x0A>`.
fn named_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let hexadecimal = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    hexadecimal.then(|| u8::from_str_radix(digits, 16).ok())?
}

/// The byte of a character of GPT-2's alphabet (`bytes_to_unicode`): most stand for themselves, the others
/// are numbered from 256 on in their order.
fn byte_of(character: char) -> Option<u8> {
    let is_plain = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let code = u32::from(character);
    match u8::try_from(code) {
        Ok(byte) => is_plain(&byte).then_some(byte),
        Err(_) => {
            let mut others = (0..=255).filter(|byte| !is_plain(byte));
            others.nth(usize::try_from(code - 256).ok()?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{byte_of, named_byte};

    #[test]
    fn bytes_have_characters_and_names() {
        let given: Vec<Option<u8>> = "aĠĊé€Ń".chars().map(byte_of).collect();
        let expected = [
            Some(b'a'),
            Some(b' '),
            Some(b'\n'),
            Some(0xe9),
            None,
            Some(0xad),
        ];
        assert_eq!(given, expected);
        let names = ["<0x0A>", "<0xff>", "<0x+1>", "<0x1>", "0x0A", "<0x00A>"];
        let given = names.map(named_byte);
        assert_eq!(given, [Some(10), Some(255), None, None, None, None]);
    }
}
