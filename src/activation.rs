//! The activations of gated MLPs, for kernels and compositions alike.

/// The activation of a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// The tanh approximation of GELU (arXiv 1606.08415), PyTorch's `approximate="tanh"`.
    GeluTanh,
}
