//! The `#[cube]` kernels. Device code only: no client, no buffers; `launch` validates, chooses and
//! launches.

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod decode;
pub mod embedding;
pub mod fragments;
pub mod gated;
pub mod gemv;
pub mod grouped;
pub mod levels;
pub mod lora;
pub mod quantize;
pub mod quantize_tiles;
pub mod rms_norm;
pub mod rotary;
pub mod route;
pub mod sample;
pub mod scales;
pub mod stage;
pub mod sums;
pub mod tensor_core;
pub mod tensor_core_blueprint;
pub mod tiled_2d;
pub mod warp_per_block;
