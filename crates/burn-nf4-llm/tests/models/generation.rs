//! The cache, batches and sampling.

use std::fs;
use std::ops::ControlFlow;

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_nf4::Nf4Error;
use burn_nf4_llm::ModelError;
use burn_nf4_llm::error::MemoryLimit;
use burn_nf4_llm::generate::sample::Sampling;
use burn_nf4_llm::generate::{Request, RowEnd, Session, generate};
use burn_nf4_llm::model::Decoder;
use burn_nf4_llm::model::cache::KvCache;
use burn_nf4_llm::model::config::DecoderConfig;
use rstest::rstest;
use serde_json::{Value, json};

use crate::fixtures::{fixture, floats, io, logits, max_difference, open, random_model};

const GREEDY: Sampling = Sampling::greedy();

fn tokens(ids: &[i64], device: &Device) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::new(ids.to_vec(), [1, ids.len()]), device)
}

fn set_window(model: &mut Decoder, window: Option<usize>) {
    for layer in &mut model.layers {
        layer.self_attn.window = window;
    }
}

/// The logits of the last positions of a text, taken token by token after a prompt.
fn decoded(model: &Decoder, config: &DecoderConfig, ids: &[i64], prompt: usize) -> Vec<f32> {
    let mut rope = model.rope_tables(config);
    let mut cache = KvCache::new(config.layers.len(), vec![0]);
    let device = model.device();
    let mut all = floats(model.next_logits(tokens(&ids[..prompt], &device), &mut rope, &mut cache));
    for id in &ids[prompt..] {
        let next = model.next_logits(tokens(&[*id], &device), &mut rope, &mut cache);
        all.extend(floats(next));
    }
    assert_eq!(cache.len(), ids.len());
    all
}

/// Past a step of the cache's growth too, and within and past a sliding window.
#[rstest]
#[case::short(48, 5, None)]
#[case::grown(270, 250, None)]
#[case::window(48, 5, Some(7))]
fn decoding_with_a_cache_is_a_full_forward(
    #[case] length: usize,
    #[case] prompt: usize,
    #[case] window: Option<usize>,
) {
    let (mut model, config) = open("hf/f32/model", None, &Device::default());
    set_window(&mut model, window);
    let ids: Vec<i64> = (0..length as i64).map(|i| (i * 37 + i * i) % 256).collect();
    let whole = logits(&model, &config, &ids, &[1, length]);
    let ours = decoded(&model, &config, &ids, prompt);
    // The same products, summed in another order for one row than for many.
    let difference = max_difference(&ours, &whole[(prompt - 1) * config.vocab_size..]);
    assert!(difference < 2e-5, "{difference:e}");
}

/// A window hides what lies before it: the first tokens change logits only without one.
#[test]
fn a_sliding_window_hides_what_lies_before_it() {
    let (mut model, config) = open("hf/f32/model", None, &Device::default());
    let last = |model: &Decoder, first: i64| {
        let mut ids: Vec<i64> = (10..40).collect();
        ids[0] = first;
        let logits = logits(model, &config, &ids, &[1, 30]);
        logits[29 * config.vocab_size..].to_vec()
    };
    assert!(max_difference(&last(&model, 1), &last(&model, 2)) > 1e-4);
    // Two layers reach back twice the window.
    set_window(&mut model, Some(10));
    assert_eq!(max_difference(&last(&model, 1), &last(&model, 2)), 0.0);
}

/// Prompts of different length, so that padding would count if anything let it.
#[test]
fn a_penalty_gives_the_text_of_transformers() {
    let path = fixture("families/penalised.json");
    let file: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let rows = |rows: &Value| -> Vec<Vec<u32>> { serde_json::from_value(rows.clone()).unwrap() };
    let cases = file["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 9);
    for case in cases {
        let folder = format!("families/{}/model", case["family"].as_str().unwrap());
        let (model, config) = open(&folder, None, &Device::default());
        let expected = rows(&case["generated"]);
        let sampling = Sampling {
            repetition_penalty: case["penalty"].as_f64().unwrap() as f32,
            ..GREEDY
        };
        let request = Request {
            max_tokens: expected[0].len(),
            ..request(rows(&file["prompts"]), sampling)
        };
        let report = generate(&model, &config, &request, |_, _| Ok(())).unwrap();
        assert_eq!(report.tokens, expected, "{folder} {sampling:?}");
    }
}

/// What a session holds counts too.
#[test]
fn a_penalty_goes_on_over_the_turns_of_a_session() {
    let (model, config) = open("families/qwen3/model", None, &Device::default());
    let sampling = Sampling {
        temperature: 0.7,
        repetition_penalty: 2.0,
        ..GREEDY
    };
    let mut session = Session::new(&model, &config);
    let mut prompt = vec![5, 9, 2, 7, 3];
    for turn in 0..3 {
        let request = request(vec![prompt.clone()], sampling);
        let report = session.generate(&request, |_, _| Ok(())).unwrap();
        assert_eq!(report.reused_tokens > 0, turn > 0);
        let fresh = generate(&model, &config, &request, |_, _| Ok(())).unwrap();
        assert_eq!(report.tokens, fresh.tokens);
        prompt.extend(&report.tokens[0]);
        prompt.push(4);
    }
}

fn request(prompts: Vec<Vec<u32>>, sampling: Sampling) -> Request {
    Request {
        prompts,
        max_tokens: 12,
        sampling,
        eos: Vec::new(),
        capture: true,
        ..Request::default()
    }
}

fn texts(request: &Request) -> Vec<Vec<u32>> {
    let (model, config) = open("hf/f32/model", None, &Device::default());
    let mut streamed = vec![Vec::new(); request.prompts.len()];
    let report = generate(&model, &config, request, |row, id| {
        streamed[row].push(id);
        Ok(())
    })
    .unwrap();
    assert_eq!(report.tokens, streamed);
    report.tokens
}

fn prompts() -> Vec<Vec<u32>> {
    let (ids, _, _) = io("hf/f32/io.safetensors");
    let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
    vec![
        ids[..9].to_vec(),
        ids[10..12].to_vec(),
        ids[20..44].to_vec(),
    ]
}

#[rstest]
#[case::greedy(GREEDY)]
#[case::sampled(Sampling { temperature: 0.8, top_k: 40, top_p: 0.95, seed: 3, ..GREEDY })]
#[case::penalised(Sampling { temperature: 0.8, min_p: 0.05, repetition_penalty: 1.4, seed: 3, ..GREEDY })]
fn a_row_of_a_padded_batch_is_the_row_alone(#[case] sampling: Sampling) {
    let batch = texts(&request(prompts(), sampling));
    for (row, prompt) in prompts().into_iter().enumerate() {
        // A row draws from a generator of its own, seeded by its place.
        let alone = Sampling {
            seed: sampling.seed + row as u64,
            ..sampling
        };
        assert_eq!(texts(&request(vec![prompt], alone))[0], batch[row]);
    }
}

#[test]
fn greedy_text_is_the_argmax_of_the_full_forward() {
    let prompt = prompts().remove(0);
    let text = texts(&request(vec![prompt.clone()], GREEDY)).remove(0);
    let (model, config) = open("hf/f32/model", None, &Device::default());
    let ids: Vec<i64> = prompt
        .iter()
        .chain(&text)
        .map(|&id| i64::from(id))
        .collect();
    let all = logits(&model, &config, &ids, &[1, ids.len()]);
    for (step, &id) in text.iter().enumerate() {
        let at = prompt.len() - 1 + step;
        let row = &all[at * config.vocab_size..(at + 1) * config.vocab_size];
        let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
        assert_eq!(best, Some(id as usize));
    }
}

#[test]
fn the_same_seed_draws_the_same_text_and_another_seed_another() {
    let draw = |seed| {
        let sampling = Sampling {
            temperature: 1.0,
            seed,
            ..GREEDY
        };
        texts(&request(prompts(), sampling))
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
}

#[rstest]
#[case::one_candidate(Sampling { temperature: 5.0, top_k: 1, seed: 1, ..GREEDY })]
#[case::tiny_nucleus(Sampling { temperature: 0.5, top_p: 1e-6, seed: 1, ..GREEDY })]
#[case::cold(Sampling { temperature: 1e-4, seed: 1, ..GREEDY })]
#[case::likeliest(Sampling { temperature: 0.5, min_p: 1.0, seed: 1, ..GREEDY })]
fn sampling_narrowed_to_one_token_is_greedy(#[case] sampling: Sampling) {
    let greedy = texts(&request(prompts(), GREEDY));
    assert_eq!(texts(&request(prompts(), sampling)), greedy);
}

#[test]
fn a_row_stops_at_its_end_and_the_others_go_on() {
    let free = texts(&request(prompts(), GREEDY));
    let eos = free[0][4];
    let mut request = request(prompts(), GREEDY);
    request.eos = vec![eos];
    for (stopped, free) in texts(&request).iter().zip(&free) {
        let end = free.iter().position(|&id| id == eos).unwrap_or(free.len());
        assert_eq!(stopped, &free[..end]);
    }
}

/// Nothing is allocated or counted ahead.
#[test]
fn a_text_of_any_length_ends_at_its_end() {
    let free = texts(&request(prompts(), GREEDY));
    let request = Request {
        max_tokens: usize::MAX,
        eos: vec![free[0][4]],
        ..request(vec![prompts().remove(0)], GREEDY)
    };
    let end = free[0].iter().position(|id| request.eos.contains(id));
    assert_eq!(texts(&request)[0], free[0][..end.unwrap()]);
}

fn sampling(temperature: f32, top_k: usize, top_p: f32) -> Sampling {
    Sampling {
        temperature,
        top_k,
        top_p,
        seed: 1,
        ..GREEDY
    }
}

#[rstest]
#[case::nan(sampling(f32::NAN, 0, 1.0), "`temperature` is NaN")]
#[case::negative(sampling(-1.0, 0, 1.0), "`temperature` is -1")]
#[case::infinite(sampling(f32::INFINITY, 0, 1.0), "`temperature` is inf")]
#[case::nucleus_empty(sampling(1.0, 0, 0.0), "`top_p` is 0")]
#[case::nucleus_negative(sampling(1.0, 0, -0.5), "`top_p` is -0.5")]
#[case::nucleus_large(sampling(1.0, 0, 1.5), "`top_p` is 1.5")]
#[case::nucleus_nan(sampling(1.0, 0, f32::NAN), "`top_p` is NaN")]
#[case::likely_beyond(Sampling { min_p: 1.5, ..sampling(1.0, 0, 1.0) }, "`min_p` is 1.5")]
#[case::likely_of_nothing(Sampling { min_p: 0.5, ..GREEDY }, "`temperature` is 0, expected above 0")]
#[case::penalty_zero(Sampling { repetition_penalty: 0.0, ..GREEDY }, "`repetition_penalty` is 0")]
#[case::penalty_nan(Sampling { repetition_penalty: f32::NAN, ..GREEDY }, "`repetition_penalty` is NaN")]
#[case::nucleus_of_nothing(sampling(0.0, 0, 0.9), "`temperature` is 0, expected above 0")]
#[case::candidates_of_nothing(sampling(0.0, 40, 1.0), "`temperature` is 0, expected above 0")]
fn sampling_that_cannot_be_is_refused(#[case] sampling: Sampling, #[case] word: &str) {
    let (model, config) = open("hf/f32/model", None, &Device::default());
    let request = request(prompts(), sampling);
    let error = generate(&model, &config, &request, |_, _| Ok(())).unwrap_err();
    assert!(error.to_string().contains(word), "{error}");
}

#[rstest]
#[case::no_prompts(Vec::new(), 1)]
#[case::an_empty_prompt(vec![vec![1], Vec::new()], 1)]
#[case::no_tokens(vec![vec![1]], 0)]
#[case::another_vocabulary(vec![vec![1, 100_000]], 1)]
fn a_request_for_nothing_is_refused(#[case] prompts: Vec<Vec<u32>>, #[case] max_tokens: usize) {
    let (model, config) = open("hf/f32/model", None, &Device::default());
    let request = Request {
        max_tokens,
        ..request(prompts, GREEDY)
    };
    assert!(generate(&model, &config, &request, |_, _| Ok(())).is_err());
}

/// Dividing by the smallest temperatures makes infinities; the likeliest token is drawn all the
/// same.
#[test]
fn a_tiny_temperature_is_greedy() {
    let greedy = texts(&request(prompts(), GREEDY));
    let tiny = sampling(f32::MIN_POSITIVE, 0, 1.0);
    assert_eq!(texts(&request(prompts(), tiny)), greedy);
}

/// Damaged weights, or a type too small for them, give no text.
#[rstest]
fn logits_that_are_no_numbers_are_refused(#[values(f32::NAN, f32::INFINITY)] weight: f32) {
    let device = Device::default();
    let (mut model, config) = open("hf/f32/model", None, &device);
    let weights = Tensor::full([config.hidden_size], weight, &device);
    model.norm.weight = burn::module::Param::from_tensor(weights);
    let request = request(prompts(), GREEDY);
    let error = generate(&model, &config, &request, |_, _| Ok(())).unwrap_err();
    match error {
        ModelError::Nf4(Nf4Error::NonFinite { tensor, given, .. }) => {
            assert!(tensor.contains("logits") && !given.is_finite(), "{tensor}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_text_beyond_the_positions_is_warned_of() {
    let (_, config) = open("hf/f32/model", None, &Device::default());
    let positions = config.max_positions;
    assert_eq!(config.warn_of_length("the prompt", positions), None);
    let warning = config.warn_of_length("the prompt", positions + 1).unwrap();
    let both = [positions, positions + 1].map(|number| number.to_string());
    assert!(
        both.iter().all(|number| warning.contains(number)),
        "{warning}"
    );
}

/// The bytes are known before anything is computed, and are those that are allocated.
#[rstest]
#[case::one_row(vec![prompts().remove(2)], 12)]
#[case::rows(prompts(), 300)]
fn the_memory_of_the_cache_is_known_before(
    #[case] prompts: Vec<Vec<u32>>,
    #[case] max_tokens: usize,
) {
    let (model, config) = open("hf/f32/model", None, &Device::default());
    let mut request = Request {
        max_tokens,
        ..request(prompts, GREEDY)
    };
    let size = request.cache_size(&model, &config);
    assert_eq!(size.rows, request.prompts.len());
    assert!(size.positions >= request.longest_prompt() + 12);
    request.max_cache_bytes = Some(size.bytes);
    let report = generate(&model, &config, &request, |_, _| Ok(())).unwrap();
    assert_eq!(report.cache_bytes as u64, size.bytes);
    request.max_cache_bytes = Some(size.bytes - 1);
    let nothing = |_, _| -> Result<(), ModelError> { panic!("nothing is generated") };
    match generate(&model, &config, &request, nothing).unwrap_err() {
        ModelError::Memory {
            rows,
            positions,
            needed,
            available,
            limit: MemoryLimit::Request,
        } => {
            assert_eq!(
                (rows, positions, needed),
                (size.rows, size.positions, size.bytes)
            );
            assert_eq!(available, size.bytes - 1);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_ends_a_row_is_told() {
    let (model, config) = open("hf/f32/model", None, &Device::default());
    let free = texts(&request(prompts(), GREEDY));
    // The first token of a row that its text has at the place and not before.
    let last = free[1]
        .iter()
        .position(|&id| !free[0].contains(&id))
        .unwrap();
    let mut request = request(prompts(), GREEDY);
    request.eos = vec![free[1][last]];
    let report = generate(&model, &config, &request, |row, _| {
        Ok(match row {
            2 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        })
    });
    let report = report.unwrap();
    assert_eq!(
        report.ends,
        [RowEnd::MaxTokens, RowEnd::Eos, RowEnd::Callback]
    );
    let lengths: Vec<usize> = report.tokens.iter().map(Vec::len).collect();
    assert_eq!(lengths, [12, last, 1]);
}

/// What was generated until then is there, and the callback got it.
#[rstest]
#[case::at_once(0)]
#[case::after_the_first(1)]
#[case::later(5)]
fn a_generation_is_cancelled_between_tokens(#[case] after: usize) {
    let (model, config) = open("hf/f32/model", None, &Device::default());
    let free = texts(&request(prompts(), GREEDY));
    let request = request(prompts(), GREEDY);
    if after == 0 {
        let cancel = request.cancel.clone();
        std::thread::spawn(move || cancel.cancel()).join().unwrap();
    }
    let mut seen = 0;
    let report = generate(&model, &config, &request, |row, _| {
        seen += usize::from(row == 2);
        if seen == after {
            request.cancel.cancel();
        }
        Ok(())
    });
    let report = report.unwrap();
    assert_eq!(report.ends, [RowEnd::Cancelled; 3]);
    for (ours, free) in report.tokens.iter().zip(&free) {
        assert_eq!(ours, &free[..after]);
    }
    let processed = if after == 0 { 0 } else { 9 + 2 + 24 };
    assert_eq!(report.prompt_tokens, processed);
}

/// Six prompts of one to 24 tokens.
fn more_prompts() -> Vec<Vec<u32>> {
    let [a, b, c] = prompts().try_into().unwrap();
    vec![
        a.clone(),
        b,
        c.clone(),
        vec![a[3]],
        c[..5].to_vec(),
        a[2..].to_vec(),
    ]
}

/// A prompt that waits takes the place of a row that ends, while the others go on; its text is the one that it
/// has in a batch of all, as far as to the bit in f32.
#[rstest]
#[case::greedy(GREEDY)]
#[case::sampled(Sampling { temperature: 0.8, top_k: 40, top_p: 0.95, seed: 3, ..Sampling::greedy() })]
fn prompts_that_wait_have_the_texts_of_a_batch_of_all(
    #[case] sampling: Sampling,
    #[values(1, 2, 4)] max_batch: usize,
) {
    let all = texts(&request(more_prompts(), sampling));
    let (model, config) = open("hf/f32/model", None, &Device::default());
    let mut request = Request {
        max_batch,
        // What ends a row early, at another place in each.
        eos: vec![all[0][3], all[4][1]],
        ..request(more_prompts(), sampling)
    };
    let until_end = |text: &Vec<u32>| -> Vec<u32> {
        let text = text.iter().take_while(|id| !request.eos.contains(id));
        text.copied().collect()
    };
    let expected: Vec<Vec<u32>> = all.iter().map(until_end).collect();
    let mut streamed = vec![Vec::new(); 6];
    let report = generate(&model, &config, &request, |prompt, id| {
        streamed[prompt].push(id);
        Ok(())
    });
    let report = report.unwrap();
    assert_eq!(report.tokens, expected);
    assert_eq!(streamed, expected);
    for (end, text) in report.ends.iter().zip(&expected) {
        let by_eos = text.len() < 12;
        assert_eq!(
            *end,
            if by_eos {
                RowEnd::Eos
            } else {
                RowEnd::MaxTokens
            }
        );
    }
    assert!(report.ends.contains(&RowEnd::MaxTokens) && report.ends.contains(&RowEnd::Eos));
    assert_eq!(report.prompt_tokens, more_prompts().concat().len());
    // The bytes are those of the rows at a time, and of a prompt beside them.
    let rows = request.cache_size(&model, &config);
    request.max_batch = 6;
    let of_all = request.cache_size(&model, &config);
    assert_eq!((rows.rows, of_all.rows), (max_batch, 6));
    assert_eq!(of_all.bytes / 6 * (max_batch as u64 + 1), rows.bytes);
}

/// With windows, two rotary embeddings, soft caps, experts, sinks, layers without rotation.
#[rstest]
fn families_take_prompts_that_wait(
    #[values(
        "gemma2",
        "gemma3_text",
        "gpt_oss",
        "mistral_window",
        "qwen3_moe",
        "phi3",
        "smollm3"
    )]
    family: &str,
) {
    let folder = format!("families/{family}/model");
    let (model, config) = open(&folder, None, &Device::default());
    let prompts = more_prompts().into_iter();
    let within = |prompt: Vec<u32>| {
        prompt
            .iter()
            .map(|id| id % config.vocab_size as u32)
            .collect()
    };
    let mut request = request(prompts.map(within).collect(), GREEDY);
    request.max_tokens = 25;
    let run = |request: &Request| {
        let mut seen = [0; 6];
        let report = generate(&model, &config, request, |prompt, _| {
            seen[prompt] += 1;
            Ok(match seen[prompt] < 25 - 4 * prompt {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            })
        });
        report.unwrap().tokens
    };
    let all = run(&request);
    for max_batch in [1, 2, 3] {
        request.max_batch = max_batch;
        assert_eq!(run(&request), all, "{max_batch}");
    }
}

/// Nothing is lost of prompts that have ended, and those that wait are not begun.
#[test]
fn prompts_that_wait_are_cancelled_too() {
    let (model, config) = open("hf/f32/model", None, &Device::default());
    let all = texts(&request(more_prompts(), GREEDY));
    let request = Request {
        max_batch: 2,
        ..request(more_prompts(), GREEDY)
    };
    let report = generate(&model, &config, &request, |prompt, _| {
        if prompt == 3 {
            request.cancel.cancel();
        }
        Ok(())
    });
    let report = report.unwrap();
    let (whole, none) = (RowEnd::MaxTokens, RowEnd::Cancelled);
    assert_eq!(report.ends, [whole, whole, none, none, none, none]);
    let lengths: Vec<usize> = report.tokens.iter().map(Vec::len).collect();
    assert_eq!(lengths, [12, 12, 1, 1, 0, 0]);
    assert_eq!(report.tokens[..2], all[..2]);
}

/// A text that may go on beyond the model's positions ends where the cache cannot grow; the others go on.
#[test]
fn a_text_ends_where_the_cache_cannot_grow() {
    let (model, config) = open("hf/f32/model", None, &Device::default());
    let mut request = Request {
        max_tokens: usize::MAX,
        ..request(vec![vec![5; 30], vec![7; 3]], GREEDY)
    };
    let size = request.cache_size(&model, &config);
    request.max_cache_bytes = Some(size.bytes);
    let report = generate(&model, &config, &request, |_, _| Ok(())).unwrap();
    assert_eq!(report.ends, [RowEnd::Memory; 2]);
    for (prompt, text) in request.prompts.iter().zip(&report.tokens) {
        // The last token needs no place.
        assert_eq!(prompt.len() + text.len(), size.positions + 1);
    }
    assert_eq!(report.cache_bytes as u64, size.bytes);
}

/// The same text, whatever else the process did.
#[test]
fn a_seed_gives_the_same_text_after_another_model() {
    let request = request(more_prompts(), sampling(0.9, 20, 0.95));
    let (model, config) = open("hf/f32/model", None, &Device::default());
    let draw = || {
        let report = generate(&model, &config, &request, |_, _| Ok(()));
        report.unwrap().tokens
    };
    let first = draw();
    assert_eq!(draw(), first);
    {
        let (other, of_other) = open("families/gemma2/model", None, &Device::default());
        let request = Request {
            prompts: vec![vec![3; 40]],
            ..request.clone()
        };
        generate(&other, &of_other, &request, |_, _| Ok(())).unwrap();
    }
    assert_eq!(draw(), first);
}

/// Angles that change with the length of the longest row, as keys are computed again (LongRoPE of Phi-3) and as
/// they are not (dynamic).
fn model_of_changing_angles(
    rope: Value,
    family: &str,
    positions: usize,
) -> (Decoder, DecoderConfig) {
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
    (model, config)
}

fn dynamic() -> (Decoder, DecoderConfig) {
    let rope = json!({"rope_type": "dynamic", "factor": 2.0});
    model_of_changing_angles(rope, "llama", 16)
}

fn longrope() -> (Decoder, DecoderConfig) {
    let rope = json!({"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 16});
    model_of_changing_angles(rope, "phi3", 64)
}

/// Where the longest row decides on the angles of all, prompts wait for all rows to end.
#[rstest]
#[case::dynamic(dynamic())]
#[case::longrope(longrope())]
fn prompts_of_changing_angles_wait_for_all_rows(#[case] (model, config): (Decoder, DecoderConfig)) {
    let all: Vec<Vec<u32>> = [12, 4, 9, 3, 15]
        .iter()
        .map(|&n| (1..=n).collect())
        .collect();
    let of = |prompts: &[Vec<u32>], max_batch| {
        let request = Request {
            max_batch,
            ..request(prompts.to_vec(), GREEDY)
        };
        let mut seen = vec![0; prompts.len()];
        // The longest rows end first.
        let report = generate(&model, &config, &request, |row, _| {
            seen[row] += 1;
            Ok(match seen[row] + prompts[row].len() < 14 {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            })
        });
        report.unwrap().tokens
    };
    let expected: Vec<_> = all.chunks(2).flat_map(|group| of(group, 2)).collect();
    assert_eq!(of(&all, 2), expected);
}

/// A row that has ended is still the longest: the keys of the other are computed again when it passes the border.
#[test]
fn keys_are_computed_again_for_all_rows() {
    let (model, config) = longrope();
    let prompts: Vec<Vec<u32>> = vec![(1..=12).collect(), (5..=8).collect()];
    let report = generate(
        &model,
        &config,
        &request(prompts.clone(), GREEDY),
        |row, _| {
            Ok(match row {
                0 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            })
        },
    );
    let ours = report.unwrap().tokens.remove(1);
    assert_eq!(ours.len(), 12);
    // Both rows padded on the left, all of them anew for each token.
    let mut rows: Vec<Vec<i64>> = prompts
        .iter()
        .map(|prompt| prompt.iter().map(|&id| i64::from(id)).collect())
        .collect();
    rows[1].splice(0..0, [0; 8]);
    for &id in &ours {
        let mut rope = model.rope_tables(&config);
        let mut cache = KvCache::new(config.layers.len(), vec![0, 8]);
        let ids = TensorData::new(rows.concat(), [2, rows[0].len()]);
        let ids = Tensor::from_data(ids, &model.device());
        let next = model.next_logits(ids, &mut rope, &mut cache).argmax(1);
        let next: Vec<i64> = next.into_data().iter::<i64>().collect();
        assert_eq!(next[1], i64::from(id), "{} tokens", rows[0].len());
        rows.iter_mut().zip(next).for_each(|(row, id)| row.push(id));
    }
    assert!(rows[0].len() > 20);
}

/// A table that is kept in 16 bit does not say in what keys and values are.
#[test]
fn the_cache_is_of_the_type_that_is_computed_in() {
    let config = r#"{"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "torch_dtype": "bfloat16"}"#;
    let config = DecoderConfig::from_json(config.as_bytes(), "config.json".as_ref()).unwrap();
    let model = random_model(&config, &Device::flex());
    let model = model.with_exact_tables();
    let request = Request {
        prompts: vec![vec![1, 2, 3]],
        max_tokens: 4,
        sampling: GREEDY,
        ..Request::default()
    };
    let report = generate(&model, &config, &request, |_, _| Ok(())).unwrap();
    let size = request.cache_size(&model, &config);
    assert_eq!(size.bytes, report.cache_bytes as u64);
    // Keys and values, f32.
    assert_eq!(size.bytes, 2 * 2 * 2 * 8 * 4 * size.positions as u64);
}
