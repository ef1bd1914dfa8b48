//! Which modules a claim is about.

use fancy_regex::Regex;

use super::{GroupWeights, LINEAR, QuantClaim, QuantMethod};
use crate::checkpoint::convert::Claim;
use crate::error::Nf4Error;
use crate::format::QuantType;

/// What the groups of a claim say of a module.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::checkpoint) struct Targeted {
    /// The types that the groups whose targets match it have.
    pub types: Vec<QuantType>,
    /// Whether one of them names it, rather than its class.
    pub by_name: bool,
    /// Whether a group targets a class of modules that names and shapes do not tell.
    pub is_unknown: bool,
}

/// A name or pattern in a list of modules.
#[derive(Debug)]
enum Pattern<'a> {
    Name(&'a str),
    /// A regular expression, and for methods that have it so an end of the path.
    Regex(Regex, Option<&'a str>),
}

impl<'a> Pattern<'a> {
    fn new(text: &'a str, method: QuantMethod) -> Result<Self, Nf4Error> {
        let (regex, end) = match method {
            QuantMethod::CompressedTensors => match text.strip_prefix("re:") {
                // Python's `re.match` begins at the start and ends anywhere.
                Some(regex) => (format!("^(?:{regex})"), None),
                None => return Ok(Self::Name(text)),
            },
            QuantMethod::ModelOpt => {
                let escaped = fancy_regex::escape(text);
                let regex = escaped.replace(r"\*", ".*").replace(r"\?", ".");
                (format!(r"^{regex}(?:\..*)?$"), None)
            }
            // transformers' `should_convert_module`.
            QuantMethod::Fp8 | QuantMethod::Mxfp4 => {
                (format!(r"^(?:{text})(?:(?<=\.)|(?=\.|$))"), Some(text))
            }
        };
        let regex = Regex::new(&regex).map_err(|error| pattern_error(text, &error))?;
        Ok(Self::Regex(regex, end))
    }

    fn matches(&self, module: &str) -> Result<bool, Nf4Error> {
        match self {
            Self::Name(name) => Ok(*name == module),
            Self::Regex(regex, end) => {
                let is_match = regex.is_match(module);
                let is_match = is_match.map_err(|error| pattern_error(regex.as_str(), &error))?;
                Ok(is_match || end.is_some_and(|end| module.ends_with(end)))
            }
        }
    }
}

/// The lists of a claim, ready to be compared with modules.
pub(in crate::checkpoint) struct Modules<'a> {
    claim: &'a QuantClaim,
    ignore: Vec<Pattern<'a>>,
    /// Of each group.
    targets: Vec<Vec<(&'a str, Pattern<'a>)>>,
}

impl QuantClaim {
    /// # Errors
    /// [`Nf4Error::Pattern`] for an entry that is no regular expression.
    pub(in crate::checkpoint) fn modules(&self) -> Result<Modules<'_>, Nf4Error> {
        let pattern = |text| Pattern::new(text, self.method);
        let targets = self.groups.iter().map(|group| {
            let targets = group.targets.iter();
            targets
                .map(|target| Ok((target.as_str(), pattern(target)?)))
                .collect()
        });
        Ok(Modules {
            claim: self,
            ignore: self
                .ignore
                .iter()
                .map(|it| pattern(it))
                .collect::<Result<_, _>>()?,
            targets: targets.collect::<Result<_, _>>()?,
        })
    }
}

impl Modules<'_> {
    /// Whether a module is to stay floats.
    ///
    /// # Errors
    /// [`Nf4Error::Pattern`] for a regular expression that takes too long to match.
    pub fn ignores(&self, module: &str) -> Result<bool, Nf4Error> {
        for pattern in &self.ignore {
            if pattern.matches(module)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether a module is to stay floats under the name that it has in another version of transformers,
    /// which adds a part before the path or takes it off.
    ///
    /// # Errors
    /// Those of [`ignores`](Self::ignores).
    pub fn may_ignore(&self, module: &str) -> Result<bool, Nf4Error> {
        let starts = module.match_indices('.').map(|(dot, _)| &module[dot + 1..]);
        for name in std::iter::once(module).chain(starts) {
            if self.ignores(name)? || self.ignores(&format!("model.{name}"))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What the groups say of a module.
    ///
    /// # Errors
    /// Those of [`ignores`](Self::ignores).
    pub fn targeted(&self, module: &str) -> Result<Targeted, Nf4Error> {
        let mut targeted = Targeted::default();
        for (group, targets) in self.claim.groups.iter().zip(&self.targets) {
            let GroupWeights::Quantized(quant_type) = group.weights else {
                continue;
            };
            for (target, pattern) in targets {
                let by_name = pattern.matches(module)?;
                let by_class = *target == LINEAR;
                if by_name || by_class {
                    targeted.types.push(quant_type);
                    targeted.by_name |= by_name;
                }
                // A class has no dot; of a module's path only short ones have none.
                let is_name = target.contains(['.', '*', ':']);
                targeted.is_unknown |= !by_name && !by_class && !is_name;
            }
        }
        Ok(targeted)
    }
}

fn pattern_error(pattern: &str, error: &fancy_regex::Error) -> Nf4Error {
    Nf4Error::Pattern {
        field: Claim::FIELD,
        pattern: pattern.into(),
        message: error.to_string(),
    }
}
