//! The values of a quantized weight, if its dtype holds them.

use crate::checkpoint::elements::with_float_type;
use crate::error::Nf4Error;
use crate::format::{FloatElement, PackedImage, ScaleParts};
use crate::host;

/// All values of a weight.
///
/// # Errors
/// [`Nf4Error::NonFinite`] for the first one that `T` cannot hold.
pub(crate) fn decode<T: FloatElement>(weight: &PackedImage, key: &str) -> Result<Vec<T>, Nf4Error> {
    let layout = weight.layout();
    let mut values = vec![T::zeroed(); layout.elems()];
    host::dequantize(weight.words(), layout, 0, &mut values);
    if !can_overflow::<T>(weight) {
        return Ok(values);
    }
    match values.iter().position(|value| !value.to_f32().is_finite()) {
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
pub(crate) fn check_decodes(weight: &PackedImage, key: &str) -> Result<(), Nf4Error> {
    with_float_type!(weight.dtype(), T => match can_overflow::<T>(weight) {
        false => Ok(()),
        true => decode::<T>(weight, key).map(drop),
    })
}

/// Whether a scale is too large for `T`. No level is larger than 1, so that all values fit where
/// all scales do.
fn can_overflow<T: FloatElement>(weight: &PackedImage) -> bool {
    let is_beyond = |scale: f32| !T::from_f32(scale).to_f32().is_finite();
    match weight.parts().scales {
        ScaleParts::Flat(scales) => scales.iter().any(is_beyond),
        ScaleParts::Nested {
            codes,
            absmax,
            map,
            offset,
            block_size,
        } => {
            let groups = codes.chunks(block_size.elems());
            groups.zip(absmax.iter()).any(|(codes, absmax)| {
                let scale = |&code: &u8| map[usize::from(code)] * absmax + offset;
                codes.iter().map(scale).any(is_beyond)
            })
        }
    }
}
