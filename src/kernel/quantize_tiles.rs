//! Quantization of a weight by tiles of blocks, for devices with barriers.

use cubecl::prelude::*;

use super::quantize::{
    CELL_WORDS, CELLS, QuantizeBlueprint, QuantizeView, copy_tables, flush, fp4_code, inverse,
    pack_code,
};
use crate::format::QuantType;

/// Quantizes tiles of blocks; the result is that of
/// [`quantize_blocks_kernel`](super::quantize::quantize_blocks_kernel).
///
/// - `weight`: `view.elems` elements in vectors of `N`, which divides eight and the number of
///   elements; `packed`: the packed weight to fill; `absmax`: one f32 a block (unused if flat);
///   `tables`: as there, with the 64 thresholds and 64 codes of [`nf4_code_by_cell`] before the steps.
/// - A cube quantizes `group` blocks, which are `per_unit * CUBE_DIM` words, in one pass over the
///   weight. Unit `u` keeps the eight elements of each of words `u`, `u + CUBE_DIM`, … in
///   registers; the maxima of the words become those of the blocks in shared memory; then each
///   unit encodes its words.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn quantize_tiles_kernel<F: Float, N: Size>(
    weight: &[Vector<F, N>],
    tables: &[u32],
    packed: &mut [u32],
    absmax: &mut [f32],
    view: QuantizeView,
    #[comptime] blueprint: QuantizeBlueprint,
    #[comptime] per_unit: usize,
    #[comptime] group: usize,
    #[define(F)] _dtype: ElemType,
) {
    let vector = N::value().comptime();
    let words_a_block = comptime!(blueprint.block_elems / 8);
    let tile_words = comptime!(group * words_a_block);
    let unit = UNIT_POS as usize;
    let stride = CUBE_DIM as usize;
    let first_block = CUBE_POS * group;
    let first_word = first_block * words_a_block;
    copy_tables(tables, packed, &view, blueprint);

    let mut thresholds = Shared::<[f32]>::new_slice(CELLS);
    let mut codes = Shared::<[u32]>::new_slice(CELLS);
    let mut i = unit;
    while i < comptime!(CELLS) {
        thresholds[i] = f32::reinterpret(tables[view.table_words + i]);
        codes[i] = tables[view.table_words + comptime!(CELLS) + i];
        i += stride;
    }

    let mut maxima = Shared::<[f32]>::new_slice(tile_words);
    let mut values = Array::<f32>::new(comptime!(per_unit * 8));
    #[unroll]
    for w in 0..per_unit {
        let index = w * stride + unit;
        let element = (first_word + index) * 8;
        let mut max = 0.0f32;
        #[unroll]
        for j in 0..comptime!(8 / vector) {
            let at = element + comptime!(j * vector);
            let mut loaded = Vector::<f32, N>::new(0.0f32);
            if at < view.elems {
                loaded = Vector::<f32, N>::cast_from(weight[at / vector]);
            }
            #[unroll]
            for k in 0..vector {
                let value = loaded.extract(k);
                values[comptime!(w * 8 + j * vector + k)] = value;
                max = f32::max(max, f32::abs(value));
            }
        }
        maxima[index] = max;
    }
    sync_cube();

    // Up to eight entries become one, until there is one a block. A round reads entries that the
    // previous one wrote, and writes to the front of the other array.
    let mut reduced = Shared::<[f32]>::new_slice(comptime!(tile_words / 4));
    let rounds = comptime!(reduction_rounds(words_a_block));
    #[unroll]
    for round in 0..rounds {
        let left = comptime!(words_a_block >> (3 * round));
        let factor = comptime!(left.min(8));
        let entries = comptime!(group * left / factor);
        let mut entry = unit;
        while entry < entries {
            let mut max = 0.0f32;
            #[unroll]
            for k in 0..factor {
                let from = entry * factor + k;
                let value = if comptime!(round % 2 == 0) {
                    maxima[from]
                } else {
                    reduced[from]
                };
                max = f32::max(max, value);
            }
            if comptime!(round % 2 == 0) {
                reduced[entry] = max;
            } else {
                maxima[entry] = max;
            }
            entry += stride;
        }
        sync_cube();
    }

    // Inverses take the place of the maxima of blocks, in the array not read by the last round.
    let mut inverses = Shared::<[f32]>::new_slice(group);
    let mut block = unit;
    while block < group {
        let max = if comptime!(rounds % 2 == 1) {
            reduced[block]
        } else {
            maxima[block]
        };
        let max = flush(max);
        inverses[block] = inverse(tables, view.table_words + comptime!(CELL_WORDS), max);
        if first_block + block < view.blocks {
            if comptime!(blueprint.flat) {
                packed[view.scales + first_block + block] = u32::reinterpret(max);
            } else {
                absmax[first_block + block] = max;
            }
        }
        block += stride;
    }
    sync_cube();

    #[unroll]
    for w in 0..per_unit {
        let index = w * stride + unit;
        let element = (first_word + index) * 8;
        if element < view.elems {
            let inverse = inverses[index / words_a_block];
            let mut word = 0u32;
            #[unroll]
            for k in 0..8usize {
                let normalized = values[comptime!(w * 8 + k)] * inverse;
                let code = if comptime!(blueprint.quant_type == QuantType::Nf4) {
                    nf4_code_by_cell(normalized, &thresholds, &codes)
                } else {
                    fp4_code(normalized)
                };
                word |= pack_code(code, element, comptime!(k), &view, blueprint);
            }
            packed[first_word + index] = word;
        }
    }
}

/// Rounds that take `words` maxima to one, eight to one a round.
fn reduction_rounds(words: usize) -> usize {
    words.ilog2().div_ceil(3) as usize
}

/// The NF4 code of a normalised value, by cells of 1/16.
///
/// A cell reaches half its width to either side of a multiple of 1/16 and holds at most one
/// threshold, well away from its borders; so it does not matter to which cell a value at a border
/// goes. Adding `2^23 + 16` to sixteen times the value leaves the number of its cell in the low
/// bits. [`nf4_cells`](crate::format::nf4_cells) makes the tables.
#[cube]
fn nf4_code_by_cell(normalized: f32, thresholds: &Shared<[f32]>, codes: &Shared<[u32]>) -> u32 {
    let cell = u32::reinterpret(normalized * 16.0f32 + 8388624.0f32) & 63;
    codes[cell as usize] + u32::cast_from(normalized > thresholds[cell as usize])
}
