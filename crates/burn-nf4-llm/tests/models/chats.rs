//! Chat templates against transformers' renderings, and where they are found.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn_nf4_llm::json::fields::Fields;
use burn_nf4_llm::text::chat::{Chat, Conversation, Ending};
use burn_nf4_llm::text::message::Message;
use chrono::{DateTime, Local, TimeZone};
use minijinja::Value;
use rstest::rstest;
use serde::Deserialize;

use crate::fixtures::fixture;

/// The time that `make_chat.py` tells the templates.
fn now() -> DateTime<Local> {
    Local.with_ymd_and_hms(2025, 11, 25, 9, 5, 7).unwrap()
}

fn chat(templates: &[(&str, &str)]) -> Chat {
    let own = |(name, source): &(&str, &str)| (name.to_string(), source.to_string());
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    let tokens = tokens.map(|(name, token)| (name.into(), token.into()));
    Chat::new(templates.iter().map(own).collect(), tokens.into(), now)
}

#[derive(Deserialize)]
struct Rendering {
    template: String,
    messages: Vec<Message>,
    ending: String,
    tools: Option<Value>,
    documents: Option<Value>,
    variables: BTreeMap<String, Value>,
    text: Option<String>,
    error: Option<String>,
}

#[test]
fn templates_render_as_in_transformers() {
    let folder = fixture("chat");
    let text = fs::read(folder.join("renderings.json")).unwrap();
    let cases: Vec<Rendering> = serde_json::from_slice(&text).unwrap();
    assert!(cases.len() > 60);
    let mut wrong = Vec::new();
    for (index, case) in cases.into_iter().enumerate() {
        let name = format!("{index}: {} {}", case.template, case.ending);
        let source = fs::read_to_string(folder.join(format!("{}.jinja", case.template))).unwrap();
        let conversation = Conversation {
            messages: case.messages,
            tools: case.tools,
            documents: case.documents,
            variables: case.variables.into_iter().collect(),
        };
        let ending = match case.ending.as_str() {
            "prompt" => Ending::Prompt,
            "open" => Ending::Open,
            _ => Ending::Whole,
        };
        let given = chat(&[("default", &source)]).render(&conversation, ending);
        match (given, case.text, case.error) {
            (Ok(given), Some(text), _) if given == text => {}
            // Their own exceptions, word for word; transformers' words differ from ours.
            (Err(given), None, Some(error)) => {
                let own = given.to_string().contains(&error);
                assert!(
                    own || error.contains("continue_final_message"),
                    "{name}: {given}"
                );
            }
            (given, text, error) => {
                wrong.push(format!("{name}\n  {given:?}\n  {text:?} {error:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[derive(Deserialize)]
struct Expressions {
    messages: Vec<Message>,
    cases: Vec<Expression>,
}

#[derive(Deserialize)]
struct Expression {
    template: String,
    text: Option<String>,
}

/// What templates consist of, each construct for itself.
#[test]
fn expressions_render_as_in_transformers() {
    let text = fs::read(fixture("chat/expressions.json")).unwrap();
    let Expressions { messages, cases } = serde_json::from_slice(&text).unwrap();
    let conversation = Conversation {
        messages,
        ..Conversation::default()
    };
    let mut wrong = Vec::new();
    for Expression { template, text } in cases {
        let given = chat(&[("default", &template)]).render(&conversation, Ending::Whole);
        if given.as_ref().ok() != text.as_ref() {
            wrong.push(format!("{template}\n  {given:?}\n  {text:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn user() -> Conversation {
    Conversation {
        messages: vec![Message::new("user", "Hi")],
        ..Conversation::default()
    }
}

fn with_tools() -> Conversation {
    let tool = Value::from_pairs([("name", "f")]);
    Conversation {
        tools: Some([tool].into_iter().collect()),
        ..user()
    }
}

/// The files of a folder, and the text of a conversation without and with tools; an error is said
/// by a word of it.
#[rstest]
#[case::config(&[("tokenizer_config.json", r#"{"chat_template": "config"}"#)], "config", "show")]
#[case::file(&[("chat_template.jinja", "file")], "file", "show")]
#[case::file_wins(
    &[("tokenizer_config.json", r#"{"chat_template": "config"}"#), ("chat_template.jinja", "file")],
    "file", "show"
)]
#[case::old_file(&[("chat_template.json", r#"{"chat_template": "old"}"#)], "old", "show")]
#[case::config_before_old_file(
    &[("tokenizer_config.json", r#"{"chat_template": "config"}"#),
      ("chat_template.json", r#"{"chat_template": "old"}"#)],
    "config", "show"
)]
#[case::file_before_old_file(
    &[("chat_template.jinja", "file"), ("chat_template.json", r#"{"chat_template": "old"}"#)],
    "file", "show"
)]
#[case::named(
    &[("tokenizer_config.json", r#"{"chat_template": [
        {"name": "tool_use", "template": "{% if tools %}T{% endif %}"},
        {"name": "default", "template": "D"}, {"name": "rag", "template": "R"}]}"#)],
    "D", "T"
)]
#[case::named_without_tools(
    &[("tokenizer_config.json", r#"{"chat_template": [
        {"name": "default", "template": "D{{ tools | length if tools }}"}]}"#)],
    "D", "D1"
)]
#[case::named_by_an_object(
    &[("tokenizer_config.json", r#"{"chat_template": {"default": "D", "tool_use": "T{{ tools }}"}}"#)],
    "D", "T[{'name': 'f'}]"
)]
#[case::no_default(
    &[("tokenizer_config.json", r#"{"chat_template": [{"name": "rag", "template": "R"}]}"#)],
    "choose one of rag", "choose one of rag"
)]
#[case::named_files(
    &[("chat_template.jinja", "D"), ("additional_chat_templates/tool_use.jinja", "T {{ tools[0].name }}"),
      ("additional_chat_templates/README.md", "no template")],
    "D", "T f"
)]
#[case::named_files_alone(
    &[("additional_chat_templates/rag.jinja", "R"),
      ("tokenizer_config.json", r#"{"chat_template": "config"}"#)],
    "choose one of rag", "choose one of rag"
)]
#[case::last_of_a_name(
    &[("tokenizer_config.json", r#"{"chat_template": [
        {"name": "default", "template": "1"}, {"name": "default", "template": "2"}]}"#)],
    "2", "show"
)]
#[case::null(&[("tokenizer_config.json", r#"{"chat_template": null}"#)], "has none", "has none")]
#[case::nothing(&[], "has none", "has none")]
#[case::empty(&[("chat_template.jinja", "")], "", "show")]
#[case::line_breaks_of_windows(
    &[("chat_template.jinja", "{% if true %}\r\na\r\n{% endif %}\r\nb\r\n")], "a\nb", "show"
)]
#[case::byte_order_mark(&[("chat_template.jinja", "\u{feff}file")], "file", "show")]
#[case::broken(&[("chat_template.jinja", "{% for %}")], "line 1 of the template", "line 1")]
#[case::generation_tags(
    &[("chat_template.jinja", "{%- generation -%}\n a {%- endgeneration %}\n{% generation %}\nb\n{% endgeneration %}\n")],
    "ab\n", "show"
)]
fn a_template_is_taken_from_where_transformers_finds_it(
    #[case] files: &[(&str, &str)],
    #[case] without: &str,
    #[case] with: &str,
) {
    let folder = tempfile::tempdir().unwrap();
    let chat = folder_chat(folder.path(), files).unwrap();
    for (conversation, expected) in [(user(), without), (with_tools(), with)] {
        match chat.render(&conversation, Ending::Whole) {
            Ok(text) => assert_eq!(text, expected),
            Err(error) => assert!(error.to_string().contains(expected), "{error}"),
        }
    }
}

fn folder_chat(
    folder: &Path,
    files: &[(&str, &str)],
) -> Result<Chat, burn_nf4_llm::error::ModelError> {
    let mut config = "{}";
    for (name, content) in files {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
        if *name == "tokenizer_config.json" {
            config = content;
        }
    }
    let path = folder.join("tokenizer_config.json");
    Chat::from_folder(
        folder,
        &Fields::parse(config.as_bytes(), &path)?,
        Vec::new(),
    )
}

#[rstest]
#[case::number(r#"{"chat_template": 5}"#)]
#[case::list_of_texts(r#"{"chat_template": ["a"]}"#)]
#[case::no_template(r#"{"chat_template": [{"name": "default"}]}"#)]
#[case::object_of_numbers(r#"{"chat_template": {"default": 1}}"#)]
fn a_template_of_another_form_is_refused(#[case] config: &str) {
    let folder = tempfile::tempdir().unwrap();
    let Err(error) = folder_chat(folder.path(), &[("tokenizer_config.json", config)]) else {
        panic!("read");
    };
    assert!(error.to_string().contains("chat_template"), "{error}");
}

/// It would render, as a text without a variable.
#[rstest]
fn a_git_lfs_pointer_is_no_template(
    #[values(
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
        "chat_template.json"
    )]
    name: &str,
) {
    let folder = tempfile::tempdir().unwrap();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    let Err(error) = folder_chat(folder.path(), &[(name, pointer)]) else {
        panic!("read");
    };
    assert!(error.to_string().contains("git lfs pull"), "{error}");
}

#[test]
fn a_template_can_be_chosen_by_name_or_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("own.jinja");
    fs::write(&path, "own {{ messages[0].content }}").unwrap();
    let mut chat = chat(&[("default", "D"), ("rag", "R")]);
    let text = |chat: &Chat| chat.render(&user(), Ending::Whole).unwrap();
    assert_eq!(text(&chat), "D");
    chat.choose("rag").unwrap();
    assert_eq!(text(&chat), "R");
    chat.choose(path.to_str().unwrap()).unwrap();
    assert_eq!(text(&chat), "own Hi");
    let error = chat.choose("tool_use").unwrap_err().to_string();
    assert!(
        error.contains("default, ") && error.contains("rag"),
        "{error}"
    );
}

/// What a template would leave out without a word.
#[rstest]
#[case::calls(
    r#"[{"role": "assistant", "tool_calls": [{"id": "1"}]}]"#,
    "tool_calls"
)]
#[case::none("[]", "no message")]
fn what_a_template_cannot_show_is_refused(#[case] messages: &str, #[case] word: &str) {
    let conversation = Conversation {
        messages: serde_json::from_str(messages).unwrap(),
        ..Conversation::default()
    };
    let chat = chat(&[(
        "default",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    )]);
    let error = chat
        .render(&conversation, Ending::Whole)
        .unwrap_err()
        .to_string();
    assert!(error.contains(word), "{error}");
}

/// Templates of text put texts together, those of other media go through the parts.
#[rstest]
#[case::of_text(
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}",
    "user: ab"
)]
#[case::of_lists("{% for m in messages %}{{ m.content }}{% endfor %}", "ab")]
#[case::of_parts(
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}\
     {% for part in m.content %}{{ part.text }}{% if not loop.last %}+{% endif %}{% endfor %}\
     {% endif %}{% endfor %}",
    "a+b"
)]
fn content_in_parts_is_shown_as_text(#[case] template: &str, #[case] expected: &str) {
    let messages =
        r#"[{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]"#;
    let conversation = Conversation {
        messages: serde_json::from_str(messages).unwrap(),
        ..Conversation::default()
    };
    let text = chat(&[("default", template)]).render(&conversation, Ending::Whole);
    assert_eq!(text.unwrap(), expected);
}

/// `json.dumps` of Python 3.11.
#[rstest]
#[case(
    "{'b': 1, 'a': [1.0, 1e16, 1.5e-5]} | tojson",
    r#"{"b": 1, "a": [1.0, 1e+16, 1.5e-05]}"#
)]
#[case("{'b': 1, 'a': 2} | tojson(sort_keys=true)", r#"{"a": 2, "b": 1}"#)]
#[case("[1, [], {}] | tojson(indent=2)", "[\n  1,\n  [],\n  {}\n]")]
#[case("[1, 2] | tojson(indent='\t')", "[\n\t1,\n\t2\n]")]
#[case("{'a': [1, 2]} | tojson(separators=(',', ':'))", r#"{"a":[1,2]}"#)]
#[case("'é\\n\\x7f<>&\\'😀' | tojson", "\"é\\n\u{7f}<>&'😀\"")]
#[case("'é😀' | tojson(ensure_ascii=true)", r#""\u00e9\ud83d\ude00""#)]
#[case("'é' | tojson(true)", r#""\u00e9""#)]
#[case(
    "{1: true, none: false, true: none} | tojson",
    r#"{"1": null, "null": false}"#
)]
#[case("strftime_now('%A %-d %B %Y %H:%M')", "Tuesday 25 November 2025 09:05")]
#[case("bos_token ~ eos_token ~ pad_token", "<s></s>")]
fn expressions_are_those_of_python(#[case] expression: &str, #[case] expected: &str) {
    let template = format!("{{{{ {expression} }}}}");
    let text = chat(&[("default", &template)]).render(&user(), Ending::Whole);
    assert_eq!(text.unwrap(), expected);
}

#[rstest]
#[case("{{ raise_exception('no ' ~ messages[0].role) }}", "no user")]
#[case("{{ 'a' + messages[0].missing }}", "line 1")]
#[case("{{ missing.field }}", "line 1")]
#[case("{{ strftime_now('%Q') }}", "%Q")]
#[case("{{ messages | tojson(indent=[]) }}", "indent")]
#[case("{{ messages | tojson(indent=10001) }}", "10000")]
#[case("{{ messages | tojson(indent=9223372036854775807) }}", "10000")]
#[case("{{ missing | tojson }}", "undefined")]
fn a_failing_template_says_why(#[case] template: &str, #[case] word: &str) {
    let error = chat(&[("default", template)])
        .render(&user(), Ending::Whole)
        .unwrap_err()
        .to_string();
    assert!(error.contains(word), "{error}");
}
