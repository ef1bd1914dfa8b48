//! How the kernels that multiply on tensor cores bring their sums together: those of planes in
//! shared memory, those of cubes in a buffer, where the cube that comes last adds them up.

use cubecl::prelude::*;

use crate::activation::Activation;

/// Who has a part of the same sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SumsBlueprint {
    /// Tiles of 16 rows of `W` of a plane.
    pub row_tiles: usize,
    /// Tiles of 8 rows of `x` of a plane.
    pub column_tiles: usize,
    /// Planes next to each other along the rows of `W`.
    pub row_planes: usize,
    /// Planes that share the work along `k`.
    pub k_planes: usize,
    /// Cubes that share the work along `k`.
    pub k_cubes: usize,
    /// Whether there is a bias to add.
    pub bias: bool,
}

impl SumsBlueprint {
    /// Units of a cube.
    pub const fn units(&self) -> usize {
        32 * self.row_planes * self.k_planes
    }

    /// Rows of `W` of a cube.
    pub const fn cube_rows(&self) -> usize {
        16 * self.row_tiles * self.row_planes
    }

    /// Tiles of 16 by 8 sums of a plane.
    pub const fn tiles(&self) -> usize {
        self.row_tiles * self.column_tiles
    }

    /// Vectors of four sums that a cube has in the end.
    pub const fn cube_vectors(&self) -> usize {
        32 * self.tiles() * self.row_planes
    }

    /// Vectors of shared memory that sums take on their way.
    pub const fn shared_vectors(&self) -> usize {
        if self.k_planes == 1 && self.k_cubes == 1 {
            return 0;
        }
        self.cube_vectors() * self.k_planes
    }
}

/// Where a cube's sums go.
#[derive(CubeType)]
pub struct Target {
    /// The cube, counted along the rows of `W`.
    pub cube: usize,
    /// The cube, counted along `k`.
    pub k_cube: usize,
    /// Rows and columns of `y`.
    pub m: usize,
    pub n: usize,
    /// Where `y` starts in its buffer.
    pub first_out: usize,
}

/// Adds up the sums of all planes, and cubes if they share the work, and stores `y`.
///
/// - `sums`: the accumulators of a lane, two pairs for each tile, in the layout of
///   `mma.sync.m16n8k16`
/// - `shared`: [`SumsBlueprint::shared_vectors`] vectors, which no unit reads any more behind a
///   barrier
/// - `parts`: `[cubes, k_cubes, cube_vectors]`, unused unless cubes share sums
/// - `counters`: one a cube along the rows of `W`, zero before and after, as above
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn store_sums<F: Float>(
    sums: &Sequence<Array<Vector<f32, Const<2>>>>,
    shared: &mut Shared<[Vector<u32, Const<4>>]>,
    bias: &[F],
    out: &mut [F],
    parts: &mut [Vector<u32, Const<4>>],
    counters: &[Atomic<u32>],
    target: &Target,
    #[comptime] blueprint: SumsBlueprint,
) {
    let tiles = comptime!(blueprint.tiles());
    let units = comptime!(blueprint.units());
    let vectors = comptime!(blueprint.cube_vectors());
    let lane = UNIT_POS_X as usize;
    let plane = UNIT_POS_Y as usize;
    if comptime!(blueprint.shared_vectors() == 0) {
        #[unroll]
        for tile in 0..tiles {
            let four = four_sums(sums.index(tile));
            store_vector::<F>(
                &four,
                (plane * tiles + tile) * 32 + lane,
                bias,
                out,
                target,
                blueprint,
            );
        }
    } else {
        share_sums(sums, shared, blueprint);
        let first = (target.cube * comptime!(blueprint.k_cubes) + target.k_cube) * vectors;
        let mut i = UNIT_POS as usize;
        while i < vectors {
            let total = shared_sum(shared, i, blueprint);
            if comptime!(blueprint.k_cubes > 1) {
                let mut words = Vector::<u32, Const<4>>::empty();
                #[unroll]
                for p in 0..4usize {
                    words.insert(p, u32::reinterpret(total[p]));
                }
                parts[first + i] = words;
            } else {
                store_vector::<F>(&total, i, bias, out, target, blueprint);
            }
            i += units;
        }
        if comptime!(blueprint.k_cubes > 1) {
            let mut arrived = Shared::<u32>::new();
            sync_storage();
            if UNIT_POS == 0 {
                *arrived = counters[target.cube].fetch_add(1u32);
            }
            sync_cube();
            if *arrived == comptime!(blueprint.k_cubes as u32 - 1) {
                sync_storage();
                add_parts::<F>(parts, bias, out, target, blueprint);
                if UNIT_POS == 0 {
                    counters[target.cube].store(0u32);
                }
            }
        }
    }
}

/// As [`store_sums`] for one row of `x` and two weights, where `y = activation(first) second`: half of the
/// planes next to each other have sums with the one, the others those with the other. No cubes share sums.
///
/// - `bias`: not used; `target`: the cube counted by results
#[cube]
pub fn store_gated<F: Float>(
    sums: &Sequence<Array<Vector<f32, Const<2>>>>,
    shared: &mut Shared<[Vector<u32, Const<4>>]>,
    bias: &[F],
    out: &mut [F],
    target: &Target,
    #[comptime] activation: Activation,
    #[comptime] blueprint: SumsBlueprint,
) {
    let results = comptime!(SumsBlueprint {
        row_planes: blueprint.row_planes / 2,
        bias: false,
        ..blueprint
    });
    let vectors = comptime!(results.cube_vectors());
    share_sums(sums, shared, blueprint);
    let mut i = UNIT_POS as usize;
    while i < vectors {
        let mut total = shared_sum(shared, i, blueprint);
        let factors = shared_sum(shared, i + vectors, blueprint);
        #[unroll]
        for p in 0..4usize {
            total[p] = activated(total[p], activation) * opened(factors[p], activation);
        }
        store_vector::<F>(&total, i, bias, out, target, results);
        i += comptime!(blueprint.units());
    }
}

/// An activation of a value.
#[cube]
pub fn activated(x: f32, #[comptime] activation: Activation) -> f32 {
    match comptime!(activation) {
        Activation::Silu => x / (1.0f32 + f32::exp(-x)),
        Activation::GeluTanh => {
            // sqrt(2 / pi)
            let inner = 0.797_884_6f32 * (x + 0.044_715f32 * x * x * x);
            0.5f32 * x * (1.0f32 + f32::tanh(inner))
        }
        Activation::ClampedSwiglu => {
            let x = f32::min(x, comptime!(Activation::SWIGLU_LIMIT));
            x / (1.0f32 + f32::exp(comptime!(-Activation::SWIGLU_ALPHA) * x))
        }
    }
}

/// What the activation of a gate is multiplied with, from what it opens.
#[cube]
pub fn opened(up: f32, #[comptime] activation: Activation) -> f32 {
    match comptime!(activation) {
        Activation::Silu | Activation::GeluTanh => up,
        Activation::ClampedSwiglu => {
            let limit = comptime!(Activation::SWIGLU_LIMIT);
            f32::min(f32::max(up, -limit), limit) + 1.0f32
        }
    }
}

/// Puts the sums of all planes into shared memory, behind a barrier and before one.
#[cube]
fn share_sums(
    sums: &Sequence<Array<Vector<f32, Const<2>>>>,
    shared: &mut Shared<[Vector<u32, Const<4>>]>,
    #[comptime] blueprint: SumsBlueprint,
) {
    let tiles = comptime!(blueprint.tiles());
    let first = UNIT_POS_Y as usize * tiles * 32 + UNIT_POS_X as usize;
    sync_cube();
    #[unroll]
    for tile in 0..tiles {
        let four = four_sums(sums.index(tile));
        let mut words = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for p in 0..4usize {
            words.insert(p, u32::reinterpret(four[p]));
        }
        shared[first + comptime!(tile * 32)] = words;
    }
    sync_cube();
}

/// The sum of what the planes along `k` have in shared memory for vector `i` of a cube.
#[cube]
fn shared_sum(
    shared: &mut Shared<[Vector<u32, Const<4>>]>,
    i: usize,
    #[comptime] blueprint: SumsBlueprint,
) -> Array<f32> {
    let vectors = comptime!(blueprint.cube_vectors());
    let mut total = zeros();
    #[unroll]
    for other in 0..comptime!(blueprint.k_planes) {
        add(&mut total, shared[i + comptime!(other * vectors)]);
    }
    total
}

/// Adds up the parts of all cubes and stores `y`. A unit has the loads of a few vectors on their way
/// at a time.
#[cube]
fn add_parts<F: Float>(
    parts: &mut [Vector<u32, Const<4>>],
    bias: &[F],
    out: &mut [F],
    target: &Target,
    #[comptime] blueprint: SumsBlueprint,
) {
    let k_cubes = comptime!(blueprint.k_cubes);
    let units = comptime!(blueprint.units());
    let vectors = comptime!(blueprint.cube_vectors());
    // Registers for sixteen vectors.
    let together = comptime!((16 / k_cubes).clamp(1, vectors.div_ceil(units)));
    let first = target.cube * comptime!(k_cubes * vectors);
    let mut i = UNIT_POS as usize;
    while i < vectors {
        let mut loaded = Array::<Vector<u32, Const<4>>>::new(comptime!(together * k_cubes));
        #[unroll]
        for t in 0..together {
            let at = usize::min(i + comptime!(t * units), comptime!(vectors - 1));
            #[unroll]
            for other in 0..k_cubes {
                loaded[comptime!(t * k_cubes + other)] =
                    parts[first + at + comptime!(other * vectors)];
            }
        }
        #[unroll]
        for t in 0..together {
            let mut total = zeros();
            #[unroll]
            for other in 0..k_cubes {
                add(&mut total, loaded[comptime!(t * k_cubes + other)]);
            }
            let at = i + comptime!(t * units);
            if at < vectors {
                store_vector::<F>(&total, at, bias, out, target, blueprint);
            }
        }
        i += comptime!(together * units);
    }
}

#[cube]
fn zeros() -> Array<f32> {
    let mut four = Array::<f32>::new(4usize);
    #[unroll]
    for p in 0..4usize {
        four[p] = 0.0f32;
    }
    four
}

#[cube]
fn add(total: &mut Array<f32>, words: Vector<u32, Const<4>>) {
    #[unroll]
    for p in 0..4usize {
        total[p] += f32::reinterpret(words.extract(p));
    }
}

#[cube]
fn four_sums(sum: &Array<Vector<f32, Const<2>>>) -> Array<f32> {
    let mut four = Array::<f32>::new(4usize);
    #[unroll]
    for p in 0..4usize {
        four[p] = sum[comptime!(p / 2)].extract(comptime!(p % 2));
    }
    four
}

/// Stores the four sums of vector `i` of a cube: two rows of `x` by rows `group` and `group + 8` of
/// a tile.
#[cube]
fn store_vector<F: Float>(
    four: &Array<f32>,
    i: usize,
    bias: &[F],
    out: &mut [F],
    target: &Target,
    #[comptime] blueprint: SumsBlueprint,
) {
    let column_tiles = comptime!(blueprint.column_tiles);
    let tile = i / 32 % comptime!(blueprint.tiles());
    let row = target.cube * comptime!(blueprint.cube_rows())
        + i / comptime!(32 * blueprint.tiles()) * comptime!(16 * blueprint.row_tiles)
        + tile / column_tiles * 16
        + ((i & 31) >> 2usize);
    let column = tile % column_tiles * 8 + (i & 3) * 2;
    #[unroll]
    for p in 0..4usize {
        let row = row + comptime!(p / 2 * 8);
        let column = column + comptime!(p % 2);
        if row < target.n && column < target.m {
            let mut sum = four[p];
            if comptime!(blueprint.bias) {
                sum += f32::cast_from(bias[row]);
            }
            out[target.first_out + column * target.n + row] = F::cast_from(sum);
        }
    }
}
