//! Codes of 8 bit, whose values are too many for a table in registers.

use super::Source;
use crate::format::FloatElement;

/// Decodes a range: values rounded to `R`, as `T`.
pub(super) fn decode<T: FloatElement, R: FloatElement>(
    source: &Source,
    start: usize,
    out: &mut [T],
) {
    let (mut at, mut rest) = (start, out);
    while !rest.is_empty() {
        let run = at >> source.run_log2;
        let left = ((run + 1) << source.run_log2) - at;
        let (part, later) = rest.split_at_mut(left.min(rest.len()));
        let scale = source.scale(run);
        for (index, value) in (at..).zip(part.iter_mut()) {
            let code = source.codes[index / 4] >> (index % 4 * 8);
            let product = level(code & 0xff) * scale;
            *value = T::from_f32(R::from_f32(product).to_f32());
        }
        at += part.len();
        rest = later;
    }
}

/// The value of an E4M3 code, without a table, so that compilers can do several at once.
#[inline(always)]
fn level(code: u32) -> f32 {
    const BIAS: u32 = 127 - 7;
    let magnitude = code & 0x7f;
    let normal = f32::from_bits((magnitude << 20) + (BIAS << 23));
    // Below the smallest exponent the mantissa counts in steps of 2^-9.
    let subnormal = magnitude as f32 * (1.0 / 512.0);
    let value = if magnitude < 8 { subnormal } else { normal };
    let value = if magnitude == 0x7f { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | (code & 0x80) << 24)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::E4M3_CODEBOOK;

    #[test]
    fn levels_are_those_of_the_table() {
        for code in 0..256u32 {
            let expected = E4M3_CODEBOOK[code as usize];
            let given = level(code);
            assert!(given.to_bits() == expected.to_bits() || given.is_nan() && expected.is_nan());
        }
    }
}
