//! Times decoding and a prompt of a small model with random weights on the CPU, without a checkpoint.
//! `burn-nf4 bench` times other sizes and devices.
//!
//! ```text
//! cargo bench -p burn-nf4-llm
//! ```

use std::error::Error;
use std::time::Instant;

use burn::tensor::Device;
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4_llm::generate::{Request, Sampling, generate};
use burn_nf4_llm::model::{DecoderConfig, random};

/// The sizes of SmolLM2-135M, with fewer layers.
const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 9,
    "num_key_value_heads": 3, "rope_theta": 100000, "max_position_embeddings": 8192,
    "tie_word_embeddings": true, "torch_dtype": "float32"}"#;

fn main() -> Result<(), Box<dyn Error>> {
    let config = DecoderConfig::from_json(CONFIG.as_bytes(), "config.json".as_ref())?;
    let model = random(
        &config,
        QuantConfig::default(),
        FloatType::F32,
        None,
        &Device::flex(),
    )?;
    for (rows, prompt, tokens) in [(1, 16, 64), (16, 16, 32), (1, 256, 1)] {
        let request = Request {
            prompts: vec![vec![1; prompt]; rows],
            max_tokens: tokens + 1,
            sampling: Sampling::greedy(),
            eos: Vec::new(),
            capture: true,
            ..Request::default()
        };
        // The first warms up.
        generate(&model, &config, &request, |_, _| Ok(()))?;
        let start = Instant::now();
        let report = generate(&model, &config, &request, |_, _| Ok(()))?;
        println!(
            "{rows:2} rows, prompt of {prompt:3}: {:7.1} tokens/s of the prompt, {:6.1} tokens/s decoded, \
             {:.2} s in all",
            report.prompt_rate(),
            report.decode_rate(),
            start.elapsed().as_secs_f64()
        );
    }
    Ok(())
}
