//! The attention kernels at the launch level: what ranges on the device may hold, that every element of a
//! result is written and nothing behind it, and what is refused. A device that is compiled in but missing
//! fails its tests.
#![cfg(feature = "cube")]

mod tensors;

use burn::backend::DispatchDevice;
use burn::tensor::Device;
use burn_nf4::Nf4Error;
use burn_nf4::format::FloatType;
use burn_nf4::launch::{
    AttentionOperands, AttentionPlan, AttentionProblem, AttentionResults, AttentionVariant,
    TokenMajor,
};
use cubecl::prelude::Client;
use cubecl::server::Handle;
use half::{bf16, f16};
use rstest::rstest;
use tensors::*;

/// Bytes that are NaN in every float type; results are filled with them before a launch.
const POISON: u8 = 0xff;
/// Bytes behind every result that must stay as they are.
const GUARD_BYTES: usize = 64;

fn client(device: &Device) -> Client {
    match device.as_dispatch() {
        DispatchDevice::Cube(device) => device.client(),
        other => panic!("{other:?} is not a CubeCL device"),
    }
}

const PROBLEM: AttentionProblem = AttentionProblem {
    batch: 1,
    heads: 3,
    kv_heads: 1,
    queries: 5,
    keys: 7,
    head_dim: 8,
    range_rows: 1,
    scale: 0.4,
    softcap: None,
    dtype: FloatType::F32,
};

/// A small problem of a dtype and a head that the kernels take.
fn problem(variant: AttentionVariant) -> AttentionProblem {
    match variant {
        AttentionVariant::Rows => PROBLEM,
        AttentionVariant::TensorCore => AttentionProblem {
            dtype: FloatType::BF16,
            head_dim: 16,
            ..PROBLEM
        },
    }
}

fn contiguous(handle: Handle, [tokens, heads, d]: [usize; 3]) -> TokenMajor {
    TokenMajor {
        handle,
        strides: [tokens * heads * d, heads * d, d],
    }
}

fn query_like(client: &Client, problem: &AttentionProblem, seed: u64) -> TokenMajor {
    let AttentionProblem {
        batch,
        heads,
        queries,
        head_dim,
        ..
    } = *problem;
    let values = uniform(batch * queries * heads * head_dim, seed);
    let handle = client.create_from_slice(&bytes(&values, problem.dtype));
    contiguous(handle, [queries, heads, head_dim])
}

fn key_like(client: &Client, problem: &AttentionProblem, seed: u64) -> TokenMajor {
    let AttentionProblem {
        kv_heads,
        keys,
        head_dim,
        ..
    } = *problem;
    let values = uniform(problem.batch * keys * kv_heads * head_dim, seed);
    let handle = client.create_from_slice(&bytes(&values, problem.dtype));
    contiguous(handle, [keys, kv_heads, head_dim])
}

fn operands(client: &Client, problem: &AttentionProblem, ranges: &[[i32; 2]]) -> AttentionOperands {
    AttentionOperands {
        q: query_like(client, problem, 1),
        k: key_like(client, problem, 2),
        v: key_like(client, problem, 3),
        ranges: client.create_from_slice(bytemuck::cast_slice(ranges)),
    }
}

/// A poisoned buffer, with a guard behind.
fn poisoned(client: &Client, bytes: usize) -> Handle {
    client.create_from_slice(&vec![POISON; bytes + GUARD_BYTES])
}

/// What a kernel wrote into a poisoned buffer.
fn read(client: &Client, handle: Handle, bytes: usize, what: &str) -> Vec<u8> {
    let mut read = client.read_one(handle).expect("the kernel ran").to_vec();
    let guard = read.split_off(bytes);
    let untouched = guard.iter().take(GUARD_BYTES).all(|&byte| byte == POISON);
    assert!(untouched, "{what}: written behind its end");
    read
}

/// The output, the log-sum-exp, and the gradients of q, k and v.
fn run(
    client: &Client,
    problem: AttentionProblem,
    ranges: &[[i32; 2]],
    variant: AttentionVariant,
) -> [Vec<u8>; 5] {
    let plan = AttentionPlan::new(client, problem, Some(variant)).expect("a valid problem");
    assert_eq!(plan.variant(), variant);
    let operands = operands(client, &problem, ranges);
    let (query_bytes, key_bytes) = (problem.query_bytes(), problem.key_bytes());
    let sizes = [
        query_bytes,
        problem.lse_bytes(),
        query_bytes,
        key_bytes,
        key_bytes,
    ];
    let [out, lse, dq, dk, dv] = sizes.map(|bytes| poisoned(client, bytes));
    plan.forward(&operands, out.clone(), lse.clone())
        .expect("valid buffers");
    let results = AttentionResults {
        output: contiguous(
            out.clone(),
            [problem.queries, problem.heads, problem.head_dim],
        ),
        grad: query_like(client, &problem, 4),
        lse: lse.clone(),
    };
    let grads = [dq.clone(), dk.clone(), dv.clone()];
    plan.backward(&operands, &results, grads)
        .expect("valid buffers");
    let all = [
        (out, "output"),
        (lse, "lse"),
        (dq, "dq"),
        (dk, "dk"),
        (dv, "dv"),
    ];
    let mut sizes = sizes.into_iter();
    all.map(|(handle, what)| read(client, handle, sizes.next().expect("five"), what))
}

/// Whether a result has a NaN; all but the log-sum-exp, the second, are of the dtype.
fn has_nan(index: usize, bytes: &[u8], dtype: FloatType) -> bool {
    match dtype {
        FloatType::F32 => bytemuck::pod_collect_to_vec::<u8, f32>(bytes)
            .iter()
            .any(|x| x.is_nan()),
        _ if index == 1 => has_nan(index, bytes, FloatType::F32),
        FloatType::BF16 => bytemuck::pod_collect_to_vec::<u8, bf16>(bytes)
            .iter()
            .any(|x| x.is_nan()),
        FloatType::F16 => bytemuck::pod_collect_to_vec::<u8, f16>(bytes)
            .iter()
            .any(|x| x.is_nan()),
    }
}

/// Ranges lie on the device, where nothing has checked them: what they have outside of the keys is left out.
fn ranges_outside_of_the_keys_are_clamped(client: &Client, variant: AttentionVariant) {
    let hostile = [[-100, -3], [-5, 2], [1, 100], [6, i32::MAX], [8, i32::MAX]];
    let clamped = [[0, 0], [0, 2], [1, 7], [6, 7], [7, 7]];
    let problem = problem(variant);
    let got = run(client, problem, &hostile, variant);
    let expected = run(client, problem, &clamped, variant);
    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
        assert_same_bits(got, expected, &format!("result {i}"));
        assert!(!has_nan(i, got, problem.dtype), "result {i}");
    }
}

/// Ranges that decrease, though none may, neither hang the kernels nor lead them out of their buffers.
fn ranges_without_order_do_no_harm(client: &Client, variant: AttentionVariant) {
    let ranges = [
        [i32::MAX, i32::MIN],
        [3, 1],
        [i32::MIN, i32::MAX],
        [0, 1],
        [-1, -1],
    ];
    let problem = problem(variant);
    let results = run(client, problem, &ranges, variant);
    // On tensor cores the values mean nothing then, but `run` has looked behind their ends.
    if variant == AttentionVariant::Rows {
        for (i, result) in results.iter().enumerate() {
            assert!(!has_nan(i, result, problem.dtype));
        }
    }
}

/// Sizes that no other test has: more of everything than a cube takes at a time, and little of it.
fn every_element_is_written(client: &Client, variant: AttentionVariant) {
    for (queries, keys, head_dim, heads) in [
        (1, 1, 1usize, 1),
        (50, 300, 20, 6),
        (9, 140, 256, 2),
        (70, 90, 240, 1),
        (1, 500, 96, 5),
        (150, 200, 48, 2),
    ] {
        let head_dim = match variant {
            AttentionVariant::Rows => head_dim,
            AttentionVariant::TensorCore => head_dim.next_multiple_of(16),
        };
        let problem = AttentionProblem {
            batch: 2,
            heads,
            queries,
            keys,
            head_dim,
            softcap: Some(20.0),
            ..problem(variant)
        };
        let ranges = vec![[0, keys as i32]; queries];
        for (i, result) in run(client, problem, &ranges, variant).iter().enumerate() {
            assert!(!has_nan(i, result, problem.dtype), "{problem:?}");
        }
    }
}

fn buffers_that_do_not_fit_are_named(client: &Client, variant: AttentionVariant) {
    let problem = problem(variant);
    let plan = AttentionPlan::new(client, problem, Some(variant)).expect("a valid problem");
    let (query_bytes, key_bytes) = (problem.query_bytes(), problem.key_bytes());
    let lse_bytes = problem.lse_bytes();
    let good = || operands(client, &problem, &[[0, 7]; 5]);
    let results = |lse: usize| AttentionResults {
        output: query_like(client, &problem, 1),
        grad: query_like(client, &problem, 1),
        lse: client.empty(lse),
    };
    let forward = |operands: &AttentionOperands, out: usize, lse: usize| {
        plan.forward(operands, client.empty(out), client.empty(lse))
    };
    let backward = |lse: usize, grads: [usize; 3]| {
        let grads = grads.map(|bytes| client.empty(bytes));
        plan.backward(&good(), &results(lse), grads)
    };
    let length = |tensor: &str, expected: usize, given: usize| {
        Err(Nf4Error::Length {
            tensor: tensor.into(),
            expected,
            given,
        })
    };
    assert_eq!(forward(&good(), query_bytes, lse_bytes), Ok(()));
    let short = forward(&good(), query_bytes - 4, lse_bytes);
    assert_eq!(short, length("output", query_bytes, query_bytes - 4));
    let short = forward(&good(), query_bytes, lse_bytes - 4);
    assert_eq!(short, length("log-sum-exp", lse_bytes, lse_bytes - 4));
    let grads = [query_bytes, key_bytes, key_bytes];
    let short = backward(lse_bytes - 4, grads);
    assert_eq!(short, length("log-sum-exp", lse_bytes, lse_bytes - 4));
    for (i, tensor) in ["gradient of q", "gradient of k", "gradient of v"]
        .into_iter()
        .enumerate()
    {
        let mut short = grads;
        short[i] -= 4;
        assert_eq!(
            backward(lse_bytes, short),
            length(tensor, grads[i], short[i])
        );
    }

    let mut wide = good();
    wide.k.strides[1] += 8;
    let expected = key_bytes + 6 * 8 * problem.dtype.size_bytes();
    assert_eq!(
        forward(&wide, query_bytes, lse_bytes),
        length("k", expected, key_bytes)
    );
    let mut endless = good();
    endless.v.strides[1] = usize::MAX / 2;
    assert_eq!(
        forward(&endless, query_bytes, lse_bytes),
        length("v", usize::MAX, key_bytes)
    );
    let mut skewed = good();
    skewed.q.handle = client.empty(query_bytes + 64).offset_start(4);
    assert_eq!(
        forward(&skewed, query_bytes, lse_bytes),
        Err(Nf4Error::Alignment {
            tensor: "q".into(),
            expected: 16,
            given: 4,
        })
    );
    let mut few = good();
    few.ranges = client.empty(36);
    assert_eq!(
        forward(&few, query_bytes, lse_bytes),
        length("key ranges", 40, 36)
    );
}

fn problems_that_make_no_sense_are_errors(client: &Client, variant: AttentionVariant) {
    let problem = problem(variant);
    let error = |problem| AttentionPlan::new(client, problem, Some(variant)).expect_err("no sense");
    for problem in [
        AttentionProblem { keys: 0, ..problem },
        AttentionProblem {
            kv_heads: 0,
            ..problem
        },
        AttentionProblem {
            queries: usize::MAX / 8,
            ..problem
        },
        AttentionProblem {
            keys: i32::MAX as usize + 1,
            ..problem
        },
    ] {
        let error = error(problem);
        assert!(matches!(error, Nf4Error::ElementCount { .. }), "{error}");
    }
    let heads = error(AttentionProblem {
        kv_heads: 2,
        ..problem
    });
    assert!(matches!(heads, Nf4Error::Config { .. }), "{heads}");
    let rows = error(AttentionProblem {
        batch: 4,
        range_rows: 3,
        ..problem
    });
    assert!(matches!(rows, Nf4Error::Shape { .. }), "{rows}");
    let long = error(AttentionProblem {
        head_dim: 4096,
        ..problem
    });
    assert!(matches!(long, Nf4Error::Variant { .. }), "{long}");
}

/// Strides that no vector of eight elements fits are told of.
#[cfg(feature = "cuda")]
#[test]
fn tensor_cores_want_strides_of_eight() {
    let variant = AttentionVariant::TensorCore;
    let (client, problem) = (client(&Device::cuda(0)), problem(variant));
    let plan = AttentionPlan::new(&client, problem, Some(variant)).expect("a valid problem");
    assert_eq!(plan.stride_multiple(), 8);
    let mut operands = operands(&client, &problem, &[[0, 7]; 5]);
    operands.k.handle = client.empty(problem.key_bytes() * 2);
    operands.k.strides[1] += 4;
    let (out, lse) = (problem.query_bytes(), problem.lse_bytes());
    let result = plan.forward(&operands, client.empty(out), client.empty(lse));
    let error = result.expect_err("a stride of 20").to_string();
    assert!(error.contains("a stride of 20 elements"), "{error}");
}

macro_rules! device_tests {
    ($name:ident, $feature:literal, $device:expr, $($variant:ident)*) => {
        #[cfg(feature = $feature)]
        mod $name {
            use super::*;

            device_tests!(@variants $device, [$($variant)*],
                ranges_outside_of_the_keys_are_clamped
                ranges_without_order_do_no_harm
                every_element_is_written
                buffers_that_do_not_fit_are_named
                problems_that_make_no_sense_are_errors
            );
        }
    };
    (@variants $device:expr, $variants:tt, $($test:ident)*) => {
        $(device_tests!(@each $device, $variants, $test);)*
    };
    (@each $device:expr, [$($variant:ident)*], $test:ident) => {
        #[rstest]
        fn $test(#[values($(AttentionVariant::$variant),*)] variant: AttentionVariant) {
            super::$test(&client(&$device), variant);
        }
    };
}

device_tests!(cuda, "cuda", Device::cuda(0), Rows TensorCore);
device_tests!(rocm, "rocm", Device::rocm(0), Rows);
device_tests!(wgpu, "wgpu", Device::wgpu(Default::default()), Rows);
device_tests!(vulkan, "vulkan", Device::vulkan(Default::default()), Rows);
device_tests!(metal, "metal", Device::metal(Default::default()), Rows);
device_tests!(cpu, "cpu", Device::cpu(), Rows);
