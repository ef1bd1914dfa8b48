//! Products of dense matrices, and which library computes them.

use std::sync::atomic::{AtomicU8, Ordering};

use burn::backend::Dispatch;
#[cfg(any(feature = "cublaslt", feature = "flex"))]
use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device, Shape, Tensor};

use super::check::{check_device, check_dtype};
use super::empty::{connect_empty, tracked_sum};
use crate::error::Nf4Error;
use crate::format::{FloatType, check_shape};
#[cfg(feature = "cublaslt")]
use crate::launch::DensePlan;
use crate::op::base::{DenseSpec, QuantBackend};
#[cfg(feature = "flex")]
use crate::op::table::TableBackend;

/// Who computes products of dense matrices: those of [`matmul`], and those with a decoded weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum DenseProvider {
    /// cuBLASLt on CUDA devices where it can be loaded, with the feature `cublaslt`, on Linux; this crate on
    /// Flex, for f32; else Burn. Once a device has to do without cuBLASLt, that is logged as a warning, with
    /// all that was tried.
    #[default]
    Auto,
    /// cuBLASLt; an error where it cannot be loaded or the device is not CUDA's. A product that it has no
    /// algorithm for is still Burn's, with a warning, and so is one in CubeCL's relaxed f32.
    CublasLt,
    /// Burn's own product.
    Burn,
}

static PROVIDER: AtomicU8 = AtomicU8::new(DenseProvider::Auto as u8);

/// Sets who computes products of dense matrices from now on, in all threads.
pub fn set_dense_provider(provider: DenseProvider) {
    PROVIDER.store(provider as u8, Ordering::Relaxed);
}

/// Who computes products of dense matrices.
pub fn dense_provider() -> DenseProvider {
    let provider = PROVIDER.load(Ordering::Relaxed);
    let all = [
        DenseProvider::Auto,
        DenseProvider::CublasLt,
        DenseProvider::Burn,
    ];
    all.into_iter()
        .find(|&known| known as u8 == provider)
        .unwrap_or_default()
}

/// Whether products on a device go to cuBLASLt, see [`DenseProvider`].
///
/// # Errors
/// Where cuBLASLt was asked for: [`Nf4Error::Library`] if it cannot be loaded, [`Nf4Error::Variant`] if
/// the device is not CUDA's or the feature is off.
pub fn uses_cublaslt(device: &Device) -> Result<bool, Nf4Error> {
    match dense_provider() {
        DenseProvider::Burn => Ok(false),
        DenseProvider::Auto => Ok(has_cublaslt(device)),
        DenseProvider::CublasLt => check_cublaslt(device).map(|()| true),
    }
}

/// Whether products on a device are those of [`QuantBackend`]: cuBLASLt's, or of f32 on Flex those of
/// [`host`](crate::host), which decode a packed weight on the way.
///
/// # Errors
/// Those of [`uses_cublaslt`].
pub(in crate::op) fn has_products(device: &Device, dtype: FloatType) -> Result<bool, Nf4Error> {
    #[cfg(feature = "flex")]
    if let DispatchDevice::Flex(_) = device.clone().without_autodiff().as_dispatch()
        && dense_provider() == DenseProvider::Auto
    {
        return Ok(dtype == FloatType::F32);
    }
    let _ = dtype;
    uses_cublaslt(device)
}

/// The same without the reason.
fn has_cublaslt(device: &Device) -> bool {
    #[cfg(feature = "cublaslt")]
    if let DispatchDevice::Cube(device) = device.clone().without_autodiff().as_dispatch() {
        return DensePlan::has_device(&device.client());
    }
    let _ = device;
    false
}

#[cfg(feature = "cublaslt")]
fn check_cublaslt(device: &Device) -> Result<(), Nf4Error> {
    match device.clone().without_autodiff().as_dispatch() {
        DispatchDevice::Cube(device) => DensePlan::check_device(&device.client()),
        _ => Err(Nf4Error::Variant {
            variant: "cublaslt",
            reason: format!("the device is {device:?}, expected CUDA"),
        }),
    }
}

#[cfg(not(feature = "cublaslt"))]
fn check_cublaslt(_device: &Device) -> Result<(), Nf4Error> {
    Err(Nf4Error::Variant {
        variant: "cublaslt",
        reason: "the crate was built without the feature `cublaslt`".into(),
    })
}

/// How [`matmul`] takes its matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct MatmulOptions {
    /// Whether `lhs` holds the transposes of the left matrices. No transposed copy is made.
    pub transpose_lhs: bool,
    /// Whether `rhs` holds the transposes of the right matrices. No transposed copy is made.
    pub transpose_rhs: bool,
    /// Whether cuBLASLt may multiply f32 as TF32, with 11 bits of each factor: several times as fast.
    pub tf32: bool,
}

impl MatmulOptions {
    /// `A Bᵀ`, such as a linear layer with a weight `[out_features, in_features]`.
    pub const TRANSPOSE_RHS: Self = Self {
        transpose_lhs: false,
        transpose_rhs: true,
        tf32: false,
    };
}

/// `A B + b`, for each matrix of a batch: a linear layer, a head, or its gradient, at the speed of
/// cuBLASLt where that is there (see [`DenseProvider`]), else by Burn's own product. Sums of f16 and bf16
/// are in f32.
///
/// The gradient flows to all operands. A single right matrix serves the whole batch without being
/// copied.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_nf4::op::{MatmulOptions, matmul};
///
/// let device = Device::default();
/// let x = Tensor::<3>::random([2, 5, 64], Distribution::Default, &device);
/// let table = Tensor::<3>::random([1, 100, 64], Distribution::Default, &device);
/// let y = matmul(x, table, None, MatmulOptions::TRANSPOSE_RHS)?;
/// assert_eq!(y.dims(), [2, 5, 100]);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// # Shapes
/// - `lhs`: `[..., m, k]`, or `[..., k, m]` to be transposed
/// - `rhs`: `[..., k, n]`, or `[..., n, k]` to be transposed; the leading dimensions are those of `lhs`,
///   or one
/// - `bias`: `[n]`
/// - returns `[..., m, n]`
///
/// `rhs` may be of f16 or bf16 where `lhs` is of f32: its exact values are multiplied. For a few rows and one
/// matrix `[n, k]`, such as a head, Flex reads it as it is; elsewhere it is cast for each product.
///
/// # Errors
/// [`Nf4Error::Rank`] for fewer than two dimensions, [`Nf4Error::Shape`] for shapes that do not fit,
/// [`Nf4Error::Dtype`] unless all are of one type, f16, bf16 or f32, but for `rhs` as above, [`Nf4Error::Device`] unless all are
/// on one device, and where cuBLASLt was asked for and cannot be used [`Nf4Error::Library`] or
/// [`Nf4Error::Variant`].
pub fn matmul<const D: usize>(
    lhs: Tensor<D>,
    rhs: Tensor<D>,
    bias: Option<Tensor<1>>,
    options: MatmulOptions,
) -> Result<Tensor<D>, Nf4Error> {
    let dtype = FloatType::from_dtype(lhs.dtype(), "lhs")?;
    let of_rhs: &[DType] = match lhs.dtype() {
        DType::F32 => &[DType::F32, DType::F16, DType::BF16],
        _ => &[lhs.dtype()],
    };
    check_dtype("rhs", &rhs, "as lhs", of_rhs)?;
    check_device("rhs", &rhs.device(), &lhs.device())?;
    let sizes = Sizes::new(lhs.dims(), rhs.dims(), options)?;
    if let Some(bias) = &bias {
        check_dtype("bias", bias, "as lhs", &[lhs.dtype()])?;
        check_device("bias", &bias.device(), &lhs.device())?;
        check_shape("bias", &[sizes.n], &bias.dims())?;
    }
    let available = has_products(&lhs.device(), dtype)?;
    let mut shape = lhs.dims();
    (shape[D - 2], shape[D - 1]) = (sizes.m, sizes.n);
    // Nothing, or sums of nothing. Not a reshape: it would read a zero as "keep this dimension".
    if shape.contains(&0) || sizes.k == 0 {
        let y = Tensor::zeros(Shape::from(shape), (&lhs.device(), lhs.dtype()));
        let sums = [tracked_sum(lhs), tracked_sum(rhs)];
        let y = connect_empty(y, sums.into_iter().flatten());
        return Ok(match bias {
            Some(bias) if shape.contains(&0) => connect_empty(y, tracked_sum(bias)),
            Some(bias) => y + bias.unsqueeze(),
            None => y,
        });
    }
    // CubeCL's relaxed f32 is f32 in memory, but cuBLASLt is not relaxed.
    let by_backend = available && lhs.dtype() == DType::from(dtype);
    let Sizes { batch, m, n, k, .. } = sizes;
    let [lhs_rows, lhs_columns] = [lhs.dims()[D - 2], lhs.dims()[D - 1]];
    let [rhs_rows, rhs_columns] = [rhs.dims()[D - 2], rhs.dims()[D - 1]];
    let spec = DenseSpec {
        batch: Some(batch),
        m,
        n,
        k,
        transpose_lhs: options.transpose_lhs,
        transpose_rhs: options.transpose_rhs,
        scale: 1.0,
        dtype,
        tf32: options.tf32,
    };
    // One matrix on the right makes all rows on the left those of one matrix.
    if sizes.shared_rhs && !options.transpose_lhs {
        let lhs = lhs.reshape([batch * m, k]);
        let rhs = rhs.reshape([rhs_rows, rhs_columns]);
        let spec = DenseSpec {
            batch: None,
            m: batch * m,
            ..spec
        };
        #[cfg(feature = "flex")]
        if lhs.dtype() == DType::F32 && spec.m <= FEW_ROWS && reads_tables(&lhs.device()) {
            return Ok(by_table(lhs, rhs, bias, spec).reshape(shape));
        }
        let y = product(lhs, rhs, bias, spec, by_backend);
        return Ok(y.reshape(shape));
    }
    let lhs = lhs.reshape([batch, lhs_rows, lhs_columns]);
    let of_rhs = if sizes.shared_rhs { 1 } else { batch };
    let rhs = rhs
        .reshape([of_rhs, rhs_rows, rhs_columns])
        // A view, and its gradient is the sum over the batch.
        .expand([batch, rhs_rows, rhs_columns]);
    Ok(product(lhs, rhs, bias, spec, by_backend).reshape(shape))
}

fn product<const D: usize>(
    lhs: Tensor<D>,
    rhs: Tensor<D>,
    bias: Option<Tensor<1>>,
    spec: DenseSpec,
    by_backend: bool,
) -> Tensor<D> {
    let rhs = match rhs.dtype() == lhs.dtype() {
        true => rhs,
        false => rhs.cast(lhs.dtype()),
    };
    match by_backend {
        true => by_backend_product(lhs, rhs, bias, spec),
        false => by_burn(lhs, rhs, bias, spec),
    }
}

fn by_backend_product<const D: usize>(
    lhs: Tensor<D>,
    rhs: Tensor<D>,
    bias: Option<Tensor<1>>,
    spec: DenseSpec,
) -> Tensor<D> {
    let (lhs, rhs) = (lhs.into_dispatch(), rhs.into_dispatch());
    Tensor::from_dispatch(match bias {
        Some(bias) => {
            <Dispatch as QuantBackend>::dense_matmul_bias(lhs, rhs, bias.into_dispatch(), spec)
        }
        None => <Dispatch as QuantBackend>::dense_matmul(lhs, rhs, spec),
    })
}

/// Rows up to which a product with a stored transpose, such as a head with the table of embeddings, is
/// `(B Aᵀ)ᵀ`: on the CPU `B`, often the largest matrix of a model, would be transposed for each token. Flex
/// takes it as it lies, unless there is a graph.
const FEW_ROWS: usize = 64;

/// Whether [`matmul`] reads a matrix of 16 bit as it lies for a few rows of f32, and need not cast it each time:
/// on Flex, without autodiff.
pub fn reads_tables(device: &Device) -> bool {
    #[cfg(feature = "flex")]
    if let DispatchDevice::Flex(_) = device.as_dispatch() {
        return true;
    }
    let _ = device;
    false
}

/// By rows of the right matrix, as it lies.
#[cfg(feature = "flex")]
fn by_table(lhs: Tensor<2>, rhs: Tensor<2>, bias: Option<Tensor<1>>, spec: DenseSpec) -> Tensor<2> {
    let table = match spec.transpose_rhs {
        true => rhs,
        false => rhs.transpose(),
    };
    let (x, table) = (lhs.into_dispatch(), table.into_dispatch());
    let y = Tensor::from_dispatch(<Dispatch as TableBackend>::table_matmul(x, table));
    match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    }
}

fn by_burn<const D: usize>(
    lhs: Tensor<D>,
    rhs: Tensor<D>,
    bias: Option<Tensor<1>>,
    spec: DenseSpec,
) -> Tensor<D> {
    let oriented = |matrix: Tensor<D>, transpose| match transpose {
        false => matrix,
        true => matrix.swap_dims(D - 2, D - 1),
    };
    let y = match spec.transpose_rhs && spec.m <= FEW_ROWS {
        true => {
            let y = rhs.matmul(oriented(lhs, !spec.transpose_lhs));
            oriented(y, true)
        }
        false => {
            let lhs = oriented(lhs, spec.transpose_lhs);
            lhs.matmul(oriented(rhs, spec.transpose_rhs))
        }
    };
    match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    }
}

/// The sizes of a product whose shapes fit.
struct Sizes {
    batch: usize,
    m: usize,
    n: usize,
    k: usize,
    /// Whether one right matrix serves the whole batch.
    shared_rhs: bool,
}

impl Sizes {
    fn new<const D: usize>(
        lhs: [usize; D],
        rhs: [usize; D],
        options: MatmulOptions,
    ) -> Result<Self, Nf4Error> {
        if D < 2 {
            return Err(Nf4Error::Rank {
                tensor: "lhs".into(),
                expected: 2,
                shape: lhs.to_vec(),
            });
        }
        let matrix = |shape: [usize; D], transpose| match transpose {
            false => [shape[D - 2], shape[D - 1]],
            true => [shape[D - 1], shape[D - 2]],
        };
        let [m, k] = matrix(lhs, options.transpose_lhs);
        let [rhs_k, n] = matrix(rhs, options.transpose_rhs);
        let shared_rhs = rhs[..D - 2].iter().all(|&dim| dim == 1);
        if rhs_k != k || (!shared_rhs && lhs[..D - 2] != rhs[..D - 2]) {
            let mut expected = rhs.to_vec();
            if !shared_rhs {
                expected[..D - 2].copy_from_slice(&lhs[..D - 2]);
            }
            expected[if options.transpose_rhs { D - 1 } else { D - 2 }] = k;
            return Err(Nf4Error::Shape {
                tensor: "rhs".into(),
                expected,
                given: rhs.to_vec(),
            });
        }
        Ok(Self {
            batch: lhs[..D - 2].iter().product(),
            m,
            n,
            k,
            shared_rhs,
        })
    }
}
