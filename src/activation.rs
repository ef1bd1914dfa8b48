//! The activations of gated MLPs, for kernels and compositions alike.

/// The activation of a gate, and what becomes of what it opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// The tanh approximation of GELU (arXiv 1606.08415), PyTorch's `approximate="tanh"`.
    GeluTanh,
    /// `x sigmoid(1.702 x)` of an `x` of at most 7, and one is added to what it opens, which is kept between -7
    /// and 7: that of gpt-oss.
    ClampedSwiglu,
}

impl Activation {
    /// The factor in the sigmoid of [`ClampedSwiglu`](Self::ClampedSwiglu): `alpha` in gpt-oss.
    pub const SWIGLU_ALPHA: f32 = 1.702;

    /// The largest number that [`ClampedSwiglu`](Self::ClampedSwiglu) lets pass: `swiglu_limit` in gpt-oss.
    pub const SWIGLU_LIMIT: f32 = 7.0;
}
