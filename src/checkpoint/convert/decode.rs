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

/// Whether a scale times the largest level is too large for `T`, or there can be a code for NaN.
fn can_overflow<T: FloatElement>(weight: &PackedImage) -> bool {
    let config = weight.layout().config();
    let levels = config.quant_type.codebook().iter();
    let largest = levels.fold(0.0f32, |max, level| max.max(level.abs()));
    if config.quant_type.bits() == 8 {
        return true;
    }
    let is_beyond = |scale: f32| !T::from_f32(largest * scale).to_f32().is_finite();
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
        ScaleParts::Coded {
            codes,
            tensor_scale,
        } => {
            let table = config.scale_type().table(tensor_scale);
            let table = table.expect("scales are 8-bit floats");
            codes
                .iter()
                .any(|&code| is_beyond(table[usize::from(code)]))
        }
    }
}
