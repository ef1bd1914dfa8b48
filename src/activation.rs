//! The activations of gated MLPs, for kernels and compositions alike.

/// The activation of a gate, and what is done to that which it opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// The tanh approximation of GELU (arXiv 1606.08415), PyTorch's `approximate="tanh"`.
    GeluTanh,
    /// The clamped SwiGLU of gpt-oss (arXiv 2508.10925): `x sigmoid(1.702 x)` of the gate, which is cut at
    /// [`LIMIT`](Self::LIMIT) above, times one more than what it opens, which is cut at it on both sides.
    ClampedSwiGlu,
}

impl Activation {
    /// Where [`ClampedSwiGlu`](Self::ClampedSwiGlu) cuts its operands.
    pub const LIMIT: f32 = 7.0;

    /// The factor within the sigmoid of [`ClampedSwiGlu`](Self::ClampedSwiGlu).
    pub const ALPHA: f32 = 1.702;
}
