//! `embedding`: the rows of a packed weight that ids ask for.

use cubecl::prelude::*;

use super::decode::{DequantizeBlueprint, PackedView, block_scale, decode_vector, load_codebook};

/// Gathers rows of a packed weight `[rows, columns]` and decodes nothing else.
///
/// - `packed`: the whole packed weight; `ids`: one a row of the result; `out`: the decoded rows, one
///   after the other, `view.len` elements in vectors of `N`.
/// - Unit `u` of a cube decodes the vectors `u`, `u + CUBE_DIM`, … of the cube's share, `per_unit` of
///   them, so that neighbouring units load neighbouring words and store neighbouring vectors. Each
///   decodes its own scale: those of a plane are mostly one, and cached.
/// - `N` divides the codes of a word, a block and `columns`, so that a vector lies within a word, a block and a row. With
///   `transposed` the weight is stored `[columns, rows]`, and `N` is 1.
/// - An id is compared before it is converted: one that is negative or past `last` reads row 0 and
///   gives a row of NaN. `last` is the last row, or the largest id of the type if that is less.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn embedding_kernel<F: Float, N: Size, I: Int>(
    packed: &[u32],
    ids: &[I],
    out: &mut [Vector<F, N>],
    view: PackedView,
    rows: usize,
    columns: usize,
    last: usize,
    #[comptime] transposed: bool,
    #[comptime] blueprint: DequantizeBlueprint,
    #[define(F)] _dtype: ElemType,
    #[define(I)] _ids_dtype: ElemType,
) {
    let vector = N::value().comptime();
    let per_unit = comptime!(blueprint.per_unit);
    let block_log2 = comptime!(blueprint.block_log2 as usize);
    let word_elems = comptime!(blueprint.codes_a_word());

    let table = load_codebook(packed, &view, blueprint);
    if comptime!(blueprint.shared) {
        sync_cube();
    }

    let vectors_a_row = columns / vector;
    let cube_dim = CUBE_DIM as usize;
    let first = CUBE_POS * (cube_dim * per_unit) + UNIT_POS as usize;
    for i in 0..per_unit {
        let index = first + i * cube_dim;
        if index * vector < view.len {
            let id = ids[index / vectors_a_row];
            let inside = id >= I::from_int(0) && id <= I::cast_from(last);
            let mut row = 0usize;
            if inside {
                row = usize::cast_from(id);
            }
            let column = index % vectors_a_row * vector;
            let element = if comptime!(transposed) {
                column * rows + row
            } else {
                row * columns + column
            };
            let block = element >> block_log2;
            let mut scale = block_scale(packed, &view, block, blueprint.scales);
            if !inside {
                // Not a constant: WGSL has no literal for it.
                scale = f32::reinterpret(comptime!(f32::NAN.to_bits()) ^ view.zero);
            }
            let word = packed[element / word_elems];
            let first = (element % word_elems) as u32;
            out[index] =
                decode_vector::<F, N>(packed, &table, &view, word, word, first, scale, blueprint);
        }
    }
}
