//! A gradient that nodes of a graph hand to the one that they come from.

use std::sync::{Arc, Mutex, PoisonError};

/// Where the uses of a tensor put its gradient, for a node in front of them. Registered by themselves, Burn would
/// add the gradients of two uses in an operation of its own.
#[derive(Debug)]
pub(super) struct SharedGradient<F>(Arc<Mutex<Option<F>>>);

impl<F> Clone for SharedGradient<F> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<F> Default for SharedGradient<F> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<F> SharedGradient<F> {
    /// Takes what was put there.
    pub fn take(&self) -> Option<F> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Puts it there, in the place of what is.
    pub fn put(&self, gradient: F) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(gradient);
    }
}
