//! Ctrl-C ends what is being generated, not the program.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn_nf4_llm::ModelError;
use burn_nf4_llm::generate::Cancellation;
use signal_hook::consts::SIGINT;
use signal_hook::flag::{register, register_conditional_shutdown};

/// As shells tell of a program that Ctrl-C ended.
const INTERRUPTED: i32 = 130;

/// What Ctrl-C does.
pub struct Interrupts {
    idle: Arc<AtomicBool>,
    interrupted: Arc<AtomicBool>,
}

impl Interrupts {
    /// From now on Ctrl-C ends the program only while nothing is generated, or the second time.
    pub fn new() -> Result<Self, ModelError> {
        let idle = Arc::new(AtomicBool::new(true));
        let interrupted = Arc::new(AtomicBool::new(false));
        // They are asked in this order.
        register_conditional_shutdown(SIGINT, INTERRUPTED, idle.clone())
            .and_then(|_| register_conditional_shutdown(SIGINT, INTERRUPTED, interrupted.clone()))
            .and_then(|_| register(SIGINT, interrupted.clone()))
            .map_err(ModelError::io("Ctrl-C"))?;
        Ok(Self { idle, interrupted })
    }

    /// Runs something that Ctrl-C cancels.
    pub fn during<T>(&self, generate: impl FnOnce(Cancellation) -> T) -> T {
        self.interrupted.store(false, Ordering::Relaxed);
        self.idle.store(false, Ordering::Relaxed);
        let given = generate(self.interrupted.clone().into());
        self.idle.store(true, Ordering::Relaxed);
        given
    }
}
