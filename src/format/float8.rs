//! The small floats that codes and scales are made of.

use super::codebook::E4M3_CODEBOOK;

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
pub fn e4m3_code(value: f32) -> u8 {
    let sign = u8::from(value.is_sign_negative()) << 7;
    if value.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = value.abs().min(E4M3_MAX);
    let above = E4M3_CODEBOOK[..127].partition_point(|&finite| finite < magnitude);
    let Some(below) = above.checked_sub(1) else {
        return sign;
    };
    // Both differences are exact.
    let down = magnitude - E4M3_CODEBOOK[below];
    let up = E4M3_CODEBOOK[above] - magnitude;
    let nearest = match down.total_cmp(&up) {
        std::cmp::Ordering::Less => below,
        std::cmp::Ordering::Greater => above,
        std::cmp::Ordering::Equal => below + below % 2,
    };
    sign | nearest as u8
}

/// The nearest E2M1 code, ties to the even one; magnitudes above 6 become 6, and so does a NaN.
pub fn e2m1_code(value: f32) -> u8 {
    let magnitude = value.abs();
    // A tie goes up where the code below is odd.
    let up_from = [0.75, 1.75, 3.5];
    let above = [0.25, 1.25, 2.5, 5.0];
    let level = up_from.iter().filter(|&&tie| magnitude >= tie).count()
        + above.iter().filter(|&&tie| magnitude > tie).count();
    let level = if value.is_nan() { 7 } else { level as u8 };
    level | u8::from(value.is_sign_negative()) << 3
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
