//! Rotary position embeddings on the way into a cache of keys and values.

#[cfg(feature = "cube")]
mod launch;

use burn::tensor::{IndexingUpdateOp, Int, Tensor};

#[cfg(feature = "cube")]
pub use launch::{RotaryAppendBackend, RotaryAppendSpec};

use super::rotary::{check_tables, rotary};
use super::tensor::{check_device, check_dtype};
use crate::error::Nf4Error;
use crate::format::check_shape;

/// The keys and values of a layer, with room for more: each `[batch, kv_heads, capacity, head_dim]`.
#[derive(Debug, Clone)]
pub struct CachedKeys {
    /// The keys, rotated.
    pub keys: Tensor<4>,
    /// The values.
    pub values: Tensor<4>,
}

/// Queries, keys and values of one token of each row: `[batch, heads, 1, head_dim]`.
#[derive(Debug, Clone)]
pub struct TokenHeads {
    /// The queries.
    pub q: Tensor<4>,
    /// The keys, of as many heads as the cache has.
    pub k: Tensor<4>,
    /// The values.
    pub v: Tensor<4>,
}

/// Rotates queries and keys of one token a row as [`rotary`] does, and writes keys and values into a cache
/// at a position that the device alone need know. Returns the queries and the cache, which is written in place
/// if it has no other owner: a step whose every buffer stays where it is can be recorded in a graph.
///
/// One launch on CubeCL; the queries and the cache have no gradient.
///
/// # Shapes
/// - `token`: see [`TokenHeads`]; `cache`: see [`CachedKeys`]
/// - `cos`, `sin`: `[batch or 1, 1, rotary_dim]`, as for [`rotary`]
/// - `positions`: `[1]`, for all rows, or `[batch]`; they must be below the cache's capacity: what others write
///   is not defined, but lies within the cache, or they panic
/// - returns the queries, `[batch, heads, 1, head_dim]`
///
/// # Errors
/// Those of [`rotary`], [`Nf4Error::Shape`] for keys, values, positions or a cache that do not fit,
/// [`Nf4Error::ElementCount`] for a cache without room, [`Nf4Error::Dtype`] unless queries, keys, values and
/// cache are of one type.
pub fn rotary_append(
    token: TokenHeads,
    [cos, sin]: [Tensor<3>; 2],
    cache: CachedKeys,
    positions: Tensor<1, Int>,
) -> Result<(Tensor<4>, CachedKeys), Nf4Error> {
    check(&token, [&cos, &sin], &cache, &positions)?;
    if token.q.shape().num_elements() == 0 {
        return Ok((token.q, cache));
    }
    #[cfg(feature = "cube")]
    if let burn::backend::DispatchDevice::Cube(_) = token.q.device().as_dispatch() {
        return Ok(launch::launched(token, [cos, sin], cache, positions));
    }
    composed(token, [cos, sin], cache, positions)
}

fn check(
    token: &TokenHeads,
    [cos, sin]: [&Tensor<3>; 2],
    cache: &CachedKeys,
    positions: &Tensor<1, Int>,
) -> Result<(), Nf4Error> {
    let TokenHeads { q, k, v } = token;
    let CachedKeys { keys, values } = cache;
    let [batch, heads, _, head_dim] = q.dims();
    let [_, kv_heads, capacity, _] = keys.dims();
    check_shape("q", &[batch, heads, 1, head_dim], &q.dims())?;
    for (name, tensor, positions) in [
        ("k", k, 1),
        ("v", v, 1),
        ("keys", keys, capacity),
        ("values", values, capacity),
    ] {
        check_shape(
            name,
            &[batch, kv_heads, positions, head_dim],
            &tensor.dims(),
        )?;
        check_dtype(name, tensor, "as q", &[q.dtype()])?;
        check_device(name, &tensor.device(), &q.device())?;
    }
    if kv_heads == 0 || capacity == 0 {
        return Err(Nf4Error::ElementCount {
            tensor: "keys".into(),
            shape: keys.dims().to_vec(),
        });
    }
    let [given] = positions.dims();
    let expected = if given == 1 { 1 } else { batch };
    check_shape("positions", &[expected], &[given])?;
    check_device("positions", &positions.device(), &q.device())?;
    check_tables(q, cos, sin).map(drop)
}

/// Of Burn's operations.
fn composed(
    TokenHeads { q, k, v }: TokenHeads,
    [cos, sin]: [Tensor<3>; 2],
    CachedKeys { keys, values }: CachedKeys,
    positions: Tensor<1, Int>,
) -> Result<(Tensor<4>, CachedKeys), Nf4Error> {
    let q = rotary(q, cos.clone(), sin.clone())?;
    let k = rotary(k, cos, sin)?;
    let [batch, kv_heads, capacity, head_dim] = keys.dims();
    let all = batch * kv_heads;
    // Where each head's token lies among those of all rows and heads.
    let device = positions.device();
    let first = Tensor::<1, Int>::arange(0..all as i64, &device) * capacity as i64;
    let of_heads = positions.reshape([-1, 1]).expand([batch, kv_heads]);
    let at = first + of_heads.reshape([all]);
    let put = |held: Tensor<4>, new: Tensor<4>| {
        let held = held.reshape([all * capacity, head_dim]);
        let new = new.reshape([all, head_dim]);
        let held = held.select_assign(0, at.clone(), new, IndexingUpdateOp::Assign);
        held.reshape([batch, kv_heads, capacity, head_dim])
    };
    let (keys, values) = (put(keys, k), put(values, v));
    Ok((q, CachedKeys { keys, values }))
}
