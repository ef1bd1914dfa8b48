//! [`rotary_append`](super::rotary_append) as Burn's dispatch sees it, on CubeCL runtimes.

use burn::backend::cubecl::dtype_to_elem_type;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{Int, Shape, Tensor};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use super::{CachedKeys, TokenHeads};
use crate::format::FloatType;
use crate::launch::{self, RotaryAppendBuffers, RotaryAppendProblem};
use crate::op::backends::cube::owned;

#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;

/// The sizes of [`rotary_append`](super::rotary_append).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RotaryAppendSpec {
    /// Rows of the batch.
    pub batch: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements of a head that are rotated, the first ones.
    pub rotary_dim: usize,
    /// Rows of the tables: one, or as many as the batch has.
    pub table_rows: usize,
    /// Positions given: one, or as many as the batch has.
    pub positions: usize,
    /// Positions that the cache has room for.
    pub capacity: usize,
    /// Type of queries, keys and values.
    pub dtype: FloatType,
    /// Type of the tables.
    pub table_dtype: FloatType,
}

impl RotaryAppendSpec {
    fn query_shape(&self) -> Shape {
        Shape::from([self.batch, 1, self.heads, self.head_dim])
    }

    #[cfg(feature = "fusion")]
    fn cache_shape(&self) -> Shape {
        Shape::from([self.batch, self.kv_heads, self.capacity, self.head_dim])
    }
}

/// Rotations into a cache of a backend.
#[backend_extension(Cube, Fusion: cfg(feature = "fusion"))]
pub trait RotaryAppendBackend: Backend {
    /// Queries that are rotated, and the cache with the token written into it.
    ///
    /// # Shapes
    /// - `q`: `[batch, 1, heads, head_dim]`; `k`, `v`: `[batch, 1, kv_heads, head_dim]`
    /// - `cos`, `sin`: `[table_rows, 1, rotary_dim]`; `positions`: `[spec.positions]`
    /// - `keys`, `values`: `[batch, kv_heads, capacity, head_dim]`
    #[fusion(meta = |q: &TensorSpec, _k: &TensorSpec, _v: &TensorSpec, _cos: &TensorSpec, _sin: &TensorSpec, _positions: &TensorSpec, _keys: &TensorSpec, _values: &TensorSpec, spec: &RotaryAppendSpec| {
        let cache = TensorSpec::new(spec.cache_shape(), q.dtype);
        (TensorSpec::new(spec.query_shape(), q.dtype), cache.clone(), cache)
    })]
    #[allow(clippy::too_many_arguments)]
    fn rotary_append(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        positions: IntTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        spec: RotaryAppendSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

impl RotaryAppendBackend for CubeBackend {
    fn rotary_append(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        positions: IntTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        spec: RotaryAppendSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let [q, k, v, cos, sin] = [q, k, v, cos, sin].map(into_contiguous);
        let positions = into_contiguous(positions);
        let [keys, values] = [keys, values].map(owned);
        let problem = RotaryAppendProblem {
            rows: spec.batch,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            rotary_dim: spec.rotary_dim,
            table_rows: spec.table_rows,
            positions: spec.positions,
            positions_dtype: dtype_to_elem_type(positions.dtype),
            capacity: spec.capacity,
            dtype: spec.dtype,
            table_dtype: spec.table_dtype,
        };
        let out = q.client.empty(problem.query_bytes());
        let buffers = RotaryAppendBuffers {
            q: q.handle,
            k: k.handle,
            v: v.handle,
            tables: [cos.handle, sin.handle],
            positions: positions.handle,
            out: out.clone(),
            keys: keys.handle.clone(),
            values: values.handle.clone(),
        };
        launch::rotary_append(&q.client, problem, buffers).expect("arguments were validated");
        let shape = spec.query_shape();
        let rotated = CubeTensor::new_contiguous(q.client, q.device, shape, out, spec.dtype.into());
        (rotated, keys, values)
    }
}

/// Makes the launch; arguments are validated.
pub(super) fn launched(
    TokenHeads { q, k, v }: TokenHeads,
    [cos, sin]: [Tensor<3>; 2],
    CachedKeys { keys, values }: CachedKeys,
    positions: Tensor<1, Int>,
) -> (Tensor<4>, CachedKeys) {
    let [batch, heads, _, head_dim] = q.dims();
    let [_, kv_heads, capacity, _] = keys.dims();
    let [table_rows, _, rotary_dim] = cos.dims();
    let of = |dtype, name| FloatType::from_dtype(dtype, name).expect("arguments are validated");
    let spec = RotaryAppendSpec {
        batch,
        heads,
        kv_heads,
        head_dim,
        rotary_dim,
        table_rows,
        positions: positions.dims()[0],
        capacity,
        dtype: of(q.dtype(), "q"),
        table_dtype: of(cos.dtype(), "cos"),
    };
    let [q, k, v] = [q, k, v].map(|tensor| tensor.swap_dims(1, 2).into_dispatch());
    let (q, keys, values) = <Dispatch as RotaryAppendBackend>::rotary_append(
        q,
        k,
        v,
        cos.into_dispatch(),
        sin.into_dispatch(),
        positions.into_dispatch(),
        keys.into_dispatch(),
        values.into_dispatch(),
        spec,
    );
    let cache = CachedKeys {
        keys: Tensor::from_dispatch(keys),
        values: Tensor::from_dispatch(values),
    };
    (Tensor::<4>::from_dispatch(q).swap_dims(1, 2), cache)
}
