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
use burn_nf4_llm::train::data::{Batch, Dataset, Example, NO_LABEL, Predict};

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
    Dataset::read(&path, &text(folder.path()), Some(EOS), LENGTH, Predict::All)
}

/// The texts of all examples, in order of their tokens.
fn decoded(data: &Dataset) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = text(folder.path()).tokenizer;
    let examples = data.examples().iter();
    let mut found: Vec<String> = examples
        .map(|example| tokenizer.decode(&example.ids, false).unwrap())
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
    assert_eq!(batch.labels(), [2, 3, 4, -100, 6, -100, -100, -100]);
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
#[case::neither("a.jsonl", r#"{"instruction": "a", "output": "b"}"#, (1, 35), "instruction, output")]
#[case::nothing("a.jsonl", "{}", (1, 2), "without fields")]
#[case::prompt_alone("a.jsonl", r#"{"prompt": "a"}"#, (1, 15), "`prompt` alone")]
#[case::mixed_sides("a.jsonl", r#"{"prompt": "a", "completion": []}"#, (1, 33), "both in one form")]
#[case::side_number("a.jsonl", r#"{"prompt": 1, "completion": "b"}"#, (1, 12), "a text or a list of messages")]
#[case::both("a.jsonl", r#"{"text": "a", "messages": []}"#, (1, 29), "`text` and `messages`")]
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
    let data = Dataset::read(&path, &text, None, 64, Predict::All).unwrap();
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

/// What is predicted of the examples of a file, each example's targets put together.
fn learned(template: &str, line: &str, length: usize) -> Result<Vec<String>, ModelError> {
    let folder = tempfile::tempdir().unwrap();
    text(folder.path());
    fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let text = Text::from_folder(folder.path()).unwrap();
    let path = folder.path().join("a.jsonl");
    fs::write(&path, line).unwrap();
    let data = Dataset::read(&path, &text, Some(EOS), length, Predict::Answers)?;
    let of_example = |example: &Example| {
        let labels = example.labels().filter(|&label| label != NO_LABEL);
        let labels: Vec<u32> = labels.map(|label| label as u32).collect();
        text.tokenizer.decode(&labels, false).unwrap()
    };
    Ok(data.examples().iter().map(of_example).collect())
}

const CHAT_ML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
                       {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Line breaks and modifiers around the tags as templates have them.
const MARKING: &str = "{% for m in messages %}
<|im_start|>{{ m.role }}:
    {%- if m.role == 'assistant' %}
    {%- generation -%}
    {{ m.content }}<|im_end|>
    {%- endgeneration %}
    {%- else %}{{ m.content }}
    {%- endif %}
{% endfor %}";

const TWO_TURNS: &str = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant",
    "content": "é b"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}"#;
const TWO_SIDES: &str = r#"{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content":
    "a"}], "completion": [{"role": "assistant", "content": "b"}]}"#;

/// The forms of TRL, which learns the same of them.
#[rstest]
#[case::answers(CHAT_ML, TWO_TURNS, "é b<|im_end|>\nd<|im_end|>\n")]
#[case::marked(MARKING, TWO_TURNS, "é b<|im_end|>d<|im_end|>")]
#[case::completion(CHAT_ML, TWO_SIDES, "b<|im_end|>\n")]
#[case::text_completion(CHAT_ML, r#"{"prompt": "a b", "completion": " é"}"#, " é</s>")]
#[case::text_without_prompt(CHAT_ML, r#"{"prompt": "", "completion": "abc"}"#, "bc</s>")]
#[case::text(CHAT_ML, r#"{"text": "abc"}"#, "bc</s>")]
#[case::answer_first(
    CHAT_ML,
    r#"{"messages": [{"role": "assistant", "content": "a"}]}"#,
    "a<|im_end|>\n"
)]
fn only_answers_and_completions_are_predicted(
    #[case] template: &str,
    #[case] line: &str,
    #[case] expected: &str,
) {
    assert_eq!(learned(template, line, 200).unwrap(), [expected]);
}

/// The last answer looks different once it is not the last, as with thoughts that are left out.
#[rstest]
#[case::answer_changes(
    "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}",
    TWO_TURNS,
    "message 2 of the assistant"
)]
#[case::other_prompt(
    "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}?{% endif %}",
    TWO_SIDES,
    "where the completion begins"
)]
#[case::changed_behind_the_marks(
    "{% set x %}{% generation %} a {% endgeneration %}{% endset %}{{ x | length }}{{ messages[0].role }}",
    TWO_TURNS,
    "changes the text of its `{% generation %}` blocks"
)]
fn a_template_that_does_not_show_the_answers_is_refused(
    #[case] template: &str,
    #[case] line: &str,
    #[case] word: &str,
) {
    let error = learned(template, line, 200).unwrap_err();
    assert!(
        matches!(&error, ModelError::Data { line: 1, .. }),
        "{error}"
    );
    assert!(error.to_string().contains(word), "{error}");
}

#[test]
fn an_example_without_an_answer_is_left_out_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let text = text(folder.path());
    let path = folder.path().join("a.jsonl");
    let line =
        |role: &str| serde_json::json!({"messages": [{"role": role, "content": "a"}]}).to_string();
    fs::write(&path, [line("user"), line("assistant")].join("\n")).unwrap();
    let read = |length| Dataset::read(&path, &text, None, length, Predict::Answers);
    let data = read(64).unwrap();
    assert_eq!((data.len(), data.left_out, data.is_text), (1, 1, false));
    // Nothing of the answer is left.
    let error = read(11).unwrap_err();
    assert!(error.to_string().contains("2 examples, none"), "{error}");
}

fn examples(lengths: &[u32]) -> Dataset {
    let ids = lengths.iter().map(|&length| (0..length).collect());
    Dataset::new(ids.collect()).unwrap()
}

#[test]
fn packed_rows_hold_every_example_once_and_none_is_seen_by_another() {
    let data = examples(&[6, 3, 5, 4, 2]).pack(10);
    assert_eq!(
        (data.len(), data.rows(), data.steps_per_epoch(1)),
        (5, 2, 2)
    );
    let batches: Vec<Batch> = data.batches(1).collect();
    assert_eq!(batches[0].ids, [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]);
    assert_eq!(batches[0].labels(), [1, 2, 3, 4, 5, -100, 1, 2, 3, -100]);
    assert_eq!((batches[1].targets(), batches[1].tokens()), (7, 10));
    let both: Vec<Batch> = data.batches(2).collect();
    assert_eq!((both.len(), both[0].rows, both[0].length), (1, 1, 20));
    // The order of rows is that of the seed.
    assert_eq!(data.step(0, 1, 2, 3), data.step(0, 1, 2, 3));
    let rows = data.step(0, 1, 2, 3);
    assert_eq!(rows.iter().map(Batch::targets).sum::<usize>(), 15);
}

/// Of the form `[rows, length]` and targets. A row of ten has room for all but one or two of the tokens.
#[rstest]
#[case::full(&[6, 4, 5, 5], 2, &[([1, 20], 16)])]
#[case::nearly_full(&[6, 4, 5, 3], 2, &[([1, 20], 14)])]
#[case::equal_lengths(&[5, 5, 5, 5], 2, &[([1, 20], 16)])]
#[case::one_short_batch(&[6, 4, 5, 5, 3], 2, &[([1, 20], 16), ([1, 3], 2)])]
#[case::nothing_packed(&[9, 8, 9], 1, &[([1, 9], 8), ([1, 9], 8), ([1, 8], 7)])]
#[case::longer_than_its_row(&[12, 6, 4], 1, &[([1, 12], 11), ([1, 10], 8)])]
fn batches_of_packed_rows_are_filled(
    #[case] lengths: &[u32],
    #[case] rows: usize,
    #[case] expected: &[([usize; 2], usize)],
) {
    let data = examples(lengths).pack(10);
    let sizes = data.batches(rows).map(|batch| {
        let filled = batch.filled();
        assert_eq!(filled.tokens(), batch.tokens());
        ([filled.rows, filled.length], filled.targets())
    });
    assert_eq!(sizes.collect::<Vec<_>>(), expected);
}

#[test]
fn examples_of_one_length_are_rows() {
    let data = examples(&[3, 3]);
    let batch = data.batches(2).next().unwrap();
    assert_eq!((batch.rows, batch.length), (2, 3));
    assert_eq!(batch.labels(), [1, 2, -100, 1, 2, -100]);
}

#[test]
fn a_part_for_evaluation_is_drawn_by_the_seed() {
    let data = examples(&[2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
    let lengths = |data: &Dataset| -> Vec<usize> {
        data.examples()
            .iter()
            .map(|example| example.ids.len())
            .collect()
    };
    let (train, eval) = data.clone().split(0.25, 1).unwrap();
    assert_eq!((train.len(), eval.len(), train.rows()), (7, 3, 7));
    let mut all = [lengths(&train), lengths(&eval)].concat();
    all.sort_unstable();
    assert_eq!(all, lengths(&data));
    assert_eq!(data.clone().split(0.25, 1).unwrap().1, eval);
    assert_ne!(data.clone().split(0.25, 2).unwrap().1, eval);
    for fraction in [0.0, -0.5, 1.0, 0.95, f64::NAN] {
        assert!(data.clone().split(fraction, 1).is_err(), "{fraction}");
    }
}

#[test]
fn what_is_predicted_and_how_it_is_packed_tells_datasets_apart() {
    let whole = examples(&[3, 4, 5]);
    let mut partial = whole.examples().to_vec();
    partial[1].predicted[2] = false;
    let partial = Dataset::from_examples(partial).unwrap();
    let packed = whole.clone().pack(9);
    assert_ne!(whole.fingerprint(), partial.fingerprint());
    assert_ne!(whole.fingerprint(), packed.fingerprint());
    assert_eq!(whole.fingerprint(), whole.clone().fingerprint());
}
