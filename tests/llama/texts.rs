//! Files of training texts.

use std::fs;
use std::path::Path;

use rstest::rstest;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use crate::data::{Batch, Dataset};
use crate::error::ModelError;
use crate::text::{ChatFormat, Message, Text};

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

fn read(name: &str, content: &str) -> Result<Dataset, ModelError> {
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
    assert!(matches!(read("a.csv", "a"), Err(ModelError::Argument(_))));
    assert!(matches!(read("a.txt", "a"), Err(ModelError::Argument(_))));
}

#[test]
fn tokens_outside_of_the_vocabulary_are_refused() {
    let data = read("a.jsonl", "{\"text\": \"abc\"}").unwrap();
    assert!(data.check_vocabulary(257).is_ok());
    assert!(data.check_vocabulary(256).is_err());
}

/// Padding comes last and is not a target.
#[test]
fn padding_is_left_out_of_the_targets() {
    let batch = Batch::new(&[&[1, 2, 3, 4], &[5, 6]]);
    assert_eq!(batch.ids, [1, 2, 3, 4, 5, 6, 0, 0]);
    assert_eq!(batch.targets(), 4);
    assert_eq!(batch.weights(), [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
}

const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

#[test]
fn the_chat_template_of_smollm2_is_applied() {
    let format = ChatFormat::recognise(Some(SMOLLM2)).unwrap();
    let message = |role: &str, content: &str| Message {
        role: role.into(),
        content: content.into(),
    };
    let user = message("user", "Hi");
    assert_eq!(
        format.render(std::slice::from_ref(&user), true),
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging \
         Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    let own = [message("system", "Be brief."), user];
    assert_eq!(
        format.render(&own, false),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    );
}

#[rstest]
#[case::none(None)]
#[case::unknown(Some("{{ messages }}"))]
fn an_unknown_chat_template_is_refused(#[case] template: Option<&str>) {
    assert!(ChatFormat::recognise(template).is_err());
}
