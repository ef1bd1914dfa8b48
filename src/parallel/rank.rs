//! One of the threads that work on a step together.

#[cfg(feature = "cube")]
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use burn::tensor::kind::Basic;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::meeting::Meeting;
use crate::error::Nf4Error;
use crate::format::check_len;

#[cfg(feature = "cube")]
use super::collective::{Collective, Summing, view};
#[cfg(feature = "cube")]
use burn::backend::{DeviceOps, DispatchDevice};
#[cfg(feature = "cube")]
use burn_cubecl::tensor::CubeTensor;

/// One of the threads that work on a step together, with its device. [`run`](super::run) makes them.
///
/// What is said to be for all ranks must be called by each, in the same order.
pub struct Rank {
    index: usize,
    size: usize,
    device: Device,
    meeting: Arc<Meeting>,
    /// Whose collectives carry data; without them it goes through the memory of the process.
    #[cfg(feature = "cube")]
    collective: Option<Collective>,
}

impl fmt::Debug for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rank")
            .field("index", &self.index)
            .field("size", &self.size)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl Rank {
    /// A group of devices. Each is to be moved to a thread of its own, and [connected](Self::connect) there.
    pub(super) fn group(devices: Vec<Device>) -> Result<Vec<Self>, Nf4Error> {
        if devices.is_empty() {
            return Err(wrong("at least one device", "none".into()));
        }
        #[cfg(feature = "cube")]
        let collective = collective_of(&devices)?;
        let size = devices.len();
        let meeting = Arc::new(Meeting::new(size));
        let ranks = devices.into_iter().enumerate();
        Ok(ranks
            .map(|(index, device)| Self {
                index,
                size,
                device,
                meeting: meeting.clone(),
                #[cfg(feature = "cube")]
                collective: collective.clone(),
            })
            .collect())
    }

    pub(super) fn meeting(&self) -> Arc<Meeting> {
        self.meeting.clone()
    }

    /// Joins the group on the device, and makes sure that sums come out right.
    pub(super) fn connect(&self) -> Result<(), Nf4Error> {
        self.exchange(())?;
        #[cfg(feature = "cube")]
        if let Some(collective) = &self.collective
            && let DispatchDevice::Cube(device) =
                self.device.clone().without_autodiff().as_dispatch()
        {
            device
                .client()
                .ensure_init_collective(collective.devices.clone());
        }
        let expected = (self.size * (self.size + 1) / 2) as f32;
        let device = self.device.clone().without_autodiff();
        let own = Tensor::<1>::full([1], (self.index + 1) as f32, (&device, DType::F32));
        let sum = self.all_reduce(own)?.try_into_data();
        let failed = |message: String| Nf4Error::Parallel {
            rank: self.index,
            message: format!("its device cannot sum with the others: {message}"),
        };
        let sum: Vec<f32> = sum
            .map_err(|error| failed(error.to_string()))?
            .iter()
            .collect();
        match sum == [expected] {
            true => Ok(()),
            false => Err(failed(format!(
                "the numbers up to {} sum to {sum:?}",
                self.size
            ))),
        }
    }

    fn check_place(
        &self,
        tensor: &str,
        device: &Device,
        in_autodiff: bool,
    ) -> Result<(), Nf4Error> {
        let [own, given] = [&self.device, device].map(|device| device.clone().without_autodiff());
        if given == own && !in_autodiff {
            return Ok(());
        }
        let with = if in_autodiff { ", with autodiff" } else { "" };
        Err(Nf4Error::Device {
            tensor: tensor.into(),
            expected: format!("{own:?}, without autodiff"),
            given: format!("{given:?}{with}"),
        })
    }

    fn read<K: Basic, const D: usize>(&self, tensor: Tensor<D, K>) -> Result<TensorData, Nf4Error> {
        let data = tensor.try_into_data();
        data.map_err(|error| Nf4Error::execution(&self.device, &error))
    }

    /// Its number, below [`size`](Self::size).
    pub fn index(&self) -> usize {
        self.index
    }

    /// Ranks of the group.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Its device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The values that all ranks give, in their order; for all ranks. Waits for the other threads, not for
    /// devices.
    ///
    /// # Errors
    /// [`Nf4Error::Parallel`] if a rank has failed, has ended, or is at another exchange.
    pub fn exchange<T>(&self, value: T) -> Result<Vec<T>, Nf4Error>
    where
        T: Clone + Send + Sync + 'static,
    {
        self.meeting.exchange(self.index, value)
    }

    /// Runs a function on one rank after the other, for what the process has only one of, such as Burn's random
    /// generator; for all ranks. What the function makes must be made in it: Burn draws the values of a fresh module
    /// when they are first read, and a device may draw them later still, so read them, and `sync` the device.
    ///
    /// # Errors
    /// [`Nf4Error::Parallel`] if a rank has failed.
    pub fn in_turn<T>(&self, function: impl FnOnce() -> T) -> Result<T, Nf4Error> {
        for _ in 0..=self.index {
            self.exchange(())?;
        }
        let given = function();
        for _ in self.index..self.size {
            self.exchange(())?;
        }
        Ok(given)
    }

    /// The sums of a tensor over all ranks, the same bits on each; for all ranks. It is written in place if it has
    /// no other owner. On cards the host does not wait.
    ///
    /// # Shapes
    /// - `tensor`: `[len]`, f32, without autodiff, of one length on all ranks, and so the result
    ///
    /// # Errors
    /// [`Nf4Error::Dtype`] unless it is f32, [`Nf4Error::Device`] unless it is on this rank's device and without
    /// autodiff, [`Nf4Error::Length`] unless all have one length, which collectives of devices do not tell,
    /// [`Nf4Error::Parallel`] if a rank is known to have failed, [`Nf4Error::Execution`] if the device has.
    pub fn all_reduce(&self, tensor: Tensor<1>) -> Result<Tensor<1>, Nf4Error> {
        check_dtype("tensor", tensor.dtype(), DType::F32)?;
        self.check_place("tensor", &tensor.device(), tensor.is_autodiff())?;
        self.meeting.check()?;
        if self.size == 1 {
            return Ok(tensor);
        }
        #[cfg(feature = "cube")]
        if let Some(collective) = &self.collective {
            return Ok(collective.sum(tensor));
        }
        let own = self.read(tensor.clone())?;
        let own: Vec<f32> = own.iter().collect();
        let len = own.len();
        let all = self.exchange(Arc::new(own))?;
        let mut sum = vec![0.0; len];
        for part in &all {
            check_len("tensor of another rank", len, part.len())?;
            for (sum, part) in sum.iter_mut().zip(part.iter()) {
                *sum += part;
            }
        }
        let sum = Tensor::from_data(TensorData::new(sum, [len]), (&tensor.device(), DType::F32));
        #[allow(clippy::single_range_in_vec_init, reason = "one axis")]
        Ok(tensor.slice_assign([0..len], sum))
    }

    /// Begins to gather the parts of all ranks, one after the other; for all ranks, whose parts are of one length. What is computed until [`Gathering::end`] goes on beside it where devices have collectives.
    ///
    /// # Shapes
    /// - `part`: `[words]`, u32
    ///
    /// # Errors
    /// [`Nf4Error::Dtype`] unless it is u32, and those of [`all_reduce`](Self::all_reduce).
    pub fn gather(&self, part: Tensor<1, Int>) -> Result<Gathering, Nf4Error> {
        check_dtype("part", part.dtype(), DType::U32)?;
        self.check_place("part", &part.device(), part.is_autodiff())?;
        self.meeting.check()?;
        if self.size == 1 {
            return Ok(Gathering(Pending::Ready(part)));
        }
        let [words] = part.dims();
        #[cfg(feature = "cube")]
        if let Some(collective) = &self.collective {
            // Sums of words with zeros are exact; CubeCL has no collective that only gathers.
            let zeros = Tensor::<1, Int>::zeros([self.size * words], (&part.device(), DType::U32));
            let start = self.index * words;
            #[allow(clippy::single_range_in_vec_init, reason = "one axis")]
            let own = zeros.slice_assign([start..start + words], part);
            return Ok(Gathering(Pending::Summing(collective.begin_sum(own))));
        }
        let device = part.device();
        let own: Vec<u32> = self.read(part)?.iter().collect();
        let all = self.exchange(Arc::new(own))?;
        for part in &all {
            check_len("part of another rank", words, part.len())?;
        }
        let all: Vec<u32> = all.iter().flat_map(|part| part.iter().copied()).collect();
        let data = TensorData::new(all, [self.size * words]);
        let all = Tensor::from_data(data, (&device, DType::U32));
        Ok(Gathering(Pending::Ready(all)))
    }
}

/// Words of all ranks that are being gathered. One that is dropped is ended first.
#[derive(Debug)]
#[must_use = "what was begun must be ended"]
pub struct Gathering(Pending);

#[derive(Debug)]
#[cfg_attr(
    feature = "cube",
    allow(clippy::large_enum_variant, reason = "there are few of them")
)]
enum Pending {
    Ready(Tensor<1, Int>),
    /// On devices with collectives.
    #[cfg(feature = "cube")]
    Summing(Summing),
}

/// The words of all ranks, one rank's after the other's.
#[derive(Debug)]
pub struct GatheredWords(Words);

#[derive(Debug)]
#[cfg_attr(
    feature = "cube",
    allow(clippy::large_enum_variant, reason = "there are few of them")
)]
enum Words {
    Tensor(Tensor<1, Int>),
    /// On devices with collectives.
    #[cfg(feature = "cube")]
    Cube(CubeTensor),
}

impl Gathering {
    /// The parts of all ranks. The host does not wait.
    pub fn end(self) -> GatheredWords {
        GatheredWords(match self.0 {
            Pending::Ready(words) => Words::Tensor(words),
            #[cfg(feature = "cube")]
            Pending::Summing(words) => Words::Cube(words.end()),
        })
    }
}

impl GatheredWords {
    /// Some of them, `[len]`, u32: a view on devices with collectives.
    ///
    /// # Panics
    /// If there are not so many, or `start` is no multiple of 128.
    pub fn part(&self, start: usize, len: usize) -> Tensor<1, Int> {
        let words = match &self.0 {
            Words::Tensor(words) => words.dims()[0],
            #[cfg(feature = "cube")]
            Words::Cube(words) => words.meta.num_elements(),
        };
        assert!(
            start.is_multiple_of(128) && start.checked_add(len).is_some_and(|end| end <= words),
            "words from {start} on, {len} of them, of {words}"
        );
        match &self.0 {
            Words::Tensor(words) => words.clone().narrow(0, start, len),
            #[cfg(feature = "cube")]
            Words::Cube(words) => view(words, start, len),
        }
    }
}

/// What devices of a group sum by: CUDA's by NCCL, others through the memory of the process.
#[cfg(feature = "cube")]
fn collective_of(devices: &[Device]) -> Result<Option<Collective>, Nf4Error> {
    let mut ids = Vec::new();
    let mut kinds = BTreeSet::new();
    for device in devices {
        let device = device.clone().without_autodiff();
        let kind = match device.as_dispatch() {
            DispatchDevice::Cube(device) => {
                // Without the library CubeCL says that CUDA has no transport.
                let name = device.client().name();
                if name == "cuda" {
                    ids.push(DeviceOps::id(device));
                }
                name
            }
            _ => "other",
        };
        kinds.insert(kind);
    }
    if kinds.len() > 1 {
        return Err(wrong("devices of one kind", format!("{devices:?}")));
    }
    if ids.len() < 2 {
        return Ok(None);
    }
    let different: BTreeSet<_> = ids.iter().collect();
    if different.len() < ids.len() {
        return Err(wrong("each device once", format!("{devices:?}")));
    }
    #[cfg(feature = "cuda")]
    super::nccl::check()?;
    Ok(Some(Collective { devices: ids }))
}

fn wrong(expected: &'static str, given: String) -> Nf4Error {
    Nf4Error::Config {
        field: "devices",
        expected,
        given,
    }
}

fn check_dtype(tensor: &str, given: DType, expected: DType) -> Result<(), Nf4Error> {
    if given == expected {
        return Ok(());
    }
    Err(Nf4Error::Dtype {
        tensor: tensor.into(),
        expected: format!("{expected:?}"),
        given: format!("{given:?}"),
    })
}
