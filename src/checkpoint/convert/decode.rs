//! The values of a quantized weight, if its dtype holds them.

use crate::checkpoint::elements::with_float_type;
use crate::error::Nf4Error;
use crate::format::{Absmax, FloatElement, Nf4Tensor};
use crate::host;

/// All values of a weight.
///
/// # Errors
/// [`Nf4Error::NonFinite`] for the first one that `T` cannot hold.
pub(crate) fn decode<T: FloatElement>(weight: Nf4Tensor, key: &str) -> Result<Vec<T>, Nf4Error> {
    let can_overflow = can_overflow::<T>(&weight);
    let layout = weight.packed_layout();
    let words = weight.to_packed();
    drop(weight);
    let mut values = vec![T::zeroed(); layout.elems()];
    host::dequantize(&words, &layout, 0, &mut values);
    let overflows = |value: &T| can_overflow && !value.to_f32().is_finite();
    match values.iter().position(overflows) {
        None => Ok(values),
        Some(index) => Err(Nf4Error::NonFinite {
            tensor: key.into(),
            index,
            given: values[index].to_f32(),
        }),
    }
}

/// Checks that every value of a weight fits its dtype, without decoding any as a rule.
///
/// # Errors
/// [`Nf4Error::NonFinite`] for the first one that does not.
pub(crate) fn check_decodes(weight: &Nf4Tensor, key: &str) -> Result<(), Nf4Error> {
    with_float_type!(weight.dtype(), T => match can_overflow::<T>(weight) {
        false => Ok(()),
        true => decode::<T>(weight.clone(), key).map(|_| ()),
    })
}

/// Whether a scale is too large for `T`. No level is larger than 1, so that all values fit where
/// all scales do.
fn can_overflow<T: FloatElement>(weight: &Nf4Tensor) -> bool {
    let is_beyond = |scale: f32| !T::from_f32(scale).to_f32().is_finite();
    match weight.absmax() {
        Absmax::Flat(scales) => scales.iter().any(|&scale| is_beyond(scale)),
        Absmax::Nested(nested) => {
            let groups = nested.codes.chunks(nested.block_size.elems());
            groups.zip(&nested.absmax).any(|(codes, absmax)| {
                let scale = |&code: &u8| nested.map[usize::from(code)] * absmax + nested.offset;
                codes.iter().map(scale).any(is_beyond)
            })
        }
    }
}
