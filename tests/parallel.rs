//! Sums over ranks, and packed weights in parts, on the CPU, on one device of wgpu that several threads share, and on
//! CUDA cards (`BURN_NF4_TEST_CUDA=1`, of which there must be two).
#![cfg(any(feature = "flex", feature = "cube"))]

use burn::module::Module;
use burn::tensor::{DType, Device, Int, Tensor};
use burn_nf4::Nf4Error;
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::nn::QuantLinear;
use burn_nf4::op::{AdamWMoments, AdamWSettings, FlatAdamW};
use burn_nf4::parallel::{self, GatheredWords, Rank, ShardedWeights};
use rstest::rstest;

fn devices(count: usize) -> Vec<Device> {
    #[cfg(feature = "cuda")]
    if std::env::var_os("BURN_NF4_TEST_CUDA").is_some() {
        let all: Vec<Device> = Device::enumerate(burn::tensor::DeviceType::Cuda)
            .into_iter()
            .collect();
        assert!(all.len() >= 2, "two CUDA devices are needed");
        return all.into_iter().take(count).collect();
    }
    #[cfg(feature = "wgpu")]
    let device = Device::wgpu(Default::default());
    #[cfg(not(feature = "wgpu"))]
    let device = Device::default();
    vec![device; count]
}

fn floats(tensor: Tensor<1>) -> Vec<f32> {
    tensor.into_data().iter().collect()
}

/// All words, in two parts.
fn words(gathered: GatheredWords, len: usize) -> Vec<u32> {
    let parts = [gathered.part(0, 256), gathered.part(256, len - 256)];
    let parts = parts.map(|part| part.into_data().iter().collect::<Vec<u32>>());
    parts.concat()
}

fn in_ranks<T: Send + 'static>(
    count: usize,
    function: impl Fn(Rank) -> Result<T, Nf4Error> + Send + Sync + 'static,
) -> Vec<T> {
    parallel::run(devices(count), function).expect("no rank fails")
}

#[rstest]
fn all_ranks_get_the_same_sums(#[values(1, 2, 3)] count: usize) {
    let all = in_ranks(count, |rank| {
        let own: Vec<f32> = (0..1000)
            .map(|i| (i * (rank.index() + 1)) as f32 * 0.5)
            .collect();
        let own = Tensor::<1>::from_floats(own.as_slice(), rank.device());
        let mut sums = Vec::new();
        for _ in 0..3 {
            sums.push(floats(rank.all_reduce(own.clone())?));
        }
        Ok((rank.size(), sums, floats(own)))
    });
    let size = all.len();
    let factor = (size * (size + 1) / 2) as f32;
    for (index, (of_rank, sums, own)) in all.into_iter().enumerate() {
        assert_eq!(of_rank, size);
        for sum in sums {
            let expected: Vec<f32> = (0..1000).map(|i| i as f32 * 0.5 * factor).collect();
            assert_eq!(sum, expected);
        }
        // Whoever else has the tensor keeps its values.
        assert_eq!(own[2], (index + 1) as f32);
    }
}

#[rstest]
fn words_of_all_ranks_are_put_together_bit_for_bit(#[values(1, 2, 3)] count: usize) {
    let of = |rank: usize| -> Vec<u32> {
        (0..640u32)
            .map(|i| (i + 7 * rank as u32).wrapping_mul(0x9e37_79b9) | 0x8000_0000)
            .collect()
    };
    let all = in_ranks(count, move |rank| {
        let part = |shift| {
            let data = of(rank.index() + shift);
            let len = data.len();
            let data = burn::tensor::TensorData::new(data, [len]);
            Tensor::<1, Int>::from_data(data, (rank.device(), DType::U32))
        };
        // One is on its way while the one before it is used.
        let first = rank.gather(part(0))?;
        let first = first.end();
        let second = rank.gather(part(1))?;
        let len = 640 * rank.size();
        let given = words(first, len);
        drop(rank.gather(part(2))?);
        Ok([given, words(second.end(), len)])
    });
    let size = all.len();
    let expected: [Vec<u32>; 2] =
        [0, 1].map(|shift| (0..size).flat_map(|rank| of(rank + shift)).collect());
    for given in all {
        assert_eq!(given, expected);
    }
}

#[derive(Module, Debug)]
struct Two {
    first: QuantLinear,
    bias: burn::module::Param<Tensor<1>>,
    second: QuantLinear,
}

/// The same weights on every rank.
fn two(device: &Device) -> Two {
    let matrix = |rows: usize, columns: usize| {
        let values: Vec<f32> = (0..rows * columns)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0)
            .collect();
        Tensor::<1>::from_floats(values.as_slice(), device).reshape([rows, columns])
    };
    let linear = |rows, columns| {
        let weight = burn_nf4::BlockWeight::quantize(matrix(rows, columns), QuantConfig::default());
        QuantLinear {
            weight: weight.expect("it is a matrix of finite numbers"),
            bias: None,
            strategy: Default::default(),
        }
    };
    Two {
        first: linear(96, 64),
        bias: burn::module::Param::from_tensor(Tensor::ones([3], device)),
        second: linear(200, 96),
    }
}

#[rstest]
fn weights_in_parts_are_the_weights(
    #[values(1, 2, 3, 5)] count: usize,
    #[values(true, false)] autodiff: bool,
) {
    let all = in_ranks(count, move |rank| {
        let device = match autodiff {
            true => rank.device().clone().autodiff(),
            false => rank.device().clone(),
        };
        let whole = two(&device);
        let expected = [&whole.first, &whole.second].map(|layer| {
            layer
                .weight
                .dequantize::<2>(FloatType::F32)
                .unwrap()
                .into_data()
        });
        let bytes: usize = [&whole.first, &whole.second]
            .map(|layer| layer.weight.size_bytes())
            .iter()
            .sum();
        let (empty, sharded) = ShardedWeights::new(whole, &rank)?;
        let unusable = empty.first.weight.dequantize::<2>(FloatType::F32).is_err();
        let mut same = true;
        for _ in 0..2 {
            let gathered = sharded.gather(&rank)?.end();
            let back = sharded.put(empty.clone(), &gathered);
            let given = [&back.first, &back.second].map(|layer| {
                layer
                    .weight
                    .dequantize::<2>(FloatType::F32)
                    .unwrap()
                    .into_data()
            });
            same &= given == expected;
        }
        Ok((same, unusable, bytes, sharded.size_bytes()))
    });
    let size = all.len();
    for (same, unusable, bytes, of_rank) in all {
        assert!(same && unusable);
        // Each of two weights, and the part, are rounded up to 512 bytes.
        assert!(of_rank <= bytes / size + 3 * 512, "{of_rank} of {bytes}");
    }
}

#[test]
fn gradients_are_summed_and_values_given_by_the_first_rank() {
    let all = in_ranks(2, |rank| {
        let device = rank.device();
        let index = rank.index() as f32;
        let parameters = vec![
            Tensor::full([300], 1.0 + index, device),
            Tensor::zeros([5], device),
        ];
        let mut optimizer = FlatAdamW::new(parameters, AdamWMoments::F32)?;
        optimizer.broadcast(&rank)?;
        let before = floats(optimizer.values(DType::F32))[0];
        // The second tensor has a gradient on the second rank only, the first on both.
        let mut gradients = vec![(0, Tensor::full([300], 1.0 + index, device))];
        if rank.index() == 1 {
            gradients.push((1, Tensor::full([5], 4.0, device)));
        }
        optimizer.accumulate(gradients)?;
        optimizer.all_reduce(&rank)?;
        let with_gradients = optimizer.with_gradients();
        optimizer.step(0.1, &AdamWSettings::default(), Tensor::ones([1], device))?;
        let report = optimizer.report().unwrap().expect("a step was made");
        Ok((
            before,
            with_gradients,
            report.grad_norm,
            floats(optimizer.values(DType::F32)),
        ))
    });
    let norm = (300.0f32 * 9.0 + 5.0 * 16.0).sqrt();
    for (before, with_gradients, given, values) in &all {
        assert_eq!(*before, 1.0);
        assert_eq!(with_gradients, &[0, 1]);
        assert!((given - norm).abs() < 1e-3, "{given} {norm}");
        assert_eq!(values, &all[0].3);
    }
}

fn error<T: std::fmt::Debug + Send + 'static>(
    count: usize,
    function: impl Fn(Rank) -> Result<T, Nf4Error> + Send + Sync + 'static,
) -> String {
    let result = parallel::run(devices(count), function);
    result.expect_err("a rank fails").to_string()
}

/// The first error is that of the rank that failed, whoever waits for it.
#[rstest]
fn an_error_of_one_rank_ends_all(#[values(0, 1)] failing: usize) {
    let text = error(2, move |rank| {
        if rank.index() == failing {
            return Err(Nf4Error::Config {
                field: "sky",
                expected: "blue",
                given: "green".into(),
            });
        }
        loop {
            rank.exchange(())?;
        }
        #[allow(unreachable_code)]
        Ok(())
    });
    assert_eq!(text, "`sky` is green, expected blue");
}

#[test]
fn a_panic_of_one_rank_is_an_error() {
    let text = error(2, |rank| {
        if rank.index() == 1 {
            panic!("out of luck");
        }
        rank.exchange(())
    });
    assert_eq!(text, "rank 1: it panicked: out of luck");
}

#[test]
fn a_rank_that_ends_before_the_others_is_an_error() {
    let text = error(2, |rank| match rank.index() {
        0 => rank.exchange(0).map(drop),
        _ => Ok(()),
    });
    assert_eq!(text, "rank 1: it has ended");
}

#[test]
fn parts_of_other_lengths_are_an_error() {
    if std::env::var_os("BURN_NF4_TEST_CUDA").is_some() {
        // NCCL does not tell.
        return;
    }
    let text = error(2, |rank| {
        rank.all_reduce(Tensor::zeros([3 + rank.index()], rank.device()))
            .map(drop)
    });
    assert!(text.contains("elements, expected"), "{text}");
}

/// Whose gradients would not go through the sum.
#[test]
fn a_tensor_with_autodiff_is_refused() {
    let text = error(1, |rank| {
        let device = rank.device().clone().autodiff();
        rank.all_reduce(Tensor::ones([2], &device)).map(drop)
    });
    assert!(text.contains("without autodiff"), "{text}");
}

#[test]
fn weights_of_other_sizes_are_refused() {
    let text = error(2, |rank| {
        let rows = 64 * (rank.index() + 1);
        let weight = Tensor::<2>::ones([rows, 64], rank.device());
        let weight = burn_nf4::BlockWeight::quantize(weight, QuantConfig::default())?;
        ShardedWeights::new(weight, &rank).map(drop)
    });
    assert!(text.contains("packed weight of another rank"), "{text}");
}

#[test]
fn no_device_is_an_error() {
    let none = parallel::run(Vec::new(), |_| Ok::<_, Nf4Error>(()));
    let text = none.expect_err("there is none").to_string();
    assert_eq!(text, "`devices` is none, expected at least one device");
}

#[cfg(feature = "cuda")]
#[test]
fn a_card_that_comes_twice_is_an_error() {
    if std::env::var_os("BURN_NF4_TEST_CUDA").is_none() {
        return;
    }
    let twice = vec![Device::cuda(0), Device::cuda(0)];
    let text = parallel::run(twice, |_| Ok::<_, Nf4Error>(())).expect_err("it is one card");
    assert!(
        text.to_string().contains("expected each device once"),
        "{text}"
    );
}
