//! A model of one's own in 4 bit, trained with LoRA, and saved for Python:
//! `cargo run --release --example own_model`.

use burn::module::Module;
use burn::nn::loss::CrossEntropyLoss;
use burn::nn::{Embedding, EmbeddingConfig, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Int, Tensor, activation::silu};
use burn_nf4::checkpoint::CheckpointStore;
use burn_nf4::linear_layers;
use burn_nf4::model::{LinearLayers, PeftModel, QuantizeLayers, SaveFolder};
use burn_nf4::nn::AnyLinear;
use burn_nf4::peft::{Adapter, LoraConfig, TargetModules};

#[derive(Module, Debug)]
struct Model {
    embed_tokens: Embedding,
    mlp: Mlp,
    lm_head: AnyLinear,
}

#[derive(Module, Debug)]
struct Mlp {
    up_proj: AnyLinear,
    down_proj: AnyLinear,
}

// All that a model needs: where its linear layers are.
linear_layers!(Mlp { up_proj, down_proj });
linear_layers!(Model { mlp, lm_head });

fn new(device: &Device) -> Model {
    let linear = |from, to| AnyLinear::from(LinearConfig::new(from, to).init(device));
    let [up_proj, down_proj] = [linear(128, 512), linear(512, 128)];
    Model {
        embed_tokens: EmbeddingConfig::new(32, 128).init(device),
        mlp: Mlp { up_proj, down_proj },
        lm_head: linear(128, 32),
    }
}

fn loss(model: &Model, ids: Tensor<1, Int>) -> Tensor<1> {
    let x: Tensor<3> = model.embed_tokens.forward(ids.clone().unsqueeze());
    let y = silu(model.mlp.up_proj.forward(x.clone()));
    let logits = model.lm_head.forward(x + model.mlp.down_proj.forward(y));
    let device = logits.device();
    let next = (ids * 5 + 3) % 32; // what is to be learned
    CrossEntropyLoss::new(None, &device).forward(logits.squeeze_dim(0), next)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::default().autodiff();
    let ids = || Tensor::arange(0..32, &device);
    let model = new(&device).quantize(&QuantizeLayers::default())?;
    let lora = LoraConfig::new(TargetModules::list(["up_proj", "down_proj"]));
    let mut model = PeftModel::new(model, lora, &device)?;
    println!("{:?}", model.model().count_parameters());

    let mut optimizer = AdamWConfig::new().init();
    for step in 0..8 {
        let loss = loss(model.model(), ids());
        println!("step {step}: loss {:.4}", loss.clone().into_scalar::<f32>());
        let grads = GradientsParams::from_grads(loss.backward(), model.model());
        model.update(|model| optimizer.step(1e-2, model, grads));
    }

    let out = std::env::temp_dir().join(format!("own_model_{}", std::process::id()));
    model.adapter()?.save(out.join("adapter"))?;
    let folder = SaveFolder::default();
    model.base().save_folder(out.join("base"), &folder)?;

    let base = new(&device).load_checkpoint(CheckpointStore::open(out.join("base"))?)?;
    let again = base.apply_adapter(&Adapter::open(out.join("adapter"))?, &device)?;
    let [was, is] = [model.model(), &again].map(|model| loss(model, ids()).into_scalar::<f32>());
    println!(
        "{was:.4} before saving to {}, {is:.4} read from it",
        out.display()
    );
    Ok(())
}
