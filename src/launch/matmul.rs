//! Launches of the matrix products with a packed weight.

use std::fmt;

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::dequantize::{decode_blueprint, packed_view};
use super::levels::{OneWeight, levels_weight};
use super::lora::{Lora, lora_arg};
use super::product::Product;
use super::strategy::MatmulVariant;
use super::tensor_core::{self, MAX_COUNTERS, SharedSums, group_rows};
use super::tile::TensorCoreTile;
use super::{
    Buffer, address_type, cube_count, elem_type, has_barriers, lanes_of_plane, units_per_cube,
    vector_size,
};
use crate::error::Nf4Error;
use crate::format::PackedLayout;
use crate::kernel::decode::DequantizeBlueprint;
use crate::kernel::gemv::{GemvBlueprint, matmul_gemv_kernel};
use crate::kernel::levels::{Joined, LevelsBlueprint, matmul_levels_kernel};
use crate::kernel::sums::SumsBlueprint;
use crate::kernel::tensor_core::matmul_tensor_core_kernel;
use crate::kernel::tensor_core_blueprint::TensorCoreBlueprint;

/// What goes into a product.
#[derive(Debug, Clone)]
pub struct Operands {
    /// `[m, k]`, row-major.
    pub x: Handle,
    /// The whole packed weight, u32 words.
    pub packed: Handle,
    /// `[n]`, there if the plan is for one.
    pub bias: Option<Handle>,
    /// A low-rank branch to add; any plan takes one, on a device that passes [`Lora::check`].
    pub lora: Option<Lora>,
}

/// A launch of a matrix product, worked out but not yet made.
// The fields are private and never change: the bounds of the launch rest on them.
#[derive(Clone)]
pub struct MatmulPlan {
    client: Client,
    layout: PackedLayout,
    product: Product,
    cube_dim: CubeDim,
    cube_count: CubeCount,
    blueprint: Blueprint,
    address: AddressType,
}

impl fmt::Debug for MatmulPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MatmulPlan")
            .field("product", &self.product)
            .field("blueprint", &self.blueprint)
            .field("cube_dim", &self.cube_dim)
            .field("cube_count", &self.cube_count)
            .finish_non_exhaustive()
    }
}

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy)]
enum Blueprint {
    Gemv {
        blueprint: GemvBlueprint,
        vector: usize,
    },
    TensorCore {
        blueprint: TensorCoreBlueprint,
    },
    Levels {
        blueprint: LevelsBlueprint,
        bias: bool,
    },
}

/// Rows of `x` that a plane of the gemv kernel multiplies with at once.
const GEMV_COLUMNS: usize = 4;

impl MatmulPlan {
    /// Works out a product with a given kernel, or with the one that suits it. Nothing is launched.
    ///
    /// # Errors
    /// [`Nf4Error::Length`] if `n * k` is not the number of weights or `m` is zero,
    /// [`Nf4Error::ElementCount`] if `x`, `y` or the weight is larger than memory can address, or the
    /// weight has no elements,
    /// [`Nf4Error::DeviceDtype`] if the device has no such type, [`Nf4Error::Variant`] if it
    /// cannot run the kernel on these sizes.
    pub fn new(
        client: &Client,
        layout: &PackedLayout,
        product: Product,
        bias: bool,
        variant: Option<MatmulVariant>,
    ) -> Result<Self, Nf4Error> {
        product.check(client, layout)?;
        let gemv = || Self::gemv(client, layout, product, bias);
        let tensor_core = || {
            let tile = TensorCoreTile::for_product(client, layout, product);
            Self::tensor_core(client, layout, product, bias, tile)
        };
        let levels = || {
            let tile = TensorCoreTile::whole(client, &product);
            Self::levels(client, layout, product, bias, tile)
        };
        match variant {
            Some(MatmulVariant::Gemv) => Ok(gemv()),
            Some(MatmulVariant::TensorCore) => tensor_core(),
            Some(MatmulVariant::Levels) => levels(),
            None => levels().or_else(|_| tensor_core()).or_else(|_| Ok(gemv())),
        }
    }

    /// Works out a product on tensor cores with a given tile.
    ///
    /// # Errors
    /// Those of [`new`](Self::new), and [`Nf4Error::Variant`] for [`MatmulVariant::Gemv`], which has
    /// no tiles.
    pub fn with_tile(
        client: &Client,
        layout: &PackedLayout,
        product: Product,
        bias: bool,
        variant: MatmulVariant,
        tile: TensorCoreTile,
    ) -> Result<Self, Nf4Error> {
        product.check(client, layout)?;
        match variant {
            MatmulVariant::TensorCore => Self::tensor_core(client, layout, product, bias, tile),
            MatmulVariant::Levels => Self::levels(client, layout, product, bias, tile),
            MatmulVariant::Gemv => Err(Nf4Error::Variant {
                variant: variant.name(),
                reason: "it has no tiles".into(),
            }),
        }
    }

    /// The same for sizes that have been checked.
    fn tensor_core(
        client: &Client,
        layout: &PackedLayout,
        product: Product,
        bias: bool,
        tile: TensorCoreTile,
    ) -> Result<Self, Nf4Error> {
        let blueprint = tensor_core::blueprint(client, layout, product, bias, tile)?;
        let sums = blueprint.sums;
        let blueprint = Blueprint::TensorCore { blueprint };
        Ok(Self::of_sums(client, layout, product, &sums, blueprint))
    }

    fn levels(
        client: &Client,
        layout: &PackedLayout,
        product: Product,
        bias: bool,
        tile: TensorCoreTile,
    ) -> Result<Self, Nf4Error> {
        let blueprint =
            tensor_core::levels_blueprint(client, layout, product, Joined::Apart, tile)?;
        let sums = blueprint.sums;
        let blueprint = Blueprint::Levels { blueprint, bias };
        Ok(Self::of_sums(client, layout, product, &sums, blueprint))
    }

    /// The launch of a kernel whose planes share the sums in this way.
    fn of_sums(
        client: &Client,
        layout: &PackedLayout,
        product: Product,
        sums: &SumsBlueprint,
        blueprint: Blueprint,
    ) -> Self {
        let Product { m, n, k, .. } = product;
        let planes = sums.units() as u32 / 32;
        Self {
            client: client.clone(),
            layout: *layout,
            product,
            cube_dim: CubeDim::new_2d(32, planes),
            cube_count: cube_count(client, n.div_ceil(sums.cube_rows()) * sums.k_cubes),
            blueprint,
            address: address_type((n * k).max(m * n).max(m * k)),
        }
    }

    fn gemv(client: &Client, layout: &PackedLayout, product: Product, bias: bool) -> Self {
        let Product { m, n, k, dtype } = product;
        let lanes = lanes_of_plane(client);
        let rows = units_per_cube(client) / lanes;
        let decode = decode_blueprint(layout);
        let word_elems = decode.codes_a_word();
        let aligned = k.is_multiple_of(word_elems);
        let blueprint = GemvBlueprint {
            decode: DequantizeBlueprint {
                shared: has_barriers(client),
                ..decode
            },
            columns: m.min(GEMV_COLUMNS),
            aligned,
            planes: lanes > 1,
            bias,
        };
        let vector = if aligned {
            vector_size(client, dtype, word_elems, &[k])
        } else {
            1
        };
        let cubes = n.div_ceil(rows as usize) * m.div_ceil(blueprint.columns);
        Self {
            client: client.clone(),
            layout: *layout,
            product,
            cube_dim: CubeDim::new_2d(lanes, rows),
            cube_count: cube_count(client, cubes),
            blueprint: Blueprint::Gemv { blueprint, vector },
            address: address_type(layout.elems().max(m * n).max(m * k)),
        }
    }

    /// The kernel.
    pub fn variant(&self) -> MatmulVariant {
        match self.blueprint {
            Blueprint::Gemv { .. } => MatmulVariant::Gemv,
            Blueprint::TensorCore { .. } => MatmulVariant::TensorCore,
            Blueprint::Levels { .. } => MatmulVariant::Levels,
        }
    }

    /// The sizes.
    pub fn product(&self) -> Product {
        self.product
    }

    /// Size of a cube.
    pub fn cube_dim(&self) -> CubeDim {
        self.cube_dim
    }

    /// Number of cubes.
    pub fn cube_count(&self) -> CubeCount {
        self.cube_count.clone()
    }

    /// Bytes of `y`.
    pub fn out_bytes(&self) -> usize {
        let Product { m, n, dtype, .. } = self.product;
        m * n * dtype.size_bytes()
    }

    /// Makes the launch, and with a low-rank branch one before it for its first half.
    ///
    /// # Shapes
    /// - `out`: `[m, n]`, row-major
    ///
    /// # Errors
    /// [`Nf4Error::Length`] if a buffer is too small, [`Nf4Error::Alignment`] if it does not begin
    /// at a multiple of 16 bytes, and with a branch those of [`Lora::check`].
    pub fn launch(&self, operands: Operands, out: Handle) -> Result<(), Nf4Error> {
        let (client, layout) = (&self.client, &self.layout);
        let Operands {
            x,
            packed,
            bias,
            lora,
        } = operands;
        let Product { m, n, k, dtype } = self.product;
        let size = dtype.size_bytes();
        let with_bias = match self.blueprint {
            Blueprint::Gemv { blueprint, .. } => blueprint.bias,
            Blueprint::TensorCore { blueprint } => blueprint.sums.bias,
            Blueprint::Levels { bias, .. } => bias,
        };
        let bias = match (with_bias, bias) {
            (false, _) => None,
            (true, Some(bias)) => Some(bias),
            (true, None) => {
                return Err(Nf4Error::Length {
                    tensor: "bias".into(),
                    expected: n * size,
                    given: 0,
                });
            }
        };
        let buffer = |name, handle, dims, elem_bytes| Buffer {
            name,
            handle,
            dims,
            elem_bytes,
        };
        buffer("x", &x, [m, k], size).check()?;
        buffer("packed weight", &packed, [layout.words(), 1], 4).check()?;
        buffer("y", &out, [m, n], size).check()?;
        if let Some(bias) = &bias {
            buffer("bias", bias, [n, 1], size).check()?;
        }
        if let Some(lora) = &lora {
            Lora::check(client, lora.dtype)?;
            lora.check_buffers(&self.product)?;
        }
        let down = lora
            .as_ref()
            .map(|lora| lora.launch_down(client, &x, &self.product));
        let view = || packed_view(layout, 0, layout.elems());
        let address = self.address;
        let elem = elem_type(dtype);
        let lora_elem = lora.as_ref().map_or(elem, |lora| elem_type(lora.dtype));
        // SAFETY: the buffers hold what is declared here and begin where vectors may (checked above).
        // The layout has `n * k` elements (checked by `new`), and the kernels guard every row by `m`
        // and `n` and every element by `k`. A bias that is not there is never read, parts that are
        // not asked for are never written.
        unsafe {
            let bias_arg = || match &bias {
                Some(bias) => BufferArg::from_raw_parts(bias.clone(), n),
                None => BufferArg::from_raw_parts(x.clone(), 1),
            };
            let out_arg = || BufferArg::from_raw_parts(out.clone(), m * n);
            let words = || BufferArg::from_raw_parts(packed.clone(), layout.words());
            let weight = || OneWeight {
                layout,
                packed: &packed,
                bias: bias.as_ref(),
                n,
            };
            match self.blueprint {
                Blueprint::TensorCore { blueprint } => {
                    let shared = SharedSums::new(client, n, &blueprint.sums);
                    let group = group_rows(m);
                    for first in (0..m).step_by(group) {
                        let m = group.min(m - first);
                        let x = x.clone().offset_start((first * k * size) as u64);
                        let out = out.clone().offset_start((first * n * size) as u64);
                        let (parts, counters) = match &shared {
                            Some(shared) => (
                                BufferArg::from_raw_parts(shared.parts.clone(), shared.words),
                                BufferArg::from_raw_parts(shared.counters.clone(), MAX_COUNTERS),
                            ),
                            None => (out_arg(), words()),
                        };
                        matmul_tensor_core_kernel::launch_unchecked(
                            client,
                            self.cube_count.clone(),
                            self.cube_dim,
                            address,
                            BufferArg::from_raw_parts(x, m * k / 2),
                            words(),
                            words(),
                            bias_arg(),
                            BufferArg::from_raw_parts(out, m * n),
                            parts,
                            counters,
                            lora_arg(down.as_ref(), n, first, m),
                            view(),
                            m,
                            n,
                            k,
                            blueprint,
                            elem,
                            lora_elem,
                        );
                    }
                }
                Blueprint::Levels { blueprint, .. } => matmul_levels_kernel::launch_unchecked(
                    client,
                    self.cube_count.clone(),
                    self.cube_dim,
                    address,
                    BufferArg::from_raw_parts(x.clone(), k / 2),
                    [levels_weight(weight(), down.as_ref(), [0, 0])].into(),
                    out_arg(),
                    out_arg(),
                    out_arg(),
                    words(),
                    k,
                    blueprint,
                    elem,
                    lora_elem,
                ),
                Blueprint::Gemv { blueprint, vector } => matmul_gemv_kernel::launch_unchecked(
                    client,
                    self.cube_count.clone(),
                    self.cube_dim,
                    address,
                    vector,
                    BufferArg::from_raw_parts(x.clone(), m * k),
                    words(),
                    bias_arg(),
                    out_arg(),
                    lora_arg(down.as_ref(), n, 0, m),
                    view(),
                    m,
                    n,
                    k,
                    blueprint,
                    elem,
                    lora_elem,
                ),
            }
        }
        Ok(())
    }
}
