//! `gemv`: a matrix product with a packed weight for a handful of rows of `x`, on any device.
//!
//! A plane a row of `W`, so that neighbouring lanes read neighbouring words; sums in f32. Any
//! length of a row and any block size: rows may start anywhere in a word.

use cubecl::prelude::*;

use super::decode::{DequantizeBlueprint, PackedView, block_scale, decode_vector, load_codebook};
use super::lora::LoraBranch;

/// What forks a compiled kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GemvBlueprint {
    /// How a word is decoded.
    pub decode: DequantizeBlueprint,
    /// Rows of `x` that a plane multiplies with at once.
    pub columns: usize,
    /// Rows start at a word: `k` is a multiple of the codes in one.
    pub aligned: bool,
    /// The lanes of a plane add their sums up; without it a unit works alone.
    pub planes: bool,
    /// Whether there is a bias to add.
    pub bias: bool,
}

/// `y = x Wᵀ + b + s (x A) B`.
///
/// - `x`: `[m, k]` in vectors of `V`, which divides the codes of a word, and is one unless `k` is a
///   multiple of them; `packed`: the whole packed weight; `bias`: `[n]`, unused without one; `out`: `[m, n]`;
///   `lora`: the low-rank branch, if there is one.
/// - The cube is `(lanes, rows)`. Lanes take the words of a row in turn. The cube's place along the
///   grid gives the rows of `W` first, then groups of `columns` rows of `x`.
/// - Tails: words that a row shares with its neighbours are masked; rows of `x` past `m` repeat the
///   last one and are not stored.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn matmul_gemv_kernel<F: Float, G: Float, V: Size>(
    x: &[Vector<F, V>],
    packed: &[u32],
    bias: &[F],
    out: &mut [F],
    lora: ComptimeOption<LoraBranch<G>>,
    view: PackedView,
    m: usize,
    n: usize,
    k: usize,
    #[comptime] blueprint: GemvBlueprint,
    #[define(F)] _dtype: ElemType,
    #[define(G)] _lora_dtype: ElemType,
) {
    let vector = V::value().comptime();
    let columns = comptime!(blueprint.columns);
    let block_log2 = comptime!(blueprint.decode.block_log2 as usize);
    let word_elems = comptime!(blueprint.decode.codes_a_word());
    // A word can have codes of more than one block.
    let many_blocks = comptime!((1usize << blueprint.decode.block_log2) < word_elems);
    let table = load_codebook(packed, &view, blueprint.decode);
    if comptime!(blueprint.decode.shared) {
        sync_cube();
    }

    let rows = CUBE_DIM_Y as usize;
    let row_cubes = n.div_ceil(rows);
    let row = CUBE_POS % row_cubes * rows + UNIT_POS_Y as usize;
    let first_column = CUBE_POS / row_cubes * columns;
    let lane = UNIT_POS_X as usize;

    let mut sums = Array::<f32>::new(columns);
    #[unroll]
    for c in 0..columns {
        sums[c] = 0.0f32;
    }
    // Every lane of a plane has the same row, so whole planes are left out.
    if row < n && first_column < m {
        #[comptime]
        match &lora {
            ComptimeOption::Some(lora) => {
                let mut four = lane;
                while four * 4 < lora.rank {
                    #[unroll]
                    for c in 0..columns {
                        let column = usize::min(first_column + c, m - 1);
                        sums[c] += lora.four_products(column, row, n, four);
                    }
                    four += CUBE_DIM_X as usize;
                }
            }
            ComptimeOption::None => {}
        }
        let start = row * k;
        let end = start + k;
        let mut word_at = start / word_elems + lane;
        while word_at * word_elems < end {
            let word = packed[word_at];
            let element = word_at * word_elems;
            let mut scale = 0.0f32;
            if comptime!(!many_blocks) {
                scale = block_scale(
                    packed,
                    &view,
                    element >> block_log2,
                    blueprint.decode.scales,
                );
            }
            #[unroll]
            for v in 0..comptime!(word_elems / vector) {
                let at = element + comptime!(v * vector);
                if comptime!(blueprint.aligned) || (at >= start && at < end) {
                    if comptime!(many_blocks) {
                        scale =
                            block_scale(packed, &view, at >> block_log2, blueprint.decode.scales);
                    }
                    let decoded = decode_vector::<F, V>(
                        packed,
                        &table,
                        &view,
                        word,
                        word,
                        comptime!((v * vector) as u32).runtime(),
                        scale,
                        blueprint.decode,
                    );
                    let decoded = Vector::<f32, V>::cast_from(decoded);
                    #[unroll]
                    for c in 0..columns {
                        let column = usize::min(first_column + c, m - 1);
                        let values = x[(column * k + at - start) / vector];
                        let products = decoded * Vector::<f32, V>::cast_from(values);
                        let mut sum = sums[c];
                        #[unroll]
                        for i in 0..vector {
                            sum += products.extract(i);
                        }
                        sums[c] = sum;
                    }
                }
            }
            word_at += CUBE_DIM_X as usize;
        }
    }
    #[unroll]
    for c in 0..columns {
        let mut sum = sums[c];
        if comptime!(blueprint.planes) {
            sum = plane_sum(sum);
        }
        if row < n && first_column + c < m && lane == 0 {
            if comptime!(blueprint.bias) {
                sum += f32::cast_from(bias[row]);
            }
            out[(first_column + c) * n + row] = F::cast_from(sum);
        }
    }
}
