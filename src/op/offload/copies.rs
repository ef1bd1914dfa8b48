//! The copies of a stack, on a stream of their own.
//!
//! # Why this is sound and why it overlaps
//!
//! It rests on what CubeCL 0.11.3 does:
//!
//! - **To the host.** A read on the stream of the copies waits, on the device, for all that the stream of the
//!   tensor holds at that moment (`stream/event.rs`, `apply_analysis`), so it is submitted at once, by this
//!   thread, and not by another one later. The stream of the tensor does not wait for it.
//! - **In place.** CubeCL writes to a tensor in place if there is one handle of it, and does not count copies
//!   under way (`ManagedMemoryHandle::can_mut`). A [`Leaving`] holds a handle until its copy is done.
//! - **Not read yet.** A read that nobody waits for gives its host memory back while the device still writes to it
//!   (`Command::read_async`): a [`Leaving`] waits when it is dropped.
//! - **To the device.** Bytes that were read are pinned and go back without another copy (`Staging::of`). Their
//!   buffer belongs to the stream of the copies. Another stream waits for it when it first reads it, and
//!   it is not used again before that is done (`SharedBindingAnalysis::pinned`). Each use of such a buffer costs
//!   events, and the server waits while eight are open (`GcThread`): so it is used once, for a copy to
//!   a buffer of the stream that computes.

use std::future::poll_fn;
use std::task::{Context, Poll, Waker};

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device, GradientCheckpointingStrategy, Shape, StreamId, Tensor};
use burn_cubecl::CubeDevice;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::bytes::{AllocationProperty, Bytes};
use cubecl::future::{DynFut, block_on};
use cubecl::prelude::Client;
use cubecl::server::{CopyDescriptor, Handle, ServerError};

use crate::op::backends::cube::{cube_tensor, from_cube};

/// Tensors that are copied to the host at once. The host waits for the one before: it is so many layers ahead of
/// the device, which is enough to keep it busy.
const IN_FLIGHT: usize = 2;

type Read = DynFut<Result<Vec<Bytes>, ServerError>>;

/// Submits a read on the current stream. Its future, which is to be waited for, borrows the client, so that both
/// are in one.
fn start_read(client: Client, source: CopyDescriptor) -> Read {
    let mut read: Read = Box::pin(async move {
        let read = client.read_tensor_async(vec![source]);
        let mut is_started = false;
        poll_fn(|_| match std::mem::replace(&mut is_started, true) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
        read.await
    });
    // Up to there.
    let mut context = Context::from_waker(Waker::noop());
    let first = read.as_mut().poll(&mut context);
    debug_assert!(first.is_pending());
    read
}

/// A tensor on its way to the host.
struct Leaving {
    /// Holds its memory, and keeps others from writing to it in place.
    tensor: CubeTensor,
    /// None once it was waited for.
    copy: Option<Read>,
}

impl Leaving {
    /// Waits for the copy.
    fn finish(&mut self) -> Result<Bytes, String> {
        let copy = self.copy.take().expect("it is waited for once");
        let mut copied = block_on(copy).map_err(|error| error.to_string())?;
        Ok(copied.pop().expect("one tensor was read"))
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        if let Some(copy) = self.copy.take() {
            // Nobody wants the bytes. After an error CubeCL keeps the memory for good.
            let _ = block_on(copy);
        }
    }
}

/// Where a tensor is.
#[allow(clippy::large_enum_variant, reason = "there are few of them")]
enum Place {
    Leaving(Leaving),
    Host(Bytes),
    /// In a buffer of the stream of the copies, or on the way there.
    Arriving(Handle),
}

/// A tensor that is not where it was.
struct Away {
    place: Place,
    shape: Shape,
    dtype: DType,
    autodiff: Option<GradientCheckpointingStrategy>,
}

#[allow(clippy::large_enum_variant, reason = "there are few of them")]
enum Entry<const D: usize> {
    /// There is nothing to copy.
    Empty(Tensor<D>),
    Away(Away),
}

/// The tensors of a stack.
pub(super) struct Copies<const D: usize> {
    client: Client,
    device: CubeDevice,
    /// Of the copies.
    stream: StreamId,
    entries: Vec<Entry<D>>,
    /// Whether what is read lies in pinned memory. Elsewhere it lies in a buffer of the device that is mapped, and
    /// counts as memory in use.
    pins: bool,
    /// When the device has taken what was popped last out of its buffer.
    taken: Option<DynFut<Result<(), ServerError>>>,
    /// Whether there is memory to give back.
    used: bool,
    /// Copies to memory that is not pinned.
    pageable: usize,
}

impl<const D: usize> Copies<D> {
    /// None if the tensors of the device are in the memory of the host.
    pub fn new(device: &Device) -> Option<Self> {
        let DispatchDevice::Cube(device) = device.as_dispatch() else {
            return None;
        };
        let client = device.client();
        let pins = matches!(client.name(), "cuda" | "hip");
        (client.name() != "cpu").then(|| Self {
            client,
            device: device.clone(),
            stream: StreamId::allocate(),
            entries: Vec::new(),
            pins,
            taken: None,
            used: false,
            pageable: 0,
        })
    }

    /// Of a tensor on this device.
    pub fn push(&mut self, x: Tensor<D>) -> Result<(), String> {
        let (shape, dtype) = (x.shape(), x.dtype());
        if shape.num_elements() == 0 {
            self.entries.push(Entry::Empty(x));
            return Ok(());
        }
        let autodiff = x.gradient_checkpointing_strategy();
        let tensor = cube_tensor(x.inner()).expect("it is on a device of CubeCL");
        let tensor = into_contiguous(tensor);
        let bytes = shape.num_elements() * dtype.size();
        let handle = tensor.handle.clone();
        let source = handle.copy_descriptor([bytes].into(), [1].into(), 1);
        let client = self.client.clone();
        let copy = self.stream.executes(|| start_read(client, source));
        self.used = true;
        let leaving = Leaving {
            tensor,
            copy: Some(copy),
        };
        self.entries.push(Entry::Away(Away {
            place: Place::Leaving(leaving),
            shape,
            dtype,
            autodiff,
        }));
        for entry in self.entries.iter_mut().rev().skip(IN_FLIGHT) {
            if let Entry::Away(away) = entry
                && let Some(is_pinned) = away.leave(self.pins)?
            {
                self.pageable += usize::from(self.pins && !is_pinned);
            }
        }
        Ok(())
    }

    pub fn prefetch(&mut self) -> Result<(), String> {
        let Some(Entry::Away(away)) = self.entries.last_mut() else {
            return Ok(());
        };
        if !matches!(away.place, Place::Host(_)) {
            return Ok(());
        }
        if let Some(taken) = self.taken.take() {
            block_on(taken).map_err(|error| error.to_string())?;
        }
        let (client, stream) = (&self.client, self.stream);
        away.arrive(|bytes| stream.executes(|| client.create(bytes)));
        Ok(())
    }

    pub fn pop(&mut self) -> Result<Option<Tensor<D>>, String> {
        self.prefetch()?;
        let away = match self.entries.pop() {
            None => return Ok(None),
            Some(Entry::Empty(x)) => return Ok(Some(x)),
            Some(Entry::Away(away)) => away,
        };
        let tensor = match away.place {
            // It has not left, but the copy has to end.
            Place::Leaving(mut leaving) => {
                leaving.finish()?;
                leaving.tensor.clone()
            }
            Place::Host(_) => unreachable!("it was fetched"),
            Place::Arriving(buffer) => self.take(buffer, away.shape, away.dtype)?,
        };
        let x: Tensor<D> = from_cube(tensor);
        Ok(Some(match away.autodiff {
            Some(strategy) => x.autodiff().with_gradient_checkpointing_strategy(strategy),
            None => x,
        }))
    }

    /// Copies a buffer to one of the stream that computes.
    fn take(&mut self, buffer: Handle, shape: Shape, dtype: DType) -> Result<CubeTensor, String> {
        // Asks, without waiting for the device, whether the copy into it was made. The bytes are read when
        // somebody looks at them, which nobody does.
        let whole = [buffer.size_in_used() as usize];
        let source = buffer.clone().copy_descriptor(whole.into(), [1].into(), 1);
        block_on(self.client.read_lazy_async(source)).map_err(|error| error.to_string())?;
        let arrived = CubeTensor::new_contiguous(
            self.client.clone(),
            self.device.clone(),
            shape,
            buffer,
            dtype,
        );
        let tensor = arrived.copy();
        self.taken = Some(self.client.sync());
        Ok(tensor)
    }

    pub fn clear(&mut self) {
        self.entries.clear();
        self.taken = None;
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn host_bytes(&self) -> usize {
        let of_entry = |entry: &Entry<D>| match entry {
            Entry::Away(Away {
                place: Place::Host(bytes),
                ..
            }) => bytes.len(),
            _ => 0,
        };
        self.entries.iter().map(of_entry).sum()
    }

    pub fn pageable(&self) -> usize {
        self.pageable
    }
}

impl Away {
    /// Gives up its memory on the device when it is on the host, which is waited for, and says whether it is in
    /// pinned memory there. Nothing if it is not on its way there.
    fn leave(&mut self, pins: bool) -> Result<Option<bool>, String> {
        let Place::Leaving(leaving) = &mut self.place else {
            return Ok(None);
        };
        let bytes = leaving.finish()?;
        let is_pinned = pins && bytes.property() == AllocationProperty::Pinned;
        self.place = Place::Host(match pins {
            true => bytes,
            false => Bytes::from_bytes_vec(bytes.to_vec()),
        });
        Ok(Some(is_pinned))
    }

    /// Sends its bytes to the device.
    fn arrive(&mut self, send: impl FnOnce(Bytes) -> Handle) {
        if let Place::Host(bytes) = &mut self.place {
            let bytes = std::mem::replace(bytes, Bytes::from_bytes_vec(Vec::new()));
            self.place = Place::Arriving(send(bytes));
        }
    }
}

impl<const D: usize> Drop for Copies<D> {
    fn drop(&mut self) {
        self.clear();
        if self.used && !std::thread::panicking() {
            // Fails while a graph is recorded; the memory is used again later then.
            let _ = self.client.memory_cleanup();
        }
    }
}
