//! `warp_per_block`: a plane per quantization block.
//!
//! All lanes that work on a block read the same scale, so it is decoded once a block in lock step
//! and costs one transaction, and neighbouring lanes store neighbouring vectors. Where a block
//! has fewer vectors than a plane has lanes, the plane takes several neighbouring blocks at once.

use cubecl::prelude::*;

use super::decode::{
    DequantizeBlueprint, PackedView, block_scale, decode_vector, load_codebook, store_vector,
};

/// Decodes a packed weight block by block.
///
/// - `packed`: the whole packed weight; `out`: the decoded elements, `view.len` of them in vectors
///   of `N`.
/// - The cube is `(lanes, planes)`. `group` neighbouring lanes work on one block, a vector of `N`
///   elements a lane at a time. They decode `per_unit` blocks, as far apart as the cube decodes
///   blocks at once, so that all its stores of a round are contiguous.
/// - Elements outside of the range asked for are not written. `N` divides eight and the element to
///   start at; `group * N` divides the block size.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn dequantize_warp_per_block_kernel<F: Float, N: Size>(
    packed: &[u32],
    out: &mut [Vector<F, N>],
    view: PackedView,
    #[comptime] blueprint: DequantizeBlueprint,
    #[define(F)] _dtype: ElemType,
) {
    let vector = N::value().comptime();
    let lanes = comptime!(blueprint.group);
    let block_elems = comptime!(1usize << blueprint.block_log2);
    let block_log2 = comptime!(blueprint.block_log2 as usize);
    let steps = comptime!(block_elems / (lanes * vector));
    let per_unit = comptime!(blueprint.per_unit);
    let word_elems = comptime!(blueprint.codes_a_word());
    let words_a_vector = comptime!(usize::max(vector / word_elems, 1));

    let table = load_codebook(packed, &view, blueprint);
    if comptime!(blueprint.shared) {
        sync_cube();
    }

    let lane = UNIT_POS as usize % lanes;
    let blocks_a_round = CUBE_DIM as usize / lanes;
    let first_block = (view.start >> block_log2)
        + CUBE_POS * (blocks_a_round * per_unit)
        + UNIT_POS as usize / lanes;
    let end = view.start + view.len;

    #[unroll]
    for i in 0..per_unit {
        let block = first_block + i * blocks_a_round;
        let block_start = block << block_log2;
        if block_start < end {
            let scale = block_scale(packed, &view, block, blueprint.scales);
            for step in 0..steps {
                let element = block_start + (step * lanes + lane) * vector;
                if element >= view.start && element < end {
                    let at = element / word_elems;
                    let word = packed[at];
                    let next = packed[at + comptime!(words_a_vector - 1)];
                    let first = (element % word_elems) as u32;
                    let decoded = decode_vector::<F, N>(
                        packed, &table, &view, word, next, first, scale, blueprint,
                    );
                    store_vector(out, element - view.start, decoded, view.len, blueprint);
                }
            }
        }
    }
}
