//! Templates in the environment that transformers runs them in (`_cached_compile_jinja_template`
//! of 5.24.0).

use std::fmt::Write;
use std::ops::Range;

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

/// The name of the template that puts marks around what the assistant says, if it says what that is.
const MARKED: &str = "marked_chat_template";

/// The marks: code points that are no characters, which no text has.
const MARKS: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];

/// A template, ready to be filled in.
#[derive(Debug, Clone)]
pub struct Template {
    environment: Environment<'static>,
    source: String,
    marks_answers: bool,
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
        environment.add_filter("answer_of_assistant", |answer: String| {
            let [start, end] = MARKS;
            format!("{start}{answer}{end}")
        });
        let plain = with_generation_as(&source, ["with", "endwith"]);
        let marks_answers = plain != source;
        let mut templates = vec![(NAME, plain)];
        if marks_answers {
            let marking = [
                "filter answer_of_assistant %}{% with",
                "endwith %}{% endfilter",
            ];
            templates.push((MARKED, with_generation_as(&source, marking)));
        }
        for (name, source) in templates {
            environment
                .add_template_owned(name, source)
                .map_err(|error| describe(&error))?;
        }
        Ok(Self {
            environment,
            source,
            marks_answers,
        })
    }

    /// Whether the template says what the assistant says, with `{% generation %}`.
    pub fn marks_answers(&self) -> bool {
        self.marks_answers
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
        self.render_named(NAME, variables)
    }

    /// As [`render`](Self::render), of a template that [marks answers](Self::marks_answers): the text, and the
    /// bytes of it that are within `{% generation %}`.
    ///
    /// # Errors
    /// Those of [`render`](Self::render), and what is wrong where a text cannot be marked.
    pub fn render_marked(&self, variables: Value) -> Result<(String, Vec<Range<usize>>), String> {
        let text = self.render(variables.clone())?;
        let marked = self.render_named(MARKED, variables)?;
        let mut spans = Vec::new();
        let (mut unmarked, mut start) = (String::new(), None);
        for letter in marked.chars() {
            match (MARKS.iter().position(|&mark| mark == letter), start) {
                (None, _) => unmarked.push(letter),
                (Some(0), None) => start = Some(unmarked.len()),
                (Some(1), Some(from)) => {
                    spans.push(from..unmarked.len());
                    start = None;
                }
                _ => return Err("its `{% generation %}` blocks are nested".into()),
            }
        }
        match unmarked == text && start.is_none() {
            true => Ok((text, spans)),
            false => Err("it changes the text of its `{% generation %}` blocks afterwards".into()),
        }
    }

    fn render_named(&self, name: &str, variables: Value) -> Result<String, String> {
        let template = self.environment.get_template(name);
        template
            .and_then(|template| template.render(variables))
            .map_err(|error| describe(&error))
    }
}

/// `{% generation %}` marks what the assistant says and changes no text. Blocks of a scope of their own
/// stand in its place, so that line breaks around it are treated alike.
fn with_generation_as(source: &str, [start, end]: [&str; 2]) -> String {
    let mut source = source.to_string();
    for (tag, block) in [("generation", start), ("endgeneration", end)] {
        let tags = Regex::new(&format!(r"\{{%([-+]?)\s*{tag}\s*([-+]?)%\}}"));
        let tags = tags.expect("a regular expression");
        let block = format!("{{%$1 {block} $2%}}");
        source = tags.replace_all(&source, block.as_str()).into_owned();
    }
    source
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
