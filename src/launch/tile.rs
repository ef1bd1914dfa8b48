//! How the kernels on tensor cores cut a weight up.

use cubecl::prelude::Client;

use super::product::Product;
use crate::kernel::scales::CHUNK;

/// Rows of `x` that a launch of the tensor core kernel takes at most; more are cut into groups.
pub const TENSOR_CORE_ROWS: usize = 64;

/// How [`TensorCore`](super::MatmulVariant::TensorCore) and [`Levels`](super::MatmulVariant::Levels) cut the weight up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TensorCoreTile {
    /// Tiles of 16 rows of `W` a plane.
    pub row_tiles: usize,
    /// Planes of a cube along the rows of `W`.
    pub row_planes: usize,
    /// Planes of a cube along `k`.
    pub k_planes: usize,
    /// Runs of 128 elements that a plane decodes of each stage of `x`: one, or as many as it takes
    /// to have all of `x` in one stage. With `Levels` it is the latter.
    pub chunks: usize,
    /// Runs whose codes are in registers at a time: two, or with a single stage of `x` any divisor
    /// of `chunks`.
    pub depth: usize,
    /// Cubes that share the work along `k`; one with `Levels`.
    pub k_cubes: usize,
}

/// A way to cut weights up, whatever their size: which one is fastest depends on the product and the
/// device, and is worth a measurement.
pub(crate) type TileRule = fn(&Client, &Product) -> TensorCoreTile;

/// More parts than this cost more to add up than they save.
const MAX_K_CUBES: usize = 8;

impl From<[usize; 6]> for TensorCoreTile {
    /// From the [`sizes`](TensorCoreTile::sizes).
    fn from(sizes: [usize; 6]) -> Self {
        let [row_tiles, row_planes, k_planes, chunks, depth, k_cubes] = sizes;
        Self {
            row_tiles,
            row_planes,
            k_planes,
            chunks,
            depth,
            k_cubes,
        }
    }
}

impl TensorCoreTile {
    /// All sizes, in the order of the fields.
    pub const fn sizes(&self) -> [usize; 6] {
        let Self {
            row_tiles,
            row_planes,
            k_planes,
            chunks,
            depth,
            k_cubes,
        } = *self;
        [row_tiles, row_planes, k_planes, chunks, depth, k_cubes]
    }

    /// All of `x` in shared memory, cubes that all run at once, each with as many planes as have four
    /// chunks or more to go through: for a few rows, and the tile of
    /// [`Levels`](super::MatmulVariant::Levels).
    pub fn whole(client: &Client, product: &Product) -> Self {
        Self::whole_of(client, product, 1)
    }

    /// The same for so many weights of the size of one, whose rows a cube multiplies with together.
    pub(super) fn whole_of(client: &Client, product: &Product, weights: usize) -> Self {
        let row_planes = product.n.div_ceil(16 * multiprocessors(client)).clamp(1, 8);
        let row_planes = weights * row_planes;
        let all = product.k.div_ceil(CHUNK).max(1);
        let k_planes = (32 / row_planes).min(all.div_ceil(4));
        let chunks = all.div_ceil(k_planes).next_multiple_of(2);
        Self {
            row_tiles: 1,
            row_planes,
            k_planes: all.div_ceil(chunks),
            chunks,
            depth: 2,
            k_cubes: 1,
        }
    }
    /// `x` in stages of 512 elements, 16 planes a cube.
    pub(crate) fn wide(client: &Client, product: &Product) -> Self {
        Self::staged(client, product, 4)
    }

    /// `x` in stages of 256 elements, 8 planes a cube, each with more registers: for many rows.
    pub(crate) fn narrow(client: &Client, product: &Product) -> Self {
        Self::staged(client, product, 2)
    }

    fn staged(client: &Client, product: &Product, k_planes: usize) -> Self {
        let tile = Self {
            row_tiles: 2,
            row_planes: 4,
            k_planes,
            chunks: 1,
            depth: 2,
            k_cubes: 1,
        };
        // Where the weight has too few rows to give every multiprocessor a cube, cubes share the
        // work along k.
        let row_cubes = product.n.div_ceil(16 * tile.row_tiles * tile.row_planes);
        let row_cubes = row_cubes.max(1);
        Self {
            k_cubes: (multiprocessors(client) / row_cubes).clamp(1, MAX_K_CUBES),
            ..tile
        }
    }
}

pub(super) fn multiprocessors(client: &Client) -> usize {
    let hardware = &client.properties().hardware;
    hardware.num_streaming_multiprocessors.unwrap_or(1) as usize
}
