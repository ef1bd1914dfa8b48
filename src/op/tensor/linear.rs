//! Linear maps with a packed weight.

use burn::backend::{Dispatch, DispatchDevice};
use burn::tensor::{DType, Device, Int, Shape, Tensor};

use super::check::{check_device, check_dtype};
use super::dense::{MatmulOptions, has_products, matmul};
use super::empty::{connect_empty, tracked_sum};
use super::weight::BlockWeight;
use crate::error::Nf4Error;
use crate::format::{FloatType, check_shape};
use crate::op::base::{
    DequantizeSpec, LinearSpec, LoraSpec, MatmulSpec, MatmulStrategy, QuantBackend, WeightLoraSpec,
};

/// `y = x Wᵀ + b` with a packed weight `W`.
///
/// Few rows of `x` are multiplied with `W` as it is packed, see [`linear_with`]; for many it is
/// decoded to the dtype of `x`, here and again in the backward pass, and not kept in between. The
/// gradient flows to `x` and `bias`, never to `W`. An empty batch gives an empty result, and gradients
/// of zeros.
///
/// # Shapes
/// - `x`: `[..., in_features]`
/// - `weight`: `[out_features, in_features]`
/// - `bias`: `[out_features]`
/// - returns `[..., out_features]`
///
/// # Errors
/// [`Nf4Error::NotAMatrix`] for a weight of another rank, [`Nf4Error::Shape`] if `x` or `bias`
/// does not fit it, [`Nf4Error::Dtype`] unless `x` is f16, bf16 or f32 and `bias` of the same,
/// [`Nf4Error::Device`] unless all are on one device; and [`Nf4Error::Library`] or
/// [`Nf4Error::Variant`] if cuBLASLt was asked for and cannot be used
/// ([`DenseProvider`](crate::op::DenseProvider)).
pub fn linear<const D: usize>(
    x: Tensor<D>,
    weight: &BlockWeight,
    bias: Option<Tensor<1>>,
) -> Result<Tensor<D>, Nf4Error> {
    linear_with(x, weight, bias, MatmulStrategy::Auto)
}

/// [`linear`], computed in a given way.
///
/// On a graphics card [`MatmulStrategy::Auto`] measures the candidates the first time that a product of
/// its kind (sizes, dtype, quantization) is computed: kernels that read the
/// packed weight, and for more than a few rows decoding it. CubeCL's autotuner keeps the result, in
/// memory and by default in a file. The gradient is always computed over the decoded weight.
///
/// # Errors
/// Those of [`linear`], and [`Nf4Error::Variant`] if the device or the weight does not allow what is
/// asked for.
pub fn linear_with<const D: usize>(
    x: Tensor<D>,
    weight: &BlockWeight,
    bias: Option<Tensor<1>>,
    strategy: MatmulStrategy,
) -> Result<Tensor<D>, Nf4Error> {
    linear_at(x, weight, weight.matrix_dims()?, 0, bias, None, strategy)
}

/// A low-rank branch `s (x A) B` of a linear map (LoRA: Hu et al., arXiv 2106.09685).
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `A`, `[in_features, rank]`.
    pub a: Tensor<2>,
    /// `B`, `[rank, out_features]`, of the dtype of `A`.
    pub b: Tensor<2>,
    /// The factor `s`.
    pub scale: f64,
}

impl LowRank {
    /// Checks that the matrices fit a weight and a rank, and each other.
    ///
    /// # Errors
    /// [`Nf4Error::Shape`].
    pub(crate) fn check(
        &self,
        [out_features, in_features]: [usize; 2],
        rank: usize,
    ) -> Result<(), Nf4Error> {
        for (tensor, expected, given) in [
            ("lora_a", [in_features, rank], self.a.dims()),
            ("lora_b", [rank, out_features], self.b.dims()),
        ] {
            check_shape(tensor, &expected, &given)?;
        }
        FloatType::from_dtype(self.a.dtype(), "lora_a")?;
        check_dtype("lora_b", &self.b, "as lora_a", &[self.a.dtype()])
    }

    /// `s (x A) B`, in the dtype of `A`, as separate products.
    ///
    /// # Shapes
    /// - `x`: `[rows, in_features]`
    /// - returns `[rows, out_features]`
    ///
    /// # Errors
    /// Those of [`matmul`].
    pub(crate) fn forward(self, x: Tensor<2>) -> Result<Tensor<2>, Nf4Error> {
        let x = x.cast(self.a.dtype());
        let options = MatmulOptions::default();
        let down = matmul(x, self.a, None, options)?;
        Ok(matmul(down, self.b, None, options)? * self.scale)
    }

    /// The product with this branch for training, in the dtype of `x` by cuBLASLt; `None` if it is another way.
    ///
    /// # Errors
    /// Those of [`lora_linear`].
    pub(in crate::op) fn trained_spec<const D: usize>(
        &self,
        x: &Tensor<D>,
        weight: &BlockWeight,
        bias: Option<&Tensor<1>>,
        strategy: MatmulStrategy,
    ) -> Result<Option<LoraSpec>, Nf4Error> {
        let dims = weight.matrix_dims()?;
        let (dtype, _) = checked_operands(x, weight, dims, bias, Some(self))?;
        let device = x.device();
        let [rows, columns] = dims;
        let m = x.shape().num_elements() / columns;
        let alike = x.dtype() == DType::from(dtype)
            && bias.is_none_or(|bias| bias.dtype() == x.dtype())
            && !strategy.is_kernel()
            && !weight.is_transposed();
        if m == 0 || !alike || !device.is_autodiff() || !has_products(&device, dtype)? {
            return Ok(None);
        }
        let spec = LinearSpec {
            weight: DequantizeSpec {
                layout: *weight.layout(),
                rows,
                columns,
                start: 0,
                dtype,
            },
            strategy,
            cublaslt: true,
        };
        Ok(MatmulSpec::of(spec, m).and_then(|matmul| self.spec(matmul, true)))
    }

    /// The branch as part of the product; `None` if it has to be computed apart: its dtype is neither
    /// that of `x` nor f32, or it is tracked and either cuBLASLt is not used or the dtype of `x` is too
    /// narrow for it.
    fn spec(&self, matmul: MatmulSpec, tracked: bool) -> Option<LoraSpec> {
        let dtype = FloatType::from_dtype(self.a.dtype(), "lora_a").ok()?;
        let spec = LoraSpec {
            matmul,
            rank: self.a.dims()[1],
            scale: self.scale,
            dtype,
        };
        let joins = match tracked {
            true => matmul.cublaslt && spec.fits_x(),
            false => dtype == matmul.weight.dtype || dtype == FloatType::F32,
        };
        (DType::from(dtype) == self.a.dtype() && joins).then_some(spec)
    }
}

/// `y = x Wᵀ + b + s (x A) B` with a packed weight `W`, otherwise as [`linear_with`].
///
/// Without autodiff few rows of `x` take the branch on their way: a graphics card needs one small
/// launch for `x A`, and the product with the packed weight adds the rest to its sums, in f32. On tensor
/// cores `s x A` and `B` are then rounded: to bf16 if that is the dtype of `x`; with an `x` of f16 to 16
/// bits of precision, with the range of f32, so that what was trained in f32 does not overflow.
///
/// By cuBLASLt, with autodiff too, it is computed in the dtype of `x` if that is bf16 or the dtype of
/// `A`, with sums in f32, as PyTorch's autocast does it: `x A` in one product, and a second one that adds
/// to the first's result. Wherever else the branch is computed apart from the product, it is in the dtype of
/// `A`. The gradient flows to `A` and `B` too, in their dtype.
///
/// # Shapes
/// - `branch.a`: `[in_features, rank]`; `branch.b`: `[rank, out_features]`
///
/// # Errors
/// Those of [`linear_with`], [`Nf4Error::Shape`] if `A` or `B` does not fit the weight, and
/// [`Nf4Error::Dtype`] unless both are of one of the types that `x` may have.
pub fn lora_linear<const D: usize>(
    x: Tensor<D>,
    weight: &BlockWeight,
    bias: Option<Tensor<1>>,
    branch: LowRank,
    strategy: MatmulStrategy,
) -> Result<Tensor<D>, Nf4Error> {
    let dims = weight.matrix_dims()?;
    linear_at(x, weight, dims, 0, bias, Some(branch), strategy)
}

/// `y = x Wₑᵀ + b` with one matrix of a packed stack of them, such as an expert's.
///
/// Like [`linear`] with `W = weight[expert]`: that matrix alone is decoded.
///
/// # Shapes
/// - `x`: `[..., in_features]`
/// - `weight`: `[experts, out_features, in_features]`
/// - `bias`: `[out_features]`
/// - returns `[..., out_features]`
///
/// # Errors
/// [`Nf4Error::Rank`] for a weight of another rank, [`Nf4Error::Shape`] if `x` or `bias` does not fit
/// it, [`Nf4Error::RowRange`] if there is no such expert, otherwise those of [`linear`].
pub fn expert_linear<const D: usize>(
    x: Tensor<D>,
    weight: &BlockWeight,
    expert: usize,
    bias: Option<Tensor<1>>,
) -> Result<Tensor<D>, Nf4Error> {
    let &[_, out_features, in_features] = weight.shape() else {
        return Err(Nf4Error::Rank {
            tensor: "weight".into(),
            expected: 3,
            shape: weight.shape().to_vec(),
        });
    };
    let start = weight.start_of(expert)?;
    let dims = [out_features, in_features];
    linear_at(x, weight, dims, start, bias, None, MatmulStrategy::Auto)
}

/// `Wᵀ + s A B` of a packed weight `W`, for modules that multiply with a dense one.
///
/// With a branch to train, or on a device with gradient checkpointing, it is decoded again in the backward pass
/// and not kept until then. Burn recomputes an operand of a product only if it is a tracked node of the
/// graph (burn-autodiff 0.22.1: `checkpoint_parents`, `checkpoint/strategy.rs:97`, refuses an untracked
/// parent, and `topological_sort_visit`, `checkpoint/base.rs:88`, looks for the parents of a node among
/// the tracked ones). A frozen weight is none, so it hangs on a leaf made for it. The price is a
/// gradient for the weight from Burn's product, `float_matmul` in `ops/tensor.rs:648`.
///
/// # Shapes
/// - `weight`: `[out_features, in_features]`
/// - `branch`: as for [`lora_linear`]; the result is then of its dtype
/// - returns `[in_features, out_features]`
///
/// # Errors
/// [`Nf4Error::NotAMatrix`] for a weight of another rank, [`Nf4Error::Shape`] or [`Nf4Error::Dtype`] if
/// the branch does not fit it, [`Nf4Error::Device`] unless all are on `device`, and
/// [`Nf4Error::DeviceDtype`] if that has no such type.
pub(crate) fn effective_weight(
    weight: &BlockWeight,
    branch: Option<LowRank>,
    dtype: FloatType,
    device: &Device,
) -> Result<Tensor<2>, Nf4Error> {
    let [out_features, in_features] = weight.matrix_dims()?;
    let packed = weight.checked_packed()?;
    check_device("packed weight", &packed.device(), device)?;
    let dtype = match &branch {
        None => dtype,
        Some(branch) => {
            let [_, rank] = branch.a.dims();
            branch.check([out_features, in_features], rank.max(1))?;
            check_device("lora_a", &branch.a.device(), device)?;
            check_device("lora_b", &branch.b.device(), device)?;
            FloatType::from_dtype(branch.a.dtype(), "lora_a")?
        }
    };
    dtype.check_device(device)?;
    debug_assert!(!weight.is_transposed(), "quantized in here");
    let spec = DequantizeSpec {
        layout: *weight.layout(),
        rows: out_features,
        columns: in_features,
        start: 0,
        dtype,
    };
    let anchor = Tensor::<1>::zeros([1], (device, DType::from(dtype)));
    let anchor = match device.is_autodiff() {
        true => anchor.require_grad(),
        false => anchor,
    };
    let (anchor, packed) = (anchor.into_dispatch(), packed.into_dispatch());
    let out = match branch {
        None => <Dispatch as QuantBackend>::quant_weight(anchor, packed, spec),
        Some(LowRank { a, b, scale }) => {
            let (a, b) = (a.into_dispatch(), b.into_dispatch());
            let spec = WeightLoraSpec {
                weight: spec,
                scale,
            };
            <Dispatch as QuantBackend>::quant_weight_lora(anchor, packed, a, b, spec)
        }
    };
    Ok(Tensor::from_dispatch(out))
}

/// The linear map of the matrix whose elements begin at `start`.
pub(in crate::op) fn linear_at<const D: usize>(
    x: Tensor<D>,
    weight: &BlockWeight,
    [out_features, in_features]: [usize; 2],
    start: usize,
    bias: Option<Tensor<1>>,
    branch: Option<LowRank>,
    strategy: MatmulStrategy,
) -> Result<Tensor<D>, Nf4Error> {
    let dims = [out_features, in_features];
    let (dtype, packed) = checked_operands(&x, weight, dims, bias.as_ref(), branch.as_ref())?;
    let mut shape: Vec<usize> = x.dims().to_vec();
    let rows = shape.iter().product::<usize>() / in_features;
    shape[D - 1] = out_features;
    if rows == 0 {
        // Not a reshape of x: it would read the zero as "keep this dimension".
        let y = Tensor::zeros(Shape::from(shape), (&x.device(), x.dtype()));
        // Any of them can have a graph, as in a batch with rows.
        let branch = branch.map(|LowRank { a, b, .. }| [tracked_sum(a), tracked_sum(b)]);
        let others = [bias.and_then(tracked_sum), tracked_sum(x)];
        let operands = branch.into_iter().flatten().chain(others).flatten();
        return Ok(connect_empty(y, operands));
    }
    let transposed = weight.is_transposed();
    let [rows_stored, columns_stored] = match transposed {
        false => [out_features, in_features],
        true => [in_features, out_features],
    };
    let spec = LinearSpec {
        weight: DequantizeSpec {
            layout: *weight.layout(),
            rows: rows_stored,
            columns: columns_stored,
            start,
            dtype,
        },
        strategy,
        cublaslt: has_products(&x.device(), dtype)?,
    };
    if strategy.is_kernel() {
        check_strategy(&x, spec, rows, transposed, bias.is_some())?;
    }
    // CubeCL's relaxed f32 is f32 in memory; a product of the two would come out as f32.
    let given = x.dtype();
    let x = x.reshape([rows, in_features]).cast(DType::from(dtype));
    let fused = MatmulSpec::of(spec, rows).filter(|_| {
        let bias_fits = bias
            .as_ref()
            .is_none_or(|bias| bias.dtype() == DType::from(dtype));
        !transposed && bias_fits
    });
    let is_tracked = |branch: &LowRank| {
        [&x, &branch.a, &branch.b]
            .iter()
            .any(|tensor| tensor.device().is_autodiff())
    };
    let lora = fused.and_then(|fused| {
        let branch = branch.as_ref()?;
        branch.spec(fused, is_tracked(branch))
    });
    let (joined, separate) = match (lora, branch) {
        (Some(lora), Some(branch)) => (Some((branch, lora)), None),
        (_, Some(branch)) => (None, Some(branch.forward(x.clone())?)),
        (_, None) => (None, None),
    };
    // Every tensor is handed on at its last use: another reference to it would be dropped after the
    // product, and with that in between Fusion gives up on what stands around it.
    let (x, packed) = (x.into_dispatch(), packed.into_dispatch());
    let y = match (joined, bias, fused) {
        (Some((LowRank { a, b, .. }, lora)), None, _) => {
            let (a, b) = (a.into_dispatch(), b.into_dispatch());
            <Dispatch as QuantBackend>::quant_matmul_lora(x, packed, a, b, lora)
        }
        (Some((LowRank { a, b, .. }, lora)), Some(bias), _) => {
            let (a, b, bias) = (a.into_dispatch(), b.into_dispatch(), bias.into_dispatch());
            <Dispatch as QuantBackend>::quant_matmul_bias_lora(x, packed, bias, a, b, lora)
        }
        (None, Some(bias), Some(fused)) => {
            <Dispatch as QuantBackend>::quant_matmul_bias(x, packed, bias.into_dispatch(), fused)
        }
        (None, bias, _) => {
            let y = match transposed {
                false => <Dispatch as QuantBackend>::quant_linear(x, packed, spec),
                // With V = Wᵀ stored, x Wᵀ = x V: the product that the other form has as its
                // gradient.
                true => <Dispatch as QuantBackend>::quant_linear_backward(x, packed, spec),
            };
            match bias {
                Some(bias) => (Tensor::<2>::from_dispatch(y) + bias.unsqueeze()).into_dispatch(),
                None => y,
            }
        }
    };
    let mut y = Tensor::<2>::from_dispatch(y);
    if let Some(separate) = separate {
        let dtype = y.dtype();
        y = y + separate.cast(dtype);
    }
    Ok(y.cast(given).reshape(Shape::from(shape)))
}

/// Checks what goes into a linear map, and returns the type of the product and the packed weight.
pub(in crate::op) fn checked_operands<const D: usize>(
    x: &Tensor<D>,
    weight: &BlockWeight,
    [out_features, in_features]: [usize; 2],
    bias: Option<&Tensor<1>>,
    branch: Option<&LowRank>,
) -> Result<(FloatType, Tensor<1, Int>), Nf4Error> {
    let dtype = FloatType::from_dtype(x.dtype(), "x")?;
    let mut shape: Vec<usize> = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = in_features;
    }
    check_shape("x", &shape, &x.dims())?;
    if let Some(bias) = bias {
        check_shape("bias", &[out_features], &bias.dims())?;
        check_dtype("bias", bias, "as x", &[x.dtype(), DType::from(dtype)])?;
    }
    let packed = weight.checked_packed()?;
    let device = x.device();
    check_device("packed weight", &packed.device(), &device)?;
    if let Some(bias) = bias {
        check_device("bias", &bias.device(), &device)?;
    }
    if let Some(branch) = branch {
        let [_, rank] = branch.a.dims();
        branch.check([out_features, in_features], rank.max(1))?;
        check_device("lora_a", &branch.a.device(), &device)?;
        check_device("lora_b", &branch.b.device(), &device)?;
    }
    Ok((dtype, packed))
}

/// Checks that a kernel that was asked for can multiply `rows` rows of `x` with a weight.
fn check_strategy<const D: usize>(
    x: &Tensor<D>,
    spec: LinearSpec,
    rows: usize,
    transposed: bool,
    bias: bool,
) -> Result<(), Nf4Error> {
    let fail = |reason: String| {
        Err(Nf4Error::Variant {
            variant: spec.strategy.name(),
            reason,
        })
    };
    if transposed {
        return fail("the weight is stored transposed".into());
    }
    let Some(product) = MatmulSpec::of(spec, rows) else {
        return fail("it takes a whole weight".into());
    };
    let device = x.device().without_autodiff();
    match device.as_dispatch() {
        #[cfg(feature = "cube")]
        DispatchDevice::Cube(device) => {
            crate::op::backends::cube::check_strategy(&device.client(), product, bias)
        }
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => crate::op::backends::flex::check_strategy(spec.strategy),
        _ => fail(format!(
            "{product:?} with bias {bias} is for no device known"
        )),
    }
}
