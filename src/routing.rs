//! How tokens are sent to experts: what the host and the kernel have in common.

use crate::error::Nf4Error;

/// How the scores of a router become the experts of a token and their weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RouteForm {
    /// A softmax over all experts, of which the likeliest are taken, as in Mixtral and Qwen.
    SoftmaxThenTopK {
        /// Whether the weights of a token's experts are divided by their sum. It is then the same as
        /// [`TopKThenSoftmax`](Self::TopKThenSoftmax).
        normalise: bool,
    },
    /// A softmax over the experts with the highest scores alone, as in gpt-oss.
    TopKThenSoftmax,
}

impl RouteForm {
    /// Whether the weights of a token's experts add up to one.
    pub(crate) const fn is_normalised(self) -> bool {
        match self {
            Self::SoftmaxThenTopK { normalise } => normalise,
            Self::TopKThenSoftmax => true,
        }
    }
}

/// Experts that tokens can be sent to at most.
pub const MAX_EXPERTS: usize = 1024;

/// Checks the sizes of a choice of experts.
///
/// # Errors
/// [`Nf4Error::ElementCount`] for no tokens, no experts, more than [`MAX_EXPERTS`] or more scores than can be
/// addressed, [`Nf4Error::Config`] unless a token has one expert or more, up to all.
pub(crate) fn check(tokens: usize, experts: usize, per_token: usize) -> Result<(), Nf4Error> {
    let bytes = [experts, 8]
        .iter()
        .try_fold(tokens, |n, &m| n.checked_mul(m));
    let fits = bytes.is_some_and(|bytes| (1..isize::MAX as usize).contains(&bytes));
    if !fits || experts > MAX_EXPERTS {
        return Err(Nf4Error::ElementCount {
            tensor: "logits".into(),
            shape: vec![tokens, experts],
        });
    }
    if !(1..=experts).contains(&per_token) {
        return Err(Nf4Error::Config {
            field: "per_token",
            expected: "at least one expert and at most all",
            given: format!("{per_token} of {experts}"),
        });
    }
    Ok(())
}
