//! Conversations, and the chat templates that turn them into text.
//!
//! As transformers 5.24.0 finds, chooses and applies templates (`_from_pretrained`,
//! `get_chat_template` and `apply_chat_template` of its tokenizers, `render_jinja_template`).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use chrono::{DateTime, Local};
use minijinja::Value;
use serde_json::Value as Json;

use crate::error::ModelError;
use crate::json::fields::{Fields, spelled};
use crate::text::jinja::Template;
use crate::text::message::Message;
use crate::text::plain_text;

/// The template of a folder that has one template only.
pub const TEMPLATE_FILE: &str = "chat_template.jinja";
/// The templates beside it, each under its name.
pub const TEMPLATE_FOLDER: &str = "additional_chat_templates";
/// Where the processors of older versions kept a template.
pub const OLD_TEMPLATE_FILE: &str = "chat_template.json";

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// Marks the end of the message to be continued, to cut off what the template puts behind it.
const END_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// A conversation, and what else its template is given.
#[derive(Debug, Clone, Default)]
pub struct Conversation {
    /// In their order.
    pub messages: Vec<Message>,
    /// Tools that the model may call, as the template wants them.
    pub tools: Option<Value>,
    /// Documents for the model to use, as the template wants them.
    pub documents: Option<Value>,
    /// Further variables.
    pub variables: Vec<(String, Value)>,
}

/// How the text of a conversation ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Ending {
    /// With its last message.
    Whole,
    /// With what asks for an answer.
    Prompt,
    /// Within its last message, which is to be continued.
    Open,
}

/// The templates of a folder by their names, and the special tokens, which are their variables.
pub struct Chat {
    templates: BTreeMap<String, Result<Template, String>>,
    tokens: Vec<(String, String)>,
    chosen: Option<String>,
    now: fn() -> DateTime<Local>,
}

impl Chat {
    /// Finds the templates of a folder. Those in files of their own have precedence over those in
    /// `tokenizer_config.json`, all of them.
    pub fn from_folder(
        folder: &Path,
        config: &Fields,
        tokens: Vec<(String, String)>,
    ) -> Result<Self, ModelError> {
        let mut sources = from_files(folder)?;
        if sources.is_empty() {
            sources = from_config(config)?;
        }
        let path = folder.join(OLD_TEMPLATE_FILE);
        if sources.is_empty() && path.exists() {
            let source = Fields::read(&path)?.required("chat_template")?;
            sources.insert(DEFAULT.into(), source);
        }
        Ok(Self::new(sources, tokens, Local::now))
    }

    /// Templates from their sources. `now` is the time that they can ask for.
    pub fn new(
        sources: BTreeMap<String, String>,
        tokens: Vec<(String, String)>,
        now: fn() -> DateTime<Local>,
    ) -> Self {
        let compile = |(name, source): (String, String)| (name, Template::new(&source, now));
        Self {
            templates: sources.into_iter().map(compile).collect(),
            tokens,
            chosen: None,
            now,
        }
    }

    /// Chooses a template by its name, or takes another one from a file.
    pub fn choose(&mut self, name: &str) -> Result<(), ModelError> {
        if !self.templates.contains_key(name) {
            if !Path::new(name).is_file() {
                return Err(ModelError::setting(
                    "the chat template",
                    format!("`{name}`, which is no file"),
                    format!("a file, or one that the model has: {}", self.names()),
                ));
            }
            let template = Template::new(&plain_text::read(Path::new(name))?, self.now);
            self.templates.insert(name.into(), template);
        }
        self.chosen = Some(name.into());
        Ok(())
    }

    fn names(&self) -> String {
        let names: Vec<&str> = self.templates.keys().map(String::as_str).collect();
        match names.is_empty() {
            true => "none".into(),
            false => names.join(", "),
        }
    }

    /// The template for a conversation: the one chosen, else the one for tools if there are any,
    /// else the default.
    pub(super) fn template(&self, tools: bool) -> Result<&Template, ModelError> {
        let wanted = match &self.chosen {
            Some(name) => name,
            None if tools && self.templates.contains_key(TOOL_USE) => TOOL_USE,
            None => DEFAULT,
        };
        match self.templates.get(wanted) {
            Some(Ok(template)) => Ok(template),
            Some(Err(message)) => Err(ModelError::Template(message.clone())),
            None if self.templates.is_empty() => Err(ModelError::Template(format!(
                "the model has none, neither in {TEMPLATE_FILE} nor in tokenizer_config.json"
            ))),
            None => Err(ModelError::Template(format!(
                "the model has several and no default, choose one of {}",
                self.names()
            ))),
        }
    }

    /// The text of a conversation.
    pub fn render(
        &self,
        conversation: &Conversation,
        ending: Ending,
    ) -> Result<String, ModelError> {
        if conversation.messages.is_empty() {
            let message = "the conversation has no message";
            return Err(ModelError::Template(message.into()));
        }
        let template = self.template(conversation.tools.is_some())?;
        self.render_first(conversation, conversation.messages.len(), ending, template)
    }

    /// The text of the first messages of a conversation, which may be none.
    pub(super) fn render_first(
        &self,
        conversation: &Conversation,
        count: usize,
        ending: Ending,
        template: &Template,
    ) -> Result<String, ModelError> {
        let failed = ModelError::Template;
        let mut messages = self.shown(conversation, template)?;
        messages.truncate(count);
        let continued = match ending {
            Ending::Open => messages.last_mut().and_then(|last| last.tag(END_TAG)),
            Ending::Whole | Ending::Prompt => None,
        };
        if ending == Ending::Open && continued.is_none() {
            let message = "the last message has no text to be continued";
            return Err(failed(message.into()));
        }
        let text = template
            .render(self.variables(conversation, &messages, ending == Ending::Prompt))
            .map_err(failed)?;
        match continued {
            None => Ok(text),
            Some(continued) => cut(&text, &continued).ok_or_else(|| {
                failed("it changes the last message, which cannot be continued".into())
            }),
        }
    }

    /// The messages as the template takes them.
    pub(super) fn shown(
        &self,
        conversation: &Conversation,
        template: &Template,
    ) -> Result<Vec<Message>, ModelError> {
        let calls = conversation.messages.iter().any(Message::has_tool_calls);
        for (given, word) in [
            (calls, "tool_calls"),
            (conversation.tools.is_some(), "tools"),
            (conversation.documents.is_some(), "documents"),
        ] {
            // The template would leave them out silently.
            if given && !template.mentions(word) {
                let message = format!("the conversation has `{word}`, which it does not show");
                return Err(ModelError::Template(message));
            }
        }
        let messages = &conversation.messages;
        if messages.iter().any(Message::has_parts) && !self.shows_parts(template) {
            return Ok(messages.iter().map(Message::with_joined_parts).collect());
        }
        Ok(messages.clone())
    }

    pub(super) fn variables(
        &self,
        conversation: &Conversation,
        messages: &[Message],
        prompt: bool,
    ) -> Value {
        let messages: Value = messages.iter().map(Message::to_value).collect();
        let none = || Value::from(());
        let own = [
            ("messages", messages),
            ("tools", conversation.tools.clone().unwrap_or_else(none)),
            (
                "documents",
                conversation.documents.clone().unwrap_or_else(none),
            ),
            ("add_generation_prompt", Value::from(prompt)),
        ];
        // Later ones win: a variable of the conversation over a special token of its name.
        let tokens = self
            .tokens
            .iter()
            .map(|(name, token)| (name.as_str(), Value::from(token)));
        let further = conversation.variables.iter();
        let further = further.map(|(name, value)| (name.as_str(), value.clone()));
        Value::from_pairs(tokens.chain(further).chain(own))
    }

    /// What stands behind an answer that is the last message.
    pub fn behind_an_answer(&self) -> Option<String> {
        const ANSWER: &str = "ANSWER_OF_THE_MODEL";
        let conversation = Conversation {
            messages: vec![Message::new("user", "a"), Message::new("assistant", ANSWER)],
            ..Conversation::default()
        };
        let text = self.render(&conversation, Ending::Whole).ok()?;
        let (_, behind) = text.rsplit_once(ANSWER)?;
        Some(behind.into())
    }

    /// Whether a template shows the text of content in parts as it does plain text.
    fn shows_parts(&self, template: &Template) -> bool {
        const TEXT: &str = "a text";
        let render = |message: Message| {
            let variables = self.variables(&Conversation::default(), &[message], false);
            template.render(variables)
        };
        match (
            render(Message::new("user", TEXT)),
            render(Message::in_parts("user", TEXT)),
        ) {
            (Ok(plain), Ok(parts)) => plain == parts,
            _ => false,
        }
    }
}

/// The text up to where the tag stands; without white space before it where the template took some
/// away.
fn cut(text: &str, continued: &str) -> Option<String> {
    if !text.contains(continued.trim()) {
        return None;
    }
    let at = text.rfind(END_TAG.trim())?;
    Some(match text[at..].starts_with(END_TAG) {
        true => text[..at].into(),
        false => text[..at].trim_end().into(),
    })
}

/// The templates that lie in files of their own.
fn from_files(folder: &Path) -> Result<BTreeMap<String, String>, ModelError> {
    let mut sources = BTreeMap::new();
    let path = folder.join(TEMPLATE_FILE);
    if path.exists() {
        sources.insert(DEFAULT.into(), plain_text::read(&path)?);
    }
    let path = folder.join(TEMPLATE_FOLDER);
    if path.is_dir() {
        for entry in fs::read_dir(&path).map_err(ModelError::io(&path))? {
            let path = entry.map_err(ModelError::io(&path))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            if let Some(name) = name.and_then(|name| name.strip_suffix(".jinja")) {
                sources.insert(name.into(), plain_text::read(&path)?);
            }
        }
    }
    Ok(sources)
}

/// The templates of `tokenizer_config.json`: one, a list of named ones, or a map of them.
fn from_config(config: &Fields) -> Result<BTreeMap<String, String>, ModelError> {
    const NAME: &str = "chat_template";
    let mut sources = BTreeMap::new();
    match config.value(NAME) {
        None | Some(Json::Null) => {}
        Some(Json::String(source)) => {
            sources.insert(DEFAULT.into(), source.clone());
        }
        Some(Json::Array(named)) => {
            for entry in named {
                let text = |name| entry.get(name).and_then(Json::as_str).map(String::from);
                let (Some(name), Some(source)) = (text("name"), text("template")) else {
                    let supported = "objects with `name` and `template`";
                    return Err(config.unsupported(NAME, "a list of something else", supported));
                };
                sources.insert(name, source);
            }
        }
        Some(Json::Object(named)) => {
            for (name, source) in named {
                let source = source
                    .as_str()
                    .ok_or_else(|| config.unsupported(NAME, spelled(source), "texts by name"))?;
                sources.insert(name.clone(), source.into());
            }
        }
        Some(other) => {
            return Err(config.unsupported(
                NAME,
                spelled(other),
                "a text, or a list of named texts",
            ));
        }
    }
    Ok(sources)
}
