//! Layers that other programs fuse into one, so that their NVFP4 weights need one scale of the tensor.

use std::collections::{BTreeSet, HashMap};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::values::Values;
use crate::error::Nf4Error;
use crate::format::{FloatElement, FloatType, TensorScale, nvfp4_global_scale, with_float_type};

/// The layers that vLLM computes as one, by the last part of their paths. It decodes them with one scale, as
/// llm-compressor provides for.
const FUSED: [&[&str]; 3] = [
    &["q_proj", "k_proj", "v_proj"],
    &["gate_proj", "up_proj"],
    &["w1", "w3"],
];

/// The scales of NVFP4 tensors, by the first weight of those that share one.
#[derive(Default)]
pub(super) struct FusedScales {
    known: HashMap<String, TensorScale>,
}

impl FusedScales {
    /// The scale of a weight that shares it with others of those that are quantized, of which the largest
    /// magnitude of all decides; `None` for one that stands alone. `dtype` is what weights are rounded
    /// to first.
    pub fn of(
        &mut self,
        source: &Checkpoint,
        key: &str,
        quantized: &BTreeSet<String>,
        dtype: Option<FloatType>,
    ) -> Result<Option<TensorScale>, Nf4Error> {
        let together = together(key, quantized);
        let [first, _, ..] = together.as_slice() else {
            return Ok(None);
        };
        if let Some(&scale) = self.known.get(first) {
            return Ok(Some(scale));
        }
        let mut max = 0.0f32;
        for key in &together {
            if let Ok(values) = Values::open(source, key)? {
                max = max.max(values.max_abs());
            }
        }
        // The largest of rounded magnitudes is the largest one rounded.
        if let Some(dtype) = dtype {
            max = with_float_type!(dtype, T => T::from_f32(max).to_f32());
        }
        let scale = TensorScale::Divides(nvfp4_global_scale(max));
        self.known.insert(first.clone(), scale);
        Ok(Some(scale))
    }
}

/// The weights that are fused with one, itself among them.
fn together(key: &str, quantized: &BTreeSet<String>) -> Vec<String> {
    let Some(module) = key.strip_suffix(".weight") else {
        return Vec::new();
    };
    let (parent, name) = module.rsplit_once('.').unwrap_or(("", module));
    let Some(names) = FUSED.iter().find(|names| names.contains(&name)) else {
        return Vec::new();
    };
    let keys = names.iter().map(|name| match parent {
        "" => format!("{name}.weight"),
        parent => format!("{parent}.{name}.weight"),
    });
    keys.filter(|key| quantized.contains(key)).collect()
}
