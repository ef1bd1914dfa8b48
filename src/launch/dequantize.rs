//! Launches of the dequantization kernels.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{
    address_type, check_dtype, cube_count, elem_type, has_barriers, units_per_cube, vector_size,
};
use crate::error::Nf4Error;
use crate::format::{BlockSize, FloatType, PackedLayout};
use crate::kernel::decode::{DequantizeBlueprint, PackedViewLaunch};
use crate::kernel::{tiled_2d, warp_per_block};

/// A dequantization kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Variant {
    /// Two-dimensional tiles over the weight, packed stores.
    Tiled2d,
    /// A plane per quantization block.
    WarpPerBlock,
}

impl Variant {
    /// All kernels.
    pub const ALL: [Self; 2] = [Self::Tiled2d, Self::WarpPerBlock];

    /// The name used in files, tests and benches.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tiled2d => "tiled_2d",
            Self::WarpPerBlock => "warp_per_block",
        }
    }

    /// The kernel that suits a device.
    pub fn default_for(client: &Client) -> Self {
        if has_barriers(client) {
            Self::Tiled2d
        } else {
            Self::WarpPerBlock
        }
    }
}

/// A launch of a dequantization kernel, worked out but not yet made.
#[derive(Debug, Clone)]
pub struct DequantizePlan {
    /// The kernel.
    pub variant: Variant,
    /// Elements a store.
    pub vector: usize,
    /// Size of a cube.
    pub cube_dim: CubeDim,
    /// Number of cubes.
    pub cube_count: CubeCount,
    blueprint: DequantizeBlueprint,
    address: AddressType,
}

impl DequantizePlan {
    /// Works out how to decode elements `start..start + len` to `dtype`, with a given kernel or
    /// the device's default. Nothing is launched.
    ///
    /// # Errors
    /// [`Nf4Error::RowRange`] if the range is empty or leaves the weight (counted in elements),
    /// [`Nf4Error::DeviceDtype`] if the device has no such type, [`Nf4Error::Variant`] if it
    /// cannot run the kernel.
    pub fn new(
        client: &Client,
        layout: &PackedLayout,
        start: usize,
        len: usize,
        dtype: FloatType,
        variant: Option<Variant>,
    ) -> Result<Self, Nf4Error> {
        if len == 0 || start.checked_add(len).is_none_or(|end| end > layout.elems) {
            return Err(Nf4Error::RowRange {
                start,
                end: start.saturating_add(len),
                rows: layout.elems,
            });
        }
        check_dtype(client, dtype)?;
        let variant = variant.unwrap_or_else(|| Variant::default_for(client));
        let block_size = layout.config.block_size;
        // Stores are as wide as the device's. Where that does not divide the number of elements,
        // the last one is stored piece by piece if the runtime can reinterpret a buffer.
        let widest = vector_size(client, dtype, 8, &[start]);
        let dividing = vector_size(client, dtype, widest, &[start, len]);
        let ragged = dividing < widest && reinterprets(client);
        let blueprint = DequantizeBlueprint {
            block_log2: block_size.log2(),
            nested_log2: layout.config.nested_block_size.map_or(0, BlockSize::log2),
            shared: has_barriers(client),
            skewed: !start.is_multiple_of(block_size.elems()),
            ragged,
            per_unit: 1,
            group: 1,
        };
        let first_block = start / block_size.elems();
        let work = Work {
            vector: if ragged { widest } else { dividing },
            block_elems: block_size.elems(),
            blocks: (start + len).div_ceil(block_size.elems()) - first_block,
        };
        let (cube_dim, cubes, per_unit, group) = match variant {
            Variant::Tiled2d => work.tiled_2d(client),
            Variant::WarpPerBlock => work.warp_per_block(client),
        };
        Ok(Self {
            variant,
            vector: work.vector,
            cube_dim,
            cube_count: cube_count(client, cubes),
            blueprint: DequantizeBlueprint {
                per_unit,
                group,
                ..blueprint
            },
            address: address_type(layout.elems),
        })
    }
}

/// What there is to decode.
struct Work {
    /// Elements a store.
    vector: usize,
    block_elems: usize,
    blocks: usize,
}

impl Work {
    /// Cube, number of cubes, vectors a unit, blocks a tile.
    fn tiled_2d(&self, client: &Client) -> (CubeDim, usize, usize, usize) {
        let units = units_per_cube(client) as usize;
        let vectors_a_block = self.block_elems / self.vector;
        if !has_barriers(client) {
            return (CubeDim::new_1d(units as u32), self.blocks, 1, 1);
        }
        // A unit decodes at most one scale, a tile is at least one block.
        let tile = (units * self.vectors_a_unit(client, units) / vectors_a_block).clamp(1, units);
        // All of these are powers of two. With large blocks a unit has more vectors than it likes.
        let per_unit = tile * vectors_a_block / units;
        (
            CubeDim::new_1d(units as u32),
            self.blocks.div_ceil(tile),
            per_unit,
            tile,
        )
    }

    /// Vectors that a unit has in flight: four were fastest on an H200, but eight where all cubes
    /// then run at once and four would leave a second, part-filled wave (`benches/NOTES.md`).
    fn vectors_a_unit(&self, client: &Client, units: usize) -> usize {
        const UNITS_A_MULTIPROCESSOR: usize = 2048;
        let multiprocessors = client.properties().hardware.num_streaming_multiprocessors;
        let at_once = multiprocessors.unwrap_or(0) as usize * UNITS_A_MULTIPROCESSOR / units;
        let cubes =
            |vectors| (self.blocks * self.block_elems).div_ceil(units * vectors * self.vector);
        if cubes(4) > at_once && cubes(8) <= at_once {
            8
        } else {
            4
        }
    }

    /// Cube, number of cubes, blocks a unit, lanes a block.
    fn warp_per_block(&self, client: &Client) -> (CubeDim, usize, usize, usize) {
        const BLOCKS_A_UNIT: usize = 4;
        let units = units_per_cube(client) as usize;
        let plane = (client.properties().hardware.plane_size_max as usize).clamp(1, units);
        let lanes = plane.min(self.block_elems / self.vector);
        let blocks_a_cube = units / lanes * BLOCKS_A_UNIT;
        (
            CubeDim::new_2d(plane as u32, (units / plane) as u32),
            self.blocks.div_ceil(blocks_a_cube),
            BLOCKS_A_UNIT,
            lanes,
        )
    }
}

/// Whether kernels can see a buffer of vectors as one of scalars: not in WGSL.
fn reinterprets(client: &Client) -> bool {
    matches!(client.name(), "cuda" | "hip" | "cpu")
}

/// Decodes elements `start..start + len` of a packed weight into `out`, in one launch.
///
/// # Shapes
/// - `packed`: `layout.words` u32 words
/// - `out`: `len` elements of `dtype`, contiguous
///
/// # Errors
/// Those of [`DequantizePlan::new`], and [`Nf4Error::Length`] if a buffer is too small.
#[allow(clippy::too_many_arguments)]
pub fn dequantize(
    client: &Client,
    packed: Handle,
    layout: &PackedLayout,
    start: usize,
    len: usize,
    dtype: FloatType,
    out: Handle,
    variant: Option<Variant>,
) -> Result<(), Nf4Error> {
    let plan = DequantizePlan::new(client, layout, start, len, dtype, variant)?;
    for (tensor, expected, given) in [
        ("packed weight", layout.words * 4, packed.size_in_used()),
        ("dequantized", len * dtype.size_bytes(), out.size_in_used()),
    ] {
        if (given as usize) < expected {
            return Err(Nf4Error::Length {
                tensor: tensor.into(),
                expected,
                given: given as usize,
            });
        }
    }

    let view = PackedViewLaunch::new(start, len, layout.scales, layout.codebook, 0);
    // SAFETY: the buffers hold at least the words and elements that are declared here (checked
    // above); the kernels guard every store and read by `len`, and read the scales, codebook and
    // nested sections only where `layout` has them.
    unsafe {
        let packed = BufferArg::from_raw_parts(packed, layout.words);
        let out = BufferArg::from_raw_parts(out, len);
        match plan.variant {
            Variant::Tiled2d => tiled_2d::dequantize_tiled_2d_kernel::launch_unchecked(
                client,
                plan.cube_count,
                plan.cube_dim,
                plan.address,
                plan.vector,
                packed,
                out,
                view,
                plan.blueprint,
                elem_type(dtype),
            ),
            Variant::WarpPerBlock => {
                warp_per_block::dequantize_warp_per_block_kernel::launch_unchecked(
                    client,
                    plan.cube_count,
                    plan.cube_dim,
                    plan.address,
                    plan.vector,
                    packed,
                    out,
                    view,
                    plan.blueprint,
                    elem_type(dtype),
                )
            }
        }
    }
    Ok(())
}
