//! `unfused`: the baseline that any machine has, two launches with the scales in between.
//!
//! It does what a user of CubeCL would write first, and what bitsandbytes and Unsloth do in CUDA:
//! one launch decodes all scales to f32, a second one decodes the codes with them.

use burn_nf4::format::{FloatType, PackedLayout};
use burn_nf4::launch::elem_type;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::timing::grid;

/// Bytes of the buffer between the launches.
pub const fn scales_bytes(layout: &PackedLayout) -> usize {
    layout.blocks() * 4
}

/// Decodes a whole weight with double quantization. `scales` holds [`scales_bytes`], `out` the
/// decoded elements.
pub fn dequantize(
    client: &Client,
    packed: &Handle,
    layout: &PackedLayout,
    dtype: FloatType,
    scales: &Handle,
    out: &Handle,
) {
    let nested = layout.config().nested_block_size;
    let nested_log2 = nested.expect("double quantization").log2();
    let reinterprets = matches!(client.name(), "cuda" | "hip" | "cpu");
    let mut vector = client
        .io_optimized_vector_sizes(dtype.size_bytes())
        .filter(|&size| size <= 8 && size.is_power_of_two())
        .max()
        .unwrap_or(1);
    while !reinterprets && !layout.elems().is_multiple_of(vector) {
        vector /= 2;
    }
    let packed = || packed.clone();
    // CubeCL's CPU runtime hangs on barriers, and a cube is a thread there: it gets more to do.
    let is_cpu = client.properties().hardware.num_cpu_cores.is_some();
    let (a_cube, per_unit) = if is_cpu {
        (1, 64)
    } else {
        (client.properties().hardware.max_units_per_cube.min(256), 1)
    };

    let (cubes, units) = grid(layout.blocks().div_ceil(per_unit), a_cube);
    // SAFETY: the buffers hold the words and scales declared; the kernel guards its index.
    unsafe {
        decode_scales_kernel::launch_unchecked(
            client,
            cubes,
            units,
            BufferArg::from_raw_parts(packed(), layout.words()),
            BufferArg::from_raw_parts(scales.clone(), layout.blocks()),
            layout.scales_start(),
            layout.nested_map_start(),
            layout.blocks(),
            0,
            per_unit,
            nested_log2,
        );
    }
    let (cubes, units) = grid(layout.elems().div_ceil(vector * per_unit), a_cube);
    // SAFETY: the buffers hold the words, scales and elements declared; the kernel guards its
    // index and, where the last vector is not whole, each element of it.
    unsafe {
        decode_codes_kernel::launch_unchecked(
            client,
            cubes,
            units,
            vector,
            BufferArg::from_raw_parts(packed(), layout.words()),
            BufferArg::from_raw_parts(scales.clone(), layout.blocks()),
            BufferArg::from_raw_parts(out.clone(), layout.elems()),
            layout.codebook_start(),
            layout.elems(),
            per_unit,
            layout.config().block_size.log2(),
            !is_cpu,
            !layout.elems().is_multiple_of(vector),
            elem_type(dtype),
        );
    }
}

/// `per_unit` neighbouring scales a unit. The product must be rounded before the offset is added: it passes through an
/// XOR with a zero that no compiler knows, so that none contracts the two to an FMA.
#[cube(launch_unchecked)]
fn decode_scales_kernel(
    packed: &[u32],
    scales: &mut [f32],
    codes: usize,
    map: usize,
    blocks: usize,
    zero: u32,
    #[comptime] per_unit: usize,
    #[comptime] nested_log2: u32,
) {
    for i in 0..per_unit {
        let block = ABSOLUTE_POS * per_unit + i;
        if block < blocks {
            let code = (packed[codes + (block >> 2usize)] >> ((block as u32 & 3) * 8)) & 255;
            let nested = map + 260usize + (block >> comptime!(nested_log2 as usize));
            let offset = f32::reinterpret(packed[map + 256usize]);
            let level = f32::reinterpret(packed[map + code as usize]);
            let product = level * f32::reinterpret(packed[nested]);
            scales[block] = f32::reinterpret(u32::reinterpret(product) ^ zero) + offset;
        }
    }
}

/// `per_unit` neighbouring vectors a unit, each of it in one block; the codebook in shared memory where there is some.
#[cube(launch_unchecked)]
fn decode_codes_kernel<F: Float, N: Size>(
    packed: &[u32],
    scales: &[f32],
    out: &mut [Vector<F, N>],
    codebook: usize,
    len: usize,
    #[comptime] per_unit: usize,
    #[comptime] block_log2: u32,
    #[comptime] shared: bool,
    #[comptime] ragged: bool,
    #[define(F)] _dtype: ElemType,
) {
    let vector = N::value().comptime();
    let mut table = Shared::<[f32]>::new_slice(16usize);
    if comptime!(shared) {
        if UNIT_POS < 16 {
            table[UNIT_POS as usize] = f32::reinterpret(packed[codebook + UNIT_POS as usize]);
        }
        sync_cube();
    }
    for j in 0..per_unit {
        let at = ABSOLUTE_POS * per_unit + j;
        let element = at * vector;
        if element < len {
            let word = packed[element >> 3usize];
            let first = (element & 7) as u32;
            let scale = scales[element >> comptime!(block_log2 as usize)];
            let mut values = Vector::<f32, N>::empty();
            #[unroll]
            for i in 0..vector {
                let code = (word >> (((first + i as u32) * 4) ^ 4)) & 15;
                let level = if comptime!(shared) {
                    table[code as usize]
                } else {
                    f32::reinterpret(packed[codebook + code as usize])
                };
                values.insert(i, level * scale);
            }
            let decoded = Vector::<F, N>::cast_from(values);
            if comptime!(ragged) {
                if element + vector <= len {
                    out[at] = decoded;
                } else {
                    let scalars = out.with_vector_size_mut::<Const<1>>();
                    #[unroll]
                    for i in 0..vector {
                        if element + i < len {
                            scalars[element + i] = Vector::<F, Const<1>>::new(decoded.extract(i));
                        }
                    }
                }
            } else {
                out[at] = decoded;
            }
        }
    }
}
