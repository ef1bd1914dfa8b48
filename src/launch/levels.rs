//! Launches of the kernel for one row that multiply with several weights at once.

use std::fmt;

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::dequantize::packed_view;
use super::lora::{Lora, LoraDown, launch_down_all, lora_arg};
use super::product::Product;
use super::tensor_core;
use super::tile::TensorCoreTile;
use super::{Buffer, address_type, cube_count, elem_type};
use crate::activation::Activation;
use crate::error::Nf4Error;
use crate::format::{FloatType, PackedLayout};
use crate::kernel::levels::{
    Joined, LevelsBlueprint, LevelsWeight, LevelsWeightLaunch, matmul_levels_kernel,
};

/// A weight as the kernel takes it.
pub(super) struct OneWeight<'a> {
    pub layout: &'a PackedLayout,
    pub packed: &'a Handle,
    pub bias: Option<&'a Handle>,
    /// Rows.
    pub n: usize,
}

/// The argument for a weight whose first cube and first result are given.
///
/// # Safety
/// The packed weight has the layout, which is that of a matrix of `n` rows, the bias has `n` elements, and
/// the branch is one of `n` columns.
pub(super) unsafe fn levels_weight<F: Float, G: Float>(
    weight: OneWeight,
    down: Option<&LoraDown>,
    [first_cube, first_out]: [usize; 2],
) -> LevelsWeightLaunch<F, G> {
    let OneWeight {
        layout,
        packed,
        bias,
        n,
    } = weight;
    // SAFETY: see above; both views are of the same buffer, which is only read.
    unsafe {
        let words = || BufferArg::from_raw_parts(packed.clone(), layout.words());
        let bias = bias.map(|bias| BufferArg::from_raw_parts(bias.clone(), n));
        LevelsWeightLaunch::new(
            words(),
            words(),
            bias.into(),
            lora_arg(down, n, 0, 1),
            packed_view(layout, 0, layout.elems()),
            n,
            first_cube,
            first_out,
        )
    }
}

/// One of several weights that the same row is multiplied with.
#[derive(Debug, Clone)]
pub struct JoinedWeight {
    /// The whole packed weight, u32 words.
    pub packed: Handle,
    /// `[n]`; all weights have one, or none.
    pub bias: Option<Handle>,
    /// A low-rank branch; all weights have one, of the same rank and type, or none.
    pub lora: Option<Lora>,
}

/// One launch that multiplies a row with several weights, worked out but not yet made.
// The fields are private and never change: the bounds of the launch rest on them.
#[derive(Clone)]
pub struct JoinedPlan {
    client: Client,
    layouts: Vec<PackedLayout>,
    /// Rows of each weight.
    rows: Vec<usize>,
    k: usize,
    dtype: FloatType,
    /// Where the results of each weight start, in bytes; of gated ones there is one result.
    starts: Vec<usize>,
    out_bytes: usize,
    /// The first cube of each weight.
    first_cubes: Vec<usize>,
    cube_dim: CubeDim,
    cube_count: CubeCount,
    blueprint: LevelsBlueprint,
}

impl fmt::Debug for JoinedPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinedPlan")
            .field("rows", &self.rows)
            .field("k", &self.k)
            .field("blueprint", &self.blueprint)
            .field("cube_dim", &self.cube_dim)
            .field("cube_count", &self.cube_count)
            .finish_non_exhaustive()
    }
}

/// Weights that a launch takes at most.
pub const MAX_JOINED: usize = 3;

impl JoinedPlan {
    /// Works out the products of one row with weights `[rows, k]`, one or up to [`MAX_JOINED`]; with a gate
    /// `activation(x W0ᵀ) (x W1ᵀ)` of two of the same size. Nothing is launched.
    ///
    /// # Errors
    /// [`Nf4Error::Variant`] if the device has no kernel for it, or weights are not quantized in one way;
    /// [`Nf4Error::Length`], [`Nf4Error::ElementCount`] and [`Nf4Error::DeviceDtype`] as for
    /// [`MatmulPlan::new`](super::MatmulPlan::new).
    pub fn new(
        client: &Client,
        weights: &[(PackedLayout, usize)],
        k: usize,
        dtype: FloatType,
        gate: Option<Activation>,
    ) -> Result<Self, Nf4Error> {
        let impossible = |reason: &str| Nf4Error::Variant {
            variant: "joined",
            reason: reason.into(),
        };
        let Some(&(first, n)) = weights.first() else {
            return Err(impossible("there is no weight"));
        };
        if weights.len() > MAX_JOINED {
            return Err(impossible("there are more than three weights"));
        }
        for &(layout, n) in weights {
            let product = Product { m: 1, n, k, dtype };
            product.check(client, &layout)?;
            if layout.config() != first.config() {
                return Err(impossible("the weights are quantized in different ways"));
            }
        }
        let all_rows: usize = weights.iter().map(|&(_, n)| n).sum();
        let (joined, results) = match gate {
            None => (Joined::Apart, all_rows),
            Some(activation) => {
                if weights.len() != 2 || weights[1].1 != n {
                    return Err(impossible("a gate takes two weights of one size"));
                }
                (Joined::Gated(activation), n)
            }
        };
        let product = Product {
            m: 1,
            n: results,
            k,
            dtype,
        };
        let weights_of_cube = if gate.is_some() { 2 } else { 1 };
        let tile = TensorCoreTile::whole_of(client, &product, weights_of_cube);
        let blueprint = tensor_core::levels_blueprint(client, &first, product, joined, tile)?;
        let alignment = client.properties().memory.alignment as usize;
        let (mut starts, mut first_cubes) = (Vec::new(), Vec::new());
        let (mut out_bytes, mut cubes) = (0, 0);
        for &(_, n) in &weights[..if gate.is_some() { 1 } else { weights.len() }] {
            out_bytes = usize::next_multiple_of(out_bytes, alignment);
            starts.push(out_bytes);
            first_cubes.push(cubes);
            out_bytes += n * dtype.size_bytes();
            cubes += n.div_ceil(blueprint.result_rows());
        }
        first_cubes.resize(weights.len(), 0);
        Ok(Self {
            client: client.clone(),
            layouts: weights.iter().map(|&(layout, _)| layout).collect(),
            rows: weights.iter().map(|&(_, n)| n).collect(),
            k,
            dtype,
            starts,
            out_bytes,
            first_cubes,
            cube_dim: CubeDim::new_2d(32, blueprint.sums.units() as u32 / 32),
            cube_count: cube_count(client, cubes),
            blueprint,
        })
    }

    /// Bytes of all results, with room between them.
    pub fn out_bytes(&self) -> usize {
        self.out_bytes
    }

    /// Where each result is among them, in bytes.
    pub fn results(&self) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
        let size = self.dtype.size_bytes();
        let results = self.starts.iter().zip(&self.rows);
        results.map(move |(&start, &n)| start..start + n * size)
    }

    /// Makes the launch, and with low-rank branches one before it for their first half.
    ///
    /// # Shapes
    /// - `x`: `[k]`
    /// - `out`: [`out_bytes`](Self::out_bytes)
    ///
    /// # Errors
    /// [`Nf4Error::Length`] if a buffer is too small or there are not as many weights as planned,
    /// [`Nf4Error::Alignment`] if one does not begin at a multiple of 16 bytes, [`Nf4Error::Variant`] unless
    /// biases and branches are alike, and those of [`Lora::check`].
    pub fn launch(
        &self,
        x: &Handle,
        weights: &[JoinedWeight],
        out: Handle,
    ) -> Result<(), Nf4Error> {
        let Self {
            client, k, dtype, ..
        } = self;
        let (k, size) = (*k, dtype.size_bytes());
        self.check_buffers(x, weights, &out)?;
        let product = Product {
            m: 1,
            n: self.rows[0],
            k,
            dtype: *dtype,
        };
        let branches: Vec<&Lora> = weights.iter().filter_map(|w| w.lora.as_ref()).collect();
        let down = match branches.is_empty() {
            true => Vec::new(),
            false => launch_down_all(client, &branches, x, &product),
        };
        let lora_dtype = branches.first().map_or(*dtype, |lora| lora.dtype);
        let most = self.rows.iter().map(|n| n * k).max().unwrap_or(0);
        let elems = self.out_bytes / size;
        // SAFETY: the buffers hold what is declared here and begin where vectors may (checked above). Each
        // layout is that of its rows times `k` elements (checked by `new`), and the kernel guards rows by
        // their number and elements by `k`. What is passed for a bias, parts and counters is not touched.
        unsafe {
            let out_arg = || BufferArg::from_raw_parts(out.clone(), elems);
            let weight = |(i, weight): (usize, &JoinedWeight)| {
                let one = OneWeight {
                    layout: &self.layouts[i],
                    packed: &weight.packed,
                    bias: weight.bias.as_ref(),
                    n: self.rows[i],
                };
                let first_out = self.starts.get(i).map_or(0, |start| start / size);
                levels_weight(one, down.get(i), [self.first_cubes[i], first_out])
            };
            let words = self.layouts[0].words();
            matmul_levels_kernel::launch_unchecked(
                client,
                self.cube_count.clone(),
                self.cube_dim,
                address_type(most.max(elems)),
                BufferArg::from_raw_parts(x.clone(), k / 2),
                weights
                    .iter()
                    .enumerate()
                    .map(weight)
                    .collect::<SequenceArg<LevelsWeight<_, _>>>(),
                out_arg(),
                out_arg(),
                out_arg(),
                BufferArg::from_raw_parts(weights[0].packed.clone(), words),
                k,
                self.blueprint,
                elem_type(*dtype),
                elem_type(lora_dtype),
            );
        }
        Ok(())
    }

    fn check_buffers(
        &self,
        x: &Handle,
        weights: &[JoinedWeight],
        out: &Handle,
    ) -> Result<(), Nf4Error> {
        let (k, size) = (self.k, self.dtype.size_bytes());
        crate::format::check_len("weights", self.rows.len(), weights.len())?;
        let check = |name, handle, dims, elem_bytes| {
            Buffer {
                name,
                handle,
                dims,
                elem_bytes,
            }
            .check()
        };
        check("x", x, [k, 1], size)?;
        check("y", out, [self.out_bytes, 1], 1)?;
        let kind = |weight: &JoinedWeight| {
            let lora = weight.lora.as_ref().map(|lora| (lora.rank, lora.dtype));
            (weight.bias.is_some(), lora)
        };
        for (i, weight) in weights.iter().enumerate() {
            let n = self.rows[i];
            if kind(weight) != kind(&weights[0]) {
                return Err(Nf4Error::Variant {
                    variant: "joined",
                    reason: "biases or branches are not alike".into(),
                });
            }
            check(
                "packed weight",
                &weight.packed,
                [self.layouts[i].words(), 1],
                4,
            )?;
            if let Some(bias) = &weight.bias {
                check("bias", bias, [n, 1], size)?;
            }
            if let Some(lora) = &weight.lora {
                Lora::check(&self.client, lora.dtype)?;
                lora.check_buffers(&Product {
                    m: 1,
                    n,
                    k,
                    dtype: self.dtype,
                })?;
            }
        }
        Ok(())
    }
}
