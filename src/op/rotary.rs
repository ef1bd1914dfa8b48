//! Rotary position embeddings (arXiv 2104.09864).

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{Shape, Tensor};

use super::tensor::{check_device, check_dtype};
use crate::error::Nf4Error;
use crate::format::{FloatType, check_shape};

#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;

/// The sizes of a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RotarySpec {
    /// Rows of the batch.
    pub batch: usize,
    /// Tokens of a row.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements of a head that are rotated, the first ones.
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

impl RotarySpec {
    /// Shape of what is rotated.
    pub fn shape(&self) -> Shape {
        Shape::from([self.batch, self.tokens, self.heads, self.head_dim])
    }

    /// The rotation back.
    pub fn inverted(self) -> Self {
        Self {
            inverse: !self.inverse,
            ..self
        }
    }
}

/// Rotations of a backend: by one kernel on CubeCL, by `host` on Flex.
#[backend_extension(
    Autodiff,
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Fusion: cfg(feature = "fusion"),
)]
pub trait RotaryBackend: Backend {
    /// `x cos + swap_halves(x) sin` of the first elements of each head, the others as they are.
    ///
    /// # Shapes
    /// - `x`: [`RotarySpec::shape`], and so the result
    /// - `cos`, `sin`: `[table_rows, tokens, rotary_dim]`, without gradients
    #[fusion(meta = |x: &TensorSpec, _cos: &TensorSpec, _sin: &TensorSpec, spec: &RotarySpec| {
        TensorSpec::new(spec.shape(), x.dtype)
    })]
    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        spec: RotarySpec,
    ) -> FloatTensor<Self>;
}

/// Rotates queries or keys by their positions: `x cos + swap_halves(x) sin` of the first elements of each
/// head, as many as the tables have; the others stay.
///
/// Computed in the type of the tables and rounded to that of `x`. The gradient flows to `x`.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_nf4::op::rotary;
///
/// let device = Device::default();
/// let x = Tensor::<4>::random([1, 8, 10, 64], Distribution::Default, &device);
/// // By no angle at all.
/// let (cos, sin) = (Tensor::ones([1, 10, 64], &device), Tensor::zeros([1, 10, 64], &device));
/// let y = rotary(x.clone(), cos, sin)?;
/// assert_eq!(y.into_data(), x.into_data());
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// # Shapes
/// - `x`: `[batch, heads, tokens, head_dim]`, and so the result
/// - `cos`, `sin`: `[batch or 1, tokens, rotary_dim]`; the sines of the first half carry the minus of the
///   rotation
///
/// # Errors
/// [`Nf4Error::Shape`] for tables that do not fit, [`Nf4Error::Config`] for a part that is odd or longer
/// than a head, [`Nf4Error::Dtype`] for a type other than f16, bf16 or f32 and for tables of two types,
/// [`Nf4Error::Device`] unless all are on one device.
pub fn rotary(x: Tensor<4>, cos: Tensor<3>, sin: Tensor<3>) -> Result<Tensor<4>, Nf4Error> {
    let spec = check_tables(&x, &cos, &sin)?;
    if spec.shape().num_elements() == 0 {
        return Ok(x);
    }
    let x = x.swap_dims(1, 2).into_dispatch();
    let y = <Dispatch as RotaryBackend>::rotary(x, cos.into_dispatch(), sin.into_dispatch(), spec);
    Ok(Tensor::<4>::from_dispatch(y).swap_dims(1, 2))
}

/// The rotation of `x`, if the tables fit it.
pub(super) fn check_tables(
    x: &Tensor<4>,
    cos: &Tensor<3>,
    sin: &Tensor<3>,
) -> Result<RotarySpec, Nf4Error> {
    let [batch, heads, tokens, head_dim] = x.dims();
    let [given_rows, _, rotary_dim] = cos.dims();
    let table_rows = if given_rows == 1 { 1 } else { batch };
    let expected = [table_rows, tokens, rotary_dim];
    check_shape("cos", &expected, &cos.dims())?;
    check_shape("sin", &expected, &sin.dims())?;
    let dtype = FloatType::from_dtype(x.dtype(), "x")?;
    let table_dtype = FloatType::from_dtype(cos.dtype(), "cos")?;
    check_dtype("sin", sin, "as cos", &[cos.dtype()])?;
    for (name, table) in [("cos", cos), ("sin", sin)] {
        check_device(name, &table.device(), &x.device())?;
    }
    if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) || rotary_dim > head_dim {
        return Err(Nf4Error::Config {
            field: "rotary_dim",
            expected: "an even part of a head",
            given: format!("{rotary_dim} of {head_dim}"),
        });
    }
    Ok(RotarySpec {
        batch,
        tokens,
        heads,
        head_dim,
        rotary_dim,
        table_rows,
        inverse: false,
        dtype,
        table_dtype,
    })
}
