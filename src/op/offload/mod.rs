//! Tensors that wait in the memory of the host.

#[cfg(feature = "cube")]
mod copies;

use std::fmt;

use burn::tensor::{Device, Tensor};

#[cfg(feature = "cube")]
use self::copies::Copies;
use super::tensor::check_device;
use crate::error::Nf4Error;
use crate::format::FloatType;

/// Tensors of a device that wait in the memory of the host: the last one in is the first one out, as layers
/// need their inputs in the backward pass. The copies run beside what the device computes.
///
/// On CUDA and ROCm they go through a stream of their own and into pinned memory, which is used again as long as
/// the stack lives and is given back when it is dropped; elsewhere into ordinary memory, and the host is busy with
/// them. [`push`](Self::push) starts a copy and waits for the
/// one that was started two tensors before, so that the host is never further ahead of the device; until then a
/// tensor takes memory of the device. [`prefetch`](Self::prefetch) starts the copy back of the tensor that is
/// popped next; without it [`pop`](Self::pop) does, and the device waits for it.
///
/// Values come back bit for bit. The stack cannot be used while a graph is recorded.
///
/// ```no_run
/// use burn::tensor::{Device, Tensor};
/// use burn_nf4::op::OffloadStack;
///
/// let device = Device::default();
/// let mut stack = OffloadStack::new(&device)?;
/// for layer in 0..32 {
///     stack.push(Tensor::<2>::full([8192, 4096], layer, &device))?;
/// }
/// while let Some(x) = stack.pop()? {
///     // The next one comes while this one is worked on.
///     let y = x.matmul(Tensor::ones([4096, 4096], &device));
///     stack.prefetch()?;
///     # drop(y);
/// }
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
pub struct OffloadStack<const D: usize> {
    device: Device,
    copies: Copies<D>,
}

impl<const D: usize> OffloadStack<D> {
    /// An empty stack for tensors of a device, with autodiff or without.
    ///
    /// # Errors
    /// [`Nf4Error::HostDevice`] for Flex and CubeCL's CPU runtime: their tensors are in the memory of the host.
    pub fn new(device: &Device) -> Result<Self, Nf4Error> {
        let device = device.clone().without_autodiff();
        match Copies::new(&device) {
            Some(copies) => Ok(Self { device, copies }),
            None => Err(Nf4Error::HostDevice {
                device: format!("{device:?}"),
            }),
        }
    }

    /// Puts a tensor on the stack, and has it copied to the host. Others may hold it too.
    ///
    /// # Shapes
    /// - `x`: any
    ///
    /// # Errors
    /// [`Nf4Error::Dtype`] unless it is of f16, bf16 or f32, [`Nf4Error::Device`] unless it is on the device of
    /// the stack, and [`Nf4Error::HostCopy`] if a copy that was started before has failed: the stack is empty
    /// then.
    pub fn push(&mut self, x: Tensor<D>) -> Result<(), Nf4Error> {
        FloatType::from_dtype(x.dtype(), "x")?;
        check_device("x", &x.device().without_autodiff(), &self.device)?;
        let pushed = self.copies.push(x);
        self.checked(pushed)
    }

    /// Starts to copy the tensor back that is popped next, once the device has taken the one that was popped
    /// last: one buffer is enough for both. To be called when the work on that one has been launched. Does nothing
    /// if the tensor is there, or none is left.
    ///
    /// # Errors
    /// [`Nf4Error::HostCopy`]: the stack is empty then.
    pub fn prefetch(&mut self) -> Result<(), Nf4Error> {
        let fetched = self.copies.prefetch();
        self.checked(fetched)
    }

    /// The tensor that was pushed last, on the device again and with autodiff if it had it, as a constant. None if
    /// the stack is empty.
    ///
    /// # Errors
    /// [`Nf4Error::HostCopy`] if the copy there or back has failed: the stack is empty then.
    pub fn pop(&mut self) -> Result<Option<Tensor<D>>, Nf4Error> {
        let popped = self.copies.pop();
        self.checked(popped)
    }

    /// Drops all that is on the stack.
    pub fn clear(&mut self) {
        self.copies.clear();
    }

    /// How many tensors are on the stack.
    pub fn len(&self) -> usize {
        self.copies.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the tensors that are on the host and no longer on the device.
    pub fn host_bytes(&self) -> usize {
        self.copies.host_bytes()
    }

    /// Copies up to now that were to go to pinned memory, on CUDA and ROCm, and went to other, as the system had no
    /// more of it to give. They are right, but slow, and the device waits for them.
    pub fn pageable_copies(&self) -> usize {
        self.copies.pageable()
    }

    /// After an error, what is left could be told from what is lost by nobody.
    fn checked<T>(&mut self, result: Result<T, String>) -> Result<T, Nf4Error> {
        result.map_err(|message| {
            self.clear();
            Nf4Error::HostCopy {
                device: format!("{:?}", self.device),
                message,
            }
        })
    }
}

impl<const D: usize> fmt::Debug for OffloadStack<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OffloadStack")
            .field("device", &self.device)
            .field("len", &self.len())
            .field("host_bytes", &self.host_bytes())
            .finish()
    }
}

/// There are none in a build without CubeCL.
#[cfg(not(feature = "cube"))]
enum Copies<const D: usize> {}

#[cfg(not(feature = "cube"))]
impl<const D: usize> Copies<D> {
    fn new(_device: &Device) -> Option<Self> {
        None
    }

    fn push(&mut self, _x: Tensor<D>) -> Result<(), String> {
        match *self {}
    }

    fn prefetch(&mut self) -> Result<(), String> {
        match *self {}
    }

    fn pop(&mut self) -> Result<Option<Tensor<D>>, String> {
        match *self {}
    }

    fn clear(&mut self) {
        match *self {}
    }

    fn len(&self) -> usize {
        match *self {}
    }

    fn host_bytes(&self) -> usize {
        match *self {}
    }

    fn pageable(&self) -> usize {
        match *self {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "flex")]
    #[test]
    fn flex_has_nothing_to_offload() {
        let error = OffloadStack::<2>::new(&Device::flex().autodiff()).unwrap_err();
        assert!(matches!(error, Nf4Error::HostDevice { .. }), "{error}");
    }

    #[cfg(feature = "cpu")]
    #[test]
    fn the_cpu_runtime_has_nothing_to_offload() {
        let error = OffloadStack::<2>::new(&Device::cpu()).unwrap_err();
        assert!(matches!(error, Nf4Error::HostDevice { .. }), "{error}");
    }
}
