//! A thread for each device.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::Device;

use super::rank::Rank;
use crate::error::Nf4Error;

/// How long the other ranks have to end after an error.
const TIME_TO_END: Duration = Duration::from_secs(3);

/// Runs a function for each device, on a thread of its own, and returns what each gave, in their order.
///
/// The first error ends the call: that of the rank that failed, or [`Nf4Error::Parallel`] for one that panicked. The
/// others are told at their next exchange, and have three seconds to end. One that waits on its device for a sum
/// that will never come waits on, as neither CubeCL nor NCCL can be told: its thread is left behind, and the
/// process should end.
///
/// # Errors
/// - [`Nf4Error::Config`] if there is no device, if several are no devices of one kind, or if one card is there
///   twice
/// - [`Nf4Error::Library`] if NCCL is needed and cannot be loaded
/// - that of the first rank that fails
pub fn run<T, E>(
    devices: Vec<Device>,
    function: impl Fn(Rank) -> Result<T, E> + Send + Sync + 'static,
) -> Result<Vec<T>, E>
where
    T: Send + 'static,
    E: From<Nf4Error> + std::fmt::Display + Send + 'static,
{
    let ranks = Rank::group(devices)?;
    let size = ranks.len();
    let meetings = ranks[0].meeting();
    let function = Arc::new(function);
    let (done, results) = mpsc::channel();
    for rank in ranks {
        let (function, done) = (function.clone(), done.clone());
        let (index, meeting) = (rank.index(), rank.meeting());
        let body = move || {
            let joined = rank.connect().map_err(E::from);
            let run = || joined.and_then(|()| function(rank));
            let result = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
                let message = panic_message(&*panic);
                Err(E::from(Nf4Error::Parallel {
                    rank: index,
                    message: message.clone(),
                }))
            });
            let error = result.as_ref().err().map(ToString::to_string);
            // Before the others are told, whose errors are of this one. Nobody listens after an error.
            let _ = done.send((index, result));
            meeting.leave(index, error.unwrap_or_else(|| "it has ended".into()));
        };
        let name = format!("rank-{index}");
        let spawned = thread::Builder::new().name(name).spawn(body);
        if let Err(error) = spawned {
            let message = format!("no thread could be started: {error}");
            meetings.leave(index, message.clone());
            return Err(E::from(Nf4Error::Parallel {
                rank: index,
                message,
            }));
        }
    }
    drop(done);
    let mut all: Vec<Option<T>> = (0..size).map(|_| None).collect();
    let mut failed = None;
    let mut until: Option<Instant> = None;
    for _ in 0..size {
        let next = match until {
            None => results.recv().ok(),
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                results.recv_timeout(left).ok()
            }
        };
        match next {
            Some((index, Ok(given))) => all[index] = Some(given),
            Some((_, Err(error))) => {
                failed.get_or_insert(error);
                until.get_or_insert_with(|| Instant::now() + TIME_TO_END);
            }
            None => break,
        }
    }
    match failed {
        Some(error) => Err(error),
        None => {
            let all: Option<Vec<T>> = all.into_iter().collect();
            Ok(all.expect("each rank has sent what it gave"))
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!(
        "it panicked: {}",
        text.unwrap_or_else(|| "without a text".into())
    )
}
