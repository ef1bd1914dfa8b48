//! The reciprocal that bitsandbytes normalises blocks with.
//!
//! bitsandbytes' CUDA kernels are built with `-use_fast_math`, so that `1.0f / absmax` becomes the
//! GPU's instruction `rcp.approx.ftz.f32`. Its result is the correctly rounded one or a neighbour
//! of it, and which of the three depends on the mantissa alone. That matters where a weight lies
//! exactly on a threshold, as it does now and then with FP4.
//!
//! The largest magnitude of a block of f16 or bf16 weights has at most ten bits behind its leading
//! one. For those, a table says where the instruction differs; it was read out on an H200 with
//! `scripts/reciprocal.cu` and explains every code of the golden files, which come from an H100.
//! Longer mantissas, which only f32 weights have, get the correctly rounded reciprocal: the
//! instruction differs from it by one unit in the last place for 13% of them.

/// Mantissa bits that the table knows.
const BITS: u32 = 10;

/// For each mantissa of ten bits, two bits: one more than what is to be added to the correctly
/// rounded reciprocal, in units in the last place. Sixteen mantissas a word, the first in the
/// lowest bits.
pub const RECIPROCAL_STEPS: [u32; 64] = [
    0x4595_4555,
    0x5555_5669,
    0x4555_5554,
    0x4555_5556,
    0x5155_4555,
    0x5594_0555,
    0x555a_5569,
    0x0555_5559,
    0x5565_1555,
    0x5559_5695,
    0x5555_5554,
    0x5555_5514,
    0x5695_5555,
    0x5115_4559,
    0x5555_5569,
    0x5655_5555,
    0x5555_5655,
    0x1555_5545,
    0x5566_5555,
    0x5555_555a,
    0x5555_5155,
    0x5165_5555,
    0x5555_5555,
    0x5555_5595,
    0x5695_5565,
    0x155a_5591,
    0x5559_5559,
    0x5115_9555,
    0x5565_6959,
    0x5541_5595,
    0x5556_5559,
    0x5599_5565,
    0x555a_9555,
    0x9555_5596,
    0x4555_5595,
    0x5555_5695,
    0x5555_5555,
    0x5555_5555,
    0x5555_4555,
    0x5555_5595,
    0x55a6_9555,
    0x5595_5555,
    0x9555_5695,
    0x5a55_5555,
    0x5555_5555,
    0x5556_5655,
    0x1555_5555,
    0x5555_5555,
    0x1555_5555,
    0x5555_59a9,
    0x5955_9955,
    0x5555_9555,
    0x5555_5555,
    0x5555_5555,
    0x6666_5555,
    0x5955_5555,
    0x5555_5555,
    0x5596_5555,
    0x5555_5556,
    0x5045_4556,
    0x5556_5155,
    0x5695_5555,
    0x5555_5955,
    0x5554_5545,
];

/// `1 / x` for a positive normal `x`, as described in the head of this file; subnormal results
/// are flushed to zero.
pub fn reciprocal(x: f32) -> f32 {
    let inverse = 1.0 / x;
    if inverse < f32::MIN_POSITIVE {
        return 0.0;
    }
    let bits = x.to_bits();
    if bits.trailing_zeros() < 23 - BITS || !inverse.is_finite() {
        return inverse;
    }
    let mantissa = bits >> (23 - BITS) & ((1 << BITS) - 1);
    let step = RECIPROCAL_STEPS[mantissa as usize / 16] >> (mantissa % 16 * 2) & 3;
    f32::from_bits(inverse.to_bits() + step - 1)
}
