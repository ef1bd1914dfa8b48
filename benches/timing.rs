//! Device time of launches.

use cubecl::future::block_on;
use cubecl::prelude::*;
use cubecl::server::Handle;

/// Times in microseconds.
#[derive(Clone, Copy)]
pub struct Timing {
    pub median_us: f64,
    /// Between the quartiles.
    pub spread_us: f64,
    /// Measured over replays of a graph; otherwise launches by the host, which can be what is
    /// measured where kernels are short.
    pub graph: bool,
}

/// Device time of a launch: the median of `samples` windows of `launches` launches each, replayed
/// from a graph where the runtime has graphs. `launch(i)` makes the i-th launch; it should rotate
/// its buffers.
pub fn device_time(client: &Client, launches: usize, launch: &(dyn Fn(usize) + Sync)) -> Timing {
    const SAMPLES: usize = 15;
    let run = || (0..launches).for_each(launch);
    run();
    sync(client);

    let graph = client.graph_prepare().and_then(|()| {
        run();
        client.start_capture()?;
        run();
        client.stop_capture()
    });
    let mut times: Vec<f64> = Vec::with_capacity(SAMPLES);
    for _ in 0..SAMPLES + 2 {
        let (_, duration) = client
            .profile(
                || match &graph {
                    // SAFETY: the buffers that the graph names are held by the caller's closure.
                    Ok(graph) => unsafe { graph.replay() }.expect("a captured graph replays"),
                    Err(_) => run(),
                },
                "bench",
            )
            .expect("the device can be profiled");
        let ticks = block_on(duration.resolve()).expect("the window was measured");
        times.push(ticks.duration().as_secs_f64() * 1e6 / launches as f64);
    }
    // The first two warm up caches and clocks.
    let mut times = times.split_off(2);
    times.sort_by(f64::total_cmp);
    Timing {
        median_us: times[SAMPLES / 2],
        spread_us: times[SAMPLES * 3 / 4] - times[SAMPLES / 4],
        graph: graph.is_ok(),
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

/// Bandwidth of a device copy of 1 GiB (64 MiB without a GPU), in bytes read and written a
/// second.
pub fn copy_bandwidth(client: &Client) -> f64 {
    let is_gpu = client
        .properties()
        .hardware
        .num_streaming_multiprocessors
        .is_some();
    let bytes: usize = if is_gpu { 1 << 30 } else { 1 << 24 };
    let fill: Vec<u32> = (0..bytes as u32 / 4).collect();
    let input = client.create_from_slice(bytemuck::cast_slice(&fill));
    let output = client.empty(bytes);
    let launch = |_: usize| copy(client, &input, &output, bytes);
    let timing = device_time(client, 4, &launch);
    let read = client.read_one(output.clone()).expect("the copy ran");
    assert!(
        read.starts_with(bytemuck::cast_slice(&fill)),
        "the copy is wrong"
    );
    2.0 * bytes as f64 / (timing.median_us * 1e-6)
}

fn copy(client: &Client, input: &Handle, output: &Handle, bytes: usize) {
    let words = bytes / 4;
    let vectors = words / 4;
    let units = client.properties().hardware.max_units_per_cube.min(256);
    let cubes = vectors.div_ceil(units as usize) as u32;
    let x = cubes.min(32768);
    // SAFETY: both buffers hold `words` words and the kernel checks its index.
    unsafe {
        copy_kernel::launch_unchecked(
            client,
            CubeCount::Static(x, cubes.div_ceil(x), 1),
            CubeDim::new_1d(units),
            4,
            BufferArg::from_raw_parts(input.clone(), words),
            BufferArg::from_raw_parts(output.clone(), words),
            vectors,
        );
    }
}
