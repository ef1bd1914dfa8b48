//! Threads that stay awake between small pieces of work.

use std::hint;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use rayon::Yield;

/// How often a thread looks for work before it begins to doze: some 2 ms.
const IDLE_ROUNDS: usize = 20_000;

/// How long it dozes at a time.
const DOZE: Duration = Duration::from_micros(100);

/// Those that are awake now: all that ask for it share them.
static THREADS: Mutex<Weak<Threads>> = Mutex::new(Weak::new());

static AWAKE: AtomicUsize = AtomicUsize::new(0);

/// Threads of a rayon pool that do not fall asleep; see [`keep_awake`].
#[derive(Debug)]
pub struct Awake {
    _threads: Arc<Threads>,
}

/// Loops that end when nobody asks for them any more.
#[derive(Debug)]
struct Threads {
    stop: Arc<AtomicBool>,
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        AWAKE.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Keeps the threads of the current rayon pool looking for work, instead of being woken for each piece of it,
/// until what is returned, by this call and by others meanwhile, is dropped. Waking takes some 20 us, and a token
/// of a small model is hundreds of products that take no longer. Those of [`matmul`](super::matmul()) are then
/// divided into smaller parts.
///
/// Meanwhile the threads take the time of their processors, but for a while without any work, after which
/// they look for it every 100 us. **Only where one thread gives the pool work**: a thread of the pool that waits
/// for a part of other work may begin to look for more in between, and then that work waits until what is
/// returned is dropped.
///
/// Best where the calling thread is one of the pool
/// ([`use_current_thread`](rayon::ThreadPoolBuilder::use_current_thread)): else it sleeps itself while the
/// others work.
pub fn keep_awake() -> Awake {
    let mut threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(threads) = threads.upgrade() {
        return Awake { _threads: threads };
    }
    let stop = Arc::new(AtomicBool::new(false));
    AWAKE.fetch_add(1, Ordering::Relaxed);
    let awake = Arc::new(Threads { stop: stop.clone() });
    *threads = Arc::downgrade(&awake);
    let caller = rayon::current_thread_index();
    rayon::spawn_broadcast(move |context| {
        if Some(context.index()) != caller {
            look_for_work(&stop);
        }
    });
    Awake { _threads: awake }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever asked first may be the first that has done.
    #[test]
    fn threads_stay_awake_until_nobody_asks_for_it() {
        let (first, second) = (keep_awake(), keep_awake());
        let stop = first._threads.stop.clone();
        drop(first);
        assert!(is_awake() && !stop.load(Ordering::Relaxed));
        drop(second);
        assert!(stop.load(Ordering::Relaxed));
    }
}
