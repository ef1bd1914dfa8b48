//! Models with names of their own, and overrides that contradict the model.

use burn::module::{Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, LinearConfig};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{Checkpoint, CheckpointStore};
use burn_nf4::format::FloatType;
use burn_nf4::linear_layers;
use burn_nf4::model::{LinearLayers, QuantizeLayers, SaveFolder, TiedHead};
use burn_nf4::nn::AnyLinear;
use burn_nf4::peft::{
    Adapter, DenseTensor, LoraConfig, LoraModule, MergeOptions, TargetModules, merge_4bit,
    merge_16bit,
};
use rstest::rstest;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::random::Random;
use crate::stored;
use crate::toy::{max_difference, tensors};

const ROWS: usize = 24;
const SIZE: usize = 64;

/// A model with a head that may be its embedding, by the names of both.
trait Tied: LinearLayers {
    const EMBEDDING: &str;
    const HEAD: &str;

    fn new(is_tied: bool, device: &Device) -> Self;

    fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3>;

    fn logits(&self) -> Vec<f32> {
        let device = self.devices()[0].clone();
        let ids = Tensor::from_data(TensorData::new(vec![1i64, 7, 3, 23], [1, 4]), &device);
        self.forward(ids).into_data().iter::<f32>().collect()
    }
}

macro_rules! tied {
    ($model:ident, $embedding:ident, $head:ident) => {
        #[derive(Module, Debug)]
        struct $model {
            $embedding: Embedding,
            proj: AnyLinear,
            $head: Option<AnyLinear>,
        }

        linear_layers!($model { proj, $head } {
            fn tied_head(&self) -> Option<TiedHead> {
                self.$head.is_none().then(|| TiedHead {
                    head: <Self as Tied>::HEAD.into(),
                    embedding: <Self as Tied>::EMBEDDING.into(),
                })
            }

            fn untie_head(mut self) -> Self {
                self.$head = Some(AnyLinear::from_weight(self.$embedding.weight.val(), None));
                self
            }

            fn head_name(&self) -> Option<String> {
                Some(<Self as Tied>::HEAD.into())
            }
        });

        impl Tied for $model {
            const EMBEDDING: &str = stringify!($embedding);
            const HEAD: &str = stringify!($head);

            fn new(is_tied: bool, device: &Device) -> Self {
                let matrix = |rows: usize, seed| {
                    let values = TensorData::new(values(rows * SIZE, seed), [rows, SIZE]);
                    Tensor::<2>::from_data(values, device)
                };
                let linear = |rows, seed| AnyLinear::from_weight(matrix(rows, seed) * 0.125, None);
                Self {
                    $embedding: Embedding {
                        weight: Param::from_tensor(matrix(ROWS, 3)),
                    },
                    proj: linear(SIZE, 4),
                    $head: (!is_tied).then(|| linear(ROWS, 7)),
                }
            }

            fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
                let x = self.proj.forward(self.$embedding.forward(ids));
                match &self.$head {
                    Some(head) => head.forward(x),
                    None => x.matmul(self.$embedding.weight.val().transpose().unsqueeze()),
                }
            }
        }
    };
}

tied!(Own, embed, head);
tied!(Root, embed_tokens, lm_head);

/// The same each time: the numbers of a device are one row for all threads.
fn values(elems: usize, seed: u64) -> Vec<f32> {
    Random(seed).units(elems)
}

fn random(shape: &[usize], seed: u64) -> DenseTensor {
    let values = values(shape.iter().product(), seed);
    DenseTensor::from_f32(&values, shape, FloatType::F32).expect("it fits")
}

/// What an adapter changes of the ends of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Changes {
    Nothing,
    SavedTable,
    SavedHead,
    Table,
    Head,
    /// The table under a branch too, which the head shares.
    SharedTable,
}

fn adapter<M: Tied>(changes: Changes) -> Adapter {
    let targets = match changes {
        Changes::Table | Changes::SharedTable => M::EMBEDDING,
        Changes::Head => M::HEAD,
        _ => "proj",
    };
    let saved = match changes {
        Changes::SavedTable => Some(vec![M::EMBEDDING.into()]),
        Changes::SavedHead => Some(vec![M::HEAD.into()]),
        _ => None,
    };
    let mut adapter = Adapter::new(LoraConfig {
        r: 2,
        modules_to_save: saved,
        ..LoraConfig::new(TargetModules::list([targets]))
    })
    .expect("valid");
    let branch = |d_output, d_input| LoraModule {
        lora_a: random(&[2, d_input], 1),
        lora_b: random(&[d_output, 2], 2),
        magnitude: None,
        bias: None,
    };
    let weight = |module: &str| format!("{module}.weight");
    match changes {
        Changes::Table | Changes::SharedTable => {
            adapter.insert_embedding(M::EMBEDDING, branch(SIZE, ROWS))
        }
        Changes::Head => adapter.insert(M::HEAD, branch(ROWS, SIZE)),
        _ => adapter.insert("proj", branch(SIZE, SIZE)),
    }
    .expect("it is asked for");
    match changes {
        Changes::SavedTable | Changes::SharedTable => {
            adapter.insert_full(&weight(M::EMBEDDING), random(&[ROWS, SIZE], 5))
        }
        Changes::SavedHead => adapter.insert_full(&weight(M::HEAD), random(&[ROWS, SIZE], 6)),
        _ => Ok(()),
    }
    .expect("it is asked for");
    adapter
}

/// `Some(None)` for a `config.json` that says nothing of a tie.
fn saved<M: Tied>(model: &M, tie: Option<Option<bool>>) -> TempDir {
    let out = TempDir::new().expect("a folder");
    let options = SaveFolder {
        model_config: tie.map(|tie| {
            let entry = tie.map(|tie| ("tie_word_embeddings".to_string(), json!(tie)));
            entry.into_iter().collect::<Map<String, Value>>()
        }),
        ..SaveFolder::default()
    };
    model
        .save_folder(out.path(), &options)
        .expect("it can be written");
    out
}

fn load<M: Tied>(folder: &TempDir, is_tied: bool) -> M {
    let store = CheckpointStore::open(folder.path()).expect("valid");
    let model = M::new(is_tied, &Device::default());
    model.load_checkpoint(store).expect("it fits")
}

fn merges_to_what_it_computes<M: Tied>(changes: Changes, is_tied: bool, tie: Option<Option<bool>>) {
    let device = Device::default();
    let model = M::new(is_tied, &device);
    let folder = saved(&model, tie);
    let again: M = load(&folder, is_tied);
    assert_eq!(again.tied_head().is_some(), is_tied);
    assert_eq!(again.logits(), model.logits());

    let adapter = adapter::<M>(changes);
    let adapted = again.apply_adapter(&adapter, &device).expect("it fits");
    let expected = adapted.logits();
    let base = Checkpoint::open(folder.path()).expect("valid");
    for in_4bit in [false, true] {
        let (out, options) = (TempDir::new().expect("a folder"), MergeOptions::default());
        match in_4bit {
            false => merge_16bit(&base, &adapter, out.path(), None, &options, |_| {}),
            true => merge_4bit(&base, &adapter, out.path(), &options, |_| {}),
        }
        .expect("it can be told");
        let merged: M = load(&out, is_tied);
        let difference = max_difference(&merged.logits(), &expected);
        // Sums of 64 products of values of up to about 10.
        assert!(difference < 1e-3, "{changes:?}, {tie:?}: {difference}");
    }
    if changes != Changes::Nothing {
        assert!(max_difference(&expected, &model.logits()) > 0.1);
    }
}

/// A merged folder computes what the adapted model does, whatever the names.
#[rstest]
fn a_change_of_one_end_is_merged_under_any_names(
    #[values(
        Changes::Nothing,
        Changes::SavedTable,
        Changes::SavedHead,
        Changes::Table,
        Changes::Head,
        Changes::SharedTable
    )]
    changes: Changes,
    #[values(false, true)] is_tied: bool,
    #[values(None, Some(None), Some(Some(true)))] tie: Option<Option<bool>>,
) {
    merges_to_what_it_computes::<Own>(changes, is_tied, tie);
    merges_to_what_it_computes::<Root>(changes, is_tied, tie);
}

/// A folder of somebody else's, in which nothing stands for the head.
#[rstest]
#[case(Changes::SavedTable, true)]
#[case(Changes::Table, true)]
#[case(Changes::SharedTable, true)]
#[case(Changes::Nothing, false)]
fn a_change_of_an_embedding_without_a_head_is_refused(
    #[case] changes: Changes,
    #[case] is_refused: bool,
    #[values(false, true)] says_it: bool,
) {
    let folder = saved(&Own::new(true, &Device::default()), None);
    let mut held = tensors(folder.path());
    assert!(held.remove("head.weight").is_some(), "it is written");
    stored::write(folder.path(), &held);
    let config = folder.path().join("config.json");
    if says_it {
        let text = json!({"tie_word_embeddings": false}).to_string();
        std::fs::write(config, text).expect("a file");
    }
    let base = Checkpoint::open(folder.path()).expect("valid");
    let out = TempDir::new().expect("a folder");
    let options = MergeOptions::default();
    let adapter = adapter::<Own>(changes);
    match merge_16bit(&base, &adapter, out.path(), None, &options, |_| {}) {
        Err(Nf4Error::Config { field, given, .. }) => {
            assert!(is_refused && !says_it, "{given}");
            assert_eq!(field, "tie_word_embeddings");
            assert!(given.contains("`embed`"), "{given}");
        }
        Ok(_) => assert!(!is_refused || says_it),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn a_head_of_another_name_stays_in_floats() {
    let device = Device::default();
    let quantized = |heads| {
        let options = QuantizeLayers {
            heads,
            ..QuantizeLayers::default()
        };
        let model = Own::new(false, &device).quantize(&options).expect("finite");
        let linears = model.linears().into_iter();
        linears
            .filter(|(_, layer)| layer.is_quantized())
            .map(|(name, _)| name)
            .collect::<Vec<_>>()
    };
    assert_eq!(quantized(false), ["proj"]);
    assert_eq!(quantized(true), ["proj", "head"]);
}

/// Two layers, a table, and overrides of every kind.
macro_rules! overridden {
    ($model:ident { $($override:tt)* }) => {
        #[derive(Module, Debug)]
        struct $model {
            embed: Embedding,
            up: AnyLinear,
            down: AnyLinear,
        }

        linear_layers!($model { up, down } { $($override)* });

        impl $model {
            fn new(device: &Device) -> Self {
                let linear = || LinearConfig::new(SIZE, SIZE).init(device).into();
                Self {
                    embed: EmbeddingConfig::new(ROWS, SIZE).init(device),
                    up: linear(),
                    down: linear(),
                }
            }
        }
    };
}

fn tied_to(embedding: &str, head: &str) -> Option<TiedHead> {
    Some(TiedHead {
        head: head.into(),
        embedding: embedding.into(),
    })
}

overridden!(OneName {
    fn checkpoint_name(path: &str) -> String {
        path.replace("down", "up")
    }
});
overridden!(NameOfATable {
    fn checkpoint_name(path: &str) -> String {
        path.replace("down", "embed")
    }
});
overridden!(NoWeight {
    fn checkpoint_name(path: &str) -> String {
        path.replace(".weight", ".w")
    }
});
overridden!(NoTable {
    fn tied_head(&self) -> Option<TiedHead> {
        tied_to("tokens", "head")
    }
});
overridden!(TableIsALayer {
    fn tied_head(&self) -> Option<TiedHead> {
        tied_to("up", "head")
    }
});
overridden!(HeadIsALayer {
    fn tied_head(&self) -> Option<TiedHead> {
        tied_to("embed", "down")
    }
});
overridden!(NoHead {
    fn head_name(&self) -> Option<String> {
        Some("head".into())
    }
});
overridden!(NeverUntied {
    fn tied_head(&self) -> Option<TiedHead> {
        tied_to("embed", "head")
    }
});

fn refusal<M: LinearLayers>(result: Result<M, Nf4Error>) -> (&'static str, String) {
    match result {
        Err(Nf4Error::Config { field, given, .. }) => (field, given),
        other => panic!("{:?}", other.map(|_| ())),
    }
}

/// By whatever is done to the model.
fn refused<M: LinearLayers>(model: M, field: &str, parts: &[&str]) {
    let device = Device::default();
    let lora = LoraConfig::new(TargetModules::list(["up"]));
    let out = TempDir::new().expect("a folder");
    let saved = model.save_folder(out.path(), &SaveFolder::default());
    let empty = Adapter::new(lora.clone()).expect("valid");
    let extracted = model.extract_adapter(&lora);
    let results = [
        model.clone().quantize(&QuantizeLayers::default()),
        model.clone().with_lora(&lora, &device),
        model.clone().apply_partial_adapter(&empty, &device),
        saved.map(|_| model.clone()),
        extracted.map(|_| model),
    ];
    for result in results {
        let (named, given) = refusal(result);
        assert_eq!(named, field, "{given}");
        for part in parts {
            assert!(given.contains(part), "{given}");
        }
    }
}

#[test]
fn overrides_that_contradict_the_model_are_refused() {
    let device = Device::default();
    let named = "checkpoint_name";
    let new = OneName::new(&device);
    refused(new, named, &["`up.weight`", "`down.weight`"]);
    let new = NameOfATable::new(&device);
    refused(new, named, &["`embed.weight`", "`down.weight`"]);
    refused(NoWeight::new(&device), named, &["`down.w`"]);
    refused(NoTable::new(&device), "tied_head", &["`tokens`"]);
    refused(TableIsALayer::new(&device), "tied_head", &["`up`"]);
    refused(HeadIsALayer::new(&device), "tied_head", &["`down`"]);
    refused(NoHead::new(&device), "head_name", &["`head`"]);
}

/// What a head that stays the table would be trained to is lost.
#[test]
fn a_head_that_cannot_be_untied_is_not_trained() {
    let device = Device::default();
    let lora = LoraConfig {
        modules_to_save: Some(vec!["head".into()]),
        ..LoraConfig::new(TargetModules::list(["up"]))
    };
    let (field, given) = refusal(NeverUntied::new(&device).with_lora(&lora, &device));
    assert_eq!(field, "untie_head");
    assert!(given.contains("`head`"), "{given}");
}
