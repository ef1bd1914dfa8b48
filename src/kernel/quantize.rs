//! Quantization on the device, to the same bits as the reference in `format`.
//!
//! Four launches with double quantization, one without:
//!
//! 1. [`quantize_blocks_kernel`], or where there are barriers
//!    [`quantize_tiles_kernel`](super::quantize_tiles::quantize_tiles_kernel): codes and absmax of
//!    each block;
//! 2. [`sum_absmax_kernel`]: sums of 4096 absmax each;
//! 3. [`mean_absmax_kernel`]: the offset, their mean;
//! 4. [`quantize_absmax_kernel`]: nested codes and absmax.
//!
//! Each sum follows the order written down at [`SumF32x2`](crate::format::SumF32x2), which does
//! not depend on plane or cube sizes. Without barriers (CubeCL's CPU runtime) one unit walks
//! through the same order alone.

use cubecl::prelude::*;

use super::decode::opaque;
use crate::format::{
    FP4_CODE_BY_LEVEL, FP4_THRESHOLDS, HEADER_WORDS, NF4_THRESHOLDS, PackedLayout, QuantType,
    SumF32x2,
};

/// Thresholds of the cells of `nf4_code_by_cell`, and as many codes after them.
pub const CELLS: usize = 64;

/// Words of both, which follow the tables and the header of a packed weight.
pub const CELL_WORDS: usize = 2 * CELLS;

/// Where the table of reciprocals starts where scales are nested.
const NESTED_RECIPROCALS: usize = PackedLayout::NESTED_SCALES + HEADER_WORDS + CELL_WORDS;

/// What forks the compiled quantization kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct QuantizeBlueprint {
    /// The 4-bit data type.
    pub quant_type: QuantType,
    /// Elements a block.
    pub block_elems: usize,
    /// Scales are written to the packed buffer as they are, not to be quantized again.
    pub flat: bool,
}

/// Run-time positions in a packed weight, in words, and its sizes.
#[derive(CubeType, CubeLaunch)]
pub struct QuantizeView {
    /// Number of weights.
    pub elems: usize,
    /// Number of blocks.
    pub blocks: usize,
    /// Words of `tables` up to the header's end.
    pub table_words: usize,
    /// Number of nested blocks; 0 if flat.
    pub nested_blocks: usize,
    /// Where the scales start.
    pub scales: usize,
    /// Where the codebook starts; with the other tables it is `tables` without its last four
    /// words.
    pub codebook: usize,
    /// Where the header starts; it is the last four words of `tables`.
    pub header: usize,
}

/// `value`, or zero where it is smaller than the smallest normal number.
#[cube]
pub fn flush(value: f32) -> f32 {
    select(value < f32::new(f32::MIN_POSITIVE), 0.0f32, value)
}

/// The factor that normalises a block, [`reciprocal`](crate::format::reciprocal()); zero for a
/// block of zeros, whose weights then get the code of zero.
///
/// `steps` is where [`RECIPROCAL_STEPS`](crate::format::RECIPROCAL_STEPS) starts in `tables`.
#[cube]
pub fn inverse(tables: &[u32], steps: usize, max: f32) -> f32 {
    let rounded = flush(1.0f32 / max);
    let bits = u32::reinterpret(max);
    let mantissa = (bits >> 13) & 1023;
    let step = (tables[steps + (mantissa >> 4) as usize] >> ((mantissa & 15) * 2)) & 3;
    let stepped = f32::reinterpret(u32::reinterpret(rounded) + step - 1);
    let short = (bits & 8191) == 0 && rounded > 0.0f32;
    select(max == 0.0f32, 0.0f32, select(short, stepped, rounded))
}

/// The NF4 code of a normalised value: how many thresholds lie strictly below it.
#[cube]
fn nf4_code(normalized: f32) -> u32 {
    let mut code = 0u32;
    #[unroll]
    for i in 0..15 {
        let threshold = comptime!(NF4_THRESHOLDS[i as usize]);
        code += u32::cast_from(normalized > f32::new(threshold));
    }
    code
}

/// The FP4 code of a normalised value.
#[cube]
pub fn fp4_code(normalized: f32) -> u32 {
    let magnitude = f32::abs(normalized);
    // Codes of the levels in ascending order; each threshold passed moves on to the next.
    let mut code = comptime!(u32::from(FP4_CODE_BY_LEVEL[0])).runtime();
    #[unroll]
    for i in 0..7 {
        let threshold = comptime!(FP4_THRESHOLDS[i as usize]);
        let next = comptime!(u32::from(FP4_CODE_BY_LEVEL[i as usize + 1]));
        code = select(magnitude > f32::new(threshold), next.runtime(), code);
    }
    code + select(normalized < 0.0f32, 8u32, 0u32)
}

/// Copies the tables to the packed weight and clears the padding of its sections; units of the
/// whole launch share the work.
#[cube]
pub fn copy_tables(
    tables: &[u32],
    packed: &mut [u32],
    view: &QuantizeView,
    #[comptime] blueprint: QuantizeBlueprint,
) {
    let unit = ABSOLUTE_POS;
    let table_words = view.table_words - comptime!(HEADER_WORDS);
    let mut i = unit;
    while i < view.table_words {
        if i < table_words {
            packed[view.codebook + i] = tables[i];
        } else {
            packed[view.header + i - table_words] = tables[i];
        }
        i += CUBE_COUNT * CUBE_DIM as usize;
    }
    // The padding of a section is at most three words. What sections hold is written elsewhere.
    if unit < 4 {
        let code_words = view.elems.div_ceil(8usize);
        if code_words + unit < view.scales {
            packed[code_words + unit] = 0u32;
        }
        let scale_words = if comptime!(blueprint.flat) {
            view.blocks
        } else {
            view.blocks.div_ceil(4usize)
        };
        if view.scales + scale_words + unit < view.codebook {
            packed[view.scales + scale_words + unit] = 0u32;
        }
        let nested_end = view.codebook + table_words + view.nested_blocks;
        if nested_end + unit < view.header {
            packed[nested_end + unit] = 0u32;
        }
    }
}

/// A code in its place of a word, or what belongs there behind the end of the weight.
#[cube]
pub fn pack_code(
    code: u32,
    element: usize,
    #[comptime] place: usize,
    view: &QuantizeView,
    #[comptime] blueprint: QuantizeBlueprint,
) -> u32 {
    let zero_code = comptime!(u32::from(blueprint.quant_type.zero_code()));
    let mut code = code;
    if element + place >= view.elems {
        // The other half of the last byte holds a zero, bytes behind it are padding.
        code = select(
            element + place == view.elems && view.elems % 2 == 1,
            zero_code.runtime(),
            0u32,
        );
    }
    code << comptime!((place as u32 * 4) ^ 4)
}

/// Quantizes blocks of weights.
///
/// - `weight`: `view.elems` elements in vectors of `N`, which divides eight and the number of
///   elements; `packed`: the packed weight to fill; `absmax`: one f32 a block (unused if flat);
///   `tables`: codebook, map and offset, then the header, 128 words that are not used here, and
///   the steps of [`inverse`].
/// - Unit `u` takes block `u`, reads it twice, and writes its words.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn quantize_blocks_kernel<F: Float, N: Size>(
    weight: &[Vector<F, N>],
    tables: &[u32],
    packed: &mut [u32],
    absmax: &mut [f32],
    view: QuantizeView,
    #[comptime] blueprint: QuantizeBlueprint,
    #[define(F)] _dtype: ElemType,
) {
    let vector = N::value().comptime();
    let vectors_a_block = comptime!(blueprint.block_elems / vector);
    let words_a_block = comptime!(blueprint.block_elems / 8);
    let block = ABSOLUTE_POS;

    copy_tables(tables, packed, &view, blueprint);

    if block < view.blocks {
        let first = block * vectors_a_block;
        let mut max = 0.0f32;
        for i in 0..vectors_a_block {
            if (first + i) * vector < view.elems {
                let values = Vector::<f32, N>::cast_from(weight[first + i]);
                #[unroll]
                for k in 0..vector {
                    max = f32::max(max, f32::abs(values.extract(k)));
                }
            }
        }
        max = flush(max);
        let inverse = inverse(tables, view.table_words + comptime!(CELL_WORDS), max);
        if comptime!(blueprint.flat) {
            packed[view.scales + block] = u32::reinterpret(max);
        } else {
            absmax[block] = max;
        }

        for w in 0..words_a_block {
            let element = block * blueprint.block_elems + w * 8;
            if element < view.elems {
                let mut word = 0u32;
                #[unroll]
                for j in 0..comptime!(8 / vector) {
                    let at = element + comptime!(j * vector);
                    let mut values = Vector::<f32, N>::new(0.0f32);
                    if at < view.elems {
                        values = Vector::<f32, N>::cast_from(weight[at / vector]);
                    }
                    #[unroll]
                    for k in 0..vector {
                        let normalized = values.extract(k) * inverse;
                        let code = if comptime!(blueprint.quant_type == QuantType::Nf4) {
                            nf4_code(normalized)
                        } else {
                            fp4_code(normalized)
                        };
                        let place = comptime!(j * vector + k);
                        word |= pack_code(code, element, place, &view, blueprint);
                    }
                }
                packed[element / 8] = word;
            }
        }
    }
}

/// Adds a sum to another, both as unevaluated pairs: [`SumF32x2::plus`].
///
/// Compilers for WGSL may cancel `(a + b) - a` to `b`, and Mesa does, which takes the rounding
/// error out of the sum; [`opaque`] keeps them from it.
#[cube]
fn plus(high: f32, low: f32, other_high: f32, other_low: f32, zero: u32) -> (f32, f32) {
    let sum = opaque(high + other_high, zero);
    let other_part = opaque(sum - high, zero);
    let error = (high - (sum - other_part)) + (other_high - other_part);
    let small = low + other_low + error;
    let total = opaque(sum + small, zero);
    (total, small - (total - sum))
}

/// Sums `items` values from `first` on in the specified order. With barriers all units of the
/// cube take part and all get the sum; without, each unit works alone.
#[cube]
fn ordered_sum(
    high: &[f32],
    low: &[f32],
    first: usize,
    items: usize,
    zero: u32,
    #[comptime] has_low: bool,
    #[comptime] barriers: bool,
) -> (f32, f32) {
    let lanes = comptime!(SumF32x2::LANES);
    if barriers {
        let mut highs = Shared::<[f32]>::new_slice(lanes);
        let mut lows = Shared::<[f32]>::new_slice(lanes);
        // Cubes of fewer units than lanes let each unit take several.
        let mut lane = UNIT_POS as usize;
        while lane < lanes {
            let (h, l) = lane_sum(high, low, first, items, lane, zero, has_low);
            highs[lane] = h;
            lows[lane] = l;
            lane += CUBE_DIM as usize;
        }
        sync_cube();
        let mut half = (lanes / 2).runtime();
        while half > 0 {
            let mut lane = UNIT_POS as usize;
            while lane < half {
                let (h, l) = plus(
                    highs[lane],
                    lows[lane],
                    highs[lane + half],
                    lows[lane + half],
                    zero,
                );
                highs[lane] = h;
                lows[lane] = l;
                lane += CUBE_DIM as usize;
            }
            sync_cube();
            half /= 2;
        }
        (highs[0], lows[0])
    } else {
        let mut highs = Array::<f32>::new(lanes);
        let mut lows = Array::<f32>::new(lanes);
        for lane in 0..lanes {
            let (h, l) = lane_sum(high, low, first, items, lane, zero, has_low);
            highs[lane] = h;
            lows[lane] = l;
        }
        let mut half = (lanes / 2).runtime();
        while half > 0 {
            for lane in 0..half {
                let (h, l) = plus(
                    highs[lane],
                    lows[lane],
                    highs[lane + half],
                    lows[lane + half],
                    zero,
                );
                highs[lane] = h;
                lows[lane] = l;
            }
            half /= 2;
        }
        (highs[0], lows[0])
    }
}

/// The sum of one lane: every 256th item.
#[cube]
fn lane_sum(
    high: &[f32],
    low: &[f32],
    first: usize,
    items: usize,
    lane: usize,
    zero: u32,
    #[comptime] has_low: bool,
) -> (f32, f32) {
    let mut h = 0.0f32;
    let mut l = 0.0f32;
    let mut i = lane;
    while i < items {
        let mut other_low = 0.0f32;
        if has_low {
            other_low = low[first + i];
        }
        let (sum_h, sum_l) = plus(h, l, high[first + i], other_low, zero);
        h = sum_h;
        l = sum_l;
        i += comptime!(SumF32x2::LANES);
    }
    (h, l)
}

/// Sums chunks of 4096 scales: cube (or, without barriers, unit) `c` takes chunk `c`.
///
/// - `absmax`: one f32 a block; `high`, `low`: one f32 a chunk.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn sum_absmax_kernel(
    absmax: &[f32],
    high: &mut [f32],
    low: &mut [f32],
    blocks: usize,
    zero: u32,
    #[comptime] barriers: bool,
) {
    let chunk = if barriers { CUBE_POS } else { ABSOLUTE_POS };
    let first = chunk * comptime!(SumF32x2::CHUNK);
    if first < blocks {
        let items = usize::min(blocks - first, comptime!(SumF32x2::CHUNK).runtime());
        let (h, l) = ordered_sum(absmax, absmax, first, items, zero, false, barriers);
        if comptime!(!barriers) || UNIT_POS == 0 {
            high[chunk] = h;
            low[chunk] = l;
        }
    }
}

/// The offset: the mean of all scales, from the sums of the chunks. One cube, or one unit.
///
/// - `absmax`: one f32 a block; `high`, `low`: one f32 a chunk; `packed[offset]` takes the mean's bits.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn mean_absmax_kernel(
    absmax: &[f32],
    high: &[f32],
    low: &[f32],
    packed: &mut [u32],
    blocks: usize,
    chunks: usize,
    offset: usize,
    inverse_blocks: f32,
    zero: u32,
    #[comptime] barriers: bool,
) {
    let (h, _l) = ordered_sum(high, low, 0usize, chunks, zero, true, barriers);
    if UNIT_POS == 0 {
        let mut mean = h * inverse_blocks;
        // By the bits: WGSL lets a compiler take all floats for finite.
        let exponent = comptime!(f32::INFINITY.to_bits()).runtime();
        if u32::reinterpret(h) & exponent == exponent {
            mean = large_mean(absmax, blocks, inverse_blocks, zero);
        }
        packed[offset] = u32::reinterpret(mean);
    }
}

/// The mean of scales whose sum overflows, by one unit: [`SumF32x2::large_mean`].
#[cube]
#[allow(clippy::needless_range_loop)] // CubeCL takes no iterator here.
fn large_mean(absmax: &[f32], blocks: usize, inverse_blocks: f32, zero: u32) -> f32 {
    let mut high = 0.0f32;
    let mut low = 0.0f32;
    for i in 0..blocks {
        let value = opaque(absmax[i] * comptime!(SumF32x2::SMALLER), zero);
        let (h, l) = plus(high, low, value, 0.0f32, zero);
        high = h;
        low = l;
    }
    let mean = opaque(high * inverse_blocks, zero) * comptime!(1.0 / SumF32x2::SMALLER);
    f32::min(mean, comptime!(f32::MAX))
}

/// Quantizes the scales to 8 bit: cube (or, without barriers, unit) `b` takes nested block `b`.
///
/// - `absmax`: one f32 a block; `tables`: codebook, then the dynamic map; `packed`: the offset is
///   there, nested codes and scales are filled in. A unit writes whole words of four codes.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn quantize_absmax_kernel(
    absmax: &[f32],
    tables: &[u32],
    packed: &mut [u32],
    blocks: usize,
    scales: usize,
    codebook: usize,
    #[comptime] nested_elems: usize,
    #[comptime] barriers: bool,
) {
    let nested_block = if barriers { CUBE_POS } else { ABSOLUTE_POS };
    let first = nested_block * nested_elems;
    if first < blocks {
        let items = usize::min(blocks - first, nested_elems.runtime());
        let offset = f32::reinterpret(packed[codebook + comptime!(PackedLayout::NESTED_OFFSET)]);
        let unit = if barriers {
            UNIT_POS as usize
        } else {
            0usize.runtime()
        };
        let stride = if barriers {
            CUBE_DIM as usize
        } else {
            1usize.runtime()
        };

        let mut max = 0.0f32;
        let mut i = unit;
        while i < items {
            max = f32::max(max, f32::abs(absmax[first + i] - offset));
            i += stride;
        }
        if barriers {
            let mut maxima = Shared::<[f32]>::new_slice(comptime!(SumF32x2::LANES));
            maxima[unit] = max;
            sync_cube();
            // The size of a cube is a power of two.
            let mut half = stride / 2;
            while half > 0 {
                if unit < half {
                    maxima[unit] = f32::max(maxima[unit], maxima[unit + half]);
                }
                sync_cube();
                half /= 2;
            }
            max = maxima[0];
        }
        max = flush(max);
        let inverse = inverse(tables, comptime!(NESTED_RECIPROCALS), max);
        if unit == 0 {
            packed[codebook + comptime!(PackedLayout::NESTED_SCALES) + nested_block] =
                u32::reinterpret(max);
        }

        let mut w = unit;
        while w * 4 < items {
            let mut word = 0u32;
            #[unroll]
            for k in 0..4usize {
                let i = w * 4 + k;
                if i < items {
                    let code = nested_code(tables, (absmax[first + i] - offset) * inverse);
                    let code = select(max > 0.0f32, code, 0u32);
                    word |= code << comptime!(k as u32 * 8);
                }
            }
            packed[scales + first / 4 + w] = word;
            w += stride;
        }
    }
}

/// The code of the nearest entry of the dynamic map: how many midpoints lie strictly below the
/// value, found by bisection.
#[cube]
fn nested_code(tables: &[u32], normalized: f32) -> u32 {
    let mut code = 0u32;
    #[unroll]
    for i in 0..8u32 {
        let step = comptime!(128u32 >> i);
        let pivot = code + step;
        // 255 midpoints, numbered from 1: midpoint m lies between entries m - 1 and m.
        // The map follows the sixteen entries of the codebook.
        let above = pivot as usize + comptime!(PackedLayout::NESTED_MAP);
        let below = f32::reinterpret(tables[above - 1]);
        let above = f32::reinterpret(tables[above]);
        code = select(normalized > (below + above) * 0.5f32, pivot, code);
    }
    code
}
