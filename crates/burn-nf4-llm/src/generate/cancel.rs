//! Ending a generation from outside.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A flag that ends a generation between two tokens, or between two passes over a prompt. What was generated
/// until then is returned.
///
/// Clones share the flag: one goes into the [`Request`](crate::generate::Request), another to whoever may
/// cancel, a callback or another thread. It stays set.
///
/// ```
/// use burn_nf4_llm::generate::Cancellation;
///
/// let cancellation = Cancellation::new();
/// let elsewhere = cancellation.clone();
/// std::thread::spawn(move || elsewhere.cancel()).join().unwrap();
/// assert!(cancellation.is_cancelled());
/// ```
#[derive(Debug, Clone, Default)]
pub struct Cancellation(Arc<AtomicBool>);

impl Cancellation {
    /// Nothing is cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the generations that have this flag.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether they are to end.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// From a flag that something else sets, such as a handler of signals.
impl From<Arc<AtomicBool>> for Cancellation {
    fn from(flag: Arc<AtomicBool>) -> Self {
        Self(flag)
    }
}
