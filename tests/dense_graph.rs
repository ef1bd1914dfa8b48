//! Products by cuBLASLt inside of a captured graph. In a program of its own: while CUDA records, no other
//! thread of the process may allocate or wait.
#![cfg(feature = "cublaslt")]

use burn::backend::DispatchDevice;
use burn::tensor::Device;
use burn_nf4::format::FloatType;
use burn_nf4::launch::{DenseOperands, DensePlan, DenseProduct, MatrixLayout};
use cubecl::bytes::Bytes;
use cubecl::future::block_on;
use cubecl::server::Handle;
use half::bf16;

/// Bytes that are NaN.
const POISON: u8 = 0xff;

fn values(elems: usize, seed: usize) -> Vec<bf16> {
    (0..elems)
        .map(|i| bf16::from_f32(((i * 7919 + seed * 104_729) % 1013) as f32 / 506.5 - 1.0))
        .collect()
}

/// In a graph: replays give the product of what the operands then hold, though memory came and went
/// between the capture and them.
#[test]
fn cuda_in_a_captured_graph() {
    let device = Device::cuda(0);
    let client = match device.as_dispatch() {
        DispatchDevice::Cube(device) => device.client(),
        other => panic!("{other:?} is not a CubeCL device"),
    };
    let (m, n, k) = (192, 256, 4096);
    let dtype = FloatType::BF16;
    let first = DenseProduct {
        rhs: MatrixLayout::contiguous_transposed(k, n),
        ..DenseProduct::new(m, n, k, dtype)
    };
    let second = DenseProduct::new(m, k, n, dtype);
    let upload = |values: &[bf16]| client.create_from_slice(bytemuck::cast_slice(values));
    let (x, w, v) = (
        upload(&values(m * k, 1)),
        upload(&values(n * k, 2)),
        upload(&values(n * k, 3)),
    );
    let plans =
        [first, second].map(|product| DensePlan::new(&client, product).expect("it is there"));
    let out = client.empty(plans[1].out_bytes());
    let run = || {
        // Freed at the end of the capture, but the graph's as long as it lives.
        let between = client.empty(plans[0].out_bytes());
        let operands = |lhs: &Handle, rhs: &Handle| DenseOperands {
            lhs: lhs.clone(),
            rhs: rhs.clone(),
            scale: 1.0,
            addend: None,
            bias: None,
        };
        let fits = "buffers fit";
        plans[0]
            .launch(operands(&x, &w), between.clone())
            .expect(fits);
        plans[1]
            .launch(operands(&between, &v), out.clone())
            .expect(fits);
    };
    let read = || client.read_one(out.clone()).expect("it ran").to_vec();

    let prepared = client.graph_prepare();
    prepared.expect("CUDA has graphs");
    (0..3).for_each(|_| run());
    block_on(client.sync()).expect("the device works");
    client.start_capture().expect("it can");
    run();
    let graph = client.stop_capture().expect("every call can be captured");

    for round in 0..10 {
        let bytes: Vec<u8> = bytemuck::cast_slice(&values(m * k, 10 + round)).to_vec();
        client.write(&x, Bytes::from_bytes_vec(bytes));
        // Takes and overwrites whatever is free: were it the graph's, its product would be wrong.
        let taken: Vec<Handle> = (0..64)
            .map(|i| client.create_from_slice(&vec![POISON; (1 << 14) << (i % 10)]))
            .collect();
        // SAFETY: every buffer that the graph names is still held here, or by the graph.
        unsafe { graph.replay() }.expect("it replays");
        let replayed = read();
        drop(taken);
        run();
        assert_eq!(replayed, read(), "round {round}");
        assert!(replayed.iter().any(|&byte| byte != 0));
    }
}
