//! Launches of the kernel that rotates queries and keys.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{
    address_type, check_buffers, check_dtype, cube_count, elem_type, units_per_cube, vector_size,
};
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::kernel::rotary::{
    RotaryAppendViewLaunch, RotaryViewLaunch, rotary_append_kernel, rotary_kernel,
};

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
    check_tables(rotary_dim, head_dim, table_rows, batch)?;
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
    check_buffers([
        ("x", &x, all, dtype.size_bytes()),
        ("cos", &cos, of_table, table_dtype.size_bytes()),
        ("sin", &sin, of_table, table_dtype.size_bytes()),
        ("rotated", &out, all, dtype.size_bytes()),
    ])?;
    let (half, rest) = (rotary_dim / 2, head_dim - rotary_dim);
    let vector = vector_size(client, wider(dtype, table_dtype), 8, &[half, rest]);
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

fn check_tables(
    rotary_dim: usize,
    head_dim: usize,
    table_rows: usize,
    rows: usize,
) -> Result<(), Nf4Error> {
    let is_even = rotary_dim > 0 && rotary_dim.is_multiple_of(2);
    if is_even && rotary_dim <= head_dim && [1, rows].contains(&table_rows) {
        return Ok(());
    }
    Err(Nf4Error::Config {
        field: "rotary_dim",
        expected: "an even part of a head, and tables of one row or of each",
        given: format!("{rotary_dim} of {head_dim}, {table_rows} rows for {rows}"),
    })
}

/// The type of which fewer elements are in a vector.
fn wider(dtype: FloatType, table_dtype: FloatType) -> FloatType {
    match dtype.size_bytes() < table_dtype.size_bytes() {
        true => table_dtype,
        false => dtype,
    }
}

/// Queries, keys and values of one token a row, and the cache that they go into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RotaryAppendProblem {
    /// Rows of the batch.
    pub rows: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements of a head that are rotated, the first ones: an even number.
    pub rotary_dim: usize,
    /// Rows of the tables: one, or as many as the batch has.
    pub table_rows: usize,
    /// Positions given: one, or as many as the batch has.
    pub positions: usize,
    /// Their type.
    pub positions_dtype: ElemType,
    /// Positions that the cache has room for.
    pub capacity: usize,
    /// Type of queries, keys and values.
    pub dtype: FloatType,
    /// Type of the tables.
    pub table_dtype: FloatType,
}

impl RotaryAppendProblem {
    /// Bytes of the queries.
    pub fn query_bytes(&self) -> usize {
        self.rows * self.heads * self.head_dim * self.dtype.size_bytes()
    }
}

/// The buffers of a [`RotaryAppendProblem`], contiguous.
#[derive(Debug, Clone)]
pub struct RotaryAppendBuffers {
    /// `[rows, heads, head_dim]`.
    pub q: Handle,
    /// `[rows, kv_heads, head_dim]`.
    pub k: Handle,
    /// As `k`.
    pub v: Handle,
    /// Cosines and sines, `[table_rows, rotary_dim]` each; the sines of the first half negative.
    pub tables: [Handle; 2],
    /// `[positions]`; a token whose position is past the cache's end is not written.
    pub positions: Handle,
    /// The rotated queries, as `q`.
    pub out: Handle,
    /// `[rows, kv_heads, capacity, head_dim]`, written at the positions.
    pub keys: Handle,
    /// As `keys`.
    pub values: Handle,
}

/// Rotates queries and keys of one token a row, and writes keys and values into their caches.
///
/// # Errors
/// Those of [`rotary`], and [`Nf4Error::Config`] unless there is one position or one for each row.
pub fn rotary_append(
    client: &Client,
    problem: RotaryAppendProblem,
    buffers: RotaryAppendBuffers,
) -> Result<(), Nf4Error> {
    let RotaryAppendProblem {
        rows,
        heads,
        kv_heads,
        head_dim,
        rotary_dim,
        table_rows,
        positions,
        positions_dtype,
        capacity,
        dtype,
        table_dtype,
    } = problem;
    check_tables(rotary_dim, head_dim, table_rows, rows)?;
    if ![1, rows].contains(&positions) {
        return Err(Nf4Error::Config {
            field: "positions",
            expected: "one for all rows, or one for each",
            given: format!("{positions} for {rows} rows"),
        });
    }
    if [rows, heads, kv_heads, capacity].contains(&0) {
        return Err(Nf4Error::ElementCount {
            tensor: "keys".into(),
            shape: vec![rows, kv_heads, capacity, head_dim],
        });
    }
    for sizes in [
        [rows, heads, head_dim, 1],
        [rows, kv_heads, capacity, head_dim],
    ] {
        let elems = sizes
            .iter()
            .try_fold(1usize, |elems, &size| elems.checked_mul(size));
        if elems.is_none_or(|elems| elems > isize::MAX as usize / 8) {
            return Err(Nf4Error::ElementCount {
                tensor: "keys".into(),
                shape: sizes.to_vec(),
            });
        }
    }
    check_dtype(client, dtype)?;
    check_dtype(client, table_dtype)?;
    let queries = [rows * heads, head_dim];
    let tokens = [rows * kv_heads, head_dim];
    let caches = [rows * kv_heads * capacity, head_dim];
    let tables = [table_rows, rotary_dim];
    let (size, table_size) = (dtype.size_bytes(), table_dtype.size_bytes());
    let [cos, sin] = &buffers.tables;
    check_buffers([
        ("q", &buffers.q, queries, size),
        ("k", &buffers.k, tokens, size),
        ("v", &buffers.v, tokens, size),
        ("cos", cos, tables, table_size),
        ("sin", sin, tables, table_size),
        (
            "positions",
            &buffers.positions,
            [positions, 1],
            positions_dtype.size(),
        ),
        ("rotated", &buffers.out, queries, size),
        ("keys", &buffers.keys, caches, size),
        ("values", &buffers.values, caches, size),
    ])?;
    let (half, rest) = (rotary_dim / 2, head_dim - rotary_dim);
    let vector = vector_size(client, wider(dtype, table_dtype), 8, &[half, rest]);
    let view = RotaryAppendViewLaunch::new(
        rows,
        heads,
        kv_heads,
        half / vector,
        rest / vector,
        table_rows,
        positions,
        capacity,
    );
    let units = units_per_cube(client);
    let needed = rows * (heads + 2 * kv_heads) * ((half + rest) / vector);
    let elems = |[rows, columns]: [usize; 2]| rows * columns;
    // SAFETY: the buffers hold at least the elements that are declared here, and begin where vectors may
    // (checked above). A unit without a row does nothing, and a position past the cache's end is not written
    // to; `half` and `rest` are multiples of the vector, so that each unit stays within its head.
    unsafe {
        let arg = |handle, dims| BufferArg::from_raw_parts(handle, elems(dims));
        rotary_append_kernel::launch_unchecked(
            client,
            cube_count(client, needed.div_ceil(units as usize)),
            CubeDim::new_1d(units),
            address_type(elems(caches).max(elems(queries))),
            vector,
            arg(buffers.q, queries),
            arg(buffers.k, tokens),
            arg(buffers.v, tokens),
            arg(buffers.tables[0].clone(), tables),
            arg(buffers.tables[1].clone(), tables),
            arg(buffers.positions, [positions, 1]),
            arg(buffers.out, queries),
            arg(buffers.keys, caches),
            arg(buffers.values, caches),
            view,
            elem_type(dtype),
            elem_type(table_dtype),
            positions_dtype,
        );
    }
    Ok(())
}
