//! `tensor_core`: a matrix product with a packed weight for a few to many rows of `x`.
//!
//! The product is turned round, `yᵀ = W xᵀ`, so that the long side of the tensor cores' tile lies
//! along the rows of `W` and the short one (8) along the few rows of `x`. Each lane decodes just
//! the elements of `W` that the instruction wants from it, straight into its registers: the order
//! of `k` inside of a product is free as long as both sides agree, so a lane takes 32 neighbouring
//! codes with one 16-byte load and hands them over four at a time.
//!
//! The values multiplied are those that dequantization gives, rounded to the dtype of `x`; sums
//! are in f32.
//!
//! Sources: the fragment layout of `mma.sync.m16n8k16` (PTX ISA, "Matrix Fragments for
//! mma.m16n8k16"); reordering `k` to suit packed weights is Marlin's idea (Frantar and
//! Alistarh, arXiv 2408.11743).

use cubecl::cmma::MmaDefinition;
use cubecl::prelude::*;

use super::decode::{PackedView, opaque};

/// What forks a compiled kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TensorCoreBlueprint {
    /// Base-2 logarithm of the block size.
    pub block_log2: u32,
    /// Base-2 logarithm of the nested block size; 0 where scales are plain f32.
    pub nested_log2: u32,
    /// Base-2 logarithm of how many neighbouring elements of a row share a scale at least: 5 or 6.
    pub run_log2: u32,
    /// Tiles of 16 rows of `W` that a plane works on.
    pub row_tiles: usize,
    /// Tiles of 8 rows of `x`.
    pub column_tiles: usize,
    /// Planes next to each other along the rows of `W`.
    pub row_planes: usize,
    /// Planes that share the work along `k`.
    pub k_planes: usize,
    /// Runs of 128 elements along `k` that a plane decodes between two barriers.
    pub chunks: usize,
    /// Rows of `x` kept in shared memory: all there are, at most `8 * column_tiles`.
    pub x_rows: usize,
    /// Whether there is a bias to add.
    pub bias: bool,
}

impl TensorCoreBlueprint {
    /// Bytes of shared memory that a cube takes.
    pub const fn shared_bytes(&self) -> usize {
        let cube_rows = 16 * self.row_tiles * self.row_planes;
        let round_k = CHUNK * self.chunks * self.k_planes;
        let tables = (16 + 256) * 4;
        let scales = cube_rows * (round_k >> self.run_log2 | 1) * 4;
        let staged = self.x_rows * round_k * 2;
        let partial = self.k_planes * 8 * self.column_tiles * cube_rows * 4;
        tables + scales + staged + partial
    }
}

/// Elements along `k` of a chunk: 32 for each of the four lanes that share a row.
const CHUNK: usize = 128;

/// `y = x Wᵀ + b`.
///
/// - `x`: `[m, k]`, two elements a u32, in vectors of eight elements; `packed`: the whole packed
///   weight, and `words` the same buffer once more; `bias`: `[n]`, unused without one; `out`:
///   `[m, n]`.
/// - A cube of `(32, row_planes * k_planes)` units computes `16 * row_tiles * row_planes` columns
///   of `y`, all its rows: planes with the same place along `k` share what is staged of `x`, those
///   with the same rows add their sums up at the end.
/// - Before each round the cube stages the part of `x` and the scales that it needs in shared
///   memory; the codes of the next round are loaded while this one is computed.
/// - Tails: rows past `n` repeat the last one and are not stored, elements past `k` count as zero.
///   `k` is a multiple of `2^run_log2`, `m` at most `8 * column_tiles`.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn matmul_tensor_core_kernel<F: Float>(
    x: &[Vector<u32, Const<4>>],
    packed: &[Vector<u32, Const<4>>],
    words: &[u32],
    bias: &[F],
    out: &mut [F],
    view: PackedView,
    m: usize,
    n: usize,
    k: usize,
    #[comptime] blueprint: TensorCoreBlueprint,
    #[define(F)] _dtype: ElemType,
) {
    let row_tiles = comptime!(blueprint.row_tiles);
    let column_tiles = comptime!(blueprint.column_tiles);
    let chunks = comptime!(blueprint.chunks);
    let k_planes = comptime!(blueprint.k_planes);
    let x_rows = comptime!(blueprint.x_rows);
    let plane_rows = comptime!(16 * row_tiles);
    let cube_rows = comptime!(plane_rows * blueprint.row_planes);
    let plane_k = comptime!(chunks * CHUNK);
    let round_k = comptime!(plane_k * k_planes);
    let x_vectors = comptime!(round_k / 8);
    let run_log2 = comptime!(blueprint.run_log2 as usize);
    let runs = comptime!(round_k >> blueprint.run_log2);
    // An odd pitch spreads the rows over the banks.
    let pitch = comptime!(runs | 1);

    let unit = UNIT_POS as usize;
    let units = comptime!(32 * blueprint.row_planes * blueprint.k_planes);
    let group = (UNIT_POS_X >> 2) as usize;
    let member = (UNIT_POS_X & 3) as usize;
    let row_plane = UNIT_POS_Y as usize % comptime!(blueprint.row_planes);
    let k_plane = UNIT_POS_Y as usize / comptime!(blueprint.row_planes);
    let cube_row = CUBE_POS * cube_rows;
    let plane_row = row_plane * plane_rows;
    // Where this lane's 32 elements of a chunk start, counted from the round's first element.
    let lane_k = k_plane * plane_k + member * 32;

    let mut table = Shared::<[f32]>::new_slice(16usize);
    let mut map = Shared::<[f32]>::new_slice(256usize);
    let mut scales = Shared::<[f32]>::new_slice(comptime!(cube_rows * pitch));
    let mut staged = Shared::<[Vector<u32, Const<4>>]>::new_slice(comptime!(x_rows * x_vectors));

    let rounds = k.div_ceil(round_k.runtime());
    let mut codes = Array::<Vector<u32, Const<4>>>::new(comptime!(2 * row_tiles * chunks));
    let mut next = Array::<Vector<u32, Const<4>>>::new(comptime!(2 * row_tiles * chunks));
    load_codes(
        packed,
        &mut next,
        cube_row + plane_row + group,
        lane_k,
        n,
        k,
        blueprint,
    );

    let mut i = unit;
    while i < 16 {
        table[i] = f32::reinterpret(words[view.codebook + i]);
        i += units;
    }
    if comptime!(blueprint.nested_log2 != 0) {
        let mut i = unit;
        while i < 256 {
            map[i] = f32::reinterpret(words[view.codebook + 16 + i]);
            i += units;
        }
        sync_cube();
    }

    let def = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    let mut sums = Sequence::<Array<Vector<f32, Const<2>>>>::new();
    #[unroll]
    for _ in 0..comptime!(row_tiles * column_tiles) {
        let mut sum = Array::<Vector<f32, Const<2>>>::new(2usize);
        sum[0] = Vector::new(0.0f32);
        sum[1] = Vector::new(0.0f32);
        sums.push(sum);
    }

    for round in 0..rounds {
        let round_start = round * round_k;
        let mut i = unit;
        while i < comptime!(x_rows * x_vectors) {
            let row = i / x_vectors;
            let column = i % x_vectors;
            let at = round_start + column * 8;
            let mut value = Vector::<u32, Const<4>>::new(0u32);
            if row < m && at < k {
                value = x[(row * k + at) / 8];
            }
            staged[row * x_vectors + swizzle(row, column)] = value;
            i += units;
        }
        let mut i = unit;
        while i < comptime!(cube_rows * runs) {
            let row = i / runs;
            let run = i % runs;
            let at = round_start + (run << run_log2);
            let mut scale = 0.0f32;
            if cube_row + row < n && at < k {
                let block = ((cube_row + row) * k + at) >> comptime!(blueprint.block_log2 as usize);
                scale = staged_block_scale(words, &map, &view, block, blueprint.nested_log2);
            }
            scales[row * pitch + run] = scale;
            i += units;
        }
        sync_cube();

        #[unroll]
        for c in 0..comptime!(2 * row_tiles * chunks) {
            codes[c] = next[c];
        }
        if round + 1 < rounds {
            load_codes(
                packed,
                &mut next,
                cube_row + plane_row + group,
                round_start + round_k + lane_k,
                n,
                k,
                blueprint,
            );
        }

        #[unroll]
        for chunk in 0..chunks {
            let at = lane_k + comptime!(chunk * CHUNK);
            let mut lane_scales = Array::<f32>::new(comptime!(2 * row_tiles));
            #[unroll]
            for r in 0..comptime!(2 * row_tiles) {
                let row = plane_row + group + comptime!(r * 8);
                lane_scales[r] = scales[row * pitch + (at >> run_log2)];
            }
            #[unroll]
            for q in 0..4usize {
                let mut x_first = Sequence::<Array<Vector<F, Const<2>>>>::new();
                let mut x_second = Sequence::<Array<Vector<F, Const<2>>>>::new();
                #[unroll]
                for tile in 0..column_tiles {
                    let mut row = group + comptime!(tile * 8);
                    if comptime!(x_rows < 8 * column_tiles) {
                        row = usize::min(row, comptime!(x_rows - 1).runtime());
                    }
                    let four = staged[row * x_vectors + swizzle(row, at / 8 + q)];
                    let mut first = Array::<Vector<F, Const<2>>>::new(2usize);
                    let mut second = Array::<Vector<F, Const<2>>>::new(2usize);
                    #[unroll]
                    for p in 0..2usize {
                        first[p] = Vector::reinterpret(four.extract(p));
                        second[p] = Vector::reinterpret(four.extract(p + 2));
                    }
                    x_first.push(first);
                    x_second.push(second);
                }
                #[unroll]
                for row_tile in 0..row_tiles {
                    let slot = comptime!(row_tile * 2);
                    let upper = codes[comptime!(slot * chunks + chunk)].extract(q);
                    let lower = codes[comptime!((slot + 1) * chunks + chunk)].extract(q);
                    let upper_scale = lane_scales[slot];
                    let lower_scale = lane_scales[comptime!(slot + 1)];
                    let w_first =
                        fragment::<F>(&table, upper, lower, upper_scale, lower_scale, 0u32);
                    let w_second =
                        fragment::<F>(&table, upper, lower, upper_scale, lower_scale, 4u32);
                    #[unroll]
                    for tile in 0..column_tiles {
                        let sum = sums.index_mut(comptime!(row_tile * column_tiles + tile));
                        def.execute_inplace(&w_first, x_first.index(tile), sum);
                        def.execute_inplace(&w_second, x_second.index(tile), sum);
                    }
                }
            }
        }
        sync_cube();
    }

    let columns = comptime!(8 * column_tiles);
    let mut partial = Shared::<[f32]>::new_slice(comptime!(k_planes * columns * cube_rows));
    #[unroll]
    for row_tile in 0..row_tiles {
        #[unroll]
        for tile in 0..column_tiles {
            let sum = sums.index(comptime!(row_tile * column_tiles + tile));
            #[unroll]
            for half in 0..2usize {
                let row = plane_row + group + comptime!(row_tile * 16 + half * 8);
                #[unroll]
                for p in 0..2usize {
                    let column = comptime!(tile * 8 + p) + member * 2;
                    partial[(k_plane * columns + column) * cube_rows + row] = sum[half].extract(p);
                }
            }
        }
    }
    sync_cube();
    let mut i = unit;
    while i < m * cube_rows {
        let row = i % cube_rows;
        if cube_row + row < n {
            let mut sum = 0.0f32;
            #[unroll]
            for plane in 0..k_planes {
                sum += partial[comptime!(plane * columns * cube_rows) + i];
            }
            if comptime!(blueprint.bias) {
                sum += f32::cast_from(bias[cube_row + row]);
            }
            out[i / cube_rows * n + cube_row + row] = F::cast_from(sum);
        }
        i += units;
    }
}

/// The scale of block `block`, with the nested map in shared memory; otherwise as
/// [`block_scale`](super::decode::block_scale).
#[cube]
fn staged_block_scale(
    words: &[u32],
    map: &Shared<[f32]>,
    view: &PackedView,
    block: usize,
    #[comptime] nested_log2: u32,
) -> f32 {
    if comptime!(nested_log2 == 0) {
        f32::reinterpret(words[view.scales + block])
    } else {
        let four = words[view.scales + (block >> 2usize)];
        let nested_block = block >> comptime!(nested_log2 as usize);
        let absmax = f32::reinterpret(words[view.codebook + 276usize + nested_block]);
        let offset = f32::reinterpret(words[view.codebook + 272usize]);
        let code = (four >> ((block as u32 & 3) * 8)) & 255;
        opaque(map[code as usize] * absmax, view.zero) + offset
    }
}

/// Loads a lane's codes of a round: 32 of each of its rows, which are `row`, `row + 8`, …, and of
/// each chunk.
#[cube]
fn load_codes(
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
fn fragment<F: Float>(
    table: &Shared<[f32]>,
    upper: u32,
    lower: u32,
    upper_scale: f32,
    lower_scale: f32,
    #[comptime] first: u32,
) -> Array<Vector<F, Const<2>>> {
    let mut registers = Array::<Vector<F, Const<2>>>::new(4usize);
    registers[0] = decode_pair::<F>(table, upper, upper_scale, first);
    registers[1] = decode_pair::<F>(table, lower, lower_scale, first);
    registers[2] = decode_pair::<F>(table, upper, upper_scale, comptime!(first + 2));
    registers[3] = decode_pair::<F>(table, lower, lower_scale, comptime!(first + 2));
    registers
}

/// Elements `first` and `first + 1` of a word; `first` is even, so they are a byte, high nibble
/// first.
#[cube]
fn decode_pair<F: Float>(
    table: &Shared<[f32]>,
    word: u32,
    scale: f32,
    #[comptime] first: u32,
) -> Vector<F, Const<2>> {
    let high = (word >> comptime!(first * 4 + 4)) & 15;
    let low = (word >> comptime!(first * 4)) & 15;
    let mut pair = Vector::<f32, Const<2>>::empty();
    pair.insert(0usize, table[high as usize] * scale);
    pair.insert(1usize, table[low as usize] * scale);
    Vector::cast_from(pair)
}

/// Where vector `column` of row `row` of `x` lies in its row of shared memory.
///
/// The eight lanes that read at once are two rows and four members; members are four vectors
/// apart, rows a multiple of eight. Folding one bit of either into the position gives them eight
/// different groups of banks.
#[cube]
fn swizzle(row: usize, column: usize) -> usize {
    column ^ ((column >> 3) & 1) ^ ((row & 1) << 1)
}
