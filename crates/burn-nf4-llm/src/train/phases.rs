//! The parts of a step, for those who measure them.

/// A part of a training step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// The layers, from the embedding on.
    Forward,
    /// The head and the loss, and where layers are run twice their gradients too.
    Loss,
    /// The gradients of the layers.
    Backward,
    /// The optimizer.
    Step,
}

impl Phase {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Loss => "loss",
            Self::Backward => "backward",
            Self::Step => "step",
        }
    }
}

/// Is told of a phase while it lasts, after each layer, and when it ends.
pub type PhaseHook = Box<dyn Fn(Phase)>;
