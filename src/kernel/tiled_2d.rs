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
/// - A cube decodes a tile of `group` blocks. Units `0..group` first decode a scale each. Then unit
///   `u` takes the vectors `u`, `u + CUBE_DIM`, … of the tile, `per_unit` of them, so that
///   neighbouring units load neighbouring words and store neighbouring vectors. `group` blocks are
///   exactly `per_unit * CUBE_DIM` vectors; a cube has at least `group` units.
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
    let vectors_a_word = comptime!(8 / vector);
    let block_log2 = comptime!(blueprint.block_log2 as usize);
    let per_unit = comptime!(blueprint.per_unit);
    let group = comptime!(blueprint.group);

    let first_block = (view.start >> block_log2) + CUBE_POS * group;
    let tile = first_block << block_log2;
    let end = view.start + view.len;

    let table = load_codebook(packed, &view, blueprint);
    if comptime!(blueprint.shared) {
        let mut codes = Array::<u32>::new(per_unit);
        #[unroll]
        for i in 0..per_unit {
            let index = i * CUBE_DIM as usize + UNIT_POS as usize;
            if tile + index * vector < end {
                codes[i] = packed[(tile >> 3usize) + index / vectors_a_word];
            }
        }

        let mut scales = Shared::<[f32]>::new_slice(group);
        let block = UNIT_POS as usize;
        if block < group && (first_block + block) << block_log2 < end {
            scales[block] = block_scale(packed, &view, first_block + block, blueprint.nested_log2);
        }
        sync_cube();

        #[unroll]
        for i in 0..per_unit {
            let index = i * CUBE_DIM as usize + UNIT_POS as usize;
            let element = tile + index * vector;
            if is_wanted(element, end, &view, blueprint) {
                let first = (index % vectors_a_word * vector) as u32;
                let scale = scales[index / vectors_a_block];
                let decoded =
                    decode_vector::<F, N>(packed, &table, &view, codes[i], first, scale, blueprint);
                store_vector(out, element - view.start, decoded, view.len, blueprint);
            }
        }
    } else if tile < end {
        let scale = block_scale(packed, &view, first_block, blueprint.nested_log2);
        let mut index = UNIT_POS as usize;
        while index < vectors_a_block {
            let element = tile + index * vector;
            if is_wanted(element, end, &view, blueprint) {
                let word = packed[element >> 3usize];
                let first = (index % vectors_a_word * vector) as u32;
                let decoded =
                    decode_vector::<F, N>(packed, &table, &view, word, first, scale, blueprint);
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
