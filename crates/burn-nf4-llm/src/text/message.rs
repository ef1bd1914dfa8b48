//! One turn of a conversation.

use std::fmt;

use minijinja::Value;
use minijinja::value::ValueKind;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

/// One turn: who says what, and all else that its template may want.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// In the order of the file, without those that are `null`: templates handle an absent key.
    fields: Vec<(String, Value)>,
}

/// Names under which templates and data know what a model thought. The first is the usual one.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

impl Message {
    /// A message of plain text.
    pub fn new(role: &str, content: &str) -> Self {
        Self::of(role, content.into())
    }

    /// A message whose content is given in parts.
    pub fn in_parts(role: &str, content: &str) -> Self {
        let part = Value::from_pairs([("type", "text"), ("text", content)]);
        Self::of(role, [part].into_iter().collect())
    }

    fn of(role: &str, content: Value) -> Self {
        Self {
            fields: vec![("role".into(), role.into()), ("content".into(), content)],
        }
    }

    fn get(&self, name: &str) -> Option<&Value> {
        let field = self.fields.iter().find(|(key, _)| key == name);
        field.map(|(_, value)| value)
    }

    fn set(&mut self, name: &str, value: Value) {
        match self.fields.iter_mut().find(|(key, _)| key == name) {
            Some((_, old)) => *old = value,
            None => self.fields.push((name.into(), value)),
        }
    }

    /// Who says it.
    pub fn role(&self) -> &str {
        self.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// Whether the message calls tools.
    pub fn has_tool_calls(&self) -> bool {
        self.get("tool_calls").is_some_and(Value::is_true)
    }

    /// Whether the content is given in parts.
    pub fn has_parts(&self) -> bool {
        self.get("content")
            .is_some_and(|content| content.as_str().is_none())
    }

    /// The message with its parts put together to one text.
    pub fn with_joined_parts(&self) -> Self {
        let mut message = self.clone();
        if self.has_parts() {
            let texts: Vec<String> = self.parts().iter().map(text_of).collect();
            message.set("content", texts.concat().into());
        }
        message
    }

    fn parts(&self) -> Vec<Value> {
        let parts = self
            .get("content")
            .and_then(|content| content.try_iter().ok());
        parts.into_iter().flatten().collect()
    }

    /// Puts a tag behind the text and returns the text, if there is one.
    pub fn tag(&mut self, tag: &str) -> Option<String> {
        if let Some(text) = self
            .get("content")
            .and_then(Value::as_str)
            .map(String::from)
        {
            self.set("content", format!("{text}{tag}").into());
            return Some(text);
        }
        let mut parts = self.parts();
        let last = parts.last_mut()?;
        let text = text_of(last);
        *last = Value::from_pairs([("type", "text".into()), ("text", format!("{text}{tag}"))]);
        self.set("content", parts.into_iter().collect());
        Some(text)
    }

    /// The message as templates see it. What the model thought is there under two names.
    pub fn to_value(&self) -> Value {
        let mut pairs = self.fields.clone();
        if let Some(reasoning) = REASONING.iter().find_map(|name| self.get(name)) {
            let mut message = self.clone();
            if message.get("thinking").is_none() {
                message
                    .fields
                    .insert(0, ("thinking".into(), reasoning.clone()));
            }
            message.set("reasoning_content", reasoning.clone());
            pairs = message.fields;
        }
        Value::from_pairs(pairs)
    }
}

fn text_of(part: &Value) -> String {
    let text = part.get_attr("text").unwrap_or_default();
    text.as_str().unwrap_or_default().into()
}

/// Refuses content that this model cannot take in.
fn check_content(content: &Value) -> Result<(), String> {
    if content.kind() == ValueKind::String {
        return Ok(());
    }
    if content.kind() != ValueKind::Seq {
        return Err(format!(
            "`content` is a {}, expected a text or a list of parts",
            content.kind()
        ));
    }
    let parts = content.try_iter().map_err(|error| error.to_string())?;
    for (index, part) in parts.enumerate() {
        if part.kind() != ValueKind::Map {
            let kind = part.kind();
            return Err(format!("`content[{index}]` is a {kind}, expected a part"));
        }
        let field = |name| part.get_attr(name).unwrap_or_default();
        let (kind, text) = (field("type"), field("text"));
        if !kind.is_undefined() && kind.as_str() != Some("text") {
            return Err(format!(
                "`content[{index}]` is a part of type `{kind}`, this model takes text only"
            ));
        }
        if text.kind() != ValueKind::String {
            return Err(format!("`content[{index}]` has no `text`"));
        }
    }
    Ok(())
}

impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MessageVisitor)
    }
}

struct MessageVisitor;

impl<'de> Visitor<'de> for MessageVisitor {
    type Value = Message;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message, an object with `role` and `content`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Message, A::Error> {
        let mut message = Message { fields: Vec::new() };
        while let Some(name) = map.next_key::<String>()? {
            let value: Value = map.next_value()?;
            if value.is_none() {
                continue;
            }
            match name.as_str() {
                "role" if value.kind() != ValueKind::String => {
                    let kind = value.kind();
                    return Err(A::Error::custom(format!(
                        "`role` is a {kind}, expected a text"
                    )));
                }
                "content" => check_content(&value).map_err(A::Error::custom)?,
                _ => {}
            }
            message.set(&name, value);
        }
        if message.get("role").is_none() {
            return Err(A::Error::custom("the message has no `role`"));
        }
        if !message
            .fields
            .iter()
            .any(|(name, _)| !["role", "name"].contains(&name.as_str()))
        {
            return Err(A::Error::custom(
                "the message has neither `content` nor `tool_calls`",
            ));
        }
        Ok(message)
    }
}
