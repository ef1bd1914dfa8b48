//! Gemma 3, the models of text alone (arXiv 2503.19786).

use serde_json::Map;

use super::gemma2;
use crate::error::ModelError;
use crate::json::fields::{Fields, spelled};
use crate::model::config::defaults::{Defaults, nullable_positive, nullable_size, size};
use crate::model::config::layers::{FULL, SLIDING};
use crate::model::config::rope_fields::{RopeDefaults, base};
use crate::model::config::{DecoderConfig, QkNorm};
use crate::model::rope::RopeConfig;

const DEFAULTS: Defaults = Defaults {
    vocab_size: 262_208,
    max_position_embeddings: 131_072,
    ..gemma2::DEFAULTS
};

/// The rotary embedding of layers without a window.
const GLOBAL: usize = 0;
/// That of layers with one.
const LOCAL: usize = 1;

/// As Gemma 2, with norms of each head of queries and keys in place of the soft caps, five layers with a
/// window before each one without, and another rotary embedding in layers with a window.
pub(super) fn read(fields: &Fields) -> Result<DecoderConfig, ModelError> {
    // transformers reads it and does not apply it.
    if let Some(cap) = fields.nullable::<f64>("attn_logit_softcapping")? {
        return Err(fields.unsupported("attn_logit_softcapping", cap, "null"));
    }
    let gemma = DEFAULTS.read_with_ropes(fields, ropes)?;
    let gemma = DecoderConfig {
        qk_norm: Some(QkNorm::Head),
        logits_softcap: nullable_positive(fields, "final_logit_softcapping", None)?,
        ..gemma2::with_norms_and_scales(gemma, fields)?
    };
    let window = nullable_size(fields, "sliding_window", Some(4096))?;
    let pattern = size(fields, "sliding_window_pattern", 6)?;
    let is_sliding = |index: usize| !(index + 1).is_multiple_of(pattern);
    let mut gemma = gemma.with_windows_by_type(fields, window, is_sliding)?;
    for layer in &mut gemma.layers {
        layer.rope = Some(match layer.window {
            None => GLOBAL,
            Some(_) => LOCAL,
        });
    }
    Ok(gemma)
}

/// By layer type in `rope_parameters`; in older files `rope_theta` and `rope_scaling` of layers without a
/// window, and `rope_local_base_freq` of those with one.
fn ropes(fields: &Fields, defaults: RopeDefaults) -> Result<Vec<RopeConfig>, ModelError> {
    const NAME: &str = "rope_parameters";
    const TYPES: [&str; 2] = [FULL, SLIDING];
    let none = || fields.of(NAME, Map::new());
    let by_type = fields.object(NAME)?.unwrap_or_else(none);
    for name in by_type.names() {
        let value = by_type.value(name).filter(|value| !value.is_null());
        if let Some(value) = value.filter(|_| !TYPES.contains(&name)) {
            return Err(by_type.unsupported(name, spelled(value), TYPES.join(", ")));
        }
    }
    let [global, local] = TYPES.map(|name| {
        let none = || by_type.of(name, Map::new());
        Ok::<_, ModelError>(by_type.object(name)?.unwrap_or_else(none))
    });
    let (mut global, local) = (global?, local?);
    if let Some(scaling) = fields.object("rope_scaling")? {
        // transformers 4 scales by it; transformers 5 passes over it, and computes something else.
        if let Some(older) = scaling.nullable::<String>("type")?
            && older != "default"
            && scaling.value("rope_type").is_none()
        {
            return Err(scaling.unsupported(
                "type",
                older,
                "the name rope_type, which transformers 5 reads",
            ));
        }
        let mut entries = global.into_entries();
        entries.extend(scaling.into_entries());
        global = fields.of("rope_scaling", entries);
    }
    let read = |parameters: &Fields, field, theta| {
        let defaults = RopeDefaults {
            theta: base(fields, field, theta)?,
            ..defaults
        };
        RopeConfig::from_parameters(parameters, parameters, defaults)
    };
    Ok(vec![
        read(&global, "rope_theta", 1e6)?,
        read(&local, "rope_local_base_freq", 1e4)?,
    ])
}
