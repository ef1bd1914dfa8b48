//! Files of training texts.

use std::fs;
use std::path::Path;

use burn_nf4::Nf4Error;
use rstest::rstest;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use burn_nf4_llm::error::ModelError;
use burn_nf4_llm::text::Text;
use burn_nf4_llm::train::data::{Batch, Dataset};

const EOS: u32 = 256;
const LENGTH: usize = 8;

/// A tokenizer with a token for each byte and three special ones, and plain ChatML.
fn text(folder: &Path) -> Text {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let vocabulary: Vocab = alphabet
        .iter()
        .zip(0..)
        .map(|(character, id)| (character.to_string(), id))
        .collect();
    let model = BPE::builder()
        .vocab_and_merges(vocabulary, Vec::new())
        .build()
        .unwrap();
    let mut tokenizer = Tokenizer::new(model);
    let bytes = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(bytes));
    tokenizer.with_decoder(Some(bytes));
    let special = ["</s>", "<|im_start|>", "<|im_end|>"].map(|t| AddedToken::from(t, true));
    tokenizer.add_special_tokens(&special);
    tokenizer
        .save(folder.join("tokenizer.json"), false)
        .unwrap();
    let template = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + \
                    message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if \
                    add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let config = serde_json::json!({ "chat_template": template });
    fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
    Text::from_folder(folder).unwrap()
}

fn read(name: &str, content: impl AsRef<[u8]>) -> Result<Dataset, ModelError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    Dataset::read(&path, &text(folder.path()), Some(EOS), LENGTH)
}

/// The texts of all examples, in order of their tokens.
fn decoded(data: &Dataset) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = text(folder.path()).tokenizer;
    let mut found: Vec<String> = data
        .step(0, data.len(), 1, 0)
        .iter()
        .flat_map(|batch: &Batch| {
            let rows = batch.ids.chunks(batch.length).zip(&batch.lengths);
            rows.map(|(row, &length)| row[..length].iter().map(|&id| id as u32).collect())
                .collect::<Vec<Vec<u32>>>()
        })
        .map(|ids| tokenizer.decode(&ids, false).unwrap())
        .collect();
    found.sort_unstable();
    found
}

#[test]
fn a_text_file_is_cut_into_pieces_without_loss() {
    let data = read("a.txt", "Once upon a time…").unwrap();
    assert_eq!(data.len(), 3);
    let folder = tempfile::tempdir().unwrap();
    let bytes = text(folder.path()).encode("Once upon a time…").unwrap();
    assert_eq!(bytes.len(), 19, "the ellipsis has three bytes");
    assert!(decoded(&data).contains(&"Once upo".to_string()));
}

#[test]
fn lines_of_text_end_with_eos_and_are_cut_at_the_length() {
    let data = read(
        "a.jsonl",
        "{\"text\": \"abc\"}\n\n{\"text\": \"abcdefghij\"}\n",
    )
    .unwrap();
    assert_eq!(decoded(&data), ["abc</s>", "abcdefgh"]);
}

#[test]
fn conversations_go_through_the_chat_template() {
    let line = r#"{"messages": [{"role": "u", "content": "a"}, {"role": "b", "content": "c"}]}"#;
    let data = read("a.jsonl", line).unwrap();
    assert_eq!(
        decoded(&data),
        ["<|im_start|>u\na<|im_end|>\n<|im_start|>b"]
    );
}

#[test]
fn a_bad_line_is_named() {
    let error = read("a.jsonl", "{\"text\": \"abc\"}\n{\"txt\": 1}\n").unwrap_err();
    assert!(error.to_string().contains("line 2"), "{error}");
    let refused = |name, field: &str| match read(name, "a") {
        Err(ModelError::Setting { name, .. }) => assert_eq!(name, field),
        other => panic!("{other:?}"),
    };
    refused("a.csv", "the data");
    refused("a.txt", "the data");
}

/// Git LFS leaves a text in the place of a file that it has not fetched: nothing to train on.
#[rstest]
fn a_git_lfs_pointer_is_no_data(#[values("a.txt", "a.jsonl", "a.json")] name: &str) {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    let error = read(name, pointer).unwrap_err();
    assert!(
        matches!(&error, ModelError::Nf4(Nf4Error::GitLfsPointer { path }) if path.ends_with(name)),
        "{error}"
    );
}

#[test]
fn tokens_outside_of_the_vocabulary_are_refused() {
    let data = read("a.jsonl", "{\"text\": \"abc\"}").unwrap();
    assert!(data.check_vocabulary(257).is_ok());
    match data.check_vocabulary(256) {
        Err(ModelError::Nf4(Nf4Error::IdRange { tensor, rows, .. })) => {
            assert_eq!((tensor.as_str(), rows), ("example 0", 256));
        }
        other => panic!("{other:?}"),
    }
}

/// Padding comes last and is not a target.
#[test]
fn padding_is_left_out_of_the_targets() {
    let batch = Batch::new(&[&[1, 2, 3, 4], &[5, 6]]);
    assert_eq!(batch.ids, [1, 2, 3, 4, 5, 6, 0, 0]);
    assert_eq!(batch.targets(), 4);
    assert_eq!(batch.weights(), [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
}

const A: &str = r#"{"text": "abc"}"#;

/// Two examples in every form that people have them in.
#[rstest]
#[case::lines("a.jsonl", &format!("{A}\n{A}\n"))]
#[case::byte_order_mark("a.jsonl", &format!("\u{feff}{A}\n{A}"))]
#[case::byte_order_mark_between("a.jsonl", &format!("\u{feff}{A}\n\u{feff}{A}\n"))]
#[case::windows("a.jsonl", &format!("{A}\r\n\r\n{A}\r\n"))]
#[case::capitals("a.JSONL", &format!("{A}\n{A}\n"))]
#[case::list("a.json", &format!("[{A},\n {A}]\n"))]
#[case::lines_in_json("a.json", &format!("{A}\n{A}\n"))]
#[case::list_in_jsonl("a.jsonl", &format!("[{A}, {A}]"))]
#[case::indented(
    "a.json",
    "[\n  {\n    \"text\": \"abc\"\n  },\n  {\n    \"text\": \"abc\"\n  }\n]\n"
)]
#[case::nulls("a.jsonl", &format!("{{\"messages\": null, \"text\": \"abc\", \"tools\": null}}\n{A}"))]
#[case::other_fields("a.jsonl", &format!("{{\"id\": 7, \"score\": NaN, \"x\": [-Infinity], \"text\": \"abc\"}}\n{A}"))]
fn examples_are_read_in_every_form(#[case] name: &str, #[case] content: &str) {
    let data = read(name, content).unwrap();
    assert_eq!(decoded(&data), ["abc</s>", "abc</s>"]);
}

#[rstest]
#[case::unix("one\ntwo")]
#[case::windows("one\r\ntwo")]
#[case::old_mac("one\rtwo")]
#[case::byte_order_mark("\u{feff}one\ntwo")]
fn text_is_read_as_python_reads_it(#[case] content: &str) {
    assert_eq!(decoded(&read("a.txt", content).unwrap()), ["one\ntwo"]);
}

/// Words of Python in a text stay.
#[test]
fn only_bare_words_are_no_text() {
    let data = read("a.jsonl", r#"{"x": NaN, "text": "\"NaN"}"#).unwrap();
    assert_eq!(decoded(&data), ["\"NaN</s>"]);
}

fn utf_16(text: &str, mark: bool) -> Vec<u8> {
    let units = text.encode_utf16().flat_map(u16::to_le_bytes);
    let mark: &[u8] = if mark { &[0xff, 0xfe] } else { &[] };
    mark.iter().copied().chain(units).collect()
}

/// The place of what was met, and a word about it.
#[rstest]
#[case::syntax("a.jsonl", format!("{A}\n{{\"text\": \"b\",}}"), (2, 14), "trailing comma")]
#[case::cut_off("a.jsonl", format!("{A}\n{{\"text\": \"b"), (2, 11), "EOF")]
#[case::behind_an_object("a.jsonl", format!("{A},\n{A}"), (1, 16), "expected an object")]
#[case::not_an_object("a.jsonl", format!("{A}\n  [1]\n"), (2, 3), "expected an object")]
#[case::no_list_end("a.json", format!("[{A}"), (1, 17), "expected `,` or `]`")]
#[case::two_lists("a.json", format!("[{A}]\n[{A}]"), (2, 1), "nothing behind it")]
#[case::neither("a.jsonl", r#"{"prompt": "a", "completion": "b"}"#, (1, 34), "prompt, completion")]
#[case::both("a.jsonl", r#"{"text": "a", "messages": []}"#, (1, 29), "both")]
#[case::text_number("a.jsonl", r#"{"text": 5}"#, (1, 10), "integer `5`")]
#[case::no_messages("a.jsonl", format!("{A}\n {{\"messages\": []}}"), (2, 2), "no message")]
#[case::message_text("a.jsonl", r#"{"messages": ["a"]}"#, (1, 17), "a message")]
#[case::no_role("a.jsonl", r#"{"messages": [{"content": "a"}]}"#, (1, 30), "no `role`")]
#[case::role_number("a.jsonl", r#"{"messages": [{"role": 1, "content": "a"}]}"#, (1, 24), "`role` is a number")]
#[case::content_number("a.jsonl", r#"{"messages": [{"role": "u", "content": 1}]}"#, (1, 41), "`content` is a number")]
#[case::nothing_said("a.jsonl", r#"{"messages": [{"role": "u", "content": null}]}"#, (1, 44), "neither `content`")]
#[case::image(
    "a.jsonl",
    r#"{"messages": [{"role": "u", "content": [{"type": "image", "url": "x"}]}]}"#,
    (1, 71), "type `image`"
)]
#[case::part_without_text("a.jsonl", r#"{"messages": [{"role": "u", "content": [{}]}]}"#, (1, 44), "no `text`")]
#[case::part_text("a.jsonl", r#"{"messages": [{"role": "u", "content": ["a"]}]}"#, (1, 45), "expected a part")]
#[case::template("a.jsonl", format!("{A}\n{{\"messages\": [{{\"role\": \"u\", \"tool_calls\": [1]}}]}}"), (2, 1), "tool_calls")]
#[case::tools_text("a.jsonl", r#"{"messages": [], "tools": "none"}"#, (1, 33), "`tools` is a text that is not JSON")]
#[case::tools_names("a.jsonl", r#"{"messages": [], "tools": ["f"]}"#, (1, 32), "list of objects")]
#[case::latin("a.jsonl", [b"{\"text\": \"a\"}\n{\"text\": \"\xc3\xa9".as_slice(), b"\xe9\"}"].concat(), (2, 12), "0xe9 is not UTF-8")]
#[case::latin_text("a.txt", b"caf\xe9".to_vec(), (1, 4), "Latin-1")]
#[case::utf_16("a.jsonl", utf_16(A, true), (1, 1), "UTF-16")]
#[case::utf_16_unmarked("a.jsonl", utf_16(A, false), (1, 2), "NUL")]
#[case::utf_16_text("a.txt", utf_16("a", true), (1, 1), "UTF-16")]
#[case::utf_32("a.txt", b"\xff\xfe\0\0a\0\0\0".to_vec(), (1, 1), "UTF-32")]
#[case::nul("a.txt", b"one\nt\0o".to_vec(), (2, 2), "NUL")]
fn what_was_met_is_said_with_its_place(
    #[case] name: &str,
    #[case] content: impl AsRef<[u8]>,
    #[case] place: (usize, usize),
    #[case] word: &str,
) {
    let error = read(name, content).unwrap_err();
    let text = error.to_string();
    let ModelError::Data { line, column, .. } = error else {
        panic!("{error}");
    };
    assert!(text.contains(word), "{text}");
    assert_eq!((line, column), place, "{text}");
}

/// Calls without a text, a name, thoughts, and fields that only a template knows.
#[test]
fn a_template_gets_all_that_a_message_has() {
    let folder = tempfile::tempdir().unwrap();
    text(folder.path());
    let template = "{% for m in messages %}{{ m.name }}{{ m.mood }}{{ m.reasoning_content }}\
                    {% for c in m.tool_calls %}{{ c.id }}{% endfor %}{% endfor %}{{ tools[0].f }}\
                    {{ documents | length }}{{ flag }}";
    fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let text = Text::from_folder(folder.path()).unwrap();
    let path = folder.path().join("a.jsonl");
    let record = r#"{"messages": [{"role": "u", "content": "a", "name": "N", "mood": "M", "thinking": "T"},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "C"}]}],
        "tools": "[{\"f\": \"F\"}]", "documents": [{}, {}], "chat_template_kwargs": {"flag": true}}"#;
    fs::write(&path, record).unwrap();
    let data = Dataset::read(&path, &text, None, 64).unwrap();
    assert_eq!(decoded(&data), ["NMTCF2True"]);
}

#[test]
fn what_is_cut_or_left_out_is_counted() {
    let lines = "{\"text\": \"abcdefghij\"}\n{\"text\": \"\"}\n{\"text\": \"abc\"}\n";
    let data = read("a.jsonl", lines).unwrap();
    assert_eq!(
        (data.len(), data.cut, data.left_out, data.longest()),
        (2, 1, 1, LENGTH)
    );
}
