//! The low-rank branch `s (x A) B` of a linear map, as the products with a packed weight take it in:
//! one small launch computes `s x A`, and the product adds its own with `B` to its sums.

use cubecl::cmma::MmaDefinition;
use cubecl::prelude::*;

/// Values of `s x A` of a row come in multiples of this many, zero from the rank on: what the tensor
/// cores take at once.
pub const DOWN_TILE: usize = 16;

/// A branch whose first half is computed.
#[derive(CubeType, CubeLaunch)]
pub struct LoraBranch<G: Float> {
    /// `[m, splits, width]`: parts of `s x A`, `width` the rank rounded up to [`DOWN_TILE`].
    pub down: Box<[Vector<f32, Const<4>>]>,
    /// `B`, `[rank, n]`.
    pub up: Box<[G]>,
    /// Columns of `A` and rows of `B`.
    pub rank: usize,
    /// Parts that add up to a value of `s x A`.
    #[cube(comptime)]
    pub splits: usize,
}

#[cube]
impl<G: Float> LoraBranch<G> {
    /// Tiles along the rank.
    fn tiles(&self) -> usize {
        self.rank.div_ceil(DOWN_TILE.runtime())
    }

    /// Four neighbouring values of `s x A`, the `four`-th of a row.
    fn down_four(&self, row: usize, four: usize) -> Vector<f32, Const<4>> {
        let pitch = self.tiles() * comptime!(DOWN_TILE / 4);
        let splits = comptime!(self.splits);
        let at = row * splits * pitch + four;
        let mut sum = self.down[at];
        #[unroll]
        for split in 1..splits {
            sum += self.down[at + split * pitch];
        }
        sum
    }

    /// An element of `B`, zero from the rank on.
    fn up_at(&self, r: usize, row: usize, n: usize) -> f32 {
        let mut value = 0.0f32;
        if r < self.rank {
            value = f32::cast_from(self.up[r * n + row]);
        }
        value
    }

    /// What four values along the rank add to `y[column, row]`.
    pub fn four_products(&self, column: usize, row: usize, n: usize, four: usize) -> f32 {
        let down = self.down_four(column, four);
        let mut sum = 0.0f32;
        #[unroll]
        for i in 0..4usize {
            sum += down.extract(i) * self.up_at(four * 4 + i, row, n);
        }
        sum
    }

    /// What the branch adds to `y[column, row]`, of which each of four neighbouring lanes, by its
    /// `member`, computes a quarter.
    pub fn quad_sum(&self, column: usize, row: usize, n: usize, member: usize) -> f32 {
        let mut sum = 0.0f32;
        for tile in 0..self.tiles() {
            sum += self.four_products(column, row, n, tile * 4 + member);
        }
        sum += plane_shuffle_xor(sum, 1u32);
        sum + plane_shuffle_xor(sum, 2u32)
    }

    /// Adds the branch to the sums of a plane on tensor cores, in the dtype of the product: the
    /// plane's tiles of 16 rows of `W`, from `plane_row` on, by 8 rows of `x`.
    ///
    /// A lane has four neighbouring places along the rank, where the instruction wants two pairs
    /// eight apart: any order does that both sides agree on.
    pub fn add_tiles<F: Float>(
        &self,
        sums: &mut Sequence<Array<Vector<f32, Const<2>>>>,
        plane_row: usize,
        m: usize,
        n: usize,
        #[comptime] row_tiles: usize,
        #[comptime] column_tiles: usize,
    ) {
        let def = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
        let group = (UNIT_POS_X >> 2) as usize;
        let member = (UNIT_POS_X & 3) as usize;
        for tile in 0..self.tiles() {
            let four = tile * 4 + member;
            let mut up = Sequence::<Array<Vector<F, Const<2>>>>::new();
            #[unroll]
            for row_tile in 0..row_tiles {
                let mut registers = Array::<Vector<F, Const<2>>>::new(4usize);
                #[unroll]
                for half in 0..2usize {
                    let row = plane_row + group + comptime!(16 * row_tile + 8 * half);
                    let row = usize::min(row, n - 1);
                    #[unroll]
                    for pair in 0..2usize {
                        let mut two = Vector::<F, Const<2>>::empty();
                        #[unroll]
                        for i in 0..2usize {
                            let r = four * 4 + comptime!(2 * pair + i);
                            two.insert(i, F::cast_from(self.up_at(r, row, n)));
                        }
                        registers[comptime!(2 * pair + half)] = two;
                    }
                }
                up.push(registers);
            }
            #[unroll]
            for column_tile in 0..column_tiles {
                let column = usize::min(comptime!(8 * column_tile) + group, m - 1);
                let values = self.down_four(column, four);
                let mut down = Array::<Vector<F, Const<2>>>::new(2usize);
                #[unroll]
                for pair in 0..2usize {
                    let mut two = Vector::<F, Const<2>>::empty();
                    #[unroll]
                    for i in 0..2usize {
                        two.insert(i, F::cast_from(values.extract(comptime!(2 * pair + i))));
                    }
                    down[pair] = two;
                }
                #[unroll]
                for row_tile in 0..row_tiles {
                    let sum = sums.index_mut(comptime!(row_tile * column_tiles + column_tile));
                    def.execute_inplace(up.index(row_tile), &down, sum);
                }
            }
        }
    }
}

/// What forks a compiled [`lora_down_kernel`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LoraDownBlueprint {
    /// Units of a cube.
    pub units: usize,
    /// Units next to each other along the rank, each with a vector of `A`.
    pub rank_units: usize,
    /// Elements of those vectors, which divides the rank.
    pub vector: usize,
    /// Rows of `x` of a cube.
    pub rows: usize,
    /// Cubes that share the work along `k`.
    pub splits: usize,
}

impl LoraDownBlueprint {
    /// Sums of a cube.
    const fn outputs(&self) -> usize {
        self.rows * self.rank_units * self.vector
    }

    /// Units along `k`.
    const fn k_units(&self) -> usize {
        self.units / self.rank_units
    }
}

/// Loads of `A` that a unit has on their way at a time.
const LOADS: usize = 4;

/// `s x A` in f32, in parts.
///
/// - `x`: `[m, k]`; `a`: `[k, rank]`, in vectors of `V`; `down`: `[m, splits, width]`, `width` the
///   rank rounded up to [`DOWN_TILE`]
/// - A cube computes a part of `rows` by `rank_units * V` sums: its place along the grid gives the
///   part first, then the columns, then the rows. Units go along `A` as it lies in memory.
/// - Tails: rows of `x` past `m` repeat the last one and are not stored; columns past the rank are
///   zero.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn lora_down_kernel<F: Float, G: Float, V: Size>(
    x: &[F],
    a: &[Vector<G, V>],
    down: &mut [f32],
    scale: f32,
    m: usize,
    k: usize,
    rank: usize,
    #[comptime] blueprint: LoraDownBlueprint,
    #[define(F)] _x_dtype: ElemType,
    #[define(G)] _dtype: ElemType,
) {
    let vector = V::value().comptime();
    let rows = comptime!(blueprint.rows);
    let splits = comptime!(blueprint.splits);
    let outputs = comptime!(blueprint.outputs());
    let columns = comptime!(blueprint.rank_units * vector);
    let width = rank.div_ceil(DOWN_TILE.runtime()) * DOWN_TILE;

    let split = CUBE_POS % splits;
    let column_cubes = width / columns;
    let first_column = CUBE_POS / splits % column_cubes * columns;
    let first_row = CUBE_POS / splits / column_cubes * rows;
    let unit = UNIT_POS as usize;
    let rank_unit = unit % comptime!(blueprint.rank_units);
    let k_unit = unit / comptime!(blueprint.rank_units);
    let column = first_column + rank_unit * vector;

    let each = k.div_ceil(splits.runtime());
    let end = usize::min(split * each + each, k);
    let mut at = split * each + k_unit;
    let mut sums = Array::<Vector<f32, V>>::new(rows);
    #[unroll]
    for row in 0..rows {
        sums[row] = Vector::new(0.0f32);
    }
    if column < rank && first_row < m {
        while at < end {
            let mut loaded = Array::<Vector<f32, V>>::new(LOADS);
            let mut values = Array::<f32>::new(comptime!(LOADS * rows));
            #[unroll]
            for l in 0..LOADS {
                let i = at + comptime!(l * blueprint.k_units());
                loaded[l] = Vector::new(0.0f32);
                #[unroll]
                for row in 0..rows {
                    values[comptime!(l * rows + row)] = 0.0f32;
                }
                if i < end {
                    loaded[l] = Vector::cast_from(a[(i * rank + column) / vector]);
                    #[unroll]
                    for row in 0..rows {
                        let x_row = usize::min(first_row + row, m - 1);
                        values[comptime!(l * rows + row)] = f32::cast_from(x[x_row * k + i]);
                    }
                }
            }
            #[unroll]
            for l in 0..LOADS {
                #[unroll]
                for row in 0..rows {
                    sums[row] += loaded[l] * Vector::new(values[comptime!(l * rows + row)]);
                }
            }
            at += comptime!(LOADS * blueprint.k_units());
        }
    }

    // Units along k add up: each of some parts of a sum first, then one the parts.
    let mut shared = Shared::<[f32]>::new_slice(comptime!(
        blueprint.units * blueprint.rows * blueprint.vector
    ));
    #[unroll]
    for row in 0..rows {
        #[unroll]
        for i in 0..vector {
            let output = comptime!(row * columns + i) + rank_unit * vector;
            shared[k_unit * outputs + output] = sums[row].extract(i);
        }
    }
    sync_cube();
    let parts = comptime!(usize::max(blueprint.units / outputs, 1));
    let mut total = 0.0f32;
    if unit < comptime!(outputs * parts) {
        let mut i = unit;
        while i < comptime!(outputs * blueprint.k_units()) {
            total += shared[i];
            i += comptime!(outputs * parts);
        }
    }
    sync_cube();
    shared[unit] = total;
    sync_cube();
    if unit < outputs {
        let mut sum = 0.0f32;
        #[unroll]
        for part in 0..parts {
            sum += shared[unit + comptime!(part * outputs)];
        }
        let row = first_row + unit / columns;
        if row < m {
            down[(row * splits + split) * width + first_column + unit % columns] = sum * scale;
        }
    }
}
