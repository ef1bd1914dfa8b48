//! Trains a LoRA adapter on a text file beside the frozen 4-bit weights of a folder, and saves it as
//! PEFT does.
//!
//! ```text
//! cargo run --release -p burn-nf4-llm --example finetune -- FOLDER story.txt ADAPTER
//! ```

use std::error::Error;
use std::path::Path;

use burn::tensor::Device;
use burn_nf4::checkpoint::CheckpointStore;
use burn_nf4::format::FloatType;
use burn_nf4::model::LinearLayers;
use burn_nf4::peft::{LoraConfig, TargetModules};
use burn_nf4_llm::model::{DecoderConfig, load};
use burn_nf4_llm::text::Text;
use burn_nf4_llm::train::data::{Dataset, Predict};
use burn_nf4_llm::train::schedule::{Decay, Schedule};
use burn_nf4_llm::train::{Settings, Trainer};

const STEPS: usize = 10;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, data, output] = arguments.as_slice() else {
        return Err("usage: finetune FOLDER TEXT OUTPUT".into());
    };
    let folder = Path::new(folder);
    let config = DecoderConfig::from_folder(folder)?;
    let text = Text::from_folder(folder)?;
    let device = Device::flex().autodiff();
    let model = load(
        CheckpointStore::open(folder)?,
        &config,
        FloatType::F32,
        &device,
    )?;
    let data = Dataset::read(data.as_ref(), &text, text.eos, 128, Predict::Answers)?;
    data.check_vocabulary(config.vocab_size)?;

    let lora = LoraConfig::new(TargetModules::AllLinear);
    let schedule = Schedule {
        peak: 2e-4,
        decay: Decay::Cosine,
        warmup: 2,
        total: STEPS,
    };
    let settings = Settings::new(schedule, &lora)?;
    let model = model.with_lora(&lora, &device)?;
    let mut trainer = Trainer::new(model, &config, lora, settings, true)?;
    for step in 0..STEPS {
        let done = trainer.step(&data.step(step, 1, 1, 42))?;
        println!("step {step}: loss {:.3}", done.loss);
    }
    trainer.save_adapter(output.as_ref())?;
    Ok(())
}
