//! `tiled_2d`: two-dimensional tiles over the matrix of words.
//!
//! The idea is that of the Mojo kernel this project started from: a tile of the weight a cube, a
//! few words a unit, all their loads in flight before the first is used, packed stores.

use cubecl::prelude::*;

use super::decode::{DequantizeBlueprint, PackedView, block_scale, decode_vector, load_codebook};

/// Decodes a packed weight, seen as rows of `width` words.
///
/// - `packed`: the whole packed weight; `out`: the decoded elements, `view.len` of them in vectors of `N`.
/// - A cube decodes a tile of `CUBE_DIM_X` words by `CUBE_DIM_Y * per_unit` rows; unit `(x, y)`
///   the words of column `x` in rows `y`, `y + CUBE_DIM_Y`, …. Tiles are numbered row by row along
///   `CUBE_POS`.
/// - Words past the end of a row or of `out` are not read, vectors past the end not written. `N`
///   divides eight, the element to start at, and the number of elements.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn dequantize_tiled_2d_kernel<F: Float, N: Size>(
    packed: &[u32],
    out: &mut [Vector<F, N>],
    view: PackedView,
    width: usize,
    tiles_a_row: usize,
    #[comptime] blueprint: DequantizeBlueprint,
    #[define(F)] _dtype: ElemType,
) {
    let table = load_codebook(packed, &view, blueprint);
    let vector = N::value().comptime();
    let vectors_a_word = comptime!(8 / vector);
    let per_unit = comptime!(blueprint.per_unit);

    let first_word = view.start / 8;
    let skew = view.start % 8;
    // One past the last word that holds an element to decode, counted from the first.
    let words = (skew + view.len).div_ceil(8usize);

    let cube = CUBE_POS;
    let tile_row = cube / tiles_a_row;
    let tile_column = cube % tiles_a_row;
    let column = tile_column * CUBE_DIM_X as usize + UNIT_POS_X as usize;
    let first_row = tile_row * (CUBE_DIM_Y as usize * per_unit) + UNIT_POS_Y as usize;

    let mut codes = Array::<u32>::new(per_unit);
    #[unroll]
    for i in 0..per_unit {
        let index = (first_row + i * CUBE_DIM_Y as usize) * width + column;
        if column < width && index < words {
            codes[i] = packed[first_word + index];
        }
    }

    #[unroll]
    for i in 0..per_unit {
        let index = (first_row + i * CUBE_DIM_Y as usize) * width + column;
        if column < width && index < words {
            let block = (first_word + index) >> comptime!(blueprint.block_log2 as usize - 3);
            let scale = block_scale(packed, &view, block, blueprint.nested_log2);
            let word = codes[i];
            #[unroll]
            for j in 0..vectors_a_word {
                let decoded = decode_vector::<F, N>(
                    packed,
                    &table,
                    &view,
                    word,
                    scale,
                    comptime!(j * vector),
                    blueprint,
                );
                let element = index * 8 + comptime!(j * vector);
                if comptime!(blueprint.skewed) {
                    if element >= skew && element - skew < view.len {
                        out[(element - skew) / vector] = decoded;
                    }
                } else if element < view.len {
                    out[element / vector] = decoded;
                }
            }
        }
    }
}
