//! Experts in the stacks that checkpoints hold them in.

use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::CheckpointStore;
use burn_nf4::model::StackPlace;

use crate::model::config::{DecoderConfig, MixtureForm};
use crate::model::layer::Mlp;
use crate::model::mixture::Router;
use crate::model::{Decoder, MixtureMlp};

/// Which tensors are stacks, and what their parts are called apart.
type Stacks<const N: usize> = [(&'static str, &'static [&'static str]); N];

/// How transformers 5 stacks the experts of a layer, where it saves them as it holds them.
const BY_ROWS: Stacks<2> = [
    (
        r"^(.*\.experts)\.gate_up_proj$",
        &["$1.{}.gate_proj.weight", "$1.{}.up_proj.weight"],
    ),
    (r"^(.*\.experts)\.down_proj$", &["$1.{}.down_proj.weight"]),
];

/// How checkpoints of gpt-oss stack them.
const BY_COLUMNS: Stacks<4> = [
    (
        r"^(.*\.experts)\.gate_up_proj$",
        &["$1.{}.gate_proj.weight", "$1.{}.up_proj.weight"],
    ),
    (
        r"^(.*\.experts)\.gate_up_proj_bias$",
        &["$1.{}.gate_proj.bias", "$1.{}.up_proj.bias"],
    ),
    (r"^(.*\.experts)\.down_proj$", &["$1.{}.down_proj.weight"]),
    (
        r"^(.*\.experts)\.down_proj_bias$",
        &["$1.{}.down_proj.bias"],
    ),
];

/// The store with stacks of experts taken apart.
///
/// # Errors
/// Those of [`CheckpointStore::unstack`].
pub(super) fn unstacked(
    mut store: CheckpointStore,
    config: &DecoderConfig,
) -> Result<CheckpointStore, Nf4Error> {
    let mut mixtures = config.layers.iter().filter_map(|layer| layer.mixture);
    if mixtures.any(|mixture| mixture.form == MixtureForm::GptOss) {
        for (stack, parts) in BY_COLUMNS {
            store = store.unstack_columns(stack, parts)?;
        }
        return Ok(store);
    }
    for (stack, parts) in BY_ROWS {
        store = store.unstack(stack, parts)?;
    }
    Ok(store)
}

/// Where a checkpoint of the model holds a parameter of an expert, if it has them in stacks alone: that of
/// other families holds experts apart too, and is written so.
pub(super) fn place_of(model: &Decoder, name: &str) -> Option<StackPlace> {
    let (layer, of_expert) = name
        .strip_prefix("model.layers.")?
        .split_once(".mlp.experts.")?;
    let Mlp::Mixture(MixtureMlp {
        routing: Router::Router(_),
        experts,
        ..
    }) = &model.layers.get(layer.parse::<usize>().ok()?)?.mlp
    else {
        return None;
    };
    let mut parts = of_expert.split('.');
    let [expert, projection, parameter] = [(); 3].map(|()| parts.next().unwrap_or_default());
    let (stack, part, parts) = match projection {
        "gate_proj" => ("gate_up_proj", 0, 2),
        "up_proj" => ("gate_up_proj", 1, 2),
        "down_proj" => ("down_proj", 0, 1),
        _ => return None,
    };
    let end = match parameter {
        "weight" => "",
        "bias" => "_bias",
        _ => return None,
    };
    Some(StackPlace {
        stack: format!("model.layers.{layer}.mlp.experts.{stack}{end}"),
        matrix: expert.parse().ok()?,
        matrices: experts.len(),
        part,
        parts,
    })
}
