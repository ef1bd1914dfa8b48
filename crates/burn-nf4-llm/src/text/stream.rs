//! Text as its tokens come.

use std::ops::ControlFlow;

use crate::error::ModelError;
use crate::text::Text;
use crate::text::token_bytes::TokenBytes;

/// Texts that end a text, such as `"\n\n"` or `"User:"`.
///
/// They are found as `stop_strings` of transformers are: across the borders of tokens, byte by byte, and the
/// names of special tokens too, which no text shows. The prompt does not count, only what comes behind it.
#[derive(Debug, Clone, Default)]
pub struct StopStrings(Vec<String>);

impl StopStrings {
    /// Any of these.
    ///
    /// # Errors
    /// [`ModelError::Setting`] for an empty one.
    pub fn new<S: Into<String>>(strings: impl IntoIterator<Item = S>) -> Result<Self, ModelError> {
        let strings: Vec<String> = strings.into_iter().map(Into::into).collect();
        match strings.iter().any(String::is_empty) {
            true => Err(ModelError::setting(
                "a stop string",
                "empty",
                "at least one character",
            )),
            false => Ok(Self(strings)),
        }
    }

    /// These and others.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn and<S: Into<String>>(
        self,
        others: impl IntoIterator<Item = S>,
    ) -> Result<Self, ModelError> {
        let others = others.into_iter().map(Into::into);
        Self::new(self.0.into_iter().chain(others))
    }

    /// None.
    pub fn none() -> Self {
        Self::default()
    }

    /// Where the first one begins that ends behind `old` bytes.
    fn find(&self, bytes: &[u8], old: usize) -> Option<usize> {
        let begin = |stop: &String| {
            let from = (old + 1).saturating_sub(stop.len());
            let mut places = bytes[from..].windows(stop.len());
            places
                .position(|part| part == stop.as_bytes())
                .map(|at| from + at)
        };
        self.0.iter().filter_map(begin).min()
    }

    /// The most bytes at the end that one of them may begin with.
    fn begun(&self, bytes: &[u8]) -> usize {
        let begun = |stop: &String| {
            let longest = (stop.len() - 1).min(bytes.len());
            let mut lengths = (1..=longest).rev();
            lengths.find(|length| bytes.ends_with(&stop.as_bytes()[..*length]))
        };
        self.0.iter().filter_map(begun).max().unwrap_or(0)
    }
}

/// A piece of a text.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Piece {
    /// May be empty.
    pub text: String,
    /// Whether a stop string is there, which ends the text before it.
    pub stops: bool,
}

impl Piece {
    /// For [`generate`](crate::generate::generate): ends the row at a stop string.
    pub fn flow(&self) -> ControlFlow<()> {
        match self.stops {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

/// The text of one row, in pieces: whole characters, and nothing that may become a stop string. The pieces
/// put together are what [`Text::decode`] gives for all tokens, up to the stop string.
pub struct TextStream<'a> {
    text: &'a Text,
    token_bytes: &'a TokenBytes,
    stop: &'a StopStrings,
    tokens: Vec<u32>,
    /// The tokens from here on have no settled text yet; those from `context` on are decoded with them.
    settled_tokens: usize,
    context: usize,
    /// Whether the last token is a byte, which those to come may change.
    in_run: bool,
    /// The text of settled tokens.
    settled: String,
    /// Bytes of it that were handed out.
    given: usize,
    /// What stop strings are looked for in, and which bytes of it the text shows.
    bytes: Vec<u8>,
    shown: Vec<bool>,
    /// Where the bytes of each token begin.
    starts: Vec<usize>,
    stopped: bool,
}

impl<'a> TextStream<'a> {
    /// An empty text.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn new(text: &'a Text, stop: &'a StopStrings) -> Result<Self, ModelError> {
        Ok(Self {
            text,
            token_bytes: text.token_bytes()?,
            stop,
            tokens: Vec::new(),
            settled_tokens: 0,
            context: 0,
            in_run: false,
            settled: String::new(),
            given: 0,
            bytes: Vec::new(),
            shown: Vec::new(),
            starts: Vec::new(),
            stopped: false,
        })
    }

    /// Takes the next token and gives the text that is certain now. Behind a stop string there is none.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn push(&mut self, token: u32) -> Result<Piece, ModelError> {
        if self.stopped {
            return Ok(Piece {
                text: String::new(),
                stops: true,
            });
        }
        self.tokens.push(token);
        let name = self.text.tokenizer.id_to_token(token);
        let name = name.filter(|_| !self.text.is_special(token));
        let is_shown = name.is_some();
        if let Some(name) = name {
            self.in_run = self.token_bytes.is_of_run(&name);
        }
        if !self.stop.0.is_empty() {
            let old = self.bytes.len();
            let bytes = self.token_bytes.bytes(&self.text.tokenizer, token)?;
            self.starts.push(old);
            self.shown.resize(old + bytes.len(), is_shown);
            self.bytes.extend(bytes);
            if let Some(at) = self.stop.find(&self.bytes, old) {
                return self.stop_at(at);
            }
        }
        self.settle()?;
        let end = self.settled.len() - self.held();
        Ok(Piece {
            text: self.give(end),
            stops: false,
        })
    }

    /// The rest of a text that has ended: what was held back.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn finish(&mut self) -> Result<String, ModelError> {
        if !self.stopped {
            self.settled += &self.unsettled()?;
            self.settled_tokens = self.tokens.len();
        }
        self.stopped = true;
        Ok(self.give(self.settled.len()))
    }

    /// All pieces given so far.
    pub fn text(&self) -> &str {
        &self.settled[..self.given]
    }

    /// The text of the tokens that have none yet, whatever it may become.
    fn unsettled(&self) -> Result<String, ModelError> {
        let whole = self.text.decode(&self.tokens[self.context..])?;
        let before = self
            .text
            .decode(&self.tokens[self.context..self.settled_tokens])?;
        Ok(whole.strip_prefix(&before).unwrap_or_default().into())
    }

    /// Settles the text of all tokens, unless it may change with those to come.
    fn settle(&mut self) -> Result<(), ModelError> {
        if self.in_run {
            return Ok(());
        }
        let new = self.unsettled()?;
        // The last character may have further bytes.
        if !new.is_empty() && !new.ends_with(char::REPLACEMENT_CHARACTER) {
            self.settled += &new;
            self.context = self.settled_tokens;
            self.settled_tokens = self.tokens.len();
        }
        Ok(())
    }

    /// Bytes at the end of the settled text that may be the beginning of a stop string.
    fn held(&self) -> usize {
        let begin = self.bytes.len() - self.stop.begun(&self.bytes);
        let starts = self.starts.get(self.settled_tokens);
        let end = starts.copied().unwrap_or(self.bytes.len());
        let held = self.shown_text(begin.min(end), end).len();
        held.min(self.settled.len() - self.given)
    }

    /// The text that some bytes show.
    fn shown_text(&self, begin: usize, end: usize) -> String {
        let places = begin..end;
        let shown: Vec<u8> = places
            .filter(|&at| self.shown[at])
            .map(|at| self.bytes[at])
            .collect();
        String::from_utf8_lossy(&shown).into_owned()
    }

    /// Ends the text before the stop string that begins at a byte.
    fn stop_at(&mut self, at: usize) -> Result<Piece, ModelError> {
        self.stopped = true;
        let mut text = self.settled.clone() + &self.unsettled()?;
        let behind = self.shown_text(at, self.bytes.len());
        if text.ends_with(&behind) {
            text.truncate(text.len() - behind.len());
        } else if behind.ends_with(&text) {
            // A decoder may have taken white space away at the start.
            text.clear();
        } else {
            let within = self.starts.partition_point(|&start| start <= at) - 1;
            text = self.text.decode(&self.tokens[..within])?;
            text += &self.shown_text(self.starts[within], at);
        }
        // What was given stays.
        if text.len() < self.given || !text.is_char_boundary(self.given) {
            text = self.text().into();
        }
        self.settled = text;
        Ok(Piece {
            text: self.give(self.settled.len()),
            stops: true,
        })
    }

    /// Hands out the text up to a byte.
    fn give(&mut self, end: usize) -> String {
        let begin = self.given;
        let mut ends = (begin..=end).rev();
        let is_whole = |end: &usize| self.settled.is_char_boundary(*end);
        self.given = ends.find(is_whole).unwrap_or(begin);
        self.settled[begin..self.given].into()
    }
}
