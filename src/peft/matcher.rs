//! Which modules an adapter adapts, and with what rank and factor: PEFT's rules, with its regular
//! expressions (Python's `re` as far as `fancy-regex` knows it).

use std::borrow::Cow;

use fancy_regex::Regex;

use super::config::LoraConfig;
use super::parts::Renaming;
use super::setting::{ModuleNames, OneOrMany, PatternMap, TargetModules};
use crate::error::Nf4Error;

/// Answers by the path of a module, such as `model.layers.0.self_attn.q_proj`, what the settings
/// say about it. From [`LoraConfig::matcher`].
#[derive(Debug, Clone)]
pub struct ModuleMatcher {
    excluded: Option<Names>,
    saved: Vec<Pattern>,
    targets: Targets,
    ranks: ByPattern<usize>,
    alphas: ByPattern<f64>,
    use_rslora: bool,
    /// From the names that modules are asked for by to those of the settings.
    renaming: Option<Renaming>,
}

#[derive(Debug, Clone)]
enum Targets {
    Names(Names),
    Layers(Vec<String>, Layers),
    AllLinear { is_classifier: bool },
}

#[derive(Debug, Clone)]
enum Names {
    List(Vec<String>),
    Regex(Pattern),
}

/// `layers_to_transform`, and the patterns whose group holds a layer's index.
#[derive(Debug, Clone)]
struct Layers {
    indices: Vec<usize>,
    patterns: Vec<Pattern>,
}

/// A compiled pattern, and where it came from.
#[derive(Debug, Clone)]
struct Pattern {
    field: &'static str,
    text: String,
    regex: Regex,
}

#[derive(Debug, Clone)]
struct ByPattern<T> {
    entries: Vec<(Pattern, T)>,
    default: T,
}

/// Output heads by the convention of transformers.
const OUTPUT_HEADS: [&str; 2] = ["lm_head", "embed_out"];

/// PEFT's `SEQ_CLS_HEAD_NAMES`.
const CLASSIFIER_HEADS: [&str; 2] = ["score", "classifier"];

impl LoraConfig {
    /// Compiles the settings that select modules.
    ///
    /// # Errors
    /// [`Nf4Error::Pattern`] for a pattern that is not a regular expression.
    pub fn matcher(&self) -> Result<ModuleMatcher, Nf4Error> {
        let excluded = match &self.exclude_modules {
            None => None,
            Some(ModuleNames::List(names)) if names.is_empty() => None,
            Some(ModuleNames::Regex(pattern)) if pattern.is_empty() => None,
            Some(ModuleNames::List(names)) => Some(Names::List(names.clone())),
            Some(ModuleNames::Regex(pattern)) => {
                Some(Names::Regex(Pattern::whole("exclude_modules", pattern)?))
            }
        };
        let saved = self.modules_to_save.iter().flatten().map(|module| {
            let regex = format!(r"\A(?:(^|.*\.){module}($|\..*))");
            Pattern::new("modules_to_save", module, &regex)
        });
        let targets = match &self.target_modules {
            TargetModules::AllLinear => Targets::AllLinear {
                is_classifier: self.task_type.as_deref() == Some("SEQ_CLS"),
            },
            TargetModules::Regex(pattern) => {
                Targets::Names(Names::Regex(Pattern::whole("target_modules", pattern)?))
            }
            TargetModules::List(names) => match self.layers()? {
                None => Targets::Names(Names::List(names.clone())),
                Some(layers) => Targets::Layers(names.clone(), layers),
            },
        };
        Ok(ModuleMatcher {
            excluded,
            saved: saved.collect::<Result<_, _>>()?,
            targets,
            ranks: ByPattern::new("rank_pattern", &self.rank_pattern, self.r)?,
            alphas: ByPattern::new("alpha_pattern", &self.alpha_pattern, self.lora_alpha)?,
            use_rslora: self.use_rslora,
            renaming: None,
        })
    }

    fn layers(&self) -> Result<Option<Layers>, Nf4Error> {
        let Some(indices) = &self.layers_to_transform else {
            return Ok(None);
        };
        if indices.as_slice().is_empty() {
            return Ok(None);
        }
        let patterns = match self
            .layers_pattern
            .as_ref()
            .filter(|names| !names.is_empty())
        {
            // Lazy: the first number is the layer's; an expert's index comes later.
            None => vec![Pattern::new(
                "layers_pattern",
                "",
                r"\A.*?\.[^.]*\.(?P<idx>\d+)\.",
            )?],
            Some(names) => OneOrMany::as_slice(names)
                .iter()
                .map(|name| {
                    let regex = format!(r"\A(?:^|.*?\.){name}\.(?P<idx>\d+)\.");
                    Pattern::new("layers_pattern", name, &regex)
                })
                .collect::<Result<_, _>>()?,
        };
        Ok(Some(Layers {
            indices: indices.as_slice().to_vec(),
            patterns,
        }))
    }
}

impl ModuleMatcher {
    /// Whether the adapter adapts this module.
    ///
    /// With [`TargetModules::AllLinear`] only linear modules may be asked for; the output head is
    /// known by its name: `lm_head` or `embed_out`, and for classifiers `score` or `classifier`.
    ///
    /// # Errors
    /// [`Nf4Error::Pattern`] if a pattern takes too long to match.
    pub fn is_target(&self, module: &str) -> Result<bool, Nf4Error> {
        match self.renaming {
            None => self.selects(module),
            // What the settings have no name for they do not speak of.
            Some(renaming) => match renaming.apply(module) {
                Some(module) => self.selects(&module),
                None => Ok(false),
            },
        }
    }

    /// Has modules asked for by other names than those of the settings.
    pub(super) fn set_renaming(&mut self, renaming: Renaming) {
        self.renaming = Some(renaming);
    }

    /// The name that the settings have for a module or a parameter.
    pub(super) fn named<'a>(&self, name: &'a str) -> Cow<'a, str> {
        let renamed = self.renaming.and_then(|renaming| renaming.apply(name));
        renamed.map_or(Cow::Borrowed(name), Cow::Owned)
    }

    fn selects(&self, module: &str) -> Result<bool, Nf4Error> {
        if let Some(excluded) = &self.excluded
            && excluded.contains(module)?
        {
            return Ok(false);
        }
        for pattern in &self.saved {
            if pattern.matches(module)? {
                return Ok(false);
            }
        }
        match &self.targets {
            Targets::Names(names) => names.contains(module),
            // A module given by its whole path is adapted whatever its layer.
            Targets::Layers(names, layers) => Ok(names.iter().any(|name| name == module)
                || names_module(names, module) && layers.contain(module)?),
            Targets::AllLinear { is_classifier } => {
                let name = module.rsplit_once('.').map_or(module, |(_, name)| name);
                let is_head = OUTPUT_HEADS.contains(&name)
                    || (*is_classifier && CLASSIFIER_HEADS.contains(&module));
                Ok(!is_head)
            }
        }
    }

    /// Whether the settings take the linear layers whatever their names.
    pub(super) fn takes_all_linear(&self) -> bool {
        matches!(self.targets, Targets::AllLinear { .. })
    }

    /// The rank of a module's branch.
    ///
    /// # Errors
    /// Those of [`is_target`](Self::is_target).
    pub fn rank(&self, module: &str) -> Result<usize, Nf4Error> {
        self.ranks.value(&self.named(module))
    }

    /// The alpha of a module's branch.
    ///
    /// # Errors
    /// Those of [`is_target`](Self::is_target).
    pub fn alpha(&self, module: &str) -> Result<f64, Nf4Error> {
        self.alphas.value(&self.named(module))
    }

    /// The factor of a module's branch: `α / r`, or `α / √r` with rank-stabilised LoRA.
    ///
    /// # Errors
    /// Those of [`is_target`](Self::is_target).
    pub fn scale(&self, module: &str) -> Result<f64, Nf4Error> {
        let rank = self.rank(module)? as f64;
        Ok(self.alpha(module)? / if self.use_rslora { rank.sqrt() } else { rank })
    }
}

impl Names {
    fn contains(&self, module: &str) -> Result<bool, Nf4Error> {
        match self {
            Self::List(names) => Ok(names_module(names, module)),
            Self::Regex(pattern) => pattern.matches(module),
        }
    }
}

/// Whether a name is the module's path, or the end of it after a dot.
fn names_module(names: &[String], module: &str) -> bool {
    names.iter().any(|name| {
        module
            .strip_suffix(name.as_str())
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    })
}

impl Layers {
    fn contain(&self, module: &str) -> Result<bool, Nf4Error> {
        for pattern in &self.patterns {
            if let Some(index) = pattern.group(module, "idx")? {
                let index = index.parse();
                return Ok(index.is_ok_and(|index: usize| self.indices.contains(&index)));
            }
        }
        Ok(false)
    }
}

impl Pattern {
    fn new(field: &'static str, text: &str, regex: &str) -> Result<Self, Nf4Error> {
        let compile = |regex: &str| {
            Regex::new(regex).map_err(|error| Nf4Error::Pattern {
                field,
                pattern: text.into(),
                message: error.to_string(),
            })
        };
        // By itself first: the error then says at which position of the setting.
        compile(text)?;
        let regex = compile(regex)?;
        Ok(Self {
            field,
            text: text.into(),
            regex,
        })
    }

    /// Python's `re.fullmatch`.
    fn whole(field: &'static str, text: &str) -> Result<Self, Nf4Error> {
        Self::new(field, text, &format!(r"\A(?:{text})\z"))
    }

    fn too_long(&self, error: fancy_regex::Error) -> Nf4Error {
        Nf4Error::Pattern {
            field: self.field,
            pattern: self.text.clone(),
            message: error.to_string(),
        }
    }

    fn matches(&self, module: &str) -> Result<bool, Nf4Error> {
        let found = self.regex.is_match(module);
        found.map_err(|error| self.too_long(error))
    }

    fn group<'m>(&self, module: &'m str, name: &str) -> Result<Option<&'m str>, Nf4Error> {
        let found = self.regex.captures(module);
        let captures = found.map_err(|error| self.too_long(error))?;
        Ok(captures.and_then(|captures| captures.name(name).map(|group| group.as_str())))
    }
}

impl<T: Copy> ByPattern<T> {
    fn new(field: &'static str, map: &PatternMap<T>, default: T) -> Result<Self, Nf4Error> {
        let entries = map.iter().map(|(text, &value)| {
            let pattern = Pattern::new(field, text, &format!(r"\A(.*\.)?({text})$"))?;
            Ok((pattern, value))
        });
        Ok(Self {
            entries: entries.collect::<Result<_, _>>()?,
            default,
        })
    }

    /// PEFT's `get_pattern_key`, and the look-up after it.
    fn value(&self, module: &str) -> Result<T, Nf4Error> {
        for (pattern, value) in &self.entries {
            if pattern.matches(module)? {
                return Ok(*value);
            }
        }
        // A path can be a key without matching itself as a pattern.
        let named = self
            .entries
            .iter()
            .find(|(pattern, _)| pattern.text == module);
        Ok(named.map_or(self.default, |(_, value)| *value))
    }
}
