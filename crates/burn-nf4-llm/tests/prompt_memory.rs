//! What is held while a prompt is processed grows with its length by the cache alone, shown on Flex with an
//! allocator that counts.
#![cfg(feature = "flex")]

#[path = "../../../tests/counting/mod.rs"]
mod counting;

use burn::tensor::Device;
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4_llm::generate::{Request, generate};
use burn_nf4_llm::model::{DecoderConfig, PROMPT_CHUNK, random};
use counting::{alone, peak_bytes};

/// A wide MLP, so that what a pass holds is large beside all else; a window, so that attention is fast.
const CONFIG: &str = r#"{"model_type": "mistral", "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "sliding_window": 32, "max_position_embeddings": 32768,
    "torch_dtype": "float32"}"#;

/// Bytes of one tensor inside of the MLP in a pass.
const OF_PASS: usize = PROMPT_CHUNK * 512 * 4;

#[test]
fn a_prompt_of_any_length_is_processed_in_the_memory_of_a_chunk() {
    let _alone = alone();
    let config = DecoderConfig::from_json(CONFIG.as_bytes(), "config.json".as_ref()).unwrap();
    let model = random(
        &config,
        QuantConfig::default(),
        FloatType::F32,
        None,
        &Device::flex(),
    )
    .unwrap();
    let beside_the_cache = |passes: usize| {
        let request = Request {
            prompts: vec![vec![7; passes * PROMPT_CHUNK]],
            max_tokens: 1,
            ..Request::default()
        };
        let (peak, report) = peak_bytes(|| generate(&model, &config, &request, |_, _| Ok(())));
        let report = report.unwrap();
        let size = request.cache_size(&model, &config);
        assert_eq!(report.cache_bytes as u64, size.bytes);
        peak - report.cache_bytes
    };
    let [short, long] = [2, 4].map(beside_the_cache);
    assert!(short > OF_PASS, "{short}");
    // The tables of angles, 16 f32 a position and as much again while they are made, and the tokens.
    assert!(long < short + 2 * OF_PASS / 4, "{short}, then {long}");
}
