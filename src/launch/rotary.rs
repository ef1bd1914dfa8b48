//! Launches of the kernel that rotates queries and keys.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{
    Buffer, address_type, check_dtype, cube_count, elem_type, units_per_cube, vector_size,
};
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::kernel::rotary::{RotaryViewLaunch, rotary_kernel};

/// What to rotate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RotaryProblem {
    /// Rows of the batch.
    pub batch: usize,
    /// Tokens of a row.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements of a head that are rotated, the first ones: an even number.
    pub rotary_dim: usize,
    /// Rows of the tables: one, or as many as the batch has.
    pub table_rows: usize,
    /// Whether the rotation is undone.
    pub inverse: bool,
    /// Type of what is rotated.
    pub dtype: FloatType,
    /// Type of the tables.
    pub table_dtype: FloatType,
}

impl RotaryProblem {
    /// Elements of what is rotated.
    fn elems(&self) -> usize {
        self.batch * self.tokens * self.heads * self.head_dim
    }

    /// Bytes of the result.
    pub fn out_bytes(&self) -> usize {
        self.elems() * self.dtype.size_bytes()
    }
}

/// Rotates the heads of tokens.
///
/// # Shapes
/// - `x`, `out`: `[batch, tokens, heads, head_dim]`, contiguous
/// - `cos`, `sin`: `[table_rows, tokens, rotary_dim]`, contiguous; the sines of the first half negative
///
/// # Errors
/// [`Nf4Error::Config`] for a part that is rotated and odd or longer than a head, [`Nf4Error::DeviceDtype`]
/// if the device has no such types, [`Nf4Error::Length`] if a buffer is too small, [`Nf4Error::Alignment`]
/// if it does not begin at a multiple of 16 bytes, [`Nf4Error::ElementCount`] for no elements.
pub fn rotary(
    client: &Client,
    problem: RotaryProblem,
    x: Handle,
    [cos, sin]: [Handle; 2],
    out: Handle,
) -> Result<(), Nf4Error> {
    let RotaryProblem {
        batch,
        tokens,
        heads,
        head_dim,
        rotary_dim,
        table_rows,
        inverse,
        dtype,
        table_dtype,
    } = problem;
    let is_even = rotary_dim > 0 && rotary_dim.is_multiple_of(2);
    if !is_even || rotary_dim > head_dim || ![1, batch].contains(&table_rows) {
        return Err(Nf4Error::Config {
            field: "rotary_dim",
            expected: "an even part of a head, and tables of one row or of each",
            given: format!("{rotary_dim} of {head_dim}, {table_rows} rows for {batch}"),
        });
    }
    if problem.elems() == 0 {
        return Err(Nf4Error::ElementCount {
            tensor: "x".into(),
            shape: vec![batch, tokens, heads, head_dim],
        });
    }
    check_dtype(client, dtype)?;
    check_dtype(client, table_dtype)?;
    let table_elems = table_rows * tokens * rotary_dim;
    let all = [problem.elems(), 1];
    let of_table = [table_elems, 1];
    for (name, handle, dims, elem_bytes) in [
        ("x", &x, all, dtype.size_bytes()),
        ("cos", &cos, of_table, table_dtype.size_bytes()),
        ("sin", &sin, of_table, table_dtype.size_bytes()),
        ("rotated", &out, all, dtype.size_bytes()),
    ] {
        Buffer {
            name,
            handle,
            dims,
            elem_bytes,
        }
        .check()?;
    }
    let (half, rest) = (rotary_dim / 2, head_dim - rotary_dim);
    let wider = match dtype.size_bytes() < table_dtype.size_bytes() {
        true => table_dtype,
        false => dtype,
    };
    let vector = vector_size(client, wider, 8, &[half, rest]);
    let view = RotaryViewLaunch::new(
        batch * tokens,
        table_rows * tokens,
        heads,
        half / vector,
        rest / vector,
    );
    let units = units_per_cube(client);
    let needed = batch * tokens * heads * ((half + rest) / vector);
    // SAFETY: the buffers hold at least the elements that are declared here, and begin where vectors may
    // (checked above). A unit without a token does nothing; `half` and `rest` are multiples of the vector, so
    // that each other stays within the head of a token, and within the tables by its remainder.
    unsafe {
        rotary_kernel::launch_unchecked(
            client,
            cube_count(client, needed.div_ceil(units as usize)),
            CubeDim::new_1d(units),
            address_type(problem.elems().max(table_elems)),
            vector,
            BufferArg::from_raw_parts(x, problem.elems()),
            BufferArg::from_raw_parts(cos, table_elems),
            BufferArg::from_raw_parts(sin, table_elems),
            BufferArg::from_raw_parts(out, problem.elems()),
            view,
            inverse,
            elem_type(dtype),
            elem_type(table_dtype),
        );
    }
    Ok(())
}
