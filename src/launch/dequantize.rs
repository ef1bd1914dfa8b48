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
    width: usize,
    tiles_a_row: usize,
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
        let blueprint = DequantizeBlueprint {
            block_log2: block_size.log2(),
            nested_log2: layout.config.nested_block_size.map_or(0, BlockSize::log2),
            shared_codebook: has_barriers(client),
            skewed: !start.is_multiple_of(8),
            per_unit: 1,
            lanes_per_block: 1,
        };
        let plan = Self {
            variant,
            vector: 1,
            cube_dim: CubeDim::new_single(),
            cube_count: CubeCount::Static(1, 1, 1),
            blueprint,
            address: address_type(layout.elems),
            width: 0,
            tiles_a_row: 0,
        };
        Ok(match variant {
            Variant::Tiled2d => plan.tiled_2d(client, start, len, dtype),
            Variant::WarpPerBlock => plan.warp_per_block(client, layout, start, len, dtype),
        })
    }

    /// Rows of 32 words a plane, as many rows as fill a cube.
    fn tiled_2d(mut self, client: &Client, start: usize, len: usize, dtype: FloatType) -> Self {
        const WORDS_A_UNIT: usize = 4;
        let words = (start % 8 + len).div_ceil(8);
        let units = units_per_cube(client) as usize;
        self.vector = vector_size(client, dtype, 8, &[start, len]);
        self.width = words.min(1024);
        let x = self.width.next_power_of_two().min(units);
        let y = units / x;
        self.blueprint.per_unit = WORDS_A_UNIT;
        self.cube_dim = CubeDim::new_2d(x as u32, y as u32);
        self.tiles_a_row = self.width.div_ceil(x);
        let rows = words.div_ceil(self.width);
        let cubes = self.tiles_a_row * rows.div_ceil(y * WORDS_A_UNIT);
        self.cube_count = cube_count(client, cubes);
        self
    }

    /// As many lanes a block as a plane has, each with at least one packed pair.
    fn warp_per_block(
        mut self,
        client: &Client,
        layout: &PackedLayout,
        start: usize,
        len: usize,
        dtype: FloatType,
    ) -> Self {
        let block_elems = layout.config.block_size.elems();
        let units = units_per_cube(client) as usize;
        let plane = (client.properties().hardware.plane_size_max as usize).clamp(1, units);
        let widest = (block_elems / plane).clamp(2, 8);
        self.vector = vector_size(client, dtype, widest, &[start, len]);
        self.blueprint.lanes_per_block = plane.min(block_elems / self.vector);
        self.blueprint.per_unit = 4;
        self.cube_dim = CubeDim::new_2d(plane as u32, (units / plane) as u32);

        let first = start / block_elems;
        let blocks = (start + len).div_ceil(block_elems) - first;
        let blocks_a_cube = units / self.blueprint.lanes_per_block * self.blueprint.per_unit;
        self.cube_count = cube_count(client, blocks.div_ceil(blocks_a_cube));
        self
    }
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
    // above); the kernels guard every store and read by `len`, and read the scales, codebook and nested sections only where `layout` has them.
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
                plan.width,
                plan.tiles_a_row,
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
