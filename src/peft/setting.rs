//! The settings that have more than one form, or an order.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::nn::LoraInit;

/// The modules that an adapter adapts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// Modules of these paths, or whose path ends with a dot and one of them.
    List(Vec<String>),
    /// Modules whose whole path matches a regular expression.
    Regex(String),
    /// Every linear module but the output head.
    AllLinear,
}

/// What stands for [`TargetModules::AllLinear`] in JSON.
const ALL_LINEAR: &str = "all-linear";

impl TargetModules {
    /// A [`List`](Self::List).
    pub fn list<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Self::List(names.into_iter().map(Into::into).collect())
    }
}

impl Serialize for TargetModules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::List(names) => names.serialize(serializer),
            Self::Regex(pattern) => pattern.serialize(serializer),
            Self::AllLinear => ALL_LINEAR.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match ModuleNames::deserialize(deserializer)? {
            ModuleNames::List(names) => Self::List(names),
            ModuleNames::Regex(name) if name.to_lowercase() == ALL_LINEAR => Self::AllLinear,
            ModuleNames::Regex(pattern) => Self::Regex(pattern),
        })
    }
}

/// Modules by name, or by a regular expression.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a list of module names or a regular expression"
)]
pub enum ModuleNames {
    /// Modules of these paths, or whose path ends with a dot and one of them.
    List(Vec<String>),
    /// Modules whose whole path matches a regular expression.
    Regex(String),
}

/// A setting that PEFT takes alone or as a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected one value or a list")]
pub enum OneOrMany<T> {
    /// One value.
    One(T),
    /// A list.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// The values.
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Many(values) => values,
        }
    }
}

impl OneOrMany<String> {
    /// Empty in Python's sense: an empty list, or an empty string.
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::One(value) => value.is_empty(),
            Self::Many(values) => values.is_empty(),
        }
    }
}

/// Which biases of the base model an adapter trains and holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraBias {
    /// None.
    #[default]
    None,
    /// Every bias of the model.
    All,
    /// Those of the adapted modules.
    LoraOnly,
}

impl<'de> Deserialize<'de> for LoraBias {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // By its name, so that an error says what was met in the place of one.
        match String::deserialize(deserializer)?.as_str() {
            "none" => Ok(Self::None),
            "all" => Ok(Self::All),
            "lora_only" => Ok(Self::LoraOnly),
            other => Err(D::Error::unknown_variant(
                other,
                &["none", "all", "lora_only"],
            )),
        }
    }
}

/// How a branch was initialized before it was trained: PEFT's `true`, `false` or a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected true, false or the name of an initialization"
)]
pub enum InitLoraWeights {
    /// The default (`true`: `B` is zero) or random in both (`false`).
    Default(bool),
    /// Another way.
    Named(String),
}

impl InitLoraWeights {
    /// How fresh factors begin, if that is known here.
    pub(crate) fn of_fresh(&self) -> Option<LoraInit> {
        match self {
            Self::Default(true) => Some(LoraInit::ZeroB),
            Self::Default(false) => Some(LoraInit::RandomB),
            Self::Named(name) => {
                let is_gaussian = name.eq_ignore_ascii_case("gaussian");
                is_gaussian.then_some(LoraInit::Gaussian)
            }
        }
    }
}

impl Default for InitLoraWeights {
    fn default() -> Self {
        Self::Default(true)
    }
}

/// Values by pattern, in order: the first pattern that matches counts.
#[derive(Debug, Clone, PartialEq)]
pub struct PatternMap<T>(Vec<(String, T)>);

impl<T> PatternMap<T> {
    /// The patterns and their values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &T)> {
        self.0
            .iter()
            .map(|(pattern, value)| (pattern.as_str(), value))
    }

    /// Sets the value of a pattern; a new one comes last.
    pub fn insert(&mut self, pattern: impl Into<String>, value: T) {
        let pattern = pattern.into();
        // As in a Python dictionary, where a repeated key keeps its first place.
        match self.0.iter_mut().find(|(known, _)| *known == pattern) {
            Some((_, slot)) => *slot = value,
            None => self.0.push((pattern, value)),
        }
    }
}

impl<T> Default for PatternMap<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<K: Into<String>, T> FromIterator<(K, T)> for PatternMap<T> {
    fn from_iter<I: IntoIterator<Item = (K, T)>>(entries: I) -> Self {
        let mut map = Self::default();
        for (pattern, value) in entries {
            map.insert(pattern, value);
        }
        map
    }
}

impl<T: Serialize> Serialize for PatternMap<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for PatternMap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = PatternMap<T>;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an object of values by pattern")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
                let mut map = PatternMap::default();
                while let Some((pattern, value)) = access.next_entry::<String, T>()? {
                    map.insert(pattern, value);
                }
                Ok(map)
            }
        }
        deserializer.deserialize_map(Entries(PhantomData))
    }
}
