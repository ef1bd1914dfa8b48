//! `warp_per_block`: a plane per quantization block.
//!
//! All lanes that work on a block read the same scale, so it is decoded once a block in lock step
//! and costs one transaction, and neighbouring lanes store neighbouring vectors.

use cubecl::prelude::*;

use super::decode::{DequantizeBlueprint, PackedView, block_scale, level, load_codebook};

/// Decodes a packed weight block by block.
///
/// - `packed`: the whole packed weight; `out`: the decoded elements, `view.len` of them in vectors of `N`.
/// - The cube is `(lanes, planes)`. A group of `lanes_per_block` neighbouring lanes decodes
///   `per_unit` consecutive blocks, a vector of `N` elements a lane at a time. With 32 lanes and
///   blocks of 64 a lane has two codes of each block, one packed store.
/// - Elements outside of the range asked for are not written. `N` divides eight, the element to
///   start at, and the number of elements; `lanes_per_block * N` divides the block size.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn dequantize_warp_per_block_kernel<F: Float, N: Size>(
    packed: &[u32],
    out: &mut [Vector<F, N>],
    view: PackedView,
    #[comptime] blueprint: DequantizeBlueprint,
    #[define(F)] _dtype: ElemType,
) {
    let table = load_codebook(packed, &view, blueprint);
    let vector = N::value().comptime();
    let lanes = comptime!(blueprint.lanes_per_block);
    let block_elems = comptime!(1usize << blueprint.block_log2);
    let steps = comptime!(block_elems / (lanes * vector));

    let unit = CUBE_POS * CUBE_DIM as usize + UNIT_POS as usize;
    let lane = unit % lanes;
    let first_block = (view.start >> comptime!(blueprint.block_log2 as usize))
        + unit / lanes * blueprint.per_unit;
    let end = view.start + view.len;

    #[unroll]
    for i in 0..blueprint.per_unit {
        let block = first_block + i;
        let block_start = block * block_elems;
        if block_start < end {
            let scale = block_scale(packed, &view, block, blueprint.nested_log2);
            for step in 0..steps {
                let element = block_start + (step * lanes + lane) * vector;
                if element >= view.start && element < end {
                    let word = packed[element / 8];
                    let mut values = Vector::<f32, N>::empty();
                    #[unroll]
                    for k in 0..vector {
                        let place = (element % 8) as u32 + comptime!(k as u32);
                        let code = (word >> (place * 4 ^ 4)) & 15;
                        values.insert(k, level(packed, &table, &view, code, blueprint) * scale);
                    }
                    out[(element - view.start) / vector] = Vector::cast_from(values);
                }
            }
        }
    }
}
