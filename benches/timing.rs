//! Device time of launches.

use std::sync::Mutex;

use cubecl::future::block_on;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::measure::{Method, Timing};

/// Windows that are timed, after two that warm up caches and clocks.
const SAMPLES: usize = 15;

/// A device's yardstick, and a way to keep it busy.
pub struct Copier {
    client: Client,
    input: Handle,
    output: Handle,
    bytes: usize,
    /// Copies that take a few milliseconds.
    head_start: usize,
}

impl Copier {
    /// Of 1 GiB on a graphics card, 16 MiB elsewhere.
    pub fn new(client: &Client, is_card: bool) -> Self {
        let bytes: usize = if is_card { 1 << 30 } else { 1 << 24 };
        let fill: Vec<u32> = (0..bytes as u32 / 4).collect();
        Self {
            client: client.clone(),
            input: client.create_from_slice(bytemuck::cast_slice(&fill)),
            output: client.empty(bytes),
            bytes,
            head_start: if is_card { 8 } else { 0 },
        }
    }

    /// Bandwidth in bytes read and written a second, once the copy has been checked.
    pub fn bandwidth(&self) -> f64 {
        let launch = |_: usize| copy(&self.client, &self.input, &self.output, self.bytes);
        launch(0);
        let read = self.client.read_one(self.output.clone());
        let read = read.expect("the copy ran");
        let words: &[u32] = bytemuck::cast_slice(&read[..self.bytes]);
        assert!(
            words.iter().zip(0..).all(|(&w, i)| w == i),
            "the copy is wrong"
        );
        let window = Window {
            launches: 4,
            launch: &launch,
            poison: None,
            copier: None,
        };
        let timing = device_time(&self.client, &window);
        2.0 * self.bytes as f64 / (timing.median_us * 1e-6)
    }

    /// Gives the device a few milliseconds of work, behind which the host can queue launches.
    pub fn keep_busy(&self) {
        for _ in 0..self.head_start {
            copy(&self.client, &self.input, &self.output, self.bytes);
        }
    }
}

/// What to time.
pub struct Window<'a> {
    /// Launches in a window.
    pub launches: usize,
    /// Makes the i-th launch; it should rotate its buffers.
    pub launch: &'a (dyn Fn(usize) + Sync),
    /// Overwrites a result; one more window then has to restore it, for the caller to check.
    pub poison: Option<&'a dyn Fn()>,
    /// Keeps the device busy while the host queues launches that cannot be captured.
    pub copier: Option<&'a Copier>,
}

/// Device time of a launch: the median of windows, replayed from a graph where the runtime has
/// graphs and the launch can be captured.
///
/// Without a graph, and with a copier, the launches of a window are queued while the device is
/// busy with something else, so that the host's time is not in the window unless it is the longer.
pub fn device_time(client: &Client, window: &Window) -> Timing {
    let (launches, launch) = (window.launches, window.launch);
    let run = || (0..launches).for_each(launch);
    run();
    sync(client);

    let graph = client.graph_prepare().and_then(|()| {
        run();
        client.start_capture()?;
        run();
        client.stop_capture()
    });
    let copier = window.copier.filter(|copier| copier.head_start > 0);
    let method = match (&graph, copier) {
        (Ok(_), _) => Method::Graph,
        (Err(_), Some(_)) => Method::Queued,
        (Err(_), None) => Method::HostLaunches,
    };
    let execute = || match &graph {
        // SAFETY: the buffers that the graph names are held by the caller's closure.
        Ok(graph) => unsafe { graph.replay() }.expect("a captured graph replays"),
        Err(_) => run(),
    };
    let mut samples: Vec<f64> = Vec::with_capacity(SAMPLES);
    for i in 0..SAMPLES + 2 {
        if let (Err(_), Some(copier)) = (&graph, copier) {
            copier.keep_busy();
        }
        let (_, duration) = client
            .profile(execute, "bench")
            .expect("the device can be profiled");
        let ticks = block_on(duration.resolve()).expect("the window was measured");
        if i >= 2 {
            samples.push(ticks.duration().as_secs_f64() * 1e6 / launches as f64);
        }
    }
    if let Some(poison) = window.poison {
        poison();
        execute();
        sync(client);
    }
    Timing::of(samples, method)
}

/// Holds what launches allocate until a window is over, so that a graph's buffers stay its own.
#[derive(Default)]
pub struct Kept(Mutex<Vec<Handle>>);

impl Kept {
    pub fn keep(&self, handle: Handle, at_most: usize) {
        let mut kept = self.0.lock().expect("no one panicked");
        if kept.len() >= at_most {
            kept.remove(0);
        }
        kept.push(handle);
    }
}

pub fn sync(client: &Client) {
    block_on(client.sync()).expect("the device works");
}

/// Copies four words a unit; the yardstick.
#[cube(launch_unchecked)]
fn copy_kernel<N: Size>(input: &[Vector<u32, N>], output: &mut [Vector<u32, N>], vectors: usize) {
    if ABSOLUTE_POS < vectors {
        output[ABSOLUTE_POS] = input[ABSOLUTE_POS];
    }
}

/// Copies `bytes`, rounded down to 16, between two buffers that hold them.
pub fn copy(client: &Client, input: &Handle, output: &Handle, bytes: usize) {
    let vectors = bytes / 16;
    let units = client.properties().hardware.max_units_per_cube.min(256);
    let (cubes, units) = grid(vectors, units);
    // SAFETY: both buffers hold `vectors` vectors of four words, and the kernel checks its index.
    unsafe {
        copy_kernel::launch_unchecked(
            client,
            cubes,
            units,
            4,
            BufferArg::from_raw_parts(input.clone(), vectors * 4),
            BufferArg::from_raw_parts(output.clone(), vectors * 4),
            vectors,
        );
    }
}

/// Enough cubes of `a_cube` units each for `units` units.
pub fn grid(units: usize, a_cube: u32) -> (CubeCount, CubeDim) {
    let cubes = units.div_ceil(a_cube as usize).max(1) as u32;
    let x = cubes.min(32768);
    (
        CubeCount::Static(x, cubes.div_ceil(x), 1),
        CubeDim::new_1d(a_cube),
    )
}
