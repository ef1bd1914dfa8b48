//! The parts of models of text and images, and the names that they have had.
//!
//! In memory transformers 5 has the text under `model.language_model`, and so has an adapter of the whole
//! model; files have it as transformers 4 did, under `language_model.model`. A model of the text alone has it
//! under `model`.

use std::collections::BTreeMap;

use super::adapter::Adapter;

/// How the names of a model are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// A model of text alone.
    Text,
    /// Text and images, in files and in transformers 4.
    Stored,
    /// Text and images, in transformers 5.
    InMemory,
}

/// Parts: the text, its head, and what is of images.
const PARTS: usize = 4;

impl Layout {
    /// The layout of a model with these names.
    pub fn of<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let mut names = names.into_iter();
        let found = names.find_map(|name| {
            let layouts = [Self::InMemory, Self::Stored].into_iter();
            let mut own = layouts.filter(|layout| layout.own_part(name));
            own.next()
        });
        found.unwrap_or(Self::Text)
    }

    /// Whether a name has a beginning that no other layout has.
    fn own_part(self, name: &str) -> bool {
        let of_text = Self::Text.beginnings();
        let own = self.beginnings().into_iter().flatten();
        let mut own = own.filter(|beginning| !of_text.contains(&Some(beginning)));
        own.any(|beginning| name.starts_with(beginning))
    }

    /// How the names of each part begin.
    fn beginnings(self) -> [Option<&'static str>; PARTS] {
        match self {
            Self::Text => [Some("model."), Some("lm_head."), None, None],
            Self::Stored => [
                Some("language_model.model."),
                Some("language_model.lm_head."),
                Some("vision_tower."),
                Some("multi_modal_projector."),
            ],
            Self::InMemory => [
                Some("model.language_model."),
                Some("lm_head."),
                Some("model.vision_tower."),
                Some("model.multi_modal_projector."),
            ],
        }
    }
}

/// Names of one layout, to be given those of another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Renaming {
    from: Layout,
    to: Layout,
}

/// What becomes of a name.
enum Renamed {
    As(String),
    /// It is of a part that the other layout does not have.
    LeftOut,
    /// It is of no known part.
    Unknown,
}

impl Renaming {
    fn reversed(self) -> Self {
        Self {
            from: self.to,
            to: self.from,
        }
    }

    /// The name in the other layout, if it has one.
    pub fn apply(self, name: &str) -> Option<String> {
        match self.rename(name) {
            Renamed::As(name) => Some(name),
            _ => None,
        }
    }

    fn rename(self, name: &str) -> Renamed {
        let parts = self.from.beginnings().into_iter();
        for (from, to) in parts.zip(self.to.beginnings()) {
            // A path can be that of a part itself.
            let is_whole = |from: &&str| from.strip_suffix('.') == Some(name);
            let rest = from.and_then(|from| match is_whole(&from) {
                true => Some(None),
                false => name.strip_prefix(from).map(Some),
            });
            match (rest, to) {
                (None, _) => continue,
                (Some(_), None) => return Renamed::LeftOut,
                (Some(None), Some(to)) => return Renamed::As(to.trim_end_matches('.').into()),
                (Some(Some(rest)), Some(to)) => return Renamed::As(format!("{to}{rest}")),
            }
        }
        Renamed::Unknown
    }
}

impl Adapter {
    /// The part of an adapter on a model of text and images that is of its text, under the names of a model of
    /// that text alone, and the names of what is left out. An adapter of a model of text stays as it is.
    ///
    /// The settings still speak of the names that the whole model has, and so does what
    /// [`save`](Self::save) writes.
    pub fn text_part(self) -> (Self, Vec<String>) {
        self.in_layout(Layout::Text)
    }

    /// The adapter under the names of a base model, where that is one of text and images.
    pub(super) fn for_base<'a>(&self, base: impl IntoIterator<Item = &'a str>) -> Self {
        match Layout::of(base) {
            Layout::Text => self.clone(),
            layout => self.clone().in_layout(layout).0,
        }
    }

    fn in_layout(mut self, to: Layout) -> (Self, Vec<String>) {
        let from = Layout::of(self.names());
        if from == to {
            return (self, Vec::new());
        }
        let renaming = Renaming { from, to };
        let mut left_out = Vec::new();
        self.modules = renamed(self.modules, renaming, &mut left_out);
        self.embeddings = renamed(self.embeddings, renaming, &mut left_out);
        self.full = renamed(self.full, renaming, &mut left_out);
        self.matcher.set_renaming(renaming.reversed());
        (self, left_out)
    }

    /// The names of all that it changes.
    fn names(&self) -> impl Iterator<Item = &str> {
        let modules = self.modules.keys().chain(self.embeddings.keys());
        modules.chain(self.full.keys()).map(String::as_str)
    }
}

fn renamed<T>(
    entries: BTreeMap<String, T>,
    renaming: Renaming,
    left_out: &mut Vec<String>,
) -> BTreeMap<String, T> {
    let entries = entries.into_iter();
    let entries = entries.filter_map(|(name, value)| match renaming.rename(&name) {
        Renamed::As(renamed) => Some((renamed, value)),
        Renamed::Unknown => Some((name, value)),
        Renamed::LeftOut => {
            left_out.push(name);
            None
        }
    });
    entries.collect()
}
