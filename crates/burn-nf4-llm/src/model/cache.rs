//! The keys and values of the tokens seen so far.

use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor};
use burn_nf4::op::{CachedKeys, TokenHeads};

use crate::model::rotation::Rotation;

/// Keys and values of every layer, for a batch whose rows were padded on the left to one length.
#[derive(Debug, Default)]
pub struct KvCache {
    /// One for each layer.
    pub layers: Vec<LayerCache>,
    /// Padding tokens at the start of each row.
    padding: Vec<usize>,
    length: usize,
}

/// Keys and values of one layer, allocated in steps and filled in place.
#[derive(Debug, Default)]
pub struct LayerCache {
    /// `[batch, kv_heads, capacity, head_dim]`.
    keys: Option<Tensor<4>>,
    values: Option<Tensor<4>>,
    length: usize,
    /// Positions to allocate at least.
    reserved: usize,
}

/// The cache grows by this many positions at a time.
const POSITIONS_STEP: usize = 256;

impl KvCache {
    /// An empty cache.
    pub fn new(layers: usize, padding: Vec<usize>) -> Self {
        Self {
            layers: (0..layers).map(|_| LayerCache::default()).collect(),
            padding,
            length: 0,
        }
    }

    /// Has the next tokens allocate room for so many positions in all, so that it does not grow before.
    pub fn reserve(&mut self, positions: usize) {
        for layer in &mut self.layers {
            layer.reserved = layer.reserved.max(positions);
        }
    }

    /// Makes room for so many positions in all at once, if anything is held.
    pub(crate) fn grow(&mut self, positions: usize) {
        for layer in &mut self.layers {
            for slot in [&mut layer.keys, &mut layer.values] {
                if let Some(held) = slot.take() {
                    let used = held.dims()[2];
                    *slot = Some(with_room(held, used, positions));
                }
            }
        }
    }

    /// Writes what another cache holds of one row to the first positions of the row `row`, in place.
    ///
    /// # Panics
    /// If it holds several rows or has no room for them, or they are of other models.
    pub(crate) fn put_row(&mut self, row: usize, from: &Self) {
        let length = from.len();
        for (layer, from) in self.layers.iter_mut().zip(&from.layers) {
            let slots = [
                (&mut layer.keys, &from.keys),
                (&mut layer.values, &from.values),
            ];
            for (slot, from) in slots {
                let (Some(held), Some(from)) = (slot.take(), from) else {
                    panic!("a prompt was processed");
                };
                let [_, heads, _, head_dim] = held.dims();
                let at = [row..row + 1, 0..heads, 0..length, 0..head_dim];
                *slot = Some(held.slice_assign(at, from.clone().narrow(2, 0, length)));
            }
        }
    }

    /// Positions that there is room for now.
    pub fn room(&self) -> usize {
        let keys = self.layers.first().and_then(|layer| layer.keys.as_ref());
        keys.map_or(0, |keys| keys.dims()[2])
    }

    /// Whether it holds no token yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Positions held, padding included.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Padding tokens at the start of each row.
    pub fn padding(&self) -> &[usize] {
        &self.padding
    }

    /// Notes that every layer has got this many positions more.
    pub fn advance(&mut self, positions: usize) {
        self.length += positions;
        for layer in &mut self.layers {
            layer.length = self.length;
        }
    }

    /// Forgets all positions but the first ones. What was allocated for the others is used again.
    pub fn truncate(&mut self, positions: usize) {
        self.length = self.length.min(positions);
        for layer in &mut self.layers {
            layer.length = layer.length.min(positions);
        }
    }

    /// The positions that are allocated where so many are needed.
    pub(crate) fn rounded(positions: usize) -> usize {
        positions
            .div_ceil(POSITIONS_STEP)
            .saturating_mul(POSITIONS_STEP)
    }

    /// Bytes allocated.
    pub fn size_bytes(&self) -> usize {
        let bytes = |tensor: &Option<Tensor<4>>| {
            tensor.as_ref().map_or(0, |tensor| {
                tensor.shape().num_elements() * element_bytes(tensor.dtype())
            })
        };
        self.layers
            .iter()
            .map(|layer| bytes(&layer.keys) + bytes(&layer.values))
            .sum()
    }
}

impl LayerCache {
    /// Adds keys and values, `[batch, kv_heads, positions, head_dim]`, and returns all so far, with room for
    /// more behind them.
    pub fn append(&mut self, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let start = self.length;
        self.length += keys.dims()[2];
        let end = self.length.max(self.reserved);
        let keys = store(&mut self.keys, keys, start, end);
        let values = store(&mut self.values, values, start, end);
        (keys, values)
    }

    /// Rotates queries and keys of one token a row, `[batch, heads, 1, head_dim]`, writes keys and values
    /// each to its position in `at`, `[batch]`, which may be known on the device only, and returns the queries
    /// and all keys and values that are allocated.
    ///
    /// # Panics
    /// If nothing is allocated yet.
    pub(super) fn put(
        &mut self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        rotation: Option<&Rotation>,
        at: &Tensor<1, Int>,
    ) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
        let mut take = |slot: fn(&mut Self) -> &mut Option<Tensor<4>>| {
            slot(self).take().expect("a prompt came before")
        };
        let (keys, values) = (
            take(|layer| &mut layer.keys),
            take(|layer| &mut layer.values),
        );
        let (q, keys, values) = match rotation {
            Some(rotation) => {
                let cache = CachedKeys { keys, values };
                let (q, cache) = rotation.append(TokenHeads { q, k, v }, cache, at.clone());
                (q, cache.keys, cache.values)
            }
            None => {
                let shape = k.dims();
                let at = at.clone().reshape([shape[0], 1, 1, 1]).expand(shape);
                let put = |held: Tensor<4>, new| {
                    held.scatter(2, at.clone(), new, IndexingUpdateOp::Assign)
                };
                (q, put(keys, k), put(values, v))
            }
        };
        let keys = self.keys.insert(keys).clone();
        (q, keys, self.values.insert(values).clone())
    }
}

/// Writes `new` from the position `start` on into room for at least `room` positions, and returns the
/// whole buffer, as a view of its filled part could be a copy.
fn store(slot: &mut Option<Tensor<4>>, new: Tensor<4>, start: usize, room: usize) -> Tensor<4> {
    let [batch, heads, positions, head_dim] = new.dims();
    let end = start + positions;
    let held = match slot.take() {
        Some(held) => with_room(held, start, room),
        None => {
            let shape = [batch, heads, KvCache::rounded(room), head_dim];
            Tensor::zeros(shape, (&new.device(), new.dtype()))
        }
    };
    let held = held.slice_assign([0..batch, 0..heads, start..end, 0..head_dim], new);
    slot.insert(held).clone()
}

/// The first `used` positions of a buffer, in one with room for at least `room` positions.
fn with_room(held: Tensor<4>, used: usize, room: usize) -> Tensor<4> {
    let [batch, heads, capacity, head_dim] = held.dims();
    if capacity >= room {
        return held;
    }
    let shape = [batch, heads, KvCache::rounded(room), head_dim];
    let grown = Tensor::zeros(shape, (&held.device(), held.dtype()));
    match used {
        0 => grown,
        _ => {
            let at = [0..batch, 0..heads, 0..used, 0..head_dim];
            grown.slice_assign(at, held.narrow(2, 0, used))
        }
    }
}

/// Bytes of one element.
pub fn element_bytes(dtype: DType) -> usize {
    dtype.size()
}
