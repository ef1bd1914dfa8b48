//! Launches of the matrix products with a packed weight.

use cubecl::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{
    address_type, check_dtype, cube_count, elem_type, has_barriers, units_per_cube, vector_size,
};
use crate::error::Nf4Error;
use crate::format::{BlockSize, FloatType, PackedLayout};
use crate::kernel::decode::{DequantizeBlueprint, PackedViewLaunch};
use crate::kernel::gemv::{GemvBlueprint, matmul_gemv_kernel};
use crate::kernel::tensor_core::{
    TensorCoreBlueprint, add_parts_kernel, matmul_tensor_core_kernel,
};

/// A kernel that multiplies with a packed weight without decoding it to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MatmulVariant {
    /// A plane per row of the weight; any device, any shape, few rows of `x`.
    Gemv,
    /// Tensor cores; up to 64 rows of f16 or bf16.
    TensorCore,
}

impl MatmulVariant {
    /// All kernels.
    pub const ALL: [Self; 2] = [Self::Gemv, Self::TensorCore];

    /// The name used in files, tests and benches.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gemv => "gemv",
            Self::TensorCore => "tensor_core",
        }
    }
}

/// `y = x Wᵀ + b`, by its sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Product {
    /// Rows of `x` and `y`.
    pub m: usize,
    /// Rows of `W`, columns of `y`.
    pub n: usize,
    /// Columns of `x` and `W`.
    pub k: usize,
    /// Type of `x`, `b` and `y`.
    pub dtype: FloatType,
}

/// How [`MatmulVariant::TensorCore`] cuts the weight up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TensorCoreTile {
    /// Tiles of 16 rows of `W` a plane.
    pub row_tiles: usize,
    /// Planes of a cube along the rows of `W`.
    pub row_planes: usize,
    /// Planes of a cube along `k`.
    pub k_planes: usize,
    /// Runs of 128 elements a plane decodes between two barriers.
    pub chunks: usize,
    /// Cubes that share the work along `k`; more than one costs a second launch.
    pub k_cubes: usize,
}

impl TensorCoreTile {
    /// The tile that suits a product on a device with so many multiprocessors, by what was fastest
    /// on an H200 (`benches/NOTES.md`).
    ///
    /// A few rows of `x` want many small cubes. Many rows want large ones, so that each part of
    /// `x` is fetched by few; where the weight has too few rows to give every multiprocessor one,
    /// cubes share the work along `k`.
    pub fn for_product(product: &Product, multiprocessors: usize) -> Self {
        let Product { m, n, k, .. } = *product;
        let tile = |row_tiles, row_planes, k_planes, chunks| Self {
            row_tiles,
            row_planes,
            k_planes,
            chunks,
            k_cubes: 1,
        };
        match m {
            0..=8 if k >= 8192 => tile(1, 1, 8, 2),
            0..=8 => tile(1, 1, 8, 1),
            9..=16 if n <= 8192 && k < 8192 => tile(2, 1, 8, 1),
            9..=16 => tile(2, 2, 4, 1).sharing(n, 2 * multiprocessors),
            _ => tile(2, 4, 2, 1).sharing(n, multiprocessors),
        }
    }

    /// As many cubes along `k` as it takes to have `cubes` in all, or one.
    fn sharing(self, n: usize, cubes: usize) -> Self {
        let k_cubes = (cubes / n.div_ceil(16 * self.row_tiles * self.row_planes)).max(1);
        Self { k_cubes, ..self }
    }

    const fn planes(&self) -> usize {
        self.row_planes * self.k_planes
    }
}

/// A launch of a matrix product, worked out but not yet made.
#[derive(Debug, Clone)]
pub struct MatmulPlan {
    /// The sizes.
    pub product: Product,
    /// Size of a cube.
    pub cube_dim: CubeDim,
    /// Number of cubes.
    pub cube_count: CubeCount,
    kernel: Kernel,
    address: AddressType,
}

#[derive(Debug, Clone, Copy)]
enum Kernel {
    Gemv {
        blueprint: GemvBlueprint,
        vector: usize,
    },
    TensorCore {
        blueprint: TensorCoreBlueprint,
        k_cubes: usize,
    },
}

/// Rows of `x` that the tensor core kernel takes at most.
pub const TENSOR_CORE_ROWS: usize = 64;

/// Rows of `x` up to which the gemv kernel is preferred.
pub const GEMV_ROWS: usize = 4;

/// Rows of `x` that a plane of the gemv kernel multiplies with at once.
const GEMV_COLUMNS: usize = 4;

impl MatmulPlan {
    /// Works out a product with a given kernel, or with the one that suits it. Nothing is launched.
    ///
    /// # Errors
    /// [`Nf4Error::Length`] if `n * k` is not the number of weights or `m` is zero,
    /// [`Nf4Error::DeviceDtype`] if the device has no such type, [`Nf4Error::Variant`] if it
    /// cannot run the kernel on these sizes.
    pub fn new(
        client: &Client,
        layout: &PackedLayout,
        product: Product,
        bias: bool,
        variant: Option<MatmulVariant>,
    ) -> Result<Self, Nf4Error> {
        check(client, layout, &product)?;
        let gemv = || Self::gemv(client, layout, product, bias);
        let tensor_core = || {
            let tile = TensorCoreTile::for_product(&product, multiprocessors(client));
            Self::tensor_core(client, layout, product, bias, tile)
        };
        match variant {
            Some(MatmulVariant::Gemv) => Ok(gemv()),
            Some(MatmulVariant::TensorCore) => tensor_core(),
            None => tensor_core().or_else(|_| Ok(gemv())),
        }
    }

    /// Works out a product with the kernel that is preferred to decoding the weight and multiplying
    /// with it, if there is one: tensor cores up to [`TENSOR_CORE_ROWS`] rows, where an H200 needs
    /// less time for the whole product than for decoding and cuBLAS; the other kernel up to
    /// [`GEMV_ROWS`], which was not measured against decoding.
    pub fn preferred(
        client: &Client,
        layout: &PackedLayout,
        product: Product,
        bias: bool,
    ) -> Option<Self> {
        let plan = Self::new(client, layout, product, bias, None).ok()?;
        let limit = match plan.variant() {
            MatmulVariant::TensorCore => TENSOR_CORE_ROWS,
            MatmulVariant::Gemv => GEMV_ROWS,
        };
        (product.m <= limit).then_some(plan)
    }

    /// Works out a product on tensor cores with a given tile.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn with_tile(
        client: &Client,
        layout: &PackedLayout,
        product: Product,
        bias: bool,
        tile: TensorCoreTile,
    ) -> Result<Self, Nf4Error> {
        check(client, layout, &product)?;
        Self::tensor_core(client, layout, product, bias, tile)
    }

    /// The same for sizes that have been checked.
    fn tensor_core(
        client: &Client,
        layout: &PackedLayout,
        product: Product,
        bias: bool,
        tile: TensorCoreTile,
    ) -> Result<Self, Nf4Error> {
        let Product { m, n, k, dtype } = product;
        let impossible = |reason: String| {
            Err(Nf4Error::Variant {
                variant: MatmulVariant::TensorCore.name(),
                reason,
            })
        };
        let hardware = &client.properties().hardware;
        let fragments = MmaConfig {
            a_type: elem_type(dtype),
            b_type: elem_type(dtype),
            cd_type: ElemType::Float(FloatKind::F32),
            m: 16,
            n: 8,
            k: 16,
        };
        // The kernel knows NVIDIA's layout of fragments.
        let has_instruction = client.properties().features.matmul.mma.contains(&fragments);
        if client.name() != "cuda" || !has_instruction || hardware.plane_size_max != 32 {
            return impossible(format!(
                "the device has no m16n8k16 tensor core instruction for {}",
                dtype.name()
            ));
        }
        if m > TENSOR_CORE_ROWS {
            return impossible(format!("{m} rows are more than {TENSOR_CORE_ROWS}"));
        }
        let block_log2 = layout.config.block_size.log2();
        let Some(run_log2) = [6, 5]
            .into_iter()
            .find(|&log2| log2 <= block_log2 && k.is_multiple_of(1 << log2))
        else {
            return impossible(format!("rows of {k} elements are no multiple of 32"));
        };
        let column_tiles = m.div_ceil(8);
        let blueprint = TensorCoreBlueprint {
            block_log2,
            nested_log2: layout.config.nested_block_size.map_or(0, BlockSize::log2),
            run_log2,
            row_tiles: tile.row_tiles,
            column_tiles,
            row_planes: tile.row_planes,
            k_planes: tile.k_planes,
            chunks: tile.chunks,
            // Each value compiles a kernel, so only few.
            x_rows: if m <= 8 { m } else { 8 * column_tiles },
            split: tile.k_cubes > 1,
            bias,
        };
        let units = 32 * tile.planes();
        if units > hardware.max_units_per_cube as usize
            || blueprint.shared_bytes() > hardware.max_shared_memory_size
        {
            return impossible(format!("{tile:?} is more than a cube may have"));
        }
        let cube_rows = 16 * tile.row_tiles * tile.row_planes;
        // No cube without a round.
        let rounds = k.div_ceil(blueprint.round_k());
        let k_cubes = rounds.div_ceil(rounds.div_ceil(tile.k_cubes.max(1)));
        Ok(Self {
            product,
            cube_dim: CubeDim::new_2d(32, tile.planes() as u32),
            cube_count: cube_count(client, n.div_ceil(cube_rows) * k_cubes),
            kernel: Kernel::TensorCore { blueprint, k_cubes },
            address: address_type(layout.elems.max(m * n).max(m * k)),
        })
    }

    fn gemv(client: &Client, layout: &PackedLayout, product: Product, bias: bool) -> Self {
        let Product { m, n, k, dtype } = product;
        let hardware = &client.properties().hardware;
        let units = units_per_cube(client);
        // Lanes can only add their sums up where a row is known to be a plane.
        let planes = has_barriers(client)
            && hardware.plane_size_min == hardware.plane_size_max
            && (2..=units).contains(&hardware.plane_size_max);
        let lanes = if planes { hardware.plane_size_max } else { 1 };
        let rows = units / lanes;
        let aligned = k.is_multiple_of(8);
        let blueprint = GemvBlueprint {
            decode: DequantizeBlueprint {
                block_log2: layout.config.block_size.log2(),
                nested_log2: layout.config.nested_block_size.map_or(0, BlockSize::log2),
                shared: has_barriers(client),
                skewed: false,
                ragged: false,
                per_unit: 1,
                group: 1,
            },
            columns: m.min(GEMV_COLUMNS),
            aligned,
            planes,
            bias,
        };
        let vector = if aligned {
            vector_size(client, dtype, 8, &[k])
        } else {
            1
        };
        let cubes = n.div_ceil(rows as usize) * m.div_ceil(blueprint.columns);
        Self {
            product,
            cube_dim: CubeDim::new_2d(lanes, rows),
            cube_count: cube_count(client, cubes),
            kernel: Kernel::Gemv { blueprint, vector },
            address: address_type(layout.elems.max(m * n).max(m * k)),
        }
    }

    /// The kernel.
    pub fn variant(&self) -> MatmulVariant {
        match self.kernel {
            Kernel::Gemv { .. } => MatmulVariant::Gemv,
            Kernel::TensorCore { .. } => MatmulVariant::TensorCore,
        }
    }

    /// Makes the launch.
    ///
    /// # Shapes
    /// - `x`: `m * k` elements, row-major; `packed`: `layout.words` u32 words; `bias`: `n`
    ///   elements, there if the plan is for one; `out`: `m * n` elements
    ///
    /// # Errors
    /// [`Nf4Error::Length`] if a buffer is too small.
    pub fn launch(
        &self,
        client: &Client,
        x: Handle,
        packed: Handle,
        layout: &PackedLayout,
        bias: Option<Handle>,
        out: Handle,
    ) -> Result<(), Nf4Error> {
        let Product { m, n, k, dtype } = self.product;
        let size = dtype.size_bytes();
        let with_bias = match self.kernel {
            Kernel::Gemv { blueprint, .. } => blueprint.bias,
            Kernel::TensorCore { blueprint, .. } => blueprint.bias,
        };
        let bias_bytes = bias.as_ref().map_or(0, |bias| bias.size_in_used() as usize);
        for (tensor, expected, given) in [
            ("x", m * k * size, x.size_in_used() as usize),
            (
                "packed weight",
                layout.words * 4,
                packed.size_in_used() as usize,
            ),
            ("bias", if with_bias { n * size } else { 0 }, bias_bytes),
            ("y", m * n * size, out.size_in_used() as usize),
        ] {
            if given < expected {
                return Err(Nf4Error::Length {
                    tensor: tensor.into(),
                    expected,
                    given,
                });
            }
        }
        let view = PackedViewLaunch::new(0, layout.elems, layout.scales, layout.codebook, 0);
        let address = self.address;
        let elem = elem_type(dtype);
        // SAFETY: the buffers hold what is declared here (checked above, and `layout` is that of
        // the weight, whose elements are `n * k`); the kernels guard every row by `m` and `n` and
        // every element by `k`. A bias that is not there is never read, parts that are not asked for
        // are never written.
        unsafe {
            let bias_arg = || match &bias {
                Some(bias) => BufferArg::from_raw_parts(bias.clone(), n),
                None => BufferArg::from_raw_parts(x.clone(), 1),
            };
            let out_arg = || BufferArg::from_raw_parts(out.clone(), m * n);
            let words = || BufferArg::from_raw_parts(packed.clone(), layout.words);
            match self.kernel {
                Kernel::TensorCore { blueprint, k_cubes } => {
                    let parts = match blueprint.split {
                        true => client.empty(k_cubes * m * n * 4),
                        false => out.clone(),
                    };
                    let parts_len = if blueprint.split { k_cubes * m * n } else { 1 };
                    matmul_tensor_core_kernel::launch_unchecked(
                        client,
                        self.cube_count.clone(),
                        self.cube_dim,
                        address,
                        BufferArg::from_raw_parts(x.clone(), m * k / 2),
                        words(),
                        words(),
                        bias_arg(),
                        out_arg(),
                        BufferArg::from_raw_parts(parts.clone(), parts_len),
                        view,
                        m,
                        n,
                        k,
                        k_cubes,
                        blueprint,
                        elem,
                    );
                    if blueprint.split {
                        let units = units_per_cube(client);
                        add_parts_kernel::launch_unchecked(
                            client,
                            cube_count(client, (m * n).div_ceil(units as usize)),
                            CubeDim::new_1d(units),
                            address,
                            BufferArg::from_raw_parts(parts, parts_len),
                            bias_arg(),
                            out_arg(),
                            m,
                            n,
                            k_cubes,
                            blueprint.bias,
                            elem,
                        );
                    }
                }
                Kernel::Gemv { blueprint, vector } => matmul_gemv_kernel::launch_unchecked(
                    client,
                    self.cube_count.clone(),
                    self.cube_dim,
                    address,
                    vector,
                    BufferArg::from_raw_parts(x.clone(), m * k),
                    words(),
                    bias_arg(),
                    out_arg(),
                    view,
                    m,
                    n,
                    k,
                    blueprint,
                    elem,
                ),
            }
        }
        Ok(())
    }
}

fn multiprocessors(client: &Client) -> usize {
    let hardware = &client.properties().hardware;
    hardware.num_streaming_multiprocessors.unwrap_or(1) as usize
}

fn check(client: &Client, layout: &PackedLayout, product: &Product) -> Result<(), Nf4Error> {
    let Product { m, n, k, dtype } = *product;
    check_dtype(client, dtype)?;
    for (tensor, expected, given) in [
        ("weight", layout.elems, n.saturating_mul(k)),
        ("x", m.max(1), m),
    ] {
        if expected != given {
            return Err(Nf4Error::Length {
                tensor: tensor.into(),
                expected,
                given,
            });
        }
    }
    Ok(())
}
