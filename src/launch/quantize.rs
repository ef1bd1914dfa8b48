//! Launches of the quantization kernels.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{
    Buffer, address_type, check_dtype, cube_count, elem_type, has_barriers, units_per_cube,
    vector_size,
};
use crate::error::Nf4Error;
use crate::format::{FloatType, PackedLayout, RECIPROCAL_STEPS, SumF32x2, check_len, nf4_cells};
use crate::kernel::quantize::{
    QuantizeBlueprint, QuantizeViewLaunch, mean_absmax_kernel, quantize_absmax_kernel,
    quantize_blocks_kernel, sum_absmax_kernel,
};
use crate::kernel::quantize_tiles::quantize_tiles_kernel;

/// Words that a unit keeps in registers, eight weights each.
const WORDS_A_UNIT: usize = 4;

/// Quantizes a weight on the device.
///
/// The weights must be finite: this is not checked, as that would wait for the device. With a NaN or
/// an infinity in it, a block decodes to unspecified values, and where scales are quantized too, so
/// does the whole weight.
///
/// # Shapes
/// - `weight`: `layout.elems()` elements of `dtype`, contiguous, row-major
/// - `shape`: the weight's shape, for the packed weight's header
/// - returns `layout.words()` u32 words
///
/// # Errors
/// [`Nf4Error::QuantType`] for a format that bitsandbytes does not have: those are quantized on the host,
/// [`Nf4Error::DeviceDtype`] if the device has no such type, [`Nf4Error::Length`] if `shape` has
/// another product or, in bytes, the buffer is too small, [`Nf4Error::ElementCount`] for a weight
/// without elements, [`Nf4Error::Alignment`] if the buffer does not begin at a multiple of 16 bytes.
pub fn quantize(
    client: &Client,
    weight: Handle,
    dtype: FloatType,
    shape: &[usize],
    layout: &PackedLayout,
) -> Result<Handle, Nf4Error> {
    let config = layout.config();
    if !config.quant_type.is_bitsandbytes() {
        return Err(Nf4Error::QuantType {
            tensor: "weight".into(),
            given: config.quant_type.name().into(),
        });
    }
    check_dtype(client, dtype)?;
    let elems = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
    check_len("weight", layout.elems(), elems.unwrap_or(usize::MAX))?;
    if layout.elems() == 0 {
        return Err(Nf4Error::ElementCount {
            tensor: "weight".into(),
            shape: shape.to_vec(),
        });
    }
    Buffer {
        name: "weight",
        handle: &weight,
        dims: [layout.elems(), 1],
        elem_bytes: dtype.size_bytes(),
    }
    .check()?;

    let mut tables = layout.tables();
    if config.nested_block_size.is_some() {
        tables.extend([0; PackedLayout::NESTED_OFFSET_WORDS]);
    }
    tables.extend(layout.header(shape, dtype));
    let table_words = tables.len();
    let (thresholds, codes) = nf4_cells();
    tables.extend(thresholds.map(f32::to_bits));
    tables.extend(codes);
    tables.extend(RECIPROCAL_STEPS);
    let all_table_words = tables.len();
    let tables = client.create_from_slice(bytemuck::cast_slice(&tables));
    let packed = client.empty(layout.words() * 4);
    let absmax_len = match config.nested_block_size {
        None => 1,
        Some(_) => layout.blocks(),
    };
    let absmax = client.empty(absmax_len * 4);

    let address = address_type(layout.elems());
    let barriers = has_barriers(client);
    let units = units_per_cube(client);
    let vector = vector_size(client, dtype, 8, &[layout.elems()]);
    let view = QuantizeViewLaunch::new(
        layout.elems(),
        layout.blocks(),
        table_words,
        config
            .nested_block_size
            .map_or(0, |size| size.blocks(layout.blocks())),
        layout.scales_start(),
        layout.codebook_start(),
        layout.header_start(),
    );
    let blueprint = QuantizeBlueprint {
        quant_type: config.quant_type,
        block_elems: config.block_size.elems(),
        flat: config.nested_block_size.is_none(),
    };
    // SAFETY: `weight` holds `layout.elems()` elements (checked above), the other buffers are
    // allocated here with the lengths declared, and the kernels guard every access by them.
    unsafe {
        let weight = BufferArg::from_raw_parts(weight, layout.elems());
        let tables = BufferArg::from_raw_parts(tables.clone(), all_table_words);
        let packed = BufferArg::from_raw_parts(packed.clone(), layout.words());
        let absmax = BufferArg::from_raw_parts(absmax.clone(), absmax_len);
        if barriers {
            let words_a_block = blueprint.block_elems / 8;
            // All of these are powers of two.
            let group = (units as usize * WORDS_A_UNIT / words_a_block).max(1);
            let per_unit = group * words_a_block / units as usize;
            quantize_tiles_kernel::launch_unchecked(
                client,
                cube_count(client, layout.blocks().div_ceil(group)),
                CubeDim::new_1d(units),
                address,
                vector,
                weight,
                tables,
                packed,
                absmax,
                view,
                blueprint,
                per_unit,
                group,
                elem_type(dtype),
            );
        } else {
            quantize_blocks_kernel::launch_unchecked(
                client,
                cube_count(client, layout.blocks().max(4).div_ceil(units as usize)),
                CubeDim::new_1d(units),
                address,
                vector,
                weight,
                tables,
                packed,
                absmax,
                view,
                blueprint,
                elem_type(dtype),
            );
        }
    }

    if let Some(nested_block_size) = config.nested_block_size {
        let chunks = layout.blocks().div_ceil(SumF32x2::CHUNK);
        let high = client.empty(chunks * 4);
        let low = client.empty(chunks * 4);
        // SAFETY: buffers are allocated above with the lengths declared; cubes past the last
        // chunk or nested block do nothing.
        unsafe {
            let absmax = || BufferArg::from_raw_parts(absmax.clone(), absmax_len);
            let sums = || {
                (
                    BufferArg::from_raw_parts(high.clone(), chunks),
                    BufferArg::from_raw_parts(low.clone(), chunks),
                )
            };
            let packed = || BufferArg::from_raw_parts(packed.clone(), layout.words());
            let dim = CubeDim::new_1d(units);
            let (high, low) = sums();
            sum_absmax_kernel::launch_unchecked(
                client,
                cube_count(client, chunks),
                dim,
                address,
                absmax(),
                high,
                low,
                layout.blocks(),
                0,
                barriers,
            );
            let (high, low) = sums();
            mean_absmax_kernel::launch_unchecked(
                client,
                CubeCount::Static(1, 1, 1),
                dim,
                address,
                absmax(),
                high,
                low,
                packed(),
                layout.blocks(),
                chunks,
                layout.nested_offset_start(),
                SumF32x2::inverse_count(layout.blocks()),
                0,
                barriers,
            );
            quantize_absmax_kernel::launch_unchecked(
                client,
                cube_count(client, nested_block_size.blocks(layout.blocks())),
                dim,
                address,
                absmax(),
                BufferArg::from_raw_parts(tables, all_table_words),
                packed(),
                layout.blocks(),
                layout.scales_start(),
                layout.codebook_start(),
                nested_block_size.elems(),
                barriers,
            );
        }
    }
    Ok(packed)
}
