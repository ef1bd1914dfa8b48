//! Conversations that keep their cache.

use std::fs;

use burn::tensor::Device;
use burn_nf4_llm::generate::{Report, Request, RowEnd, Sampling, Session, generate};
use burn_nf4_llm::model::cache::KvCache;
use burn_nf4_llm::model::{Decoder, DecoderConfig};
use burn_nf4_llm::text::chat::Ending;
use burn_nf4_llm::text::{Conversation, Message, StopStrings, Text};
use rstest::rstest;
use serde_json::{Value, json};

use crate::fixtures::{fixture, floats, max_difference, open, random_model};

fn request(prompt: &[u32]) -> Request {
    Request {
        prompts: vec![prompt.to_vec()],
        max_tokens: 12,
        sampling: Sampling::greedy(),
        eos: Vec::new(),
        capture: true,
        ..Request::default()
    }
}

fn fresh(model: &Decoder, config: &DecoderConfig, request: &Request) -> Report {
    generate(model, config, request, |_, _| Ok(())).unwrap()
}

/// Text for the 256 tokens of the tiny models, with a template that takes thoughts out of earlier turns.
fn text() -> Text {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = fs::read(fixture("tokenizers/bytes.json")).unwrap();
    fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();
    let template = "{% for m in messages %}<{{ m.role[0] }}>{% if loop.last %}{{ m.content }}{% else %}\
                    {{ m.content.split('#')[-1] }}{% endif %}<|im_end|>{% endfor %}\
                    {% if add_generation_prompt %}<a>{% endif %}";
    let config = json!({"eos_token": "</s>", "chat_template": template});
    fs::write(
        folder.path().join("tokenizer_config.json"),
        config.to_string(),
    )
    .unwrap();
    Text::from_folder(folder.path()).unwrap()
}

/// Three turns: as said, and as a template shows them that drops what was thought.
#[rstest]
fn three_turns_are_those_of_fresh_runs(#[values(false, true)] thinks: bool) {
    let (model, config) = open("hf/f32/model", None, &Device::default());
    let text = text();
    let mut session = Session::new(&model, &config);
    let mut conversation = Conversation::default();
    let mut before: Vec<u32> = Vec::new();
    for turn in ["Hello there", "And then?", "Good-bye!"] {
        conversation.messages.push(Message::new("user", turn));
        let prompt = text.encode_chat(&conversation, Ending::Prompt).unwrap();
        let same = before
            .iter()
            .zip(&prompt)
            .take_while(|(a, b)| a == b)
            .count();
        let request = request(&prompt);
        let given = session
            .generate_text(&text, &request, &StopStrings::none(), |_, _| Ok(()))
            .unwrap();
        assert_eq!(given.report.tokens, fresh(&model, &config, &request).tokens);
        assert_eq!(given.report.reused_tokens, same);
        assert_eq!(given.report.prompt_tokens, prompt.len() - same);
        // The last token was not processed.
        before = [prompt.as_slice(), &given.report.tokens[0][..11]].concat();
        assert_eq!(session.tokens(), before);
        let answer = match thinks {
            true => format!("{}#Yes", given.texts[0]),
            false => given.texts[0].clone(),
        };
        conversation
            .messages
            .push(Message::new("assistant", &answer));
    }
    assert!(before.len() > 60);
}

/// Windows, two rotary embeddings, fused projections, layers without rotation.
#[rstest]
fn families_keep_their_cache(
    #[values("gemma2", "gemma3_text", "mistral_window", "qwen3", "phi3", "smollm3")] family: &str,
) {
    let (model, config) = open(
        &format!("families/{family}/model"),
        None,
        &Device::default(),
    );
    let size = config.vocab_size as u32;
    let mut session = Session::new(&model, &config);
    let mut prompt: Vec<u32> = (0..20).map(|i| (i * 37 + 5) % size).collect();
    for turn in 0..3 {
        let request = request(&prompt);
        let given = session.generate(&request, |_, _| Ok(())).unwrap();
        assert_eq!(
            given.tokens,
            fresh(&model, &config, &request).tokens,
            "turn {turn}"
        );
        assert_eq!(given.reused_tokens > 0, turn > 0);
        prompt.extend(&given.tokens[0]);
        prompt.extend([3, 1, 4]);
    }
}

/// What is behind the cut leaves no trace.
#[test]
fn a_cut_cache_has_the_logits_of_a_fresh_one() {
    let (model, config) = open("hf/f32/model", None, &Device::default());
    let device = model.device();
    let ids = |range: std::ops::Range<i64>, factor| {
        let ids: Vec<i64> = range.map(|i| (i * factor) % 256).collect();
        let shape = [1, ids.len()];
        burn::tensor::Tensor::from_data(burn::tensor::TensorData::new(ids, shape), &device)
    };
    let mut rope = model.rope_tables(&config);
    let mut cache = KvCache::new(config.layers.len(), vec![0]);
    // Beyond a step of the cache's growth.
    model.next_logits(ids(0..300, 7), &mut rope, &mut cache);
    cache.truncate(20);
    assert_eq!(cache.len(), 20);
    let ours = floats(model.next_logits(ids(20..33, 11), &mut rope, &mut cache));
    let mut whole = KvCache::new(config.layers.len(), vec![0]);
    model.next_logits(ids(0..20, 7), &mut rope, &mut whole);
    let theirs = floats(model.next_logits(ids(20..33, 11), &mut rope, &mut whole));
    assert_eq!(max_difference(&ours, &theirs), 0.0);
    cache.truncate(100);
    assert_eq!(cache.len(), 33);
}

/// Keys of other angles are not kept: dynamic scaling within and beyond the positions, and LongRoPE.
#[rstest]
#[case::dynamic(json!({"rope_type": "dynamic", "factor": 2.0}), "llama", 16)]
#[case::longrope(
    json!({"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3],
           "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 16}),
    "phi3", 64
)]
fn angles_that_change_are_computed_again(
    #[case] rope: Value,
    #[case] family: &str,
    #[case] positions: usize,
) {
    let mut rope = rope;
    rope["rope_theta"] = json!(10000.0);
    let config = json!({
        "model_type": family, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": positions, "original_max_position_embeddings": 16,
        "rope_parameters": rope, "torch_dtype": "float32", "pad_token_id": 0,
    });
    let path = std::path::Path::new("config.json");
    let config = DecoderConfig::from_json(config.to_string().as_bytes(), path).unwrap();
    let model = random_model(&config, &Device::default());
    let mut session = Session::new(&model, &config);
    let all: Vec<u32> = (0..40).map(|i| (i * 29 + 3) % 64).collect();
    for (length, reuses) in [(4, false), (12, true), (30, false), (8, false), (30, false)] {
        let request = Request {
            max_tokens: if length == 4 { 3 } else { 8 },
            ..request(&all[..length])
        };
        let given = session.generate(&request, |_, _| Ok(())).unwrap();
        assert_eq!(
            given.tokens,
            fresh(&model, &config, &request).tokens,
            "{length}"
        );
        assert_eq!(given.reused_tokens > 0, reuses, "{length}");
    }
}

/// What was processed of a prompt that is cancelled is not processed again, nor is its answer.
#[test]
fn a_session_keeps_what_was_generated_before_it_was_cancelled() {
    let (model, config) = open("hf/f32/model", None, &Device::default());
    let mut session = Session::new(&model, &config);
    let mut prompt: Vec<u32> = (20..30).collect();
    let cancelled = request(&prompt);
    let mut seen = 0;
    let given = session.generate(&cancelled, |_, _| {
        seen += 1;
        if seen == 4 {
            cancelled.cancel.cancel();
        }
        Ok(())
    });
    let given = given.unwrap();
    assert_eq!(given.ends, [RowEnd::Cancelled]);
    assert_eq!(
        given.tokens[0],
        fresh(&model, &config, &request(&prompt)).tokens[0][..4]
    );
    prompt.extend(&given.tokens[0]);
    prompt.extend([3, 1]);
    let next = request(&prompt);
    let given = session.generate(&next, |_, _| Ok(())).unwrap();
    assert_eq!(given.tokens, fresh(&model, &config, &next).tokens);
    // The last token that was chosen was not processed.
    assert_eq!(given.reused_tokens, 13);
}

#[test]
fn a_session_is_of_one_text_and_forgets_after_an_error() {
    let (model, config) = open("hf/f32/model", None, &Device::default());
    let mut session = Session::new(&model, &config);
    let two = Request {
        prompts: vec![vec![1], vec![2]],
        ..request(&[])
    };
    let error = session
        .generate(&two, |_, _| Ok(()))
        .unwrap_err()
        .to_string();
    assert!(error.contains("prompts of a session is 2"), "{error}");
    let request = request(&[1, 2, 3]);
    let failed = session.generate(&request, |_, _| match true {
        true => Err(burn_nf4_llm::ModelError::Tokenizer("no".into())),
        false => Ok(()),
    });
    assert!(failed.is_err() && session.tokens().is_empty());
    let given = session.generate(&request, |_, _| Ok(())).unwrap();
    assert_eq!(given.tokens, fresh(&model, &config, &request).tokens);
    // The same prompt again: its last token is processed for the logits.
    let again = session.generate(&request, |_, _| Ok(())).unwrap();
    assert_eq!((again.reused_tokens, again.prompt_tokens), (2, 1));
    assert_eq!(again.tokens, given.tokens);
}
