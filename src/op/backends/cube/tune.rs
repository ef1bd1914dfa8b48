//! Which way to compute a product with a packed weight: measured on the device, once for each kind of
//! product, by CubeCL's autotuner, which keeps what it finds.

use std::sync::Arc;

use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::CubeTuneId;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::zeros_client;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::Client;
use cubecl::tune::{LocalTuner, Tunable, TunableSet, TuneGroup, local_tuner};

use crate::error::Nf4Error;
use crate::launch::{
    Candidate, Lora, MatmulKey, MatmulPlan, MatmulVariant, Operands, TileRule, has_tensor_cores,
};
use crate::op::base::{
    LoraSpec, MatmulSpec, MatmulStrategy, add_lora, cast, decoded_matmul, lora_product,
};

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

    /// Whether the whole is products of dense matrices by cuBLASLt, in the dtype of `x`.
    fn is_dense(&self) -> bool {
        self.spec.matmul.cublaslt && self.spec.fits_x()
    }

    /// The product over the decoded weight, with the branch.
    fn product(self, x: CubeTensor, packed: CubeTensor, bias: Option<CubeTensor>) -> CubeTensor {
        let matmul = MatmulSpec {
            strategy: MatmulStrategy::Decode,
            ..self.spec.matmul
        };
        let spec = LoraSpec {
            matmul,
            ..self.spec
        };
        let dtype = matmul.weight.dtype;
        let factors = [self.a, self.b].map(|factor| cast::<CubeBackend>(factor, dtype));
        lora_product::<CubeBackend>(x, packed, factors, bias, spec).0
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

/// Computes a product with a kernel, which cuts the weight up as its own rule says if there is no other,
/// or over the decoded weight.
///
/// # Errors
/// [`Nf4Error::Variant`] if the device cannot.
pub(super) fn run(
    inputs: Inputs,
    variant: Option<MatmulVariant>,
    tile: Option<TileRule>,
) -> Result<CubeTensor, Nf4Error> {
    let Inputs {
        x,
        packed,
        bias,
        lora,
        spec,
    } = inputs;
    let layout = &spec.weight.layout;
    let product = spec.product();
    let (client, with_bias) = (&x.client, bias.is_some());
    let plan = match (variant, tile) {
        (None, _) => None,
        (variant, None) => Some(MatmulPlan::new(
            client, layout, product, with_bias, variant,
        )?),
        (Some(variant), Some(rule)) => {
            let tile = rule(client, &product);
            Some(MatmulPlan::with_tile(
                client, layout, product, with_bias, variant, tile,
            )?)
        }
    };
    if let (None, Some(lora)) = (&plan, &lora)
        && lora.is_dense()
    {
        return Ok(lora.clone().product(x, packed, bias));
    }
    // A branch that a kernel cannot add is added after it.
    let joined = plan.as_ref().and(lora.as_ref());
    let joined = joined.and_then(LoraInputs::joined);
    let separate = lora.filter(|_| joined.is_none());
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
    Ok(match separate {
        Some(lora) => lora.add(y, x),
        None => y,
    })
}

fn key_of(inputs: &Inputs) -> MatmulKey {
    let MatmulSpec {
        weight, cublaslt, ..
    } = inputs.spec;
    let rank = inputs.lora.as_ref().map_or(0, |lora| lora.spec.rank);
    MatmulKey::new(
        inputs.spec.product(),
        weight.layout.config(),
        inputs.bias.is_some(),
        rank,
        cublaslt,
    )
}

/// Computes a product the way that the sizes alone suggest.
pub(super) fn by_rule(inputs: Inputs) -> CubeTensor {
    let product = inputs.spec.product();
    let tensor_cores = has_tensor_cores(&inputs.x.client, product.dtype, product.k);
    MatmulVariant::by_rule(tensor_cores, inputs.spec.cublaslt, product.m)
        .map(Some)
        .chain([None])
        .find_map(|variant| run(inputs.clone(), variant, None).ok())
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
    let key = key_of(&inputs);
    let tensor_cores = has_tensor_cores(&client, key.dtype, key.k);
    let candidates = Candidate::ALL
        .iter()
        .filter(|candidate| candidate.priority(tensor_cores, key.m) > 0)
        .count();
    if candidates < 2 {
        return by_rule(inputs);
    }
    let id = CubeTuneId::new(&client, &inputs.x.device);
    let tunables = {
        let client = client.clone();
        TUNER.init(&id, move || tunables(&client))
    };
    let decodes = Candidate::DECODE.priority(tensor_cores, key.m) > 0;
    if decodes && TUNER.fastest_identity(&id, &tunables, &key).is_none() {
        // Burn measures its own product the first time, which must not happen inside of our
        // measurement.
        drop(run(inputs.clone(), None, None));
    }
    TUNER.execute(&id, &client, tunables, inputs)
}

/// What is measured on a device.
fn tunables(client: &Client) -> TunableSet<MatmulKey, Inputs, CubeTensor> {
    let mut set = TunableSet::new_cloning_inputs(key_of).with_eviction(Arc::new(
        |_: &MatmulKey, inputs: &Inputs| -> Result<(), String> {
            evict(inputs);
            Ok(())
        },
    ));
    let group = TuneGroup::new("packed", |_: &MatmulKey| 0);
    for candidate in Candidate::ALL {
        let client = client.clone();
        let priority = move |key: &MatmulKey| {
            let tensor_cores = has_tensor_cores(&client, key.dtype, key.k);
            candidate.priority(tensor_cores, key.m)
        };
        let Candidate { variant, tile, .. } = candidate;
        let run =
            move |inputs: Inputs| run(inputs, variant, tile).map_err(|error| error.to_string());
        set = set.with(Tunable::new(candidate.name, run).group(&group, priority));
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
