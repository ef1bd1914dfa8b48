//! What layers have of their own.

use crate::error::ModelError;
use crate::json::fields::Fields;
use crate::model::config::DecoderConfig;

/// A layer that sees all positions before it, in `layer_types`.
pub(crate) const FULL: &str = "full_attention";
/// A layer with a window.
pub(crate) const SLIDING: &str = "sliding_attention";

/// What a layer has of its own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerConfig {
    /// How many positions a token sees, itself included; all before it if none.
    pub window: Option<usize>,
    /// Its rotary embedding, an index of [`DecoderConfig::ropes`], if it has one.
    pub rope: Option<usize>,
    /// The mixture of experts that it has in place of one MLP.
    pub mixture: Option<MixtureConfig>,
}

/// The mixture of experts of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MixtureConfig {
    /// Experts.
    pub experts: usize,
    /// Experts that a token is sent to.
    pub experts_per_token: usize,
    /// Elements inside of an expert.
    pub intermediate_size: usize,
    /// Whether the weights of a token's experts are divided by their sum.
    pub normalises_weights: bool,
    /// What checkpoints call its parts, and how they stack them.
    pub form: MixtureForm,
}

/// What the checkpoints of a family call the parts of a mixture, and how they stack experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MixtureForm {
    /// A router `gate`. Experts are stored apart, or in stacks `[experts, rows, columns]` in which the rows of
    /// an expert's gate come before those of `up`.
    Qwen3Moe,
    /// A router `router`. Experts are stored in stacks `[experts, columns, rows]` in which the rows of gate and
    /// `up` come in turn, and so are biases `[experts, rows]`.
    GptOss,
}

impl DecoderConfig {
    /// Gives the window of a model to the layers that `layer_types` names, or, without it, to those of
    /// these indices.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] for other types, for another number of types than of layers, and for a
    /// layer with a window where the model has none.
    pub(crate) fn with_windows_by_type(
        mut self,
        fields: &Fields,
        window: Option<usize>,
        is_sliding: impl Fn(usize) -> bool,
    ) -> Result<Self, ModelError> {
        let types = layer_types(fields)?.unwrap_or_else(|| {
            let name = |index| if is_sliding(index) { SLIDING } else { FULL };
            let layers = 0..self.layers.len();
            layers.map(|index| name(index).to_string()).collect()
        });
        if types.len() != self.layers.len() {
            let supported = format!("a type for each of {} layers", self.layers.len());
            return Err(refused(fields, &types, supported));
        }
        for (layer, name) in self.layers.iter_mut().zip(&types) {
            layer.window = match (name.as_str(), window) {
                // The second is what transformers called it before.
                (FULL | "attention", _) => None,
                (SLIDING, Some(window)) => Some(window),
                (SLIDING, None) => {
                    let supported = format!("{FULL}, as there is no sliding window");
                    return Err(refused(fields, &types, supported));
                }
                _ => return Err(refused(fields, &types, format!("{FULL}, {SLIDING}"))),
            };
        }
        Ok(self)
    }

    /// Gives all layers the window of a model, or none. transformers treats all layers of such a family
    /// alike, whatever `layer_types` says.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] for types that say otherwise.
    pub(crate) fn with_window(
        mut self,
        fields: &Fields,
        window: Option<usize>,
    ) -> Result<Self, ModelError> {
        for layer in &mut self.layers {
            layer.window = window;
        }
        let expected = match window {
            Some(_) => SLIDING,
            None => FULL,
        };
        let layers = self.layers.len();
        match layer_types(fields)? {
            Some(types) if types.len() != layers || types.iter().any(|name| name != expected) => {
                let supported = format!("{expected} for each of {layers} layers");
                Err(refused(fields, &types, supported))
            }
            _ => Ok(self),
        }
    }
}

fn layer_types(fields: &Fields) -> Result<Option<Vec<String>>, ModelError> {
    fields.nullable("layer_types")
}

fn refused(fields: &Fields, types: &[String], supported: String) -> ModelError {
    fields.unsupported("layer_types", format!("[{}]", types.join(", ")), supported)
}
