//! Checks that every layer above makes too.

use crate::error::Nf4Error;

/// Product of a shape, if there are elements and their bytes can be addressed as f32.
pub(crate) fn checked_elems(tensor: &str, shape: &[usize]) -> Result<usize, Nf4Error> {
    shape
        .iter()
        .try_fold(1usize, |elems, &dim| elems.checked_mul(dim))
        .filter(|&elems| elems > 0 && elems <= isize::MAX as usize / 4)
        .ok_or_else(|| Nf4Error::ElementCount {
            tensor: tensor.into(),
            shape: shape.to_vec(),
        })
}

/// Checks a number of elements.
pub(crate) fn check_len(tensor: &str, expected: usize, given: usize) -> Result<(), Nf4Error> {
    if expected == given {
        return Ok(());
    }
    Err(Nf4Error::Length {
        tensor: tensor.into(),
        expected,
        given,
    })
}

/// Checks a shape.
pub(crate) fn check_shape(
    tensor: &str,
    expected: &[usize],
    given: &[usize],
) -> Result<(), Nf4Error> {
    if expected == given {
        return Ok(());
    }
    Err(Nf4Error::Shape {
        tensor: tensor.into(),
        expected: expected.to_vec(),
        given: given.to_vec(),
    })
}

/// Looks for the first NaN or infinity.
pub(crate) fn check_finite(
    tensor: &str,
    values: impl IntoIterator<Item = f32>,
) -> Result<(), Nf4Error> {
    let mut values = values.into_iter().enumerate();
    match values.find(|(_, value)| !value.is_finite()) {
        None => Ok(()),
        Some((index, given)) => Err(Nf4Error::NonFinite {
            tensor: tensor.into(),
            index,
            given,
        }),
    }
}

/// The dimensions of a matrix.
pub(crate) fn matrix_dims(tensor: &str, shape: &[usize]) -> Result<[usize; 2], Nf4Error> {
    shape.try_into().map_err(|_| Nf4Error::NotAMatrix {
        tensor: tensor.into(),
        shape: shape.to_vec(),
    })
}
