//! Launches of the dequantization kernels.

use std::fmt;
use std::ops::Range;

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{
    address_type, check_buffers, check_dtype, cube_count, elem_type, has_barriers, units_per_cube,
    vector_size,
};
use crate::error::Nf4Error;
use crate::format::{FloatType, PackedLayout};
use crate::kernel::decode::{DequantizeBlueprint, PackedViewLaunch, ScaleKind};
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
///
/// ```no_run
/// # fn decode(client: &cubecl::prelude::Client, packed: cubecl::server::Handle)
/// # -> Result<cubecl::server::Handle, burn_nf4::Nf4Error> {
/// use burn_nf4::format::{FloatType, PackedLayout, QuantConfig};
/// use burn_nf4::launch::DequantizePlan;
///
/// let layout = PackedLayout::new(4096 * 4096, QuantConfig::default());
/// let plan = DequantizePlan::new(client, &layout, 0..layout.elems(), FloatType::BF16, None)?;
/// let out = client.empty(plan.out_bytes());
/// plan.launch(packed, out.clone())?;
/// # Ok(out)
/// # }
/// ```
// The fields are private and never change: the bounds of the launch rest on them.
#[derive(Clone)]
pub struct DequantizePlan {
    client: Client,
    layout: PackedLayout,
    start: usize,
    len: usize,
    dtype: FloatType,
    variant: Variant,
    vector: usize,
    cube_dim: CubeDim,
    cube_count: CubeCount,
    blueprint: DequantizeBlueprint,
    address: AddressType,
}

impl fmt::Debug for DequantizePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DequantizePlan")
            .field("variant", &self.variant)
            .field("elems", &(self.start..self.start + self.len))
            .field("dtype", &self.dtype)
            .field("cube_dim", &self.cube_dim)
            .field("cube_count", &self.cube_count)
            .finish_non_exhaustive()
    }
}

impl DequantizePlan {
    /// Works out how to decode a range of elements to `dtype`, with a given kernel or the device's
    /// default. Nothing is launched. Every device runs both kernels.
    ///
    /// # Errors
    /// [`Nf4Error::ElementRange`] if the range is empty or leaves the weight,
    /// [`Nf4Error::DeviceDtype`] if the device has no such type.
    pub fn new(
        client: &Client,
        layout: &PackedLayout,
        elems: Range<usize>,
        dtype: FloatType,
        variant: Option<Variant>,
    ) -> Result<Self, Nf4Error> {
        let Range { start, end } = elems;
        if start >= end || end > layout.elems() {
            return Err(Nf4Error::ElementRange {
                start,
                end,
                elems: layout.elems(),
            });
        }
        let len = end - start;
        check_dtype(client, dtype)?;
        let variant = variant.unwrap_or_else(|| Variant::default_for(client));
        let block_elems = 1 << layout.run_log2();
        // Stores are as wide as the device's. Where that does not divide the number of elements,
        // the last one is stored piece by piece if the runtime can reinterpret a buffer.
        let widest = vector_size(client, dtype, block_elems.min(8), &[start]);
        let dividing = vector_size(client, dtype, widest, &[start, len]);
        let ragged = dividing < widest && reinterprets(client);
        let blueprint = DequantizeBlueprint {
            shared: has_barriers(client),
            skewed: !start.is_multiple_of(block_elems),
            ragged,
            ..decode_blueprint(layout)
        };
        let first_block = start / block_elems;
        let work = Work {
            vector: if ragged { widest } else { dividing },
            block_elems,
            blocks: (start + len).div_ceil(block_elems) - first_block,
        };
        let (cube_dim, cubes, per_unit, group) = match variant {
            Variant::Tiled2d => work.tiled_2d(client),
            Variant::WarpPerBlock => work.warp_per_block(client),
        };
        Ok(Self {
            client: client.clone(),
            layout: *layout,
            start,
            len,
            dtype,
            variant,
            vector: work.vector,
            cube_dim,
            cube_count: cube_count(client, cubes),
            blueprint: DequantizeBlueprint {
                per_unit,
                group,
                ..blueprint
            },
            address: address_type(layout.elems()),
        })
    }

    /// The kernel.
    pub fn variant(&self) -> Variant {
        self.variant
    }

    /// Elements a store.
    pub fn vector(&self) -> usize {
        self.vector
    }

    /// Size of a cube.
    pub fn cube_dim(&self) -> CubeDim {
        self.cube_dim
    }

    /// Number of cubes.
    pub fn cube_count(&self) -> CubeCount {
        self.cube_count.clone()
    }

    /// Bytes of the result.
    pub fn out_bytes(&self) -> usize {
        self.len * self.dtype.size_bytes()
    }

    /// Makes the launch.
    ///
    /// # Shapes
    /// - `packed`: [`PackedLayout::words`] u32 words
    /// - `out`: as many elements as the range has, contiguous
    ///
    /// # Errors
    /// [`Nf4Error::Length`] if a buffer is too small, [`Nf4Error::Alignment`] if it does not begin
    /// at a multiple of 16 bytes.
    pub fn launch(&self, packed: Handle, out: Handle) -> Result<(), Nf4Error> {
        let (layout, len) = (&self.layout, self.len);
        check_buffers([
            ("packed weight", &packed, [layout.words(), 1], 4),
            ("dequantized", &out, [len, 1], self.dtype.size_bytes()),
        ])?;
        let view = packed_view(layout, self.start, len);
        // SAFETY: the buffers hold at least the words and elements that are declared here, and begin
        // where vectors may (checked above). The kernels guard every store and read by `len`, which
        // `new` has checked to lie within the weight, and read the scales, codebook and nested
        // sections only where the layout has them.
        unsafe {
            let packed = BufferArg::from_raw_parts(packed, layout.words());
            let out = BufferArg::from_raw_parts(out, len);
            match self.variant {
                Variant::Tiled2d => tiled_2d::dequantize_tiled_2d_kernel::launch_unchecked(
                    &self.client,
                    self.cube_count.clone(),
                    self.cube_dim,
                    self.address,
                    self.vector,
                    packed,
                    out,
                    view,
                    self.blueprint,
                    elem_type(self.dtype),
                ),
                Variant::WarpPerBlock => {
                    warp_per_block::dequantize_warp_per_block_kernel::launch_unchecked(
                        &self.client,
                        self.cube_count.clone(),
                        self.cube_dim,
                        self.address,
                        self.vector,
                        packed,
                        out,
                        view,
                        self.blueprint,
                        elem_type(self.dtype),
                    )
                }
            }
        }
        Ok(())
    }
}

/// What all kernels that decode are compiled for by the format alone, with everything else switched
/// off.
pub(super) fn decode_blueprint(layout: &PackedLayout) -> DequantizeBlueprint {
    DequantizeBlueprint {
        block_log2: layout.run_log2(),
        scales: ScaleKind::of(layout),
        code_bits: layout.config().quant_type.bits(),
        shared: false,
        skewed: false,
        ragged: false,
        per_unit: 1,
        group: 1,
    }
}

/// Where kernels find `len` elements from `start` on, and all that belongs to them.
pub(super) fn packed_view(layout: &PackedLayout, start: usize, len: usize) -> PackedViewLaunch {
    PackedViewLaunch::new(
        start,
        len,
        layout.scales_start(),
        layout.codebook_start(),
        layout.columns() >> layout.run_log2(),
        0,
    )
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
        // A tile is at least one block.
        let tile = (units * self.vectors_a_unit(client, units) / vectors_a_block).max(1);
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
