//! Launches of the kernels of the optimizer.

use std::collections::HashSet;

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{
    Buffer, address_type, check_dtype, cube_count, elem_type, has_barriers, units_per_cube,
    vector_size,
};
use crate::error::Nf4Error;
use crate::flat::{AdamWForm, AdamWScalars, FlatLayout, MAX_PARTS, TILE_ELEMS};
use crate::format::FloatType;
use crate::kernel::adamw::{
    FlatPart, FlatPartLaunch, StepScalarsLaunch, adamw_8bit_kernel, adamw_kernel,
    flat_accumulate_kernel, square_sums_kernel, step_report_kernel,
};

/// Elements that a unit adds up.
const PER_UNIT: usize = 8;

/// Cubes that share the sum of squares; so many sums are left for the last cube.
const SUM_CUBES: usize = 1024;

/// A tensor that is added to its part of a flat buffer.
#[derive(Debug, Clone)]
pub struct AccumulatePart {
    /// Its number in the layout.
    pub tensor: usize,
    /// As many elements as the layout says, contiguous.
    pub values: Handle,
}

/// Adds tensors to their parts of a flat f32 buffer, [`MAX_PARTS`] a launch or as many as the device binds.
///
/// # Errors
/// [`Nf4Error::DeviceDtype`] if the device has no such type, [`Nf4Error::Length`] if a buffer is too small or
/// there is no such tensor in the layout, [`Nf4Error::Alignment`] if it does not begin at a multiple of 16 bytes,
/// [`Nf4Error::Config`] for a tensor that comes twice.
pub fn flat_accumulate(
    client: &Client,
    layout: &FlatLayout,
    flat: &Handle,
    parts: &[AccumulatePart],
    dtype: FloatType,
) -> Result<(), Nf4Error> {
    check_dtype(client, dtype)?;
    check_flat("flat", flat, layout.elems())?;
    let mut tensors = HashSet::new();
    for part in parts {
        if !tensors.insert(part.tensor) {
            return Err(Nf4Error::Config {
                field: "parts",
                expected: "each tensor once",
                given: format!("tensor {} twice", part.tensor),
            });
        }
        if part.tensor >= layout.tensors() {
            return Err(Nf4Error::Length {
                tensor: "layout".into(),
                expected: part.tensor + 1,
                given: layout.tensors(),
            });
        }
        Buffer {
            name: "gradient",
            handle: &part.values,
            dims: [layout.range(part.tensor).len(), 1],
            elem_bytes: dtype.size_bytes(),
        }
        .check()?;
    }
    let units = units_per_cube(client) as usize;
    let of_cube = units * PER_UNIT;
    // One for the buffer itself, one for the sizes.
    let bindings = client.properties().hardware.max_bindings as usize;
    let most = MAX_PARTS.min(bindings.saturating_sub(2)).max(1);
    for parts in parts.chunks(most) {
        let mut cubes = 0;
        let mut args = SequenceArg::<FlatPart<_>>::new();
        for part in parts {
            let range = layout.range(part.tensor);
            let len = range.len();
            // SAFETY: it holds so many elements (checked above).
            let values = unsafe { BufferArg::from_raw_parts(part.values.clone(), len) };
            args.push(FlatPartLaunch::new(values, range.start, len, cubes));
            cubes += len.div_ceil(of_cube);
        }
        // SAFETY: the flat buffer holds the whole layout (checked above), and each part lies within it, no two in one
        // place. A cube
        // past the last part and a unit past the end of a part do nothing.
        unsafe {
            flat_accumulate_kernel::launch_unchecked(
                client,
                cube_count(client, cubes),
                CubeDim::new_1d(units as u32),
                address_type(layout.elems() + of_cube),
                BufferArg::from_raw_parts(flat.clone(), layout.elems()),
                args,
                PER_UNIT,
                elem_type(dtype),
            );
        }
    }
    Ok(())
}

/// Writes the loss and the norm of a flat f32 buffer side by side, in two launches.
///
/// # Shapes
/// - `flat`: `[elems]`, a multiple of 256; `loss`: `[1]`; `report`: `[2]`
///
/// # Errors
/// [`Nf4Error::Length`] if a buffer is too small, [`Nf4Error::Alignment`] if it does not begin at a multiple of 16
/// bytes, [`Nf4Error::ElementCount`] for no elements.
pub fn step_report(
    client: &Client,
    elems: usize,
    flat: Handle,
    loss: Handle,
    report: Handle,
) -> Result<(), Nf4Error> {
    if elems == 0 {
        return Err(Nf4Error::ElementCount {
            tensor: "flat".into(),
            shape: vec![elems],
        });
    }
    check_flat("flat", &flat, elems)?;
    check_flat("loss", &loss, 1)?;
    check_flat("report", &report, 2)?;
    let vector = vector_size(client, FloatType::F32, 4, &[elems]);
    let vectors = elems / vector;
    let units = units_per_cube(client) as usize;
    let barriers = has_barriers(client);
    let cubes = vectors.div_ceil(units).min(SUM_CUBES);
    let sums = client.empty(cubes * 4);
    let cube_dim = CubeDim::new_1d(units as u32);
    // SAFETY: the buffers hold what is declared here (checked above). A cube past the last does nothing, and
    // units walk within the buffers.
    unsafe {
        square_sums_kernel::launch_unchecked(
            client,
            cube_count(client, cubes),
            cube_dim,
            address_type(elems + cubes * units * vector),
            vector,
            BufferArg::from_raw_parts(flat, elems),
            BufferArg::from_raw_parts(sums.clone(), cubes),
            vectors,
            cubes,
            units,
            barriers,
        );
        step_report_kernel::launch_unchecked(
            client,
            CubeCount::new_single(),
            cube_dim,
            BufferArg::from_raw_parts(sums, cubes),
            BufferArg::from_raw_parts(loss, 1),
            BufferArg::from_raw_parts(report, 2),
            cubes,
            units,
            barriers,
        );
    }
    Ok(())
}

/// What every step of AdamW reads and writes, f32 but for the tiles.
#[derive(Debug, Clone)]
pub(crate) struct AdamWBuffers {
    /// `[elems]`: the parameters.
    pub values: Handle,
    /// `[elems]`: the gradients.
    pub grads: Handle,
    /// `[2]`: the loss and the norm.
    pub report: Handle,
    /// `[count, 3]`, u32: see `FlatLayout::tiles_of`.
    pub tiles: Handle,
    /// `[tensors, 2]`: see the kernel.
    pub factors: Handle,
}

impl AdamWBuffers {
    fn check(&self, layout: &FlatLayout, count: usize) -> Result<(), Nf4Error> {
        for (name, handle, elems) in [
            ("values", &self.values, layout.elems()),
            ("gradients", &self.grads, layout.elems()),
            ("report", &self.report, 2),
            ("tiles", &self.tiles, 3 * count),
            ("factors", &self.factors, 2 * layout.tensors()),
        ] {
            check_flat(name, handle, elems)?;
        }
        Ok(())
    }
}

/// The moments of so many tiles.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant, reason = "they live for a call")]
pub(crate) enum MomentBuffers {
    /// f32, `[count * 256]`.
    F32 { first: Handle, second: Handle },
    /// Codes, u32, `[count * 64]`; what they are multiplied by, f32, `[count]`; the values of both kinds of codes,
    /// f32, `[512]`.
    Bits8 {
        codes: [Handle; 2],
        maxima: [Handle; 2],
        maps: Handle,
    },
}

/// A step of AdamW in place over `count` tiles, in one launch.
///
/// # Errors
/// [`Nf4Error::Length`] if a buffer is too small, [`Nf4Error::Alignment`] if it does not begin at a multiple of 16
/// bytes.
pub(crate) fn adamw(
    client: &Client,
    layout: &FlatLayout,
    count: usize,
    (scalars, form): (AdamWScalars, AdamWForm),
    buffers: AdamWBuffers,
    moments: MomentBuffers,
) -> Result<(), Nf4Error> {
    buffers.check(layout, count)?;
    let AdamWBuffers {
        values,
        grads,
        report,
        tiles,
        factors,
    } = buffers;
    let elems = layout.elems();
    let scalars = StepScalarsLaunch::new(
        scalars.decay,
        scalars.keep_first,
        scalars.first,
        scalars.keep_second,
        scalars.second,
        scalars.eps,
        scalars.max_norm,
    );
    let units = units_per_cube(client);
    match moments {
        MomentBuffers::F32 { first, second } => {
            let of_moments = count * TILE_ELEMS;
            check_flat("first moments", &first, of_moments)?;
            check_flat("second moments", &second, of_moments)?;
            let vector = vector_size(client, FloatType::F32, 4, &[TILE_ELEMS]);
            let vectors = of_moments / vector;
            // SAFETY: the buffers hold what is declared here (checked above). A unit past the last vector does
            // nothing; tiles and their tensors are those of the layout, as its maker made them.
            unsafe {
                adamw_kernel::launch_unchecked(
                    client,
                    cube_count(client, vectors.div_ceil(units as usize)),
                    CubeDim::new_1d(units),
                    address_type(elems),
                    vector,
                    BufferArg::from_raw_parts(values, elems),
                    BufferArg::from_raw_parts(first, of_moments),
                    BufferArg::from_raw_parts(second, of_moments),
                    BufferArg::from_raw_parts(grads, elems),
                    BufferArg::from_raw_parts(report, 2),
                    BufferArg::from_raw_parts(tiles, 3 * count),
                    BufferArg::from_raw_parts(factors, 2 * layout.tensors()),
                    vectors,
                    scalars,
                    form,
                );
            }
        }
        MomentBuffers::Bits8 {
            codes: [first, second],
            maxima: [first_max, second_max],
            maps,
        } => {
            let words = count * TILE_ELEMS / 4;
            for (name, handle, elems) in [
                ("first moments", &first, words),
                ("second moments", &second, words),
                ("maxima of first moments", &first_max, count),
                ("maxima of second moments", &second_max, count),
                ("maps", &maps, 512),
            ] {
                check_flat(name, handle, elems)?;
            }
            let units = (units as usize).min(TILE_ELEMS / 4);
            // SAFETY: as above, with a cube a tile; codes have eight bits, and maps 256 values each.
            unsafe {
                adamw_8bit_kernel::launch_unchecked(
                    client,
                    cube_count(client, count),
                    CubeDim::new_1d(units as u32),
                    address_type(elems),
                    BufferArg::from_raw_parts(values, elems),
                    BufferArg::from_raw_parts(first, words),
                    BufferArg::from_raw_parts(second, words),
                    BufferArg::from_raw_parts(first_max, count),
                    BufferArg::from_raw_parts(second_max, count),
                    BufferArg::from_raw_parts(grads, elems),
                    BufferArg::from_raw_parts(report, 2),
                    BufferArg::from_raw_parts(tiles, 3 * count),
                    BufferArg::from_raw_parts(factors, 2 * layout.tensors()),
                    BufferArg::from_raw_parts(maps, 512),
                    count,
                    scalars,
                    units,
                    has_barriers(client),
                );
            }
        }
    }
    Ok(())
}

/// Checks a buffer of numbers of four bytes.
fn check_flat(name: &'static str, handle: &Handle, elems: usize) -> Result<(), Nf4Error> {
    Buffer {
        name,
        handle,
        dims: [elems, 1],
        elem_bytes: 4,
    }
    .check()
}
