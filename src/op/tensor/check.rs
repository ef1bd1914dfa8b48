//! Checks of the tensors given.

use burn::tensor::{DType, Device, Tensor};

use crate::error::Nf4Error;

/// Checks that a tensor is of one of the dtypes that fit another.
pub(in crate::op) fn check_dtype<const D: usize>(
    name: &str,
    tensor: &Tensor<D>,
    how: &str,
    dtypes: &[DType],
) -> Result<(), Nf4Error> {
    if dtypes.contains(&tensor.dtype()) {
        return Ok(());
    }
    Err(Nf4Error::Dtype {
        tensor: name.into(),
        expected: format!("{:?} {how}", dtypes[0]),
        given: format!("{:?}", tensor.dtype()),
    })
}

/// Checks that a tensor lies on a device, with a graph or without.
pub(in crate::op) fn check_device(
    name: &str,
    given: &Device,
    expected: &Device,
) -> Result<(), Nf4Error> {
    if given == expected {
        return Ok(());
    }
    let [expected, given] = [expected, given].map(|device| device.clone().without_autodiff());
    if expected == given {
        return Ok(());
    }
    Err(Nf4Error::Device {
        tensor: name.into(),
        expected: format!("{expected:?}"),
        given: format!("{given:?}"),
    })
}
