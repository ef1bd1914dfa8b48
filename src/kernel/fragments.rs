//! What the units of [`tensor_core`](super::tensor_core) load, and the fragments that they make of
//! it.

use cubecl::prelude::*;

use super::decode::PackedView;
use super::tensor_core::{CHUNK, TensorCoreBlueprint};

/// Loads a lane's share of its plane's scales of a round, not yet decoded: codes and nested scales,
/// or the scales themselves.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn load_scales(
    words: &[u32],
    view: &PackedView,
    codes: &mut Array<u32>,
    absmax: &mut Array<f32>,
    lane: usize,
    plane_row: usize,
    start: usize,
    n: usize,
    k: usize,
    #[comptime] blueprint: TensorCoreBlueprint,
) {
    let runs = comptime!(blueprint.plane_k() >> blueprint.run_log2);
    #[unroll]
    for e in 0..comptime!(blueprint.plane_scales().div_ceil(32)) {
        let i = lane + comptime!(e * 32);
        let row = plane_row + i / runs;
        let at = start + ((i % runs) << comptime!(blueprint.run_log2 as usize));
        codes[e] = 0u32;
        absmax[e] = 0.0f32;
        if row < n && at < k {
            let block = (row * k + at) >> comptime!(blueprint.block_log2 as usize);
            if comptime!(blueprint.nested_log2 == 0) {
                absmax[e] = f32::reinterpret(words[view.scales + block]);
            } else {
                let four = words[view.scales + (block >> 2usize)];
                let nested_block = block >> comptime!(blueprint.nested_log2 as usize);
                codes[e] = (four >> ((block as u32 & 3) * 8)) & 255;
                absmax[e] = f32::reinterpret(words[view.codebook + 276usize + nested_block]);
            }
        }
    }
}

/// Loads a unit's share of the part of `x` that a round needs: rows of a plane's piece along `k`,
/// then the next plane's.
#[cube]
pub fn load_x(
    x: &[Vector<u32, Const<4>>],
    vectors: &mut Array<Vector<u32, Const<4>>>,
    unit: usize,
    start: usize,
    m: usize,
    k: usize,
    #[comptime] blueprint: TensorCoreBlueprint,
) {
    let units = comptime!(blueprint.x_units());
    let pitch = comptime!(blueprint.plane_k() / 8);
    #[unroll]
    for e in 0..comptime!(blueprint.x_vectors().div_ceil(units)) {
        let i = unit + comptime!(e * units);
        let row = i / pitch % blueprint.x_rows;
        let piece = i / comptime!(pitch * blueprint.x_rows);
        let at = start + piece * comptime!(blueprint.plane_k()) + i % pitch * 8;
        let mut value = Vector::<u32, Const<4>>::new(0u32);
        if row < m && at < k {
            value = x[(row * k + at) / 8];
        }
        vectors[e] = value;
    }
}

/// Loads a lane's codes of a round: 32 of each of its rows, which are `row`, `row + 8`, …, and of
/// each chunk.
#[cube]
pub fn load_codes(
    packed: &[Vector<u32, Const<4>>],
    codes: &mut Array<Vector<u32, Const<4>>>,
    row: usize,
    start: usize,
    n: usize,
    k: usize,
    #[comptime] blueprint: TensorCoreBlueprint,
) {
    let chunks = comptime!(blueprint.chunks);
    #[unroll]
    for r in 0..comptime!(2 * blueprint.row_tiles) {
        let row = usize::min(row + comptime!(r * 8), n - 1);
        #[unroll]
        for chunk in 0..chunks {
            let at = start + comptime!(chunk * CHUNK);
            let mut four = Vector::<u32, Const<4>>::new(0u32);
            if at < k {
                four = packed[(row * k + at) / 32];
            }
            codes[comptime!(r * chunks + chunk)] = four;
        }
    }
}

/// What a lane contributes of `W` to one product of 16 by 8 by 16: elements `first..first + 4` of
/// the word of its upper row and of the word eight rows below.
#[cube]
pub fn fragment<F: Float>(
    level: f32,
    upper: u32,
    lower: u32,
    upper_scale: f32,
    lower_scale: f32,
    #[comptime] first: u32,
) -> Array<Vector<F, Const<2>>> {
    let mut registers = Array::<Vector<F, Const<2>>>::new(4usize);
    registers[0] = decode_pair::<F>(level, upper, upper_scale, first);
    registers[1] = decode_pair::<F>(level, lower, lower_scale, first);
    registers[2] = decode_pair::<F>(level, upper, upper_scale, comptime!(first + 2));
    registers[3] = decode_pair::<F>(level, lower, lower_scale, comptime!(first + 2));
    registers
}

/// Elements `first` and `first + 1` of a word; `first` is even, so they are a byte, high nibble
/// first.
///
/// A shuffle looks at the lowest five bits of the lane it is given, and lanes 16 apart hold the
/// same level, so that the code's neighbours in the word need not be masked out.
#[cube]
fn decode_pair<F: Float>(
    level: f32,
    word: u32,
    scale: f32,
    #[comptime] first: u32,
) -> Vector<F, Const<2>> {
    let mut pair = Vector::<f32, Const<2>>::empty();
    let high = plane_shuffle(level, word >> comptime!(first * 4 + 4));
    let low = plane_shuffle(level, word >> comptime!(first * 4));
    pair.insert(0usize, high * scale);
    pair.insert(1usize, low * scale);
    Vector::cast_from(pair)
}

/// Where vector `column` of row `row` of `x` lies in its row of shared memory.
///
/// The eight lanes that read at once are two rows and four members; members are four vectors
/// apart, rows a multiple of eight. Folding one bit of either into the position gives them eight
/// different groups of banks.
#[cube]
pub fn swizzle(row: usize, column: usize) -> usize {
    column ^ ((column >> 3) & 1) ^ ((row & 1) << 1)
}
