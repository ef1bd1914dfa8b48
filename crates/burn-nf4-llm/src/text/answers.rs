//! Which tokens of an example are to be learned: what the assistant says, or a completion.

use std::ops::Range;

use crate::error::ModelError;
use crate::text::Text;
use crate::text::chat::{Chat, Conversation, Ending};

const ASSISTANT: &str = "assistant";

/// A text, and bytes of it.
type Spans = (String, Vec<Range<usize>>);

/// Tokens, and for each whether it belongs to what is to be learned.
pub type LearnedTokens = (Vec<u32>, Vec<bool>);

impl Text {
    /// The tokens of a conversation, and whether the assistant says them: the template marks it with
    /// `{% generation %}`, or it is what the template adds with a message of the assistant behind what asks
    /// for an answer.
    ///
    /// # Errors
    /// [`ModelError::Template`] as well where a text of the first messages does not begin the whole text, so
    /// that nobody knows where an answer lies.
    pub fn encode_answers(&self, conversation: &Conversation) -> Result<LearnedTokens, ModelError> {
        let (text, spans) = self.chat.render_answers(conversation)?;
        self.encode_spans(&text, &spans, false)
    }

    /// The tokens of a conversation, and whether they come behind the prompt, its first messages.
    ///
    /// # Errors
    /// [`ModelError::Template`] as well where the text of the prompt does not begin the whole text.
    pub fn encode_completion(
        &self,
        conversation: &Conversation,
        prompt: usize,
    ) -> Result<LearnedTokens, ModelError> {
        let (text, spans) = self.chat.render_completion(conversation, prompt)?;
        self.encode_spans(&text, &spans, false)
    }

    /// The tokens of a text, with the special ones that the tokenizer adds, and whether they lie, as a whole
    /// or in part, behind its first bytes.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn encode_behind(
        &self,
        text: &str,
        prompt_bytes: usize,
    ) -> Result<LearnedTokens, ModelError> {
        let behind = prompt_bytes..text.len();
        self.encode_spans(text, &[behind], true)
    }

    /// The tokens of a text, and whether they have bytes in one of the spans, as transformers has it.
    fn encode_spans(
        &self,
        text: &str,
        spans: &[Range<usize>],
        special: bool,
    ) -> Result<LearnedTokens, ModelError> {
        let encoding = self.encoding(text, special)?;
        let tokens = encoding.get_offsets().iter();
        let tokens = tokens.zip(encoding.get_special_tokens_mask());
        let (mut reached, mut last) = (0, false);
        let learned = tokens.map(|(&(start, end), &added)| {
            // Some tokenizers leave out the white space of a token: it begins where the last one ends.
            let start = start.min(reached);
            reached = reached.max(end);
            let within = |span: &Range<usize>| start < span.end && end > span.start;
            // What the tokenizer adds has no bytes: it belongs to what is before it.
            last = match added {
                0 => spans.iter().any(within),
                _ => last,
            };
            last
        });
        Ok((encoding.get_ids().to_vec(), learned.collect()))
    }
}

impl Chat {
    /// The text of a conversation, and where the assistant speaks.
    fn render_answers(&self, conversation: &Conversation) -> Result<Spans, ModelError> {
        let template = self.template(conversation.tools.is_some())?;
        let messages = &conversation.messages;
        let whole = self.render(conversation, Ending::Whole)?;
        if template.marks_answers() {
            let messages = self.shown(conversation, template)?;
            let variables = self.variables(conversation, &messages, false);
            return template
                .render_marked(variables)
                .map_err(ModelError::Template);
        }
        let mut spans = Vec::new();
        for (index, message) in messages.iter().enumerate() {
            if message.role() != ASSISTANT {
                continue;
            }
            let first = |count, ending| self.render_first(conversation, count, ending, template);
            let before = first(index, Ending::Prompt)?;
            let through = first(index + 1, Ending::Whole)?;
            if !through.starts_with(&before) || !whole.starts_with(&through) {
                return Err(no_beginning(&format!(
                    "where message {} of the assistant begins and ends",
                    index + 1
                )));
            }
            spans.push(before.len()..through.len());
        }
        Ok((whole, spans))
    }

    /// The text of a conversation, and what comes behind its first messages.
    fn render_completion(
        &self,
        conversation: &Conversation,
        prompt: usize,
    ) -> Result<Spans, ModelError> {
        let template = self.template(conversation.tools.is_some())?;
        let whole = self.render(conversation, Ending::Whole)?;
        let before = self.render_first(conversation, prompt, Ending::Prompt, template)?;
        if !whole.starts_with(&before) {
            return Err(no_beginning("where the completion begins"));
        }
        let span = before.len()..whole.len();
        Ok((whole, vec![span]))
    }
}

fn no_beginning(what: &str) -> ModelError {
    ModelError::Template(format!(
        "it does not show {what}: the text of the messages up to there is not the beginning of the text of \
         all. A template that marks answers with {{% generation %}} would, and to learn all tokens nothing \
         has to be known of it"
    ))
}
