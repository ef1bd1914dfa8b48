//! OLMo 2 (arXiv 2501.00656).

use super::llama;
use crate::error::ModelError;
use crate::json::fields::Fields;
use crate::model::NormForm;
use crate::model::config::defaults::{Defaults, flag};
use crate::model::config::{Biases, DecoderConfig, NormPlacement, QkNorm};

const DEFAULTS: Defaults = Defaults {
    vocab_size: 50_304,
    rms_norm_eps: 1e-5,
    eos_token_id: Some(50_279),
    ..llama::DEFAULTS
};

/// As Llama, with post-norm, norms of the queries and of the keys over all heads of a token, and rotation
/// in f32.
pub(super) fn read(fields: &Fields) -> Result<DecoderConfig, ModelError> {
    let olmo = DecoderConfig {
        norm_placement: NormPlacement::Post,
        norm_form: NormForm::WeightThenCast,
        qk_norm: Some(QkNorm::Projection),
        rotates_in_f32: true,
        biases: Biases::of(flag(fields, "attention_bias")?, false),
        ..DEFAULTS.read(fields)?
    };
    olmo.with_window(fields, None)
}
