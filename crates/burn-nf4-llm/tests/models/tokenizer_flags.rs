//! Tokenizers under the flags of `tokenizer_config.json`, against transformers.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn_nf4_llm::json::fields::Fields;
use burn_nf4_llm::model::DecoderConfig;
use burn_nf4_llm::text::Text;
use burn_nf4_llm::text::chat::{Conversation, Ending};
use burn_nf4_llm::text::message::Message;
use burn_nf4_llm::text::pipeline::Class;
use burn_nf4_llm::text::special_tokens::SpecialTokens;
use rstest::rstest;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::fixtures::fixture;

#[derive(Deserialize)]
struct Ids {
    texts: Vec<String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    tokenizer: String,
    /// What differs from the tokenizer of the fixture.
    steps: BTreeMap<String, Value>,
    config: Value,
    model_type: String,
    files: BTreeMap<String, Value>,
    ids: Vec<Vec<u32>>,
    chat_ids: Vec<Vec<u32>>,
    named: BTreeMap<String, String>,
}

fn write(folder: &Path, case: &Case) {
    let path = fixture(&format!("tokenizers/{}.json", case.tokenizer));
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    for (name, step) in &case.steps {
        tokenizer[name] = step.clone();
    }
    let mut files = case.files.clone();
    files.insert("tokenizer.json".into(), tokenizer);
    files.insert("tokenizer_config.json".into(), case.config.clone());
    files.insert("config.json".into(), json!({"model_type": case.model_type}));
    for (name, content) in files {
        fs::write(folder.join(name), content.to_string()).unwrap();
    }
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    fs::write(folder.join("chat_template.jinja"), template).unwrap();
}

/// `ids.json` comes from transformers, see `make_tokenizers.py`.
#[test]
fn flags_change_the_ids_as_in_transformers() {
    let text = fs::read(fixture("tokenizers/ids.json")).unwrap();
    let Ids { texts, cases } = serde_json::from_slice(&text).unwrap();
    assert!(cases.len() > 90);
    for case in cases {
        let name = format!("{} {} {:?}", case.tokenizer, case.config, case.steps.keys());
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &case);
        let text = Text::from_folder(folder.path()).unwrap();
        for ((example, ids), chat_ids) in texts.iter().zip(&case.ids).zip(&case.chat_ids) {
            assert_eq!(&text.encode(example).unwrap(), ids, "{name}: {example:?}");
            let conversation = Conversation {
                messages: vec![Message::new("user", example)],
                ..Conversation::default()
            };
            let given = text.encode_chat(&conversation, Ending::Whole).unwrap();
            assert_eq!(&given, chat_ids, "{name}: {example:?}");
        }
        let eos = case.named.get("eos_token");
        let eos = eos.and_then(|eos| text.tokenizer.token_to_id(eos));
        assert_eq!(text.eos, eos, "{name}");
    }
}

/// The variables of a template.
#[test]
fn special_tokens_have_the_names_of_transformers() {
    let text = fs::read(fixture("tokenizers/ids.json")).unwrap();
    let Ids { cases, .. } = serde_json::from_slice(&text).unwrap();
    for case in cases {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &case);
        let path = folder.path().join("tokenizer_config.json");
        let config = Fields::parse(case.config.to_string().as_bytes(), &path).unwrap();
        let class = Class::of(folder.path(), &config).unwrap();
        let defaults = class.default_tokens();
        let tokens = SpecialTokens::from_folder(folder.path(), &config, defaults).unwrap();
        let named: BTreeMap<String, String> = tokens.named.into_iter().collect();
        // Padding in tokenizer.json names a token too; nothing is padded by it here.
        let mut theirs = case.named;
        if case.steps.contains_key("padding") {
            theirs.remove("pad_token");
        }
        assert_eq!(named, theirs, "{}", case.config);
    }
}

#[test]
fn a_folder_without_tokenizer_json_says_what_it_lacks() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tokenizer.model"), "").unwrap();
    let Err(error) = Text::from_folder(folder.path()) else {
        panic!("read");
    };
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
}

#[rstest]
fn a_tokenizer_that_is_none_is_an_error(
    #[values(
        "[]",
        "{}",
        "{\"model\": []}",
        "{\"model\": {\"merges\": 1}, \"pre_tokenizer\": []}",
        "nonsense"
    )]
    content: &str,
    #[values("LlamaTokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast")] class: &str,
) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tokenizer.json"), content).unwrap();
    let config = json!({ "tokenizer_class": class });
    fs::write(
        folder.path().join("tokenizer_config.json"),
        config.to_string(),
    )
    .unwrap();
    assert!(Text::from_folder(folder.path()).is_err());
}

/// The model's, the tokenizer's, and in a chat the special token behind an answer.
#[rstest]
#[case::of_the_model("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", &[7, 1], &[7, 1])]
#[case::of_the_turn("{% for m in messages %}{{ m.content }} <|im_end|>\n{% endfor %}", &[7, 1], &[7, 1, 2])]
#[case::text("{% for m in messages %}{{ m.content }} END<|im_end|>\n{% endfor %}", &[7, 1], &[7, 1])]
#[case::not_shown("no messages", &[7, 1], &[7, 1])]
#[case::no_template("{{ raise_exception('no') }}", &[7, 1], &[7, 1])]
fn all_places_say_what_ends_a_text(
    #[case] template: &str,
    #[case] of_text: &[u32],
    #[case] of_chat: &[u32],
) {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    fs::copy(fixture("tokenizers/bytes.json"), file("tokenizer.json")).unwrap();
    let config = json!({"eos_token": "</s>", "chat_template": template});
    fs::write(file("tokenizer_config.json"), config.to_string()).unwrap();
    let config = json!({"model_type": "llama", "eos_token_id": 7});
    fs::write(file("config.json"), config.to_string()).unwrap();
    let config = DecoderConfig::from_folder(folder.path()).unwrap();
    let text = Text::from_folder(folder.path()).unwrap();
    assert_eq!(text.ends(&config, false), of_text);
    assert_eq!(text.ends(&config, true), of_chat);
}
