//! A time, and how it was taken.

use serde::Serialize;

/// How a time was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Device time over replays of a captured graph.
    #[cfg(feature = "cube")]
    Graph,
    /// Device time over launches by the host, which had a head start on a device kept busy.
    #[cfg(feature = "cube")]
    Queued,
    /// Device time over launches by the host, which can be what is measured where kernels are
    /// short.
    #[cfg(feature = "cube")]
    HostLaunches,
    /// Time by the host's clock.
    Clock,
}

/// Times in microseconds.
#[derive(Clone, Copy)]
pub struct Timing {
    pub median_us: f64,
    /// Between the quartiles.
    pub spread_us: f64,
    /// The shortest.
    pub best_us: f64,
    pub method: Method,
}

impl Timing {
    /// Sorts samples. There must be some.
    pub fn of(mut samples_us: Vec<f64>, method: Method) -> Self {
        samples_us.sort_by(f64::total_cmp);
        let len = samples_us.len();
        Self {
            median_us: samples_us[len / 2],
            spread_us: samples_us[len * 3 / 4] - samples_us[len / 4],
            best_us: samples_us[0],
            method,
        }
    }
}
