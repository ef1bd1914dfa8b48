//! From the name of a model to a folder.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn_nf4::checkpoint::{INDEX_FILE, SINGLE_FILE};
use hf_hub::api::sync::{ApiBuilder, ApiError};
use serde::Deserialize;

use crate::error::ModelError;
use crate::json::files::read_json;
use crate::text::chat::{OLD_TEMPLATE_FILE, TEMPLATE_FILE, TEMPLATE_FOLDER};

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The folder of a model: `name` itself if there is such a path, else the files of the repository
/// `name` (`org/name`) of the Hugging Face hub, fetched into its cache.
pub fn folder(name: &str) -> Result<PathBuf, ModelError> {
    let path = Path::new(name);
    if path.exists() {
        return Ok(path.into());
    }
    let parts: Vec<&str> = name.split('/').collect();
    if parts.len() != 2
        || parts
            .iter()
            .any(|part| part.is_empty() || part.starts_with('.'))
    {
        return Err(ModelError::setting(
            "the model",
            format!("`{name}`"),
            "a folder that is there, or a repository `org/name`",
        ));
    }
    fetch(name)
}

/// The files that are read beside the weights: those that must be there, and of the others those
/// that are.
pub fn beside_the_weights(held: &BTreeSet<String>) -> Vec<&str> {
    const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];
    const OPTIONAL: [&str; 5] = [
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        TEMPLATE_FILE,
        OLD_TEMPLATE_FILE,
    ];
    let optional = held.iter().map(String::as_str).filter(|file| {
        let template = file
            .strip_prefix(TEMPLATE_FOLDER)
            .and_then(|file| file.strip_prefix('/'))
            .is_some_and(|file| file.ends_with(".jinja") && !file.contains('/'));
        template || OPTIONAL.contains(file)
    });
    REQUIRED.into_iter().chain(optional).collect()
}

/// Fetches only what is needed, with hf-hub's progress bars.
fn fetch(name: &str) -> Result<PathBuf, ModelError> {
    let failed = |error: ApiError| ModelError::Fetch {
        repo: name.into(),
        message: error.to_string(),
    };
    let repo = ApiBuilder::from_env()
        .with_progress(true)
        .build()
        .map_err(failed)?
        .model(name.into());
    let held: BTreeSet<String> = repo
        .info()
        .map_err(failed)?
        .siblings
        .into_iter()
        .map(|file| file.rfilename)
        .collect();
    for file in beside_the_weights(&held) {
        repo.get(file).map_err(failed)?;
    }
    if held.contains(INDEX_FILE) {
        let index: Index = read_json(&repo.get(INDEX_FILE).map_err(failed)?)?;
        let shards: BTreeSet<&String> = index.weight_map.values().collect();
        for shard in shards {
            repo.get(shard).map_err(failed)?;
        }
    } else {
        repo.get(SINGLE_FILE).map_err(failed)?;
    }
    let config = repo.get("config.json").map_err(failed)?;
    Ok(config.parent().unwrap_or(Path::new(".")).into())
}
