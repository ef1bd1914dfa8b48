//! Generating text rather than tokens.

use std::ops::ControlFlow;

use crate::error::ModelError;
use crate::generate::{Report, Request, Session, generate};
use crate::model::Decoder;
use crate::model::config::DecoderConfig;
use crate::text::{StopStrings, Text, TextStream};

/// The texts, and how it went.
#[derive(Debug, Clone)]
pub struct TextReport {
    /// The text of each row, without special tokens, up to its stop string.
    pub texts: Vec<String>,
    /// Its tokens are those generated, the stop string included: decoded they are what transformers returns
    /// with `stop_strings`.
    pub report: Report,
}

/// Continues every prompt as [`generate`] does, up to a stop string. `on_text` gets the text of each row as it
/// comes, in whole characters.
///
/// # Errors
/// Those of [`generate`], of the tokenizer, and of `on_text`.
pub fn generate_text(
    model: &Decoder,
    config: &DecoderConfig,
    text: &Text,
    request: &Request,
    stop: &StopStrings,
    on_text: impl FnMut(usize, &str) -> Result<(), ModelError>,
) -> Result<TextReport, ModelError> {
    let mut rows = Rows::new(text, request.prompts.len(), stop, on_text)?;
    let report = generate(model, config, request, |row, id| rows.push(row, id))?;
    rows.finish(report)
}

impl Session<'_> {
    /// Continues a prompt as [`generate_text`] does.
    ///
    /// # Errors
    /// Those of [`Session::generate`], of the tokenizer, and of `on_text`.
    pub fn generate_text(
        &mut self,
        text: &Text,
        request: &Request,
        stop: &StopStrings,
        on_text: impl FnMut(usize, &str) -> Result<(), ModelError>,
    ) -> Result<TextReport, ModelError> {
        let mut rows = Rows::new(text, request.prompts.len(), stop, on_text)?;
        let report = self.generate(request, |row, id| rows.push(row, id))?;
        rows.finish(report)
    }
}

/// The texts of a batch.
struct Rows<'a, F> {
    streams: Vec<TextStream<'a>>,
    on_text: F,
}

impl<'a, F: FnMut(usize, &str) -> Result<(), ModelError>> Rows<'a, F> {
    fn new(
        text: &'a Text,
        rows: usize,
        stop: &'a StopStrings,
        on_text: F,
    ) -> Result<Self, ModelError> {
        let streams: Result<_, _> = (0..rows).map(|_| text.stream(stop)).collect();
        Ok(Self {
            streams: streams?,
            on_text,
        })
    }

    fn push(&mut self, row: usize, id: u32) -> Result<ControlFlow<()>, ModelError> {
        let piece = self.streams[row].push(id)?;
        if !piece.text.is_empty() {
            (self.on_text)(row, &piece.text)?;
        }
        Ok(piece.flow())
    }

    fn finish(mut self, report: Report) -> Result<TextReport, ModelError> {
        let mut texts = Vec::with_capacity(self.streams.len());
        for (row, stream) in self.streams.iter_mut().enumerate() {
            let rest = stream.finish()?;
            if !rest.is_empty() {
                (self.on_text)(row, &rest)?;
            }
            texts.push(stream.text().into());
        }
        Ok(TextReport { texts, report })
    }
}
