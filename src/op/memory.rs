//! What memory a device has.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use burn::tensor::Device;

/// Bytes of a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// All that it has.
    pub total: u64,
    /// Those that tensors of this process take. Other processes are not counted, nor are pages that the
    /// runtime keeps to use again.
    pub in_use: u64,
}

impl DeviceMemory {
    /// Bytes that tensors can still take at most.
    pub fn left(&self) -> u64 {
        self.total.saturating_sub(self.in_use)
    }
}

/// The memory of a device, where its runtime tells: CUDA, ROCm, Metal, Vulkan and CubeCL's CPU runtime do. None
/// for Flex and wgpu's other back ends.
pub fn device_memory(device: &Device) -> Option<DeviceMemory> {
    #[cfg(feature = "cube")]
    if let burn::backend::DispatchDevice::Cube(cube) =
        device.clone().without_autodiff().as_dispatch()
    {
        let total = cube.client().properties().memory.max_memory()?;
        let in_use = bytes_in_use(device)?;
        return Some(DeviceMemory { total, in_use });
    }
    let _ = device;
    None
}

/// What tensors of this process take on a device, of all streams of its runtime, if it is one of CubeCL's.
///
/// Asked past Burn's fusion, which would run what it has put off first. The runtime answers requests of all threads
/// one after the other, so it may be asked by any of them.
fn bytes_in_use(device: &Device) -> Option<u64> {
    #[cfg(feature = "cube")]
    if let burn::backend::DispatchDevice::Cube(device) =
        device.clone().without_autodiff().as_dispatch()
    {
        let report = device.client().memory_report(cubecl::MemoryScope::Device);
        return Some(report.usage().bytes_in_use);
    }
    let _ = device;
    None
}

/// Time between two samples. The host gives a layer of some 75 operations to the device in about a millisecond.
const SAMPLE_EVERY: Duration = Duration::from_micros(100);

/// Watches how many bytes tensors take on a device, from a thread of its own, until it is dropped.
///
/// The runtimes keep no peak, and what is allocated and freed between two looks of the thread that computes is missed
/// by it. This one asks every 0.1 ms or so. The answers are of moments between operations, in the order in which
/// they were given to the device, so what is found was in use at once; a peak that is shorter than the time between
/// two samples can be missed. Of work that repeats, such as that of the layers of a model, samples fall on all of it.
///
/// ```
/// use burn::tensor::Device;
/// use burn_nf4::op::MemoryWatch;
///
/// // Flex does not tell.
/// assert!(MemoryWatch::new(&Device::flex()).is_none());
/// ```
pub struct MemoryWatch {
    shared: Arc<Watched>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Watched {
    most: AtomicU64,
    stops: AtomicBool,
}

impl fmt::Debug for MemoryWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let most = self.shared.most.load(Ordering::Relaxed);
        let debug = &mut f.debug_struct("MemoryWatch");
        debug.field("most_bytes", &most).finish_non_exhaustive()
    }
}

impl MemoryWatch {
    /// Begins to watch a device, if its runtime is one of CubeCL's. None too where the system gives no thread.
    pub fn new(device: &Device) -> Option<Self> {
        bytes_in_use(device)?;
        let shared = Arc::new(Watched::default());
        let (device, watched) = (device.clone(), shared.clone());
        let sample = move || {
            while !watched.stops.load(Ordering::Relaxed) {
                if let Some(bytes) = bytes_in_use(&device) {
                    watched.most.fetch_max(bytes, Ordering::Relaxed);
                }
                thread::sleep(SAMPLE_EVERY);
            }
        };
        let thread = thread::Builder::new().name("memory watch".into());
        Some(Self {
            thread: Some(thread.spawn(sample).ok()?),
            shared,
        })
    }

    /// The most bytes in use that were seen since the last call; zero if no sample was taken since.
    pub fn take_most_bytes(&self) -> u64 {
        self.shared.most.swap(0, Ordering::Relaxed)
    }
}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        self.shared.stops.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It panics if the runtime does, which is told where results are read.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    #[cfg(feature = "cpu")]
    use std::sync::Mutex;

    use super::*;

    /// What one allocates the other would count.
    #[cfg(feature = "cpu")]
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

    #[cfg(feature = "flex")]
    #[test]
    fn flex_does_not_tell() {
        assert_eq!(device_memory(&Device::flex()), None);
    }

    /// Those of a tensor are counted, and are left again after it.
    #[cfg(feature = "cpu")]
    #[test]
    fn the_bytes_of_a_tensor_are_counted() {
        use burn::tensor::Tensor;

        let _alone = ONE_AT_A_TIME
            .lock()
            .unwrap_or_else(|lock| lock.into_inner());
        let device = Device::cpu();
        let memory = || {
            device.sync().unwrap();
            device_memory(&device).unwrap()
        };
        let before = memory();
        assert!(before.total > 1 << 20);
        let tensor = Tensor::<1>::zeros([1 << 20], &device);
        let during = memory();
        assert_eq!(during.total, before.total);
        assert!(
            during.in_use >= before.in_use + (4 << 20),
            "{before:?} {during:?}"
        );
        assert_eq!(during.left(), during.total - during.in_use);
        drop(tensor);
        assert!(memory().in_use < during.in_use);
    }

    /// A tensor that is gone when the thread that had it looks is seen.
    #[cfg(feature = "cpu")]
    #[test]
    fn what_was_in_use_in_between_is_seen() {
        use burn::tensor::Tensor;

        const BYTES: u64 = 64 << 20;
        let _alone = ONE_AT_A_TIME
            .lock()
            .unwrap_or_else(|lock| lock.into_inner());
        let device = Device::cpu();
        let watch = MemoryWatch::new(&device).expect("it tells");
        let in_use = || {
            device.sync().unwrap();
            device_memory(&device).unwrap().in_use
        };
        // Tests of other modules come and go with less.
        let large = in_use() + BYTES / 2;
        let tensor = Tensor::<1>::zeros([BYTES as usize / 4], &device);
        // With fusion it is not made before.
        device.sync().unwrap();
        let start = std::time::Instant::now();
        let mut most = 0;
        while most < large && start.elapsed() < Duration::from_secs(20) {
            thread::sleep(Duration::from_millis(1));
            most = most.max(watch.take_most_bytes());
        }
        assert!(most >= large, "{large} {most}");
        drop(tensor);
        assert!(in_use() < large);
        // What is seen from here on is of what is there now; one sample may be under way.
        thread::sleep(Duration::from_millis(50));
        watch.take_most_bytes();
        thread::sleep(Duration::from_millis(50));
        assert!(watch.take_most_bytes() < large);
    }
}
