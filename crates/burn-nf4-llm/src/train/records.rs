//! Training examples in JSON: objects one after the other (JSON Lines), or a list of them.

use std::borrow::Cow;
use std::fmt;
use std::path::Path;

use fancy_regex::{Captures, Regex};
use minijinja::Value;
use minijinja::value::ValueKind;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use crate::error::ModelError;
use crate::text::chat::Conversation;
use crate::text::message::Message;
use crate::text::plain_text::Place;

/// An example, in one of the forms that TRL has.
#[derive(Debug, Clone)]
pub enum Record {
    Text(String),
    Conversation(Box<Conversation>),
    /// `prompt` and `completion` as texts.
    Completion {
        prompt: String,
        completion: String,
    },
    /// `prompt` and `completion` as lists of messages.
    Continuation {
        /// All messages.
        conversation: Box<Conversation>,
        /// How many of them are the prompt.
        prompt: usize,
    },
}

/// What an object of a file has to have.
const EXPECTED: &str = "`text`, `messages`, or `prompt` and `completion`";

/// A side of an example of two.
enum Side {
    Text(String),
    Messages(Vec<Message>),
}

impl Side {
    fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "a text",
            Self::Messages(_) => "a list of messages",
        }
    }
}

impl<'de> Deserialize<'de> for Side {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SideVisitor)
    }
}

struct SideVisitor;

impl<'de> Visitor<'de> for SideVisitor {
    type Value = Side;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text or a list of messages")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Side, E> {
        Ok(Side::Text(text.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Side, A::Error> {
        let mut messages = Vec::new();
        while let Some(message) = list.next_element()? {
            messages.push(message);
        }
        Ok(Side::Messages(messages))
    }
}

/// Reads all records of a text, each with its place; the path is for errors.
pub fn parse(text: &str, path: &Path) -> Result<Vec<(Place, Record)>, ModelError> {
    let text = &without_non_finite(text);
    let fail = |at: usize, message: &str| Place::of(text, at).error(path, message);
    let mut records = Vec::new();
    let mut place = Place::START;
    let mut placed = 0;
    let mut at = skip_space(text, 0);
    let list = text[at..].starts_with('[');
    if list {
        at = skip_space(text, at + 1);
    }
    while at < text.len() && !(list && text[at..].starts_with(']')) {
        if !text[at..].starts_with('{') {
            let message = format!("expected an object with {EXPECTED}");
            return Err(fail(at, &message));
        }
        let mut stream = serde_json::Deserializer::from_str(&text[at..]).into_iter::<Record>();
        let record = match stream.next() {
            Some(Ok(record)) => record,
            Some(Err(error)) => return Err(json_error(text, at, path, &error)),
            None => break,
        };
        place = place.after(&text[placed..at]);
        placed = at;
        records.push((place, record));
        at = skip_space(text, at + stream.byte_offset());
        if list {
            at = match text[at..].chars().next() {
                Some(',') => skip_space(text, at + 1),
                Some(']') => at,
                _ => return Err(fail(at, "expected `,` or `]`")),
            };
        }
    }
    if list {
        let end = skip_space(text, at + 1);
        if at >= text.len() || end < text.len() {
            let message = "expected one list, and nothing behind it";
            return Err(fail(end.min(text.len()), message));
        }
    }
    Ok(records)
}

/// Python writes `NaN` and `Infinity`, which is what tables have where a value is missing. JSON has
/// `null` for that.
fn without_non_finite(text: &str) -> Cow<'_, str> {
    const WORDS: [&str; 3] = ["NaN", "Infinity", "-Infinity"];
    if !WORDS.iter().any(|word| text.contains(word)) {
        return text.into();
    }
    // A string, to its end or to that of the file, or one of the words outside of any.
    let pattern = r#"(?s)"(?:\\.|[^"\\])*"?|NaN|-?Infinity"#;
    let tokens = Regex::new(pattern).expect("a regular expression");
    let as_json = |token: &Captures<'_>| match &token[0] {
        string if string.starts_with('"') => string.to_string(),
        _ => "null".into(),
    };
    tokens.replace_all(text, as_json)
}

/// The next byte that is not white space. Files put together with `cat` have byte order marks in
/// between.
fn skip_space(text: &str, at: usize) -> usize {
    let blank = |character: char| character.is_whitespace() || character == '\u{feff}';
    match text[at.min(text.len())..].find(|character| !blank(character)) {
        Some(next) => at + next,
        None => text.len(),
    }
}

/// An error of the JSON reader, which counts from where its text begins.
fn json_error(text: &str, start: usize, path: &Path, error: &serde_json::Error) -> ModelError {
    let lines = text[start..].split_inclusive('\n');
    let before: usize = lines
        .take(error.line().saturating_sub(1))
        .map(str::len)
        .sum();
    let at = start + before + error.column().saturating_sub(1);
    Place::of(text, at).error(path, without_place(error))
}

/// The message of the JSON reader without its own place, that within its text.
fn without_place(error: &serde_json::Error) -> String {
    let message = error.to_string();
    match message.rsplit_once(" at line ") {
        Some((message, _)) => message.into(),
        None => message,
    }
}

impl<'de> Deserialize<'de> for Record {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RecordVisitor)
    }
}

struct RecordVisitor;

impl<'de> Visitor<'de> for RecordVisitor {
    type Value = Record;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object with {EXPECTED}")
    }

    /// Fields that are `null` count as absent: tables written as JSON have every column in every
    /// line.
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Record, A::Error> {
        let mut text: Option<String> = None;
        let mut messages: Option<Vec<Message>> = None;
        let (mut prompt, mut completion): (Option<Side>, Option<Side>) = (None, None);
        let mut conversation = Conversation::default();
        let mut others = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            match name.as_str() {
                "text" => text = map.next_value()?,
                "messages" => messages = map.next_value()?,
                "prompt" => prompt = map.next_value()?,
                "completion" => completion = map.next_value()?,
                "tools" => conversation.tools = objects(&name, map.next_value()?)?,
                "documents" => conversation.documents = objects(&name, map.next_value()?)?,
                "chat_template_kwargs" => {
                    conversation.variables = variables(map.next_value()?)?;
                }
                _ => {
                    map.next_value::<serde::de::IgnoredAny>()?;
                    others.push(name);
                }
            }
        }
        let given = [
            ("text", text.is_some()),
            ("messages", messages.is_some()),
            ("prompt", prompt.is_some()),
            ("completion", completion.is_some()),
        ];
        let given: Vec<&str> = given
            .iter()
            .filter(|(_, is)| *is)
            .map(|(name, _)| *name)
            .collect();
        let fail = |given: &str| Err(A::Error::custom(format!("{given}, expected {EXPECTED}")));
        match (text, messages, prompt, completion) {
            (Some(text), None, None, None) => Ok(Record::Text(text)),
            (None, Some(messages), None, None) => {
                conversation.messages = messages;
                Ok(Record::Conversation(Box::new(conversation)))
            }
            (None, None, Some(prompt), Some(completion)) => {
                of_two_sides(prompt, completion, conversation)
            }
            _ if !given.is_empty() => fail(&format!("`{}` alone of these", given.join("` and `"))),
            _ if others.is_empty() => fail("an object without fields"),
            _ => fail(&format!("only {}", others.join(", "))),
        }
    }
}

fn of_two_sides<E: Error>(
    prompt: Side,
    completion: Side,
    mut conversation: Conversation,
) -> Result<Record, E> {
    match (prompt, completion) {
        (Side::Text(prompt), Side::Text(completion)) => {
            Ok(Record::Completion { prompt, completion })
        }
        (Side::Messages(prompt), Side::Messages(completion)) => {
            let count = prompt.len();
            conversation.messages = prompt.into_iter().chain(completion).collect();
            Ok(Record::Continuation {
                conversation: Box::new(conversation),
                prompt: count,
            })
        }
        (prompt, completion) => Err(E::custom(format!(
            "`prompt` is {} and `completion` {}, expected both in one form",
            prompt.kind(),
            completion.kind()
        ))),
    }
}

/// A list of objects, which may be written as a text of JSON, as TRL's data has it. An empty list
/// counts as absent.
fn objects<E: Error>(name: &str, value: Value) -> Result<Option<Value>, E> {
    let value = match value.as_str() {
        Some(text) => serde_json::from_str(text).map_err(|error| {
            let message = without_place(&error);
            E::custom(format!("`{name}` is a text that is not JSON: {message}"))
        })?,
        None => value,
    };
    let of_objects = |value: &Value| {
        let items = value.try_iter();
        items.is_ok_and(|mut items| items.all(|item| item.kind() == ValueKind::Map))
    };
    match value.kind() {
        ValueKind::None => Ok(None),
        ValueKind::Seq if of_objects(&value) => Ok(value.is_true().then_some(value)),
        kind => Err(E::custom(format!(
            "`{name}` is a {kind}, expected a list of objects"
        ))),
    }
}

fn variables<E: Error>(value: Value) -> Result<Vec<(String, Value)>, E> {
    match value.kind() {
        ValueKind::None => Ok(Vec::new()),
        ValueKind::Map => {
            let names = value.try_iter().map_err(E::custom)?;
            let pair = |name: Value| {
                let field = value.get_item(&name).map_err(E::custom)?;
                Ok((name.to_string(), field))
            };
            names.map(pair).collect()
        }
        kind => Err(E::custom(format!(
            "`chat_template_kwargs` is a {kind}, expected an object"
        ))),
    }
}
