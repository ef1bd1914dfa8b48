//! `tiled_2d`: two-dimensional tiles, blocks by words.
//!
//! The idea is that of the Mojo kernel this project started from: a tile of the weight a cube, its
//! scales decoded once, a few words a unit with all their loads in flight before the first is
//! used, packed stores.

use cubecl::prelude::*;

use super::decode::{
    DequantizeBlueprint, PackedView, block_scale, decode_vector, load_codebook, store_vector,
};

/// Decodes a packed weight, seen as a matrix with a block a row.
///
/// - `packed`: the whole packed weight; `out`: the decoded elements, `view.len` of them in vectors
///   of `N`.
/// - A cube decodes a tile of `group` blocks. Units first decode its scales, mostly one each. Then unit
///   `u` takes the vectors `u`, `u + CUBE_DIM`, … of the tile, `per_unit` of them, so that
///   neighbouring units load neighbouring words and store neighbouring vectors. `group` blocks are
///   exactly `per_unit * CUBE_DIM` vectors.
/// - Without shared memory `group` is one block, and each unit walks through its share of it.
/// - Elements outside of the range asked for are neither read nor written. `N` divides eight and
///   the element to start at.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn dequantize_tiled_2d_kernel<F: Float, N: Size>(
    packed: &[u32],
    out: &mut [Vector<F, N>],
    view: PackedView,
    #[comptime] blueprint: DequantizeBlueprint,
    #[define(F)] _dtype: ElemType,
) {
    let vector = N::value().comptime();
    let vectors_a_block = comptime!((1usize << blueprint.block_log2) / vector);
    let word_elems = comptime!(blueprint.codes_a_word());
    let vectors_a_word = comptime!(usize::max(word_elems / vector, 1));
    let words_a_vector = comptime!(usize::max(vector / word_elems, 1));
    // Blocks shorter than a word can begin within one.
    let begins_anywhere = comptime!((1usize << blueprint.block_log2) < word_elems);
    let block_log2 = comptime!(blueprint.block_log2 as usize);
    let per_unit = comptime!(blueprint.per_unit);
    let group = comptime!(blueprint.group);

    let first_block = (view.start >> block_log2) + CUBE_POS * group;
    let tile = first_block << block_log2;
    let end = view.start + view.len;

    let table = load_codebook(packed, &view, blueprint);
    if comptime!(blueprint.shared) {
        let mut codes = Array::<u32>::new(comptime!(per_unit * words_a_vector));
        #[unroll]
        for i in 0..per_unit {
            let index = i * CUBE_DIM as usize + UNIT_POS as usize;
            if tile + index * vector < end {
                let mut at = tile / word_elems + index / vectors_a_word * words_a_vector;
                if comptime!(begins_anywhere) {
                    at = (tile + index * vector) / word_elems;
                }
                #[unroll]
                for w in 0..words_a_vector {
                    codes[comptime!(i * words_a_vector + w)] = packed[at + w];
                }
            }
        }

        let mut scales = Shared::<[f32]>::new_slice(group);
        let scales_each = comptime!((per_unit / vectors_a_block).max(1));
        #[unroll]
        for s in 0..scales_each {
            let block = s * CUBE_DIM as usize + UNIT_POS as usize;
            if block < group && (first_block + block) << block_log2 < end {
                scales[block] = block_scale(packed, &view, first_block + block, blueprint.scales);
            }
        }
        sync_cube();

        #[unroll]
        for i in 0..per_unit {
            let index = i * CUBE_DIM as usize + UNIT_POS as usize;
            let element = tile + index * vector;
            if is_wanted(element, end, &view, blueprint) {
                let mut first = (index % vectors_a_word * vector) as u32;
                if comptime!(begins_anywhere) {
                    first = (element % word_elems) as u32;
                }
                let scale = scales[index / vectors_a_block];
                let word = codes[comptime!(i * words_a_vector)];
                let next = codes[comptime!(i * words_a_vector + words_a_vector - 1)];
                let decoded = decode_vector::<F, N>(
                    packed, &table, &view, word, next, first, scale, blueprint,
                );
                store_vector(out, element - view.start, decoded, view.len, blueprint);
            }
        }
    } else if tile < end {
        let scale = block_scale(packed, &view, first_block, blueprint.scales);
        let mut index = UNIT_POS as usize;
        while index < vectors_a_block {
            let element = tile + index * vector;
            if is_wanted(element, end, &view, blueprint) {
                let at = element / word_elems;
                let word = packed[at];
                let next = packed[at + comptime!(words_a_vector - 1)];
                let first = (element % word_elems) as u32;
                let decoded = decode_vector::<F, N>(
                    packed, &table, &view, word, next, first, scale, blueprint,
                );
                store_vector(out, element - view.start, decoded, view.len, blueprint);
            }
            index += CUBE_DIM as usize;
        }
    }
}

/// Whether an element lies in the range to decode.
#[cube]
fn is_wanted(
    element: usize,
    end: usize,
    view: &PackedView,
    #[comptime] blueprint: DequantizeBlueprint,
) -> bool {
    if comptime!(blueprint.skewed) {
        element < end && element >= view.start
    } else {
        element < end
    }
}
