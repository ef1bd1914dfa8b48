//! Products with the weights of the experts that rows are sent to.

mod base;

use burn::backend::Dispatch;
use burn::tensor::{DType, Int, Tensor};

pub(super) use base::GroupedWeights;
pub use base::{GroupedBackend, GroupedSpec};

use super::tensor::{ExpertStack, check_device, check_dtype};
use crate::activation::Activation;
use crate::error::Nf4Error;
use crate::format::{FloatType, check_len, check_shape};

/// The weights of experts, and their biases.
#[derive(Debug, Clone)]
pub struct ExpertPart<'a> {
    /// The weights, `[out_features, in_features]` each.
    pub stack: &'a ExpertStack,
    /// `[experts, out_features]`, of the dtype of `x`.
    pub bias: Option<Tensor<2>>,
}

/// The gates of experts and what they open.
#[derive(Debug, Clone)]
#[allow(
    clippy::large_enum_variant,
    reason = "it is taken apart by the function that it is made for"
)]
pub enum GatedExperts<'a> {
    /// In stacks of their own, of the same sizes; both have biases, or neither has.
    Apart {
        /// The gates.
        gate: ExpertPart<'a>,
        /// What they open.
        up: ExpertPart<'a>,
    },
    /// In one stack, whose even rows are those of the gates, as in gpt-oss.
    Interleaved(ExpertPart<'a>),
}

/// Entries up to which each is looked at by all cubes.
const MAX_ENTRIES: usize = 1024;

/// Entries of an expert up to which the grouped kernel decodes a weight no more often than is good: twice.
const MAX_ENTRIES_AN_EXPERT: usize = 16;

/// Whether so many tokens, each sent to `per_token` of `experts`, are for [`grouped_linear`]; more are better
/// sent to each expert alone ([`ExpertStack::linear`]), with products of many rows. A rule by the sizes, which
/// was not measured.
pub const fn grouped_pays(tokens: usize, per_token: usize, experts: usize) -> bool {
    let entries = tokens.saturating_mul(per_token);
    entries <= MAX_ENTRIES && entries <= experts.saturating_mul(MAX_ENTRIES_AN_EXPERT)
}

/// `y = x Wₑᵀ + bₑ` of each token with each of its experts `e`, which the device alone need know
/// ([`route`](super::route)): one launch for all experts that are used, with sums in f32.
///
/// For a few tokens, see [`grouped_pays`]: a plane of a graphics card takes a row of an expert's weight for up to
/// eight tokens at a time. On the CPU (Flex) each expert is multiplied with the rows of its tokens.
///
/// There is no gradient. An id that no expert has is an error on the CPU; on other devices, where looking would
/// wait for the device, it gives a row of NaN, and nothing outside of the weights is read.
///
/// ```
/// use burn::tensor::{Device, Distribution, Int, Tensor};
/// use burn_nf4::BlockWeight;
/// use burn_nf4::format::QuantConfig;
/// use burn_nf4::op::{ExpertStack, grouped_linear};
///
/// let device = Device::default();
/// let experts = Tensor::<3>::random([4, 32, 64], Distribution::Default, &device);
/// let experts = ExpertStack::from_whole(BlockWeight::quantize(experts, QuantConfig::default())?)?;
/// let x = Tensor::<2>::random([3, 64], Distribution::Default, &device);
/// let ids = Tensor::<2, Int>::from_data([[0, 3], [3, 1], [2, 3]], &device);
/// let y = grouped_linear(x, ids, &experts, None)?;
/// assert_eq!(y.dims(), [3 * 2, 32]);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// # Shapes
/// - `x`: `[tokens, in_features]`, or `[tokens * per_token, in_features]` with a row for each expert of a token
/// - `ids`: `[tokens, per_token]`, of any integer type
/// - `bias`: `[experts, out_features]`
/// - returns `[tokens * per_token, out_features]`
///
/// # Errors
/// [`Nf4Error::Shape`] if `x` or `bias` does not fit, [`Nf4Error::Dtype`] unless `x` is f16, bf16 or f32 and
/// `bias` of the same, [`Nf4Error::Device`] unless all are on one device, [`Nf4Error::IdRange`] on the CPU at the
/// first id that no expert has, [`Nf4Error::Variant`] for an `x` or a bias with autodiff: use
/// [`ExpertStack::linear`].
pub fn grouped_linear(
    x: Tensor<2>,
    ids: Tensor<2, Int>,
    stack: &ExpertStack,
    bias: Option<Tensor<2>>,
) -> Result<Tensor<2>, Nf4Error> {
    grouped(x, ids, vec![ExpertPart { stack, bias }], None)
}

/// `activation(x Gₑᵀ + bₑ)` times what opens of `x Uₑᵀ + cₑ`: the first half of the gated MLP of each expert
/// (arXiv 2002.05202), otherwise as [`grouped_linear`]. One launch, on graphics cards with sums and activation
/// in f32; on the CPU (Flex) products are rounded to the dtype of `x` before that, as
/// [`gated`](super::gated) takes them.
///
/// # Shapes
/// - `x`, `ids`: as for [`grouped_linear`]
/// - returns `[tokens * per_token, out_features]`, of interleaved weights half of that
///
/// # Errors
/// Those of [`grouped_linear`]; [`Nf4Error::Shape`] and [`Nf4Error::Dtype`] unless gates and what they open are of
/// the same sizes and quantized in one way, [`Nf4Error::Config`] if only one of them has biases,
/// [`Nf4Error::Length`] for an odd number of interleaved rows.
pub fn grouped_gated_linear(
    x: Tensor<2>,
    ids: Tensor<2, Int>,
    experts: GatedExperts,
    activation: Activation,
) -> Result<Tensor<2>, Nf4Error> {
    let parts = match experts {
        GatedExperts::Interleaved(part) => {
            let [rows, _] = part.stack.matrix_dims();
            check_len("rows of interleaved gates", rows / 2 * 2, rows)?;
            vec![part]
        }
        GatedExperts::Apart { gate, up } => {
            check_alike(&gate, &up)?;
            vec![gate, up]
        }
    };
    grouped(x, ids, parts, Some(activation))
}

/// Checks that gates and what they open can be multiplied by one kernel.
fn check_alike(gate: &ExpertPart, up: &ExpertPart) -> Result<(), Nf4Error> {
    let shape = |part: &ExpertPart| {
        let [n, k] = part.stack.matrix_dims();
        [part.stack.experts(), n, k]
    };
    check_shape("weights of what gates open", &shape(gate), &shape(up))?;
    let config = |part: &ExpertPart| part.stack.layout().image().config();
    if config(gate) != config(up) {
        return Err(Nf4Error::Dtype {
            tensor: "weights of what gates open".into(),
            expected: format!("{}, as the gates", gate.stack.form()),
            given: up.stack.form().to_string(),
        });
    }
    if gate.bias.is_some() != up.bias.is_some() {
        return Err(Nf4Error::Config {
            field: "bias",
            expected: "one of gates and of what they open, or none",
            given: "one".into(),
        });
    }
    Ok(())
}

fn grouped(
    x: Tensor<2>,
    ids: Tensor<2, Int>,
    parts: Vec<ExpertPart>,
    gate: Option<Activation>,
) -> Result<Tensor<2>, Nf4Error> {
    let [tokens, per_token] = ids.dims();
    let entries = tokens * per_token;
    let given = x.dtype();
    let dtype = FloatType::from_dtype(given, "x")?;
    let [rows, _] = x.dims();
    let [_, k] = parts[0].stack.matrix_dims();
    let per_row = match rows == tokens {
        true => per_token,
        false => 1,
    };
    check_shape("x", &[entries / per_row.max(1), k], &x.dims())?;
    let device = x.device();
    check_device("ids", &ids.device(), &device)?;
    check_untracked("x", &x)?;
    let spec = GroupedSpec {
        stacks: parts.iter().map(|part| *part.stack.layout()).collect(),
        entries,
        per_row,
        tokens,
        dtype,
        gate,
    };
    let weights = parts.into_iter().map(|part| part.checked(&x));
    let weights = weights.collect::<Result<Vec<_>, _>>()?;
    #[cfg(feature = "flex")]
    super::backends::flex::check_ids("ids", &ids, spec.stacks[0].experts(), None)?;
    if entries == 0 {
        return Ok(Tensor::zeros([0, spec.columns()], (&device, given)));
    }
    let weights = into_dispatch(weights);
    let ids = ids.without_autodiff().reshape([entries]).into_dispatch();
    let x = x.cast(DType::from(dtype)).into_dispatch();
    let y = <Dispatch as GroupedBackend>::grouped_product(x, ids, weights, spec);
    Ok(Tensor::<2>::from_dispatch(y).cast(given))
}

impl ExpertPart<'_> {
    /// The words, and the bias, checked against `x`.
    fn checked(self, x: &Tensor<2>) -> Result<(Tensor<1, Int>, Option<Tensor<2>>), Nf4Error> {
        let Self { stack, bias } = self;
        let packed = stack.checked_packed()?;
        let device = x.device();
        check_device("packed weights", &packed.device(), &device)?;
        if let Some(bias) = &bias {
            let [rows, _] = stack.matrix_dims();
            check_shape("bias", &[stack.experts(), rows], &bias.dims())?;
            check_dtype("bias", bias, "as x", &[x.dtype()])?;
            check_device("bias", &bias.device(), &device)?;
            check_untracked("bias", bias)?;
        }
        Ok((packed.without_autodiff(), bias))
    }
}

/// Checks that a tensor can have no gradient.
fn check_untracked(name: &str, tensor: &Tensor<2>) -> Result<(), Nf4Error> {
    if !tensor.is_autodiff() {
        return Ok(());
    }
    Err(Nf4Error::Variant {
        variant: "grouped_gemv",
        reason: format!("it has no gradients, and `{name}` is on a device with autodiff"),
    })
}

fn into_dispatch(weights: Vec<(Tensor<1, Int>, Option<Tensor<2>>)>) -> GroupedWeights<Dispatch> {
    let mut weights = weights.into_iter();
    match (weights.next(), weights.next()) {
        (Some((packed, None)), None) => GroupedWeights::One {
            packed: packed.into_dispatch(),
        },
        (Some((packed, Some(bias))), None) => GroupedWeights::OneBias {
            packed: packed.into_dispatch(),
            bias: bias.into_dispatch(),
        },
        (Some((gate, None)), Some((up, None))) => GroupedWeights::Two {
            gate: gate.into_dispatch(),
            up: up.into_dispatch(),
        },
        (Some((gate, Some(gate_bias))), Some((up, Some(up_bias)))) => GroupedWeights::TwoBias {
            gate: gate.into_dispatch(),
            up: up.into_dispatch(),
            gate_bias: gate_bias.into_dispatch(),
            up_bias: up_bias.into_dispatch(),
        },
        _ => unreachable!("one stack or two, with biases or without"),
    }
}
