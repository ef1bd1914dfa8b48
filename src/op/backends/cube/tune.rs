//! Which way to compute a product with a packed weight: measured on the device, once for each kind of
//! product, by CubeCL's autotuner, which keeps what it finds.

use std::fmt::{Display, Formatter};
use std::sync::Arc;

use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::CubeTuneId;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::zeros_client;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::Client;
use cubecl::tune::{AutotuneKey, LocalTuner, Tunable, TunableSet, TuneGroup, local_tuner};
use serde::{Deserialize, Serialize};

use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::launch::{
    Cut, Lora, MatmulPlan, MatmulVariant, Operands, Product, TENSOR_CORE_ROWS, has_tensor_cores,
};
use crate::op::base::{LoraSpec, MatmulSpec, add_lora, decoded_matmul};

/// Rows of `x` up to which the plain kernel is taken unmeasured where there are no tensor cores: it
/// reads an eighth of what decoding writes and reads.
const GEMV_ROWS: usize = 4;

/// Rows of `x` from which it is not even measured.
const MAX_GEMV_ROWS: usize = 32;

/// Rows of `x` up to which the kernel on tensor cores is taken unmeasured where cuBLASLt is there: on an
/// H100 the two break even between 128 and 192 rows for a large weight.
const CUBLASLT_ROWS: usize = 128;

/// Bytes written to push a weight out of the caches before it is read for a measurement.
const EVICTION_BYTES: usize = 128 << 20;

/// A product, as the functions measured take it.
#[derive(Clone)]
pub(super) struct Inputs {
    pub x: CubeTensor,
    pub packed: CubeTensor,
    pub bias: Option<CubeTensor>,
    pub lora: Option<LoraInputs>,
    pub spec: MatmulSpec,
}

/// The low-rank branch of a product.
#[derive(Clone)]
pub(super) struct LoraInputs {
    a: CubeTensor,
    b: CubeTensor,
    spec: LoraSpec,
}

impl LoraInputs {
    pub fn new(a: CubeTensor, b: CubeTensor, spec: LoraSpec) -> Self {
        Self {
            a: into_contiguous(a),
            b: into_contiguous(b),
            spec,
        }
    }

    /// Adds the branch with products of its own.
    fn add(self, y: CubeTensor, x: CubeTensor) -> CubeTensor {
        add_lora::<CubeBackend>(y, x, self.a, self.b, self.spec)
    }

    /// The branch as a kernel adds it, if the device can.
    fn joined(&self) -> Option<Lora> {
        let LoraSpec {
            rank, scale, dtype, ..
        } = self.spec;
        Lora::check(&self.a.client, dtype).ok()?;
        Some(Lora {
            a: self.a.handle.clone(),
            b: self.b.handle.clone(),
            rank,
            scale: scale as f32,
            dtype,
        })
    }
}

/// A way to compute it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// A kernel, with the tile that its rule gives.
    Kernel(MatmulVariant),
    /// The tensor core kernel, cut up in this way.
    Cut(Cut),
    /// Decode the weight, then a dense product.
    Decode,
}

impl Way {
    /// All that may be the fastest.
    const ALL: [Self; 6] = [
        Self::Cut(Cut::Whole),
        Self::Cut(Cut::Wide),
        Self::Cut(Cut::Narrow),
        Self::Kernel(MatmulVariant::Levels),
        Self::Kernel(MatmulVariant::Gemv),
        Self::Decode,
    ];

    fn name(self) -> String {
        match self {
            Self::Kernel(variant) => variant.name().into(),
            Self::Cut(cut) => format!("tensor_core-{}", cut.name()),
            Self::Decode => "decode".into(),
        }
    }

    /// The ways of a device with or without tensor cores for so many rows, by the sizes alone: the
    /// first that the device can go. `cublaslt`: products with the decoded
    /// weight are cuBLASLt's.
    fn by_rule(tensor_cores: bool, cublaslt: bool, m: usize) -> [Option<Self>; 4] {
        let kernel = |wanted: bool, variant| wanted.then_some(Self::Kernel(variant));
        let decode = cublaslt && m > CUBLASLT_ROWS;
        [
            kernel(tensor_cores && m == 1, MatmulVariant::Levels),
            kernel(tensor_cores && !decode, MatmulVariant::TensorCore),
            kernel(m <= GEMV_ROWS, MatmulVariant::Gemv),
            Some(Self::Decode),
        ]
    }

    /// Whether it takes part in a measurement: 1 if so, 0 if it stands in where all others fail, -1 if
    /// never.
    fn priority(self, tensor_cores: bool, m: usize) -> i8 {
        let takes_part = match self {
            Self::Kernel(MatmulVariant::Levels) => {
                return if tensor_cores && m == 1 { 1 } else { -1 };
            }
            // Its cuts are measured.
            Self::Kernel(MatmulVariant::TensorCore) => return -1,
            Self::Kernel(MatmulVariant::Gemv) => !tensor_cores && m <= MAX_GEMV_ROWS,
            // What does not fit the device fails, and is left out then.
            Self::Cut(_) if !tensor_cores => return -1,
            Self::Cut(Cut::Whole) => m <= 16,
            Self::Cut(Cut::Wide) => m <= 32,
            Self::Cut(Cut::Narrow) => m > 4,
            // Up to 64 rows it needs at least twice the time wherever it was measured.
            Self::Decode => {
                m > if tensor_cores {
                    TENSOR_CORE_ROWS
                } else {
                    GEMV_ROWS
                }
            }
        };
        i8::from(takes_part)
    }

    /// Computes the product this way.
    ///
    /// # Errors
    /// [`Nf4Error::Variant`] if the device cannot.
    pub fn run(self, inputs: Inputs) -> Result<CubeTensor, Nf4Error> {
        let Inputs {
            x,
            packed,
            bias,
            lora,
            spec,
        } = inputs;
        let layout = &spec.weight.layout;
        let product = spec.product();
        let with_bias = bias.is_some();
        let plan = match self {
            Self::Kernel(variant) => Some(MatmulPlan::new(
                &x.client,
                layout,
                product,
                with_bias,
                Some(variant),
            )?),
            Self::Cut(cut) => {
                let tile = cut.tile(&x.client, &product);
                let variant = MatmulVariant::TensorCore;
                let client = &x.client;
                let plan =
                    MatmulPlan::with_tile(client, layout, product, with_bias, variant, tile)?;
                Some(plan)
            }
            Self::Decode => None,
        };
        let joined = plan.as_ref().and(lora.as_ref());
        let joined = joined.and_then(LoraInputs::joined);
        let beside = lora.filter(|_| joined.is_none());
        let y = match plan {
            Some(plan) => {
                let out = x.client.empty(plan.out_bytes());
                let operands = Operands {
                    x: x.handle.clone(),
                    packed: packed.handle,
                    bias: bias.map(|bias| bias.handle),
                    lora: joined,
                };
                plan.launch(operands, out.clone())?;
                let shape = Shape::from([product.m, product.n]);
                let (client, device) = (x.client.clone(), x.device.clone());
                CubeTensor::new_contiguous(client, device, shape, out, product.dtype.into())
            }
            None => decoded_matmul::<CubeBackend>(x.clone(), packed, bias, spec.linear()),
        };
        Ok(match beside {
            Some(lora) => lora.add(y, x),
            None => y,
        })
    }
}

/// Products that the same way is fastest for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct MatmulKey {
    /// Rows of `x`, rounded up, see [`rounded_rows`].
    m: usize,
    n: usize,
    k: usize,
    dtype: FloatType,
    block_size: usize,
    nested: bool,
    bias: bool,
    /// Rank of the branch, rounded up to a power of two; zero without one.
    rank: usize,
    /// Whether the product with the decoded weight is cuBLASLt's.
    cublaslt: bool,
}

impl Display for MatmulKey {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

impl AutotuneKey for MatmulKey {}

impl MatmulKey {
    fn new(inputs: &Inputs) -> Self {
        let Product { m, n, k, dtype } = inputs.spec.product();
        let config = inputs.spec.weight.layout.config();
        Self {
            m: rounded_rows(m),
            n,
            k,
            dtype,
            block_size: config.block_size.elems(),
            nested: config.nested_block_size.is_some(),
            bias: inputs.bias.is_some(),
            rank: match &inputs.lora {
                Some(lora) => lora.spec.rank.next_power_of_two(),
                None => 0,
            },
            cublaslt: inputs.spec.cublaslt,
        }
    }
}

/// Prompts have any length: all up to the next of these share a measurement.
fn rounded_rows(m: usize) -> usize {
    match m {
        0..=16 => m.next_power_of_two(),
        17..=64 => m.next_multiple_of(16),
        _ => m.next_multiple_of(TENSOR_CORE_ROWS),
    }
}

/// Computes a product the way that the sizes alone suggest.
pub(super) fn by_rule(inputs: Inputs) -> CubeTensor {
    let product = inputs.spec.product();
    let tensor_cores = has_tensor_cores(&inputs.x.client, product.dtype, product.k);
    Way::by_rule(tensor_cores, inputs.spec.cublaslt, product.m)
        .into_iter()
        .flatten()
        .find_map(|way| way.run(inputs.clone()).ok())
        .expect("arguments were validated, and any device can decode")
}

/// Computes a product the way that was fastest when its like was first computed on this device, or
/// finds out.
pub(super) fn fastest(inputs: Inputs) -> CubeTensor {
    static TUNER: LocalTuner<MatmulKey, CubeTuneId> = local_tuner!("matmul");
    if inputs.spec.m > MatmulSpec::MAX_ROWS {
        return by_rule(inputs);
    }
    let client = inputs.x.client.clone();
    let key = MatmulKey::new(&inputs);
    let tensor_cores = has_tensor_cores(&client, key.dtype, key.k);
    let candidates = Way::ALL
        .iter()
        .filter(|way| way.priority(tensor_cores, key.m) > 0)
        .count();
    if candidates < 2 {
        return by_rule(inputs);
    }
    let id = CubeTuneId::new(&client, &inputs.x.device);
    let tunables = {
        let client = client.clone();
        TUNER.init(&id, move || tunables(&client))
    };
    let decodes = Way::Decode.priority(tensor_cores, key.m) > 0;
    if decodes && TUNER.fastest_identity(&id, &tunables, &key).is_none() {
        // Burn measures its own product the first time, which must not happen inside of our
        // measurement.
        drop(Way::Decode.run(inputs.clone()));
    }
    TUNER.execute(&id, &client, tunables, inputs)
}

/// What is measured on a device.
fn tunables(client: &Client) -> TunableSet<MatmulKey, Inputs, CubeTensor> {
    let mut set = TunableSet::new_cloning_inputs(MatmulKey::new).with_eviction(Arc::new(
        |_: &MatmulKey, inputs: &Inputs| -> Result<(), String> {
            evict(inputs);
            Ok(())
        },
    ));
    let group = TuneGroup::new("packed", |_: &MatmulKey| 0);
    for way in Way::ALL {
        let client = client.clone();
        let priority = move |key: &MatmulKey| {
            let tensor_cores = has_tensor_cores(&client, key.dtype, key.k);
            way.priority(tensor_cores, key.m)
        };
        let run = move |inputs: Inputs| way.run(inputs).map_err(|error| error.to_string());
        set = set.with(Tunable::new(&way.name(), run).group(&group, priority));
    }
    set
}

/// A model's weights do not stay in the caches from one token to the next.
fn evict(inputs: &Inputs) {
    let CubeTensor { client, device, .. } = &inputs.x;
    if client
        .properties()
        .hardware
        .num_streaming_multiprocessors
        .is_some()
    {
        let shape = Shape::from([EVICTION_BYTES / 4]);
        drop(zeros_client(
            client.clone(),
            device.clone(),
            shape,
            DType::F32,
        ));
    }
}
