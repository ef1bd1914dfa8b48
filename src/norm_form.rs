//! How a root-mean-square norm applies its weight.

/// How a norm applies its weight to the normalised values. The first two differ in bf16 and f16 alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NormForm {
    /// The values are cast to the type of the model, then multiplied by the weight, as in Llama.
    CastThenWeight,
    /// The values are multiplied by the weight in f32, then cast, as in OLMo 2.
    WeightThenCast,
    /// The values are multiplied by one plus the weight in f32, then cast, as in Gemma.
    OnePlusWeight,
}

impl NormForm {
    /// The weight that changes nothing.
    pub fn neutral_weight(self) -> f64 {
        match self {
            Self::CastThenWeight | Self::WeightThenCast => 1.0,
            Self::OnePlusWeight => 0.0,
        }
    }
}
