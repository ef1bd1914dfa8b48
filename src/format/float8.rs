//! The small floats that codes and scales are made of.

/// The largest finite value of E4M3.
pub const E4M3_MAX: f32 = 448.0;

/// The largest value of E2M1.
pub const E2M1_MAX: f32 = 6.0;

pub(super) const fn e4m3_table() -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code] = e4m3_value(code as u32);
        code += 1;
    }
    values
}

/// One sign bit, four of exponent with a bias of 7, three of mantissa.
const fn e4m3_value(code: u32) -> f32 {
    let (exponent, mantissa) = ((code >> 3) & 15, code & 7);
    let magnitude = if code & 0x7f == 0x7f {
        f32::NAN
    } else if exponent == 0 {
        mantissa as f32 * (1.0 / 512.0)
    } else {
        f32::from_bits((exponent + 127 - 7) << 23 | mantissa << 20)
    };
    if code & 0x80 != 0 {
        -magnitude
    } else {
        magnitude
    }
}

/// The nearest E4M3 code, ties to the even one; magnitudes above 448 become 448, a NaN stays one.
#[inline]
pub fn e4m3_code(value: f32) -> u8 {
    /// Of an f32's mantissa bits three are kept.
    const DROPPED_BITS: u32 = 20;
    const SMALLEST_NORMAL: f32 = 1.0 / 64.0;
    /// Neighbours of this number are as far apart as E4M3's below the smallest normal one.
    const ROUNDS_AS_SUBNORMALS: f32 = 16384.0;
    let sign = u8::from(value.is_sign_negative()) << 7;
    if value.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = value.abs().min(E4M3_MAX);
    let code = if magnitude < SMALLEST_NORMAL {
        (magnitude + ROUNDS_AS_SUBNORMALS).to_bits() - ROUNDS_AS_SUBNORMALS.to_bits()
    } else {
        let bits = magnitude.to_bits();
        let last = (bits >> DROPPED_BITS) & 1;
        let rounded = (bits + last + (1 << (DROPPED_BITS - 1)) - 1) >> DROPPED_BITS;
        // The bias is 7 in place of 127.
        rounded - ((127 - 7) << 3)
    };
    sign | code as u8
}

/// The nearest E2M1 code, ties to the even one; magnitudes above 6 become 6, and so does a NaN.
#[inline]
pub fn e2m1_code(value: f32) -> u8 {
    let magnitude = value.abs();
    let is_at_least = |tie: f32| u32::from(magnitude >= tie);
    let is_above = |tie: f32| u32::from(magnitude > tie);
    // A tie goes up where the code below is odd.
    let level = is_above(0.25)
        + is_at_least(0.75)
        + is_above(1.25)
        + is_at_least(1.75)
        + is_above(2.5)
        + is_at_least(3.5)
        + is_above(5.0);
    let level = if value.is_nan() { 7 } else { level };
    (level | (value.to_bits() >> 28) & 8) as u8
}

/// `2^(code - 127)`; 255 is NaN.
pub fn e8m0_value(code: u8) -> f32 {
    match code {
        255 => f32::NAN,
        // Half of the smallest normal number.
        0 => f32::from_bits(1 << 22),
        code => f32::from_bits(u32::from(code) << 23),
    }
}
