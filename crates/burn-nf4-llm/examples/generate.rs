//! Loads a folder and continues a text.
//!
//! ```text
//! cargo run --release -p burn-nf4-llm --example generate -- FOLDER "The capital of France is"
//! ```

use std::error::Error;
use std::path::Path;

use burn::tensor::Device;
use burn_nf4::checkpoint::CheckpointStore;
use burn_nf4::format::FloatType;
use burn_nf4_llm::generate::{Request, Sampling, generate_text};
use burn_nf4_llm::model::{DecoderConfig, load};
use burn_nf4_llm::text::{StopStrings, Text};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, prompt] = arguments.as_slice() else {
        return Err("usage: generate FOLDER PROMPT".into());
    };
    let folder = Path::new(folder);
    let config = DecoderConfig::from_folder(folder)?;
    let text = Text::from_folder(folder)?;
    let device = Device::flex();
    let model = load(
        CheckpointStore::open(folder)?,
        &config,
        FloatType::F32,
        &device,
    )?;

    let request = Request {
        prompts: vec![text.encode(prompt)?],
        max_tokens: 64,
        sampling: Sampling::greedy(),
        eos: text.ends(&config, false),
        capture: true,
        ..Request::default()
    };
    print!("{prompt}");
    let stop = StopStrings::none();
    let given = generate_text(&model, &config, &text, &request, &stop, |_row, piece| {
        print!("{piece}");
        Ok(())
    })?;
    println!();
    eprintln!("{:.1} tokens/s", given.report.decode_rate());
    Ok(())
}
