//! Templates in the environment that transformers runs them in (`_cached_compile_jinja_template`
//! of 5.24.0).

use std::fmt::Write;

use chrono::{DateTime, Local};
use fancy_regex::Regex;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};
use minijinja_contrib::filters::striptags;
use minijinja_contrib::globals::{cycler, joiner};

use crate::text::methods::method;
use crate::text::plain_text::with_unix_lines;
use crate::text::python::{escape, int, tojson};

/// The name of a template within its environment.
const NAME: &str = "chat_template";

/// A template, ready to be filled in.
#[derive(Debug, Clone)]
pub struct Template {
    environment: Environment<'static>,
    source: String,
}

impl Template {
    /// Compiles a template. `now` is the time that it can ask for.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn new(source: &str, now: fn() -> DateTime<Local>) -> Result<Self, String> {
        // Jinja reads every line break as `\n`.
        let source = with_unix_lines(source);
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| describe(&error))?;
        environment.set_syntax(syntax);
        environment.set_unknown_method_callback(method);
        environment.add_filter("tojson", tojson);
        environment.add_filter("int", int);
        environment.add_filter("escape", escape);
        environment.add_filter("e", escape);
        environment.add_filter("striptags", striptags);
        environment.add_function("cycler", |items: Rest<Value>| cycler(items.0));
        environment.add_function("joiner", joiner);
        // Texts have a length and indices as well.
        environment.add_test("sequence", |value: &Value| {
            matches!(
                value.kind(),
                ValueKind::Seq | ValueKind::String | ValueKind::Map
            )
        });
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", move |format: &str| strftime(now(), format));
        environment
            .add_template_owned(NAME, without_generation(&source))
            .map_err(|error| describe(&error))?;
        Ok(Self {
            environment,
            source,
        })
    }

    /// Whether a word is anywhere in the template.
    pub fn mentions(&self, word: &str) -> bool {
        self.source.contains(word)
    }

    /// Fills in the variables.
    ///
    /// # Errors
    /// What went wrong, in words: those of the template where it raised an exception itself.
    pub fn render(&self, variables: Value) -> Result<String, String> {
        let template = self.environment.get_template(NAME);
        template
            .and_then(|template| template.render(variables))
            .map_err(|error| describe(&error))
    }
}

/// `{% generation %}` marks what the assistant says and changes no text. A block of a scope of its
/// own stands in its place, so that line breaks around it are treated alike.
fn without_generation(source: &str) -> String {
    match Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}") {
        Ok(tags) => tags.replace_all(source, "{%$1 ${2}with $3%}").into_owned(),
        Err(_) => source.into(),
    }
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_string()))
}

/// As of a time that knows no zone and counts microseconds.
fn strftime(now: DateTime<Local>, format: &str) -> Result<String, Error> {
    let mut text = String::new();
    let own = |part: &str| {
        let part = part.replace("%z", "").replace("%Z", "");
        part.replace("%f", "%6f")
    };
    let own: Vec<String> = format.split("%%").map(own).collect();
    let own = own.join("%%");
    write!(text, "{}", now.format(&own)).map_err(|_| {
        let message = format!("strftime_now does not know all of `{format}`");
        Error::new(ErrorKind::InvalidOperation, message)
    })?;
    Ok(text)
}

/// The message of an error and the line that it came from.
fn describe(error: &Error) -> String {
    let message = match error.detail() {
        Some(detail) => detail.to_string(),
        None => error.kind().to_string(),
    };
    match error.line() {
        Some(line) => format!("{message} (line {line} of the template)"),
        None => message,
    }
}
