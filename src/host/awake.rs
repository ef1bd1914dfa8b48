//! Threads that stay awake between small pieces of work.

use std::hint;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rayon::Yield;

/// How often a thread looks for work before it begins to doze: some 2 ms.
const IDLE_ROUNDS: usize = 20_000;

/// How long it dozes at a time.
const DOZE: Duration = Duration::from_micros(100);

static AWAKE: AtomicUsize = AtomicUsize::new(0);

/// Threads of a rayon pool that do not fall asleep; see [`keep_awake`].
#[derive(Debug)]
pub struct Awake {
    stop: Arc<AtomicBool>,
}

/// Keeps the threads of the current rayon pool looking for work, instead of being woken for each piece of it,
/// until what is returned is dropped. Waking takes some 20 us, and a token of a small model is hundreds of
/// products that take no longer. Those of [`matmul`](super::matmul()) are then divided into smaller parts.
///
/// Meanwhile the threads take the time of their processors, but for a while without any work, after which
/// they look for it every 100 us.
///
/// Best where the calling thread is one of the pool
/// ([`use_current_thread`](rayon::ThreadPoolBuilder::use_current_thread)): else it sleeps itself while the
/// others work.
pub fn keep_awake() -> Awake {
    let stop = Arc::new(AtomicBool::new(false));
    let awake = Awake { stop: stop.clone() };
    if AWAKE.fetch_add(1, Ordering::Relaxed) > 0 {
        return awake;
    }
    let caller = rayon::current_thread_index();
    rayon::spawn_broadcast(move |context| {
        if Some(context.index()) != caller {
            look_for_work(&stop);
        }
    });
    awake
}

/// Whether threads are kept awake.
pub(super) fn is_awake() -> bool {
    AWAKE.load(Ordering::Relaxed) > 0
}

fn look_for_work(stop: &AtomicBool) {
    let mut idle = 0;
    while !stop.load(Ordering::Relaxed) {
        match rayon::yield_now() {
            Some(Yield::Executed) => idle = 0,
            _ if idle < IDLE_ROUNDS => {
                idle += 1;
                hint::spin_loop();
            }
            _ => thread::sleep(DOZE),
        }
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        AWAKE.fetch_sub(1, Ordering::Relaxed);
    }
}
