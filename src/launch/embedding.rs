//! Launches of the embedding kernel.

use std::fmt;

use cubecl::features::TypeUsage;
use cubecl::ir::{ElemType, IntKind, UIntKind};
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::dequantize::{decode_blueprint, packed_view};
use super::{
    address_type, check_buffers, check_dtype, cube_count, elem_type, has_barriers, units_per_cube,
    vector_size,
};
use crate::error::Nf4Error;
use crate::format::{FloatType, PackedLayout};
use crate::kernel::decode::DequantizeBlueprint;
use crate::kernel::embedding::embedding_kernel;

/// Rows to gather from a packed weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EmbeddingProblem {
    /// Rows of the weight.
    pub rows: usize,
    /// Columns of the weight and of the result.
    pub columns: usize,
    /// Whether the weight is stored `[columns, rows]`.
    pub transposed: bool,
    /// Number of ids, the rows of the result.
    pub ids: usize,
    /// Type of the ids: an integer.
    pub ids_dtype: ElemType,
    /// Type to decode to.
    pub dtype: FloatType,
}

/// A launch of the embedding kernel, worked out but not yet made.
// The fields are private and never change: the bounds of the launch rest on them.
#[derive(Clone)]
pub struct EmbeddingPlan {
    client: Client,
    layout: PackedLayout,
    problem: EmbeddingProblem,
    /// The largest id that has a row, of those that the type of the ids can hold.
    last: usize,
    /// Elements of the result.
    len: usize,
    vector: usize,
    cube_dim: CubeDim,
    cube_count: CubeCount,
    blueprint: DequantizeBlueprint,
    address: AddressType,
}

impl fmt::Debug for EmbeddingPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddingPlan")
            .field("problem", &self.problem)
            .field("vector", &self.vector)
            .field("cube_dim", &self.cube_dim)
            .field("cube_count", &self.cube_count)
            .finish_non_exhaustive()
    }
}

impl EmbeddingPlan {
    /// Works out how to gather rows. Nothing is launched.
    ///
    /// # Errors
    /// [`Nf4Error::Length`] if the weight has not `rows * columns` elements,
    /// [`Nf4Error::ElementCount`] if the weight or the result has none, or that too many,
    /// [`Nf4Error::Dtype`] if the ids are no integers, [`Nf4Error::DeviceDtype`] if the device has no
    /// such types.
    pub fn new(
        client: &Client,
        layout: &PackedLayout,
        problem: EmbeddingProblem,
    ) -> Result<Self, Nf4Error> {
        let EmbeddingProblem {
            rows,
            columns,
            transposed,
            ids,
            ids_dtype,
            dtype,
        } = problem;
        let elems = rows.checked_mul(columns);
        if elems != Some(layout.elems()) {
            return Err(Nf4Error::Length {
                tensor: "packed weight".into(),
                expected: elems.unwrap_or(usize::MAX),
                given: layout.elems(),
            });
        }
        layout.check_columns(columns)?;
        let len = ids
            .checked_mul(columns)
            .filter(|&len| len > 0 && rows > 0 && len.checked_mul(dtype.size_bytes()).is_some());
        let Some(len) = len else {
            return Err(Nf4Error::ElementCount {
                tensor: "embedded".into(),
                shape: vec![ids, columns],
            });
        };
        let largest_id = largest(ids_dtype)?;
        check_dtype(client, dtype)?;
        let usage = client.properties().type_usage(ids_dtype);
        if !usage.contains(TypeUsage::Buffer) {
            return Err(Nf4Error::DeviceDtype {
                device: client.name().into(),
                dtype: format!("{ids_dtype:?}"),
            });
        }
        let decode = decode_blueprint(layout);
        let widest = decode.codes_a_word().min(1 << layout.run_log2());
        let vector = match transposed {
            true => 1,
            false => vector_size(client, dtype, widest, &[columns]),
        };
        let shared = has_barriers(client);
        // One vector a unit: rows are few. CubeCL's CPU runtime has one unit a cube, and a cube costs
        // it more than a vector.
        let per_unit = if shared { 1 } else { 64 };
        let units = units_per_cube(client);
        let cubes = (len / vector).div_ceil(units as usize * per_unit);
        Ok(Self {
            client: client.clone(),
            layout: *layout,
            problem,
            last: usize::try_from(largest_id).map_or(rows - 1, |id| id.min(rows - 1)),
            len,
            vector,
            cube_dim: CubeDim::new_1d(units),
            cube_count: cube_count(client, cubes),
            blueprint: DequantizeBlueprint {
                shared,
                per_unit,
                ..decode
            },
            address: address_type(layout.elems().max(len)),
        })
    }

    /// Elements a store.
    pub fn vector(&self) -> usize {
        self.vector
    }

    /// Bytes of the result.
    pub fn out_bytes(&self) -> usize {
        self.len * self.problem.dtype.size_bytes()
    }

    /// Makes the launch. An id that no row has gives a row of NaN.
    ///
    /// # Shapes
    /// - `packed`: [`PackedLayout::words`] u32 words
    /// - `ids`: one a row of the result, contiguous
    /// - `out`: `[ids, columns]`, contiguous
    ///
    /// # Errors
    /// [`Nf4Error::Length`] if a buffer is too small, [`Nf4Error::Alignment`] if it does not begin
    /// at a multiple of 16 bytes.
    pub fn launch(&self, packed: Handle, ids: Handle, out: Handle) -> Result<(), Nf4Error> {
        let (layout, len, problem) = (&self.layout, self.len, &self.problem);
        check_buffers([
            ("packed weight", &packed, [layout.words(), 1], 4),
            ("ids", &ids, [problem.ids, 1], problem.ids_dtype.size()),
            ("embedded", &out, [len, 1], problem.dtype.size_bytes()),
        ])?;
        let view = packed_view(layout, 0, len);
        // SAFETY: the buffers hold at least the words and elements that are declared here, and begin
        // where vectors may (checked above). The kernel guards every read of an id and every store by
        // `len`, which is `ids * columns`, and takes no id for a row that is not in `0..=last`; `new`
        // has checked that the weight has `rows * columns` elements and that `last < rows`.
        unsafe {
            embedding_kernel::launch_unchecked(
                &self.client,
                self.cube_count.clone(),
                self.cube_dim,
                self.address,
                self.vector,
                BufferArg::from_raw_parts(packed, layout.words()),
                BufferArg::from_raw_parts(ids, problem.ids),
                BufferArg::from_raw_parts(out, len),
                view,
                problem.rows,
                problem.columns,
                self.last,
                problem.transposed,
                self.blueprint,
                elem_type(problem.dtype),
                problem.ids_dtype,
            );
        }
        Ok(())
    }
}

/// The largest number of an integer type.
pub(super) fn largest(dtype: ElemType) -> Result<u64, Nf4Error> {
    match dtype {
        ElemType::Int(IntKind::I8) => Ok(i8::MAX as u64),
        ElemType::Int(IntKind::I16) => Ok(i16::MAX as u64),
        ElemType::Int(IntKind::I32) => Ok(i32::MAX as u64),
        ElemType::Int(IntKind::I64) => Ok(i64::MAX as u64),
        ElemType::UInt(UIntKind::U8) => Ok(u8::MAX.into()),
        ElemType::UInt(UIntKind::U16) => Ok(u16::MAX.into()),
        ElemType::UInt(UIntKind::U32) => Ok(u32::MAX.into()),
        ElemType::UInt(UIntKind::U64) => Ok(u64::MAX),
        _ => Err(Nf4Error::Dtype {
            tensor: "ids".into(),
            expected: "an integer".into(),
            given: format!("{dtype:?}"),
        }),
    }
}
