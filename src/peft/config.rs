//! The settings of an adapter: `adapter_config.json`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use super::options;
use super::setting::{
    InitLoraWeights, LoraBias, ModuleNames, OneOrMany, PatternMap, TargetModules,
};
use crate::checkpoint::python_json::{self, Float};
use crate::error::Nf4Error;

/// The settings of a LoRA adapter, with PEFT's names and defaults.
///
/// Settings that are not a field of their own are kept in [`other`](Self::other) and written back.
///
/// ```
/// use burn_nf4::peft::{LoraConfig, TargetModules};
///
/// let config = LoraConfig {
///     r: 16,
///     lora_alpha: 32.0,
///     ..LoraConfig::new(TargetModules::list(["q_proj", "v_proj"]))
/// };
/// let matcher = config.matcher()?;
/// assert!(matcher.is_target("model.layers.0.self_attn.q_proj")?);
/// assert!(!matcher.is_target("model.layers.0.self_attn.k_proj")?);
/// assert_eq!(matcher.scale("model.layers.0.self_attn.q_proj")?, 2.0);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct LoraConfig {
    /// Rank of the branch, where [`rank_pattern`](Self::rank_pattern) gives no other.
    #[serde(default = "default_rank")]
    pub r: usize,
    /// Numerator of the branch's factor, where [`alpha_pattern`](Self::alpha_pattern) gives no
    /// other.
    #[serde(default = "default_alpha", deserialize_with = "float")]
    pub lora_alpha: f64,
    /// Whether the factor is `α / √r` instead of `α / r`.
    #[serde(default, deserialize_with = "null_as_default")]
    pub use_rslora: bool,
    /// Probability of dropping an input of the branch while training.
    #[serde(default, deserialize_with = "float")]
    pub lora_dropout: f64,
    /// Ranks of modules that match a pattern.
    #[serde(default, deserialize_with = "null_as_default")]
    pub rank_pattern: PatternMap<usize>,
    /// Alphas of modules that match a pattern.
    #[serde(default, deserialize_with = "floats")]
    pub alpha_pattern: PatternMap<f64>,
    /// The modules to adapt.
    pub target_modules: TargetModules,
    /// Modules not to adapt after all.
    #[serde(default)]
    pub exclude_modules: Option<ModuleNames>,
    /// Indices of the layers to adapt, with a list of target modules; all if absent or empty.
    #[serde(default)]
    pub layers_to_transform: Option<OneOrMany<usize>>,
    /// Patterns of the name before a layer's index, such as `layers`.
    #[serde(default)]
    pub layers_pattern: Option<OneOrMany<String>>,
    /// Which biases of the base model are trained and saved.
    #[serde(default)]
    pub bias: LoraBias,
    /// Modules that are trained and saved as a whole.
    #[serde(default)]
    pub modules_to_save: Option<Vec<String>>,
    /// Whether the branch comes with a trained magnitude a row (DoRA, arXiv 2402.09353).
    #[serde(default, deserialize_with = "null_as_default")]
    pub use_dora: bool,
    /// Whether the base model stores its weights `[in_features, out_features]`, as GPT-2 does.
    #[serde(default, deserialize_with = "null_as_default")]
    pub fan_in_fan_out: bool,
    /// How the branch was initialized.
    #[serde(default, deserialize_with = "null_as_false")]
    pub init_lora_weights: InitLoraWeights,
    /// What the model is for, such as `CAUSAL_LM`.
    #[serde(default)]
    pub task_type: Option<String>,
    /// Where the base model came from.
    #[serde(default)]
    pub base_model_name_or_path: Option<String>,
    /// All other settings, as they were read.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

fn default_rank() -> usize {
    8
}

fn default_alpha() -> f64 {
    8.0
}

/// PEFT allows `null` where its default is an empty dictionary, and Python takes it as false.
fn null_as_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

fn null_as_false<'de, D: Deserializer<'de>>(deserializer: D) -> Result<InitLoraWeights, D::Error> {
    let init = Option::deserialize(deserializer)?;
    Ok(init.unwrap_or(InitLoraWeights::Default(false)))
}

/// Any number of Python's JSON.
fn float<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Float::deserialize(deserializer)?.0)
}

fn floats<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PatternMap<f64>, D::Error> {
    let values: PatternMap<Float> = null_as_default(deserializer)?;
    let values = values.iter();
    Ok(values.map(|(pattern, value)| (pattern, value.0)).collect())
}

/// What is wrong with the first setting that cannot be read, with its name.
fn faulty(settings: &Map<String, Value>) -> Option<String> {
    const TARGETS: &str = "target_modules";
    settings.iter().find_map(|(name, value)| {
        // Beside the one setting that must be there.
        let alone = [(TARGETS.into(), Value::Array(Vec::new()))];
        let mut alone = Map::from_iter(alone);
        alone.insert(name.clone(), value.clone());
        let text = python_json::to_string(&alone).ok()?;
        let read: Result<LoraConfig, _> = python_json::from_slice(text.as_bytes());
        let given = python_json::to_string(value).ok()?;
        let error = read.err()?.to_string();
        // The line and the column of another text.
        let error = error.split(" at line ").next()?;
        Some(format!("`{name}` is {given}: {error}"))
    })
}

impl LoraConfig {
    /// PEFT's defaults: rank 8, alpha 8, no dropout, no biases.
    pub fn new(target_modules: TargetModules) -> Self {
        Self {
            r: default_rank(),
            lora_alpha: default_alpha(),
            use_rslora: false,
            lora_dropout: 0.0,
            rank_pattern: PatternMap::default(),
            alpha_pattern: PatternMap::default(),
            target_modules,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            bias: LoraBias::None,
            modules_to_save: None,
            use_dora: false,
            fan_in_fan_out: false,
            init_lora_weights: InitLoraWeights::default(),
            task_type: None,
            base_model_name_or_path: None,
            // PEFT sets it on saving: a loaded adapter is frozen unless asked for otherwise.
            other: BTreeMap::from([("inference_mode".into(), Value::Bool(true))]),
        }
    }

    /// Reads the JSON text of an `adapter_config.json`, which can hold what Python's JSON can
    /// ([`python_json`]); `path` is named in errors.
    ///
    /// # Errors
    /// [`Nf4Error::AdapterConfig`] for text that is not the expected JSON, and those of
    /// [`check`](Self::check).
    pub fn parse(json: &[u8], path: &Path) -> Result<Self, Nf4Error> {
        let malformed = |message: String| Nf4Error::AdapterConfig {
            path: path.into(),
            message,
        };
        let value: Value =
            python_json::from_slice(json).map_err(|error| malformed(error.to_string()))?;
        // Before anything else: the settings of another method need not be those of LoRA, and an
        // option that is not supported can leave `target_modules` empty.
        let Some(settings) = value.as_object() else {
            return Err(malformed("is not a JSON object".into()));
        };
        match settings.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            _ => {
                let given = settings.get("peft_type").unwrap_or(&Value::Null);
                return Err(Nf4Error::AdapterOption {
                    key: "peft_type".into(),
                    given: given.to_string(),
                });
            }
        }
        options::check(settings)?;
        // From the text again: `Value` need not keep the order of the patterns.
        let mut config: Self = python_json::from_slice(json)
            .map_err(|error| malformed(faulty(settings).unwrap_or(error.to_string())))?;
        config.other.remove("peft_type");
        config.check()?;
        Ok(config)
    }

    /// The JSON text as PEFT writes it: that of Python, with two spaces and keys sorted.
    pub fn to_json(&self) -> String {
        // Keys are strings and nothing else can fail.
        python_json::to_string_pretty(self).unwrap_or_default()
    }

    /// Checks the values, and that they do not contradict each other.
    ///
    /// # Errors
    /// [`Nf4Error::Config`] for a rank of zero, an alpha that is not finite in f32, a dropout outside of
    /// `[0, 1)`, or layer settings that PEFT refuses; [`Nf4Error::AdapterOption`] for settings in
    /// [`other`](Self::other) that change the result and are not supported; [`Nf4Error::Pattern`]
    /// for a pattern that is not a regular expression.
    pub fn check(&self) -> Result<(), Nf4Error> {
        let invalid = |field, expected, given: String| {
            Err(Nf4Error::Config {
                field,
                expected,
                given,
            })
        };
        let settings = self
            .other
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()));
        options::check(&settings.collect())?;
        options::check_init(&self.init_lora_weights)?;
        if self.r == 0 {
            return invalid("r", "at least 1", "0".into());
        }
        if let Some((pattern, _)) = self.rank_pattern.iter().find(|(_, rank)| **rank == 0) {
            return invalid("rank_pattern", "at least 1", format!("0 for `{pattern}`"));
        }
        let alphas = self.alpha_pattern.iter().map(|(_, alpha)| alpha);
        for (field, alpha) in std::iter::once(("lora_alpha", &self.lora_alpha))
            .chain(alphas.map(|alpha| ("alpha_pattern", alpha)))
        {
            if !(*alpha as f32).is_finite() {
                return invalid(field, "a finite number of f32", alpha.to_string());
            }
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            let given = self.lora_dropout.to_string();
            return invalid("lora_dropout", "at least 0 and below 1", given);
        }
        if self.modules_to_save.iter().flatten().any(String::is_empty) {
            return invalid("modules_to_save", "names of modules", "an empty one".into());
        }
        let listed = matches!(self.target_modules, TargetModules::List(_));
        if !listed && self.layers_to_transform.is_some() {
            let given = format!("{:?}", self.layers_to_transform);
            return invalid(
                "layers_to_transform",
                "null unless target_modules is a list",
                given,
            );
        }
        if let Some(patterns) = &self.layers_pattern
            && !listed
        {
            let given = format!("{patterns:?}");
            return invalid(
                "layers_pattern",
                "null unless target_modules is a list",
                given,
            );
        }
        if let Some(patterns) = &self.layers_pattern
            && !patterns.is_empty()
            && self.layers_to_transform.is_none()
        {
            let given = format!("{patterns:?}");
            return invalid(
                "layers_pattern",
                "null unless layers_to_transform is set",
                given,
            );
        }
        self.matcher().map(|_| ())
    }
}

impl Serialize for LoraConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(untagged)]
        enum Setting<'a> {
            Json(&'a Value),
            Flag(bool),
            Count(usize),
            Number(Value),
            Real(f64),
            Text(&'a str),
            Name(&'a Option<String>),
            Names(&'a Option<Vec<String>>),
            Targets(&'a TargetModules),
            Excluded(&'a Option<ModuleNames>),
            Layers(&'a Option<OneOrMany<usize>>),
            LayersPattern(&'a Option<OneOrMany<String>>),
            Bias(LoraBias),
            Init(&'a InitLoraWeights),
            Ranks(&'a PatternMap<usize>),
            Alphas(PatternMap<Value>),
        }
        use Setting::*;
        let alphas = self.alpha_pattern.iter();
        let alphas = alphas.map(|(pattern, alpha)| (pattern.to_string(), number(*alpha)));
        let mut settings: BTreeMap<&str, Setting> = self
            .other
            .iter()
            .map(|(key, value)| (key.as_str(), Json(value)))
            .collect();
        settings.extend([
            ("peft_type", Text("LORA")),
            ("r", Count(self.r)),
            ("lora_alpha", Number(number(self.lora_alpha))),
            ("use_rslora", Flag(self.use_rslora)),
            ("lora_dropout", Real(self.lora_dropout)),
            ("rank_pattern", Ranks(&self.rank_pattern)),
            ("alpha_pattern", Alphas(alphas.collect())),
            ("target_modules", Targets(&self.target_modules)),
            ("exclude_modules", Excluded(&self.exclude_modules)),
            ("layers_to_transform", Layers(&self.layers_to_transform)),
            ("layers_pattern", LayersPattern(&self.layers_pattern)),
            ("bias", Bias(self.bias)),
            ("modules_to_save", Names(&self.modules_to_save)),
            ("use_dora", Flag(self.use_dora)),
            ("fan_in_fan_out", Flag(self.fan_in_fan_out)),
            ("init_lora_weights", Init(&self.init_lora_weights)),
            ("task_type", Name(&self.task_type)),
            (
                "base_model_name_or_path",
                Name(&self.base_model_name_or_path),
            ),
        ]);
        let mut map = serializer.serialize_map(Some(settings.len()))?;
        for (key, setting) in &settings {
            map.serialize_entry(key, setting)?;
        }
        map.end()
    }
}

/// An alpha is an integer in Python as a rule, and is written as one.
fn number(alpha: f64) -> Value {
    const EXACT: f64 = (1u64 << 53) as f64;
    if alpha.fract() == 0.0 && alpha.abs() <= EXACT {
        Value::from(alpha as i64)
    } else {
        Value::from(alpha)
    }
}
