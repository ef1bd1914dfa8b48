//! Loads a model of any family and saves it as a Hugging Face folder; of a model of text and images, its text
//! part.
//!
//! ```sh
//! cargo run --release -p burn-nf4-llm --example save -- MODEL FOLDER
//! ```

use std::path::Path;

use burn::tensor::Device;
use burn_nf4::checkpoint::{Checkpoint, CheckpointStore};
use burn_nf4::model::{LinearLayers, SaveFolder};
use burn_nf4_llm::model::{DecoderConfig, load};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(model), Some(out)) = (arguments.next(), arguments.next()) else {
        return Err("usage: save MODEL FOLDER".into());
    };
    let folder = Path::new(&model);
    let config = DecoderConfig::from_folder(folder)?;
    let store = CheckpointStore::open(folder)?;
    let model = load(store, &config, config.dtype, &Device::default())?;
    let source = Checkpoint::open(folder)?;
    let options = SaveFolder {
        source: Some(&source),
        model_config: Some(DecoderConfig::model_entries(folder)?),
        ..SaveFolder::default()
    };
    let written = model.save_folder(&out, &options)?;
    println!("{} bytes in {out}", written.size_bytes);
    Ok(())
}
