//! `pipelined`: the tiles of `tiled_2d`, walked through by cubes that stay.
//!
//! As many cubes as the device holds at once share the tiles evenly. While a cube decodes one tile,
//! the loads of its next one are under way, so that their latency and the start of a cube are paid
//! once, not once a tile.

use cubecl::prelude::*;

use super::decode::{
    DequantizeBlueprint, PackedView, block_scale, decode_vector, is_wanted, load_codebook,
    store_vector,
};

/// Decodes a packed weight, seen as a matrix with a block a row. Needs shared memory and barriers.
///
/// - `packed`: the whole packed weight; `out`: the decoded elements, `view.len` of them in vectors
///   of `N`.
/// - A tile is `group` blocks, which are exactly `per_unit * CUBE_DIM` vectors; a cube has at least
///   `group` units and takes tiles `CUBE_POS`, `CUBE_POS + CUBE_COUNT`, … of `tiles`.
/// - Of the next tile a unit keeps the words of its vectors and, units `0..group`, a scale in
///   registers, until the barrier that ends the current tile.
/// - Elements outside of the range asked for are neither read nor written. `N` divides eight and
///   the element to start at.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn dequantize_pipelined_kernel<F: Float, N: Size>(
    packed: &[u32],
    out: &mut [Vector<F, N>],
    view: PackedView,
    tiles: usize,
    #[comptime] blueprint: DequantizeBlueprint,
    #[define(F)] _dtype: ElemType,
) {
    let vector = N::value().comptime();
    let vectors_a_block = comptime!((1usize << blueprint.block_log2) / vector);
    let vectors_a_word = comptime!(8 / vector);
    let block_log2 = comptime!(blueprint.block_log2 as usize);
    let per_unit = comptime!(blueprint.per_unit);
    let group = comptime!(blueprint.group);

    let first_block = view.start >> block_log2;
    let end = view.start + view.len;
    let unit = UNIT_POS as usize;

    let table = load_codebook(packed, &view, blueprint);
    let mut scales = Shared::<[f32]>::new_slice(comptime!(2 * group));
    let mut codes = Array::<u32>::new(per_unit);
    let mut half = 0usize;
    let mut tile = CUBE_POS;
    if tile < tiles {
        let block = first_block + tile * group;
        #[unroll]
        for i in 0..per_unit {
            let index = i * CUBE_DIM as usize + unit;
            if (block << block_log2) + index * vector < end {
                codes[i] = packed[((block << block_log2) >> 3usize) + index / vectors_a_word];
            }
        }
        if unit < group && (block + unit) << block_log2 < end {
            scales[unit] = block_scale(packed, &view, block + unit, blueprint.nested_log2);
        }
    }
    sync_cube();

    while tile < tiles {
        let next = tile + CUBE_COUNT;
        let mut next_codes = Array::<u32>::new(per_unit);
        let mut next_scale = 0.0f32;
        if next < tiles {
            let block = first_block + next * group;
            #[unroll]
            for i in 0..per_unit {
                let index = i * CUBE_DIM as usize + unit;
                if (block << block_log2) + index * vector < end {
                    next_codes[i] =
                        packed[((block << block_log2) >> 3usize) + index / vectors_a_word];
                }
            }
            if unit < group && (block + unit) << block_log2 < end {
                next_scale = block_scale(packed, &view, block + unit, blueprint.nested_log2);
            }
        }

        let start = (first_block + tile * group) << block_log2;
        #[unroll]
        for i in 0..per_unit {
            let index = i * CUBE_DIM as usize + unit;
            let element = start + index * vector;
            if is_wanted(element, end, &view, blueprint) {
                let first = (index % vectors_a_word * vector) as u32;
                let scale = scales[half + index / vectors_a_block];
                let decoded =
                    decode_vector::<F, N>(packed, &table, &view, codes[i], first, scale, blueprint);
                store_vector(out, element - view.start, decoded, view.len, blueprint);
            }
        }

        // The half that is written now was last read before the previous barrier.
        half = group - half;
        if unit < group {
            scales[half + unit] = next_scale;
        }
        #[unroll]
        for i in 0..per_unit {
            codes[i] = next_codes[i];
        }
        sync_cube();
        tile = next;
    }
}
