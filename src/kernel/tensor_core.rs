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
use super::fragments::{fragment, load_codes, load_scales, load_x, swizzle};

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
    /// Rows of `x` kept in shared memory: all there are up to eight, else `8 * column_tiles`.
    pub x_rows: usize,
    /// Cubes share the work along `k` too: sums go to `parts` instead of `out`.
    pub split: bool,
    /// Whether there is a bias to add.
    pub bias: bool,
}

impl TensorCoreBlueprint {
    /// Elements along `k` that a plane decodes in a round.
    pub const fn plane_k(&self) -> usize {
        CHUNK * self.chunks
    }

    /// Elements along `k` of a round.
    pub const fn round_k(&self) -> usize {
        self.plane_k() * self.k_planes
    }

    /// Whether planes have nothing of `x` in common, so that no plane waits for another.
    pub const fn apart(&self) -> bool {
        self.row_planes == 1
    }

    /// Vectors of `x` staged for a plane, or for all planes of a cube that share them.
    pub const fn x_vectors(&self) -> usize {
        self.x_rows * self.plane_k() / 8 * if self.apart() { 1 } else { self.k_planes }
    }

    /// Units that stage them.
    pub const fn x_units(&self) -> usize {
        32 * if self.apart() {
            1
        } else {
            self.row_planes * self.k_planes
        }
    }

    /// Scales staged for a plane.
    pub const fn plane_scales(&self) -> usize {
        16 * self.row_tiles * (self.plane_k() >> self.run_log2)
    }

    /// Bytes of shared memory that a cube takes.
    pub const fn shared_bytes(&self) -> usize {
        let cube_rows = 16 * self.row_tiles * self.row_planes;
        let map = 256 * 4;
        let scales = cube_rows * self.k_planes * ((self.plane_k() >> self.run_log2) | 1) * 4;
        let staged = self.x_rows * self.round_k() * 2;
        let partial = self.k_planes * 8 * self.column_tiles * cube_rows * 4;
        map + 2 * scales + 2 * staged + partial
    }
}

/// Elements along `k` of a chunk: 32 for each of the four lanes that share a row.
pub const CHUNK: usize = 128;

/// `y = x Wᵀ + b`.
///
/// - `x`: `[m, k]`, two elements a u32, in vectors of eight elements; `packed`: the whole packed
///   weight, and `words` the same buffer once more; `bias`: `[n]`, unused without one; `out`:
///   `[m, n]`; `parts`: `[k_cubes, m, n]`, unused unless split.
/// - A cube of `(32, row_planes * k_planes)` units computes `16 * row_tiles * row_planes` columns
///   of `y`, all its rows: planes with the same place along `k` share what is staged of `x`, those
///   with the same rows add their sums up at the end.
/// - With `split`, `k_cubes` cubes share those columns, each taking some rounds.
/// - Each round works on a piece along `k`, with its part of `x` and its scales in shared memory.
///   Those and the codes of the next round are loaded while this one is computed. A plane stages
///   its own scales; where planes share rows of `x`, the cube stages those together.
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
    parts: &mut [f32],
    view: PackedView,
    m: usize,
    n: usize,
    k: usize,
    k_cubes: usize,
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
    let plane_k = comptime!(blueprint.plane_k());
    let round_k = comptime!(blueprint.round_k());
    // A row of `x` in shared memory, in vectors, and a row of scales; an odd pitch spreads the
    // latter over the banks.
    let x_pitch = comptime!(plane_k / 8);
    let run_log2 = comptime!(blueprint.run_log2 as usize);
    let runs = comptime!(plane_k >> blueprint.run_log2);
    let pitch = comptime!(runs | 1);

    let unit = UNIT_POS as usize;
    let units = comptime!(32 * blueprint.row_planes * blueprint.k_planes);
    let lane = UNIT_POS_X as usize;
    let plane = UNIT_POS_Y as usize;
    let group = lane >> 2usize;
    let member = lane & 3;
    let row_plane = plane % comptime!(blueprint.row_planes);
    let k_plane = plane / comptime!(blueprint.row_planes);
    let mut cube = CUBE_POS;
    let mut k_cube = 0usize.runtime();
    if comptime!(blueprint.split) {
        k_cube = CUBE_POS % k_cubes;
        cube = CUBE_POS / k_cubes;
    }
    let cube_row = cube * cube_rows;
    let plane_row = row_plane * plane_rows;
    let lane_row = cube_row + plane_row + group;
    // Where this lane's 32 elements of a chunk start, counted from the round's first element.
    let lane_k = k_plane * plane_k + member * 32;
    let rounds = k.div_ceil(round_k.runtime());
    let rounds_each = rounds.div_ceil(k_cubes);
    let first_round = k_cube * rounds_each;
    let end_round = usize::min(first_round + rounds_each, rounds);
    let first_k = first_round * round_k;

    // Two halves: while one is read, the next round is put into the other.
    let plane_scales = comptime!(plane_rows * pitch);
    let scale_half = comptime!(plane_scales * blueprint.row_planes * k_planes);
    let x_half = comptime!(x_rows * x_pitch * k_planes);
    let mut scales = Shared::<[f32]>::new_slice(comptime!(2 * scale_half));
    let mut staged = Shared::<[Vector<u32, Const<4>>]>::new_slice(comptime!(2 * x_half));
    let mut map = Shared::<[f32]>::new_slice(256usize);

    // Who stages what of `x`: the plane its own part, or the cube all of it.
    let x_all = comptime!(blueprint.x_vectors());
    let x_units = comptime!(blueprint.x_units());
    let mut x_unit = unit;
    let mut x_plane = 0usize.runtime();
    if comptime!(blueprint.apart()) {
        x_unit = lane;
        x_plane = k_plane;
    }

    // What is loaded ahead of the round that needs it.
    let x_each = comptime!(x_all.div_ceil(x_units));
    let scales_each = comptime!(blueprint.plane_scales().div_ceil(32));
    let mut codes = Array::<Vector<u32, Const<4>>>::new(comptime!(2 * row_tiles * chunks));
    let mut next_codes = Array::<Vector<u32, Const<4>>>::new(comptime!(2 * row_tiles * chunks));
    let mut next_x = Array::<Vector<u32, Const<4>>>::new(x_each);
    let mut next_scale_codes = Array::<u32>::new(scales_each);
    let mut next_absmax = Array::<f32>::new(scales_each);
    load_codes(
        packed,
        &mut next_codes,
        lane_row,
        first_k + lane_k,
        n,
        k,
        blueprint,
    );
    load_x(
        x,
        &mut next_x,
        x_unit,
        first_k + x_plane * plane_k,
        m,
        k,
        blueprint,
    );
    load_scales(
        words,
        &view,
        &mut next_scale_codes,
        &mut next_absmax,
        lane,
        cube_row + plane_row,
        first_k + k_plane * plane_k,
        n,
        k,
        blueprint,
    );

    // Lane `l` holds level `l % 16`, for all lanes to read by a shuffle.
    let level = f32::reinterpret(words[view.codebook + (UNIT_POS_X & 15) as usize]);
    let mut offset = 0.0f32;
    if comptime!(blueprint.nested_log2 != 0) {
        let mut i = unit;
        while i < 256 {
            map[i] = f32::reinterpret(words[view.codebook + 16 + i]);
            i += units;
        }
        offset = f32::reinterpret(words[view.codebook + 272usize]);
        sync_cube();
    }

    // Positions of a lane in shared memory; the rest of an address is known when compiling.
    let fold = (member >> 1) ^ ((group & 1) << 1);
    let mut x_row = group;
    if comptime!(x_rows < 8) {
        x_row = usize::min(group, comptime!(x_rows - 1).runtime());
    }
    let x_base = (k_plane * x_rows + x_row) * x_pitch + member * 4;
    let mut x_at = Array::<usize>::new(4usize);
    #[unroll]
    for q in 0..4usize {
        x_at[q] = x_base + (q ^ fold);
    }
    let scales_base = plane * plane_scales;
    let scale_at = scales_base + group * pitch + ((member * 32) >> run_log2);

    let def = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    let mut sums = Sequence::<Array<Vector<f32, Const<2>>>>::new();
    #[unroll]
    for _ in 0..comptime!(row_tiles * column_tiles) {
        let mut sum = Array::<Vector<f32, Const<2>>>::new(2usize);
        sum[0] = Vector::new(0.0f32);
        sum[1] = Vector::new(0.0f32);
        sums.push(sum);
    }

    for round in first_round..end_round {
        let half = (round - first_round) & 1;
        let x_start = half * x_half;
        let scale_start = half * scale_half;
        #[unroll]
        for e in 0..x_each {
            let i = x_unit + comptime!(e * x_units);
            if comptime!((e + 1) * x_units <= x_all) || i < x_all {
                let row = i / x_pitch;
                let column = i % x_pitch;
                let at = x_start + x_plane * comptime!(x_rows * x_pitch) + row * x_pitch;
                staged[at + swizzle(row % x_rows, column)] = next_x[e];
            }
        }
        #[unroll]
        for e in 0..scales_each {
            let i = lane + comptime!(e * 32);
            if comptime!((e + 1) * 32 <= blueprint.plane_scales()) || i < blueprint.plane_scales() {
                let scale = if comptime!(blueprint.nested_log2 != 0) {
                    let value = map[next_scale_codes[e] as usize];
                    opaque(value * next_absmax[e], view.zero) + offset
                } else {
                    next_absmax[e]
                };
                scales[scale_start + scales_base + i / runs * pitch + i % runs] = scale;
            }
        }
        #[unroll]
        for c in 0..comptime!(2 * row_tiles * chunks) {
            codes[c] = next_codes[c];
        }
        if comptime!(blueprint.apart()) {
            sync_plane();
        } else {
            sync_cube();
        }

        if round + 1 < end_round {
            let start = (round + 1) * round_k;
            load_codes(
                packed,
                &mut next_codes,
                lane_row,
                start + lane_k,
                n,
                k,
                blueprint,
            );
            load_x(
                x,
                &mut next_x,
                x_unit,
                start + x_plane * plane_k,
                m,
                k,
                blueprint,
            );
            load_scales(
                words,
                &view,
                &mut next_scale_codes,
                &mut next_absmax,
                lane,
                cube_row + plane_row,
                start + k_plane * plane_k,
                n,
                k,
                blueprint,
            );
        }

        #[unroll]
        for chunk in 0..chunks {
            let mut lane_scales = Array::<f32>::new(comptime!(2 * row_tiles));
            #[unroll]
            for r in 0..comptime!(2 * row_tiles) {
                let further = comptime!(r * 8 * pitch + ((chunk * CHUNK) >> blueprint.run_log2));
                lane_scales[r] = scales[scale_start + scale_at + further];
            }
            #[unroll]
            for q in 0..4usize {
                let mut x_first = Sequence::<Array<Vector<F, Const<2>>>>::new();
                let mut x_second = Sequence::<Array<Vector<F, Const<2>>>>::new();
                #[unroll]
                for tile in 0..column_tiles {
                    let further = comptime!(tile * 8 * x_pitch + chunk * CHUNK / 8);
                    let four = staged[x_start + x_at[q] + further];
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
                        fragment::<F>(level, upper, lower, upper_scale, lower_scale, 0u32);
                    let w_second =
                        fragment::<F>(level, upper, lower, upper_scale, lower_scale, 4u32);
                    #[unroll]
                    for tile in 0..column_tiles {
                        let sum = sums.index_mut(comptime!(row_tile * column_tiles + tile));
                        def.execute_inplace(&w_first, x_first.index(tile), sum);
                        def.execute_inplace(&w_second, x_second.index(tile), sum);
                    }
                }
            }
        }
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
            let at = i / cube_rows * n + cube_row + row;
            if comptime!(blueprint.split) {
                parts[k_cube * m * n + at] = sum;
            } else {
                if comptime!(blueprint.bias) {
                    sum += f32::cast_from(bias[cube_row + row]);
                }
                out[at] = F::cast_from(sum);
            }
        }
        i += units;
    }
}

/// Adds up the sums of cubes that shared the work along `k`.
///
/// - `parts`: `[k_cubes, m, n]`; `bias`: `[n]`, unused without one; `out`: `[m, n]`.
/// - A unit an element.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn add_parts_kernel<F: Float>(
    parts: &[f32],
    bias: &[F],
    out: &mut [F],
    m: usize,
    n: usize,
    k_cubes: usize,
    #[comptime] has_bias: bool,
    #[define(F)] _dtype: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at < m * n {
        let mut sum = 0.0f32;
        for part in 0..k_cubes {
            sum += parts[part * m * n + at];
        }
        if has_bias {
            sum += f32::cast_from(bias[at % n]);
        }
        out[at] = F::cast_from(sum);
    }
}
