//! Text as its tokens come, and stop strings.

use std::collections::BTreeMap;
use std::fs;

use burn::tensor::Device;
use burn_nf4_llm::generate::{Request, Sampling, generate, generate_text};
use burn_nf4_llm::model::{Decoder, DecoderConfig};
use burn_nf4_llm::text::{StopStrings, Text};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rstest::rstest;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::fixtures::{fixture, open};

/// See `make_stops.py`.
#[derive(Deserialize)]
struct Stops {
    tokenizers: BTreeMap<String, Value>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    tokenizer: String,
    stops: Vec<String>,
    ids: Vec<u32>,
    end: Option<usize>,
    text: String,
}

impl Stops {
    fn read() -> Self {
        serde_json::from_slice(&fs::read(fixture("stops/stops.json")).unwrap()).unwrap()
    }

    fn texts(&self) -> BTreeMap<&str, Text> {
        let kinds = self.tokenizers.iter();
        kinds
            .map(|(kind, tokenizer)| (kind.as_str(), text_of(tokenizer, "</s>")))
            .collect()
    }
}

fn text_of(tokenizer: &Value, eos: &str) -> Text {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos});
    for (name, content) in [
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", &config),
    ] {
        fs::write(folder.path().join(name), content.to_string()).unwrap();
    }
    Text::from_folder(folder.path()).unwrap()
}

/// The pieces of a text, and how many tokens it took.
fn streamed(text: &Text, ids: &[u32], stop: &StopStrings) -> (Vec<String>, Option<usize>) {
    let mut stream = text.stream(stop).unwrap();
    let mut pieces = Vec::new();
    let mut end = None;
    for (index, &id) in ids.iter().enumerate() {
        let piece = stream.push(id).unwrap();
        pieces.push(piece.text);
        if piece.stops {
            end = Some(index + 1);
            break;
        }
    }
    pieces.push(stream.finish().unwrap());
    assert_eq!(stream.text(), pieces.concat());
    (pieces, end)
}

#[test]
fn a_text_stops_where_transformers_stops() {
    let stops = Stops::read();
    let texts = stops.texts();
    assert!(stops.cases.len() > 100);
    for case in &stops.cases {
        let text = &texts[case.tokenizer.as_str()];
        let stop = StopStrings::new(case.stops.clone()).unwrap();
        let (pieces, end) = streamed(text, &case.ids, &stop);
        let name = format!("{} {:?} {:?}", case.tokenizer, case.stops, case.text);
        assert_eq!(end, case.end, "{name}");
        // Up to the stop string, of which special tokens show nothing.
        let ours = pieces.concat();
        let Some(behind) = case.text.strip_prefix(&ours) else {
            panic!("{name}: {ours:?}");
        };
        let starts = |stop: &String| behind.starts_with(stop.as_str());
        // The first space is no part of a text of pieces.
        let stripped = |stop: &String| ours.is_empty() && behind.starts_with(stop.trim_start());
        let last = case.ids[end.unwrap_or(case.ids.len()) - 1];
        let special = text.is_special(last) && behind.is_empty();
        let found = case.stops.iter().any(|stop| starts(stop) || stripped(stop));
        assert!(
            end.is_none() && behind.is_empty() || found || special,
            "{name}: {ours:?}"
        );
    }
}

/// Whatever the tokens are: bytes of characters that never end, special ones, ids that no token has.
#[test]
fn pieces_put_together_are_the_whole_text() {
    let stops = Stops::read();
    let none = StopStrings::none();
    // None of them is in any text, but their beginnings are.
    let unmet = ["stop", "é", " ", "s", "\u{fffd}"].map(|start| format!("{start}\u{10ffff}"));
    let unmet = StopStrings::new(unmet).unwrap();
    let mut random = StdRng::seed_from_u64(1);
    for text in stops.texts().values() {
        let size = text.tokenizer.get_vocab_size(true) as u32;
        for round in 0..300 {
            let own = &stops.cases[round % stops.cases.len()].ids;
            let ids: Vec<u32> = (0..30)
                .map(|_| match random.random_range(0..3) {
                    0 => random.random_range(0..size + 2),
                    _ => own[random.random_range(0..own.len())],
                })
                .collect();
            let whole = text.decode(&ids).unwrap();
            for stop in [&none, &unmet] {
                let (pieces, end) = streamed(text, &ids, stop);
                assert_eq!((pieces.concat(), end), (whole.clone(), None), "{ids:?}");
            }
        }
    }
}

/// Nothing waits longer than it must.
#[rstest]
#[case::characters("bytes", "aé😀b", &["a", "", "é", "", "", "", "😀", "b", ""])]
#[case::a_run_of_bytes("pieces", "a€b", &["", "a", "", "", "", "€b", ""])]
fn a_piece_is_of_whole_characters(
    #[case] kind: &str,
    #[case] words: &str,
    #[case] expected: &[&str],
) {
    let stops = Stops::read();
    let text = &stops.texts()[kind];
    let ids = text.encode(words).unwrap();
    assert_eq!(streamed(text, &ids, &StopStrings::none()).0, expected);
}

#[test]
fn what_may_become_a_stop_string_is_held_back() {
    let stops = Stops::read();
    let text = &stops.texts()["bytes"];
    let stop = StopStrings::new(["ab!", "b?"]).unwrap();
    let ids = text.encode("xabcab?z").unwrap();
    let (pieces, end) = streamed(text, &ids, &stop);
    // `ab` may become the first, and then its `b` the second.
    assert_eq!(pieces, ["x", "", "", "abc", "", "", "a", ""]);
    assert_eq!(end, Some(7));
}

#[test]
fn an_empty_stop_string_is_refused() {
    let error = StopStrings::new(["a", ""]).unwrap_err().to_string();
    assert!(error.contains("stop string is empty"), "{error}");
}

/// A tiny model whose vocabulary is the bytes, and a tokenizer for it.
fn model() -> (Decoder, DecoderConfig, Text) {
    let (model, config) = open("hf/f32/model", None, &Device::default());
    let file = fs::read(fixture("tokenizers/bytes.json")).unwrap();
    let text = text_of(&serde_json::from_slice(&file).unwrap(), "</s>");
    (model, config, text)
}

/// Each row of a batch ends at its own stop string, and the others go on.
#[test]
fn rows_stop_by_themselves() {
    let (model, config, text) = model();
    let prompts = ["Once upon", "a", "The end"].map(|prompt| text.encode(prompt).unwrap());
    let request = Request {
        prompts: prompts.into(),
        max_tokens: 24,
        sampling: Sampling {
            temperature: 2.0,
            seed: 5,
            ..Sampling::greedy()
        },
        eos: Vec::new(),
        capture: true,
        ..Request::default()
    };
    let free = generate(&model, &config, &request, |_, _| Ok(())).unwrap();
    let whole: Vec<String> = free
        .tokens
        .iter()
        .map(|row| text.decode(row).unwrap())
        .collect();
    // Two characters of the second row, which are two tokens at least.
    let letters: Vec<char> = whole[1].chars().collect();
    let at = (2..letters.len() - 1)
        .find(|&at| letters[at..at + 2].iter().all(char::is_ascii))
        .unwrap();
    let stop: String = letters[at..at + 2].iter().collect();
    let stops = StopStrings::new([stop.clone()]).unwrap();
    let mut shown = vec![String::new(); 3];
    let given = generate_text(&model, &config, &text, &request, &stops, |row, piece| {
        shown[row] += piece;
        Ok(())
    })
    .unwrap();
    assert_eq!(given.texts, shown);
    for (row, whole) in whole.iter().enumerate() {
        let expected = whole.split(&stop).next().unwrap();
        assert_eq!(given.texts[row], expected);
        // The tokens hold the stop string, as those of transformers do.
        let tokens = &given.report.tokens[row];
        assert_eq!(tokens, &free.tokens[row][..tokens.len()]);
        let stopped = whole.contains(&stop);
        assert_eq!(text.decode(tokens).unwrap().ends_with(&stop), stopped);
    }
    assert!(given.texts[1].len() < whole[1].len());
    assert!(given.report.tokens.iter().any(|row| row.len() == 24));
}
