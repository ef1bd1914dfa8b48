//! Launches of the attention kernels.

mod plain;
mod tensor_core;

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{Buffer, check_dtype};
use crate::error::Nf4Error;
use crate::format::FloatType;
use tensor_core::Blueprints;

/// The kernels of an attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AttentionVariant {
    /// A few queries a cube, sums in f32 without tensor cores: any device.
    Rows,
    /// On NVIDIA's tensor cores, f16 and bf16, heads of a multiple of 16 elements. Sums are in f32,
    /// probabilities are rounded to the dtype.
    TensorCore,
}

impl AttentionVariant {
    /// All kernels.
    pub const ALL: [Self; 2] = [Self::Rows, Self::TensorCore];

    /// The name used in files, tests and benches.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rows => "rows",
            Self::TensorCore => "tensor_core",
        }
    }
}

/// The sizes and constants of an attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionProblem {
    /// Rows of the batch.
    pub batch: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Queries of a row and head.
    pub queries: usize,
    /// Keys of a row and head.
    pub keys: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Rows of the key ranges: one for all, or one for each row of the batch.
    pub range_rows: usize,
    /// The factor of scores.
    pub scale: f32,
    /// `c` of `c tanh(score / c)`, if scores are capped.
    pub softcap: Option<f32>,
    /// Type of all tensors but the log-sum-exp.
    pub dtype: FloatType,
}

impl AttentionProblem {
    /// Heads of queries that share a head of keys.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Batch, tokens, heads and head_dim of queries.
    fn query_dims(&self) -> [usize; 4] {
        [self.batch, self.queries, self.heads, self.head_dim]
    }

    /// Batch, tokens, heads and head_dim of keys.
    fn key_dims(&self) -> [usize; 4] {
        [self.batch, self.keys, self.kv_heads, self.head_dim]
    }

    /// Bytes of the queries, of the output and of its gradient, contiguous.
    pub fn query_bytes(&self) -> usize {
        self.query_dims().iter().product::<usize>() * self.dtype.size_bytes()
    }

    /// Bytes of keys, or of values, contiguous.
    pub fn key_bytes(&self) -> usize {
        self.key_dims().iter().product::<usize>() * self.dtype.size_bytes()
    }

    /// Numbers of the key ranges.
    fn range_elems(&self) -> usize {
        self.range_rows * self.queries * 2
    }

    /// Numbers of the log-sum-exp.
    fn lse_elems(&self) -> usize {
        self.batch * self.heads * self.queries
    }

    /// Bytes of the log-sum-exp, f32.
    pub fn lse_bytes(&self) -> usize {
        self.lse_elems() * 4
    }

    /// Checks what the kernels rest on.
    fn check(&self) -> Result<(), Nf4Error> {
        let fits = |dims: [usize; 4]| {
            let elems = dims
                .iter()
                .try_fold(1usize, |all, &dim| all.checked_mul(dim));
            elems.is_some_and(|elems| elems > 0 && elems <= isize::MAX as usize / 4)
        };
        for (tensor, dims) in [("q", self.query_dims()), ("k", self.key_dims())] {
            if !fits(dims) {
                return Err(Nf4Error::ElementCount {
                    tensor: tensor.into(),
                    shape: dims.into(),
                });
            }
        }
        // Ranges are i32.
        if self.keys.max(self.queries) > i32::MAX as usize {
            return Err(Nf4Error::ElementCount {
                tensor: "key ranges".into(),
                shape: vec![self.queries, self.keys],
            });
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Nf4Error::Config {
                field: "kv_heads",
                expected: "a divisor of the heads of queries",
                given: format!("{} for {} heads of queries", self.kv_heads, self.heads),
            });
        }
        if self.range_rows != 1 && self.range_rows != self.batch {
            return Err(Nf4Error::Shape {
                tensor: "key ranges".into(),
                expected: vec![self.batch, self.queries, 2],
                given: vec![self.range_rows, self.queries, 2],
            });
        }
        Ok(())
    }
}

/// A tensor `[batch, tokens, heads, head_dim]` whose heads are contiguous.
#[derive(Debug, Clone)]
pub struct TokenMajor {
    /// The buffer, which begins with the first element.
    pub handle: Handle,
    /// Elements from a row of the batch, a token and a head to the next.
    pub strides: [usize; 3],
}

impl TokenMajor {
    /// A tensor without gaps.
    pub fn contiguous(handle: Handle, [_, tokens, heads, head_dim]: [usize; 4]) -> Self {
        Self {
            handle,
            strides: [tokens * heads * head_dim, heads * head_dim, head_dim],
        }
    }

    /// The strides, none where there is but one.
    fn steps(&self, dims: [usize; 4]) -> [usize; 3] {
        std::array::from_fn(|i| if dims[i] == 1 { 0 } else { self.strides[i] })
    }

    /// Elements from the first to one past the last.
    fn extent(&self, dims: [usize; 4]) -> Option<usize> {
        let steps = self.steps(dims).into_iter().zip(dims);
        steps
            .map(|(step, dim)| step.checked_mul(dim - 1))
            .try_fold(dims[3], |all, last| all.checked_add(last?))
            .filter(|&extent| extent <= isize::MAX as usize / 4)
    }

    /// Checks that the kernel stays within the buffer.
    ///
    /// # Errors
    /// [`Nf4Error::Length`], in bytes, or [`Nf4Error::Alignment`].
    fn check(
        &self,
        name: &'static str,
        dims: [usize; 4],
        dtype: FloatType,
    ) -> Result<(), Nf4Error> {
        Buffer {
            name,
            handle: &self.handle,
            dims: [self.extent(dims).unwrap_or(usize::MAX), 1],
            elem_bytes: dtype.size_bytes(),
        }
        .check()
    }
}

/// What goes into an attention.
#[derive(Debug, Clone)]
pub struct AttentionOperands {
    /// `[batch, queries, heads, head_dim]`.
    pub q: TokenMajor,
    /// `[batch, keys, kv_heads, head_dim]`.
    pub k: TokenMajor,
    /// As `k`.
    pub v: TokenMajor,
    /// `[range_rows, queries, 2]`, i32: the first key that a query sees, and the one past the last; neither
    /// decreases from one query of a row to the next. What lies outside of the keys is left out.
    pub ranges: Handle,
}

impl AttentionOperands {
    fn tensors(&self, problem: &AttentionProblem) -> [(&TokenMajor, [usize; 4]); 3] {
        let (of_queries, of_keys) = (problem.query_dims(), problem.key_dims());
        [
            (&self.q, of_queries),
            (&self.k, of_keys),
            (&self.v, of_keys),
        ]
    }

    fn check(&self, problem: &AttentionProblem) -> Result<(), Nf4Error> {
        let dtype = problem.dtype;
        self.q.check("q", problem.query_dims(), dtype)?;
        self.k.check("k", problem.key_dims(), dtype)?;
        self.v.check("v", problem.key_dims(), dtype)?;
        Buffer {
            name: "key ranges",
            handle: &self.ranges,
            dims: [problem.range_elems(), 1],
            elem_bytes: 4,
        }
        .check()
    }
}

/// What goes into the backward pass besides [`AttentionOperands`].
#[derive(Debug, Clone)]
pub struct AttentionResults {
    /// The output of the forward pass, of the shape of `q`.
    pub output: TokenMajor,
    /// The gradient of the output.
    pub grad: TokenMajor,
    /// The log-sum-exp, `[batch, heads, queries]`, contiguous, f32.
    pub lse: Handle,
}

/// Launches of attention, worked out but not yet made.
// The fields are private and never change: the bounds of the launches rest on them.
#[derive(Clone)]
pub struct AttentionPlan {
    client: Client,
    problem: AttentionProblem,
    kernels: Kernels,
}

/// The kernels of a plan.
#[derive(Clone, Copy)]
enum Kernels {
    Rows,
    TensorCore(Blueprints),
}

impl std::fmt::Debug for AttentionPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AttentionPlan")
            .field("problem", &self.problem)
            .field("variant", &self.variant())
            .finish_non_exhaustive()
    }
}

impl AttentionPlan {
    /// Works out an attention with given kernels, or with those that suit it. Nothing is launched.
    ///
    /// # Errors
    /// [`Nf4Error::ElementCount`] if a tensor has no elements or more than memory can address,
    /// [`Nf4Error::Config`] for heads that the heads of keys do not divide, [`Nf4Error::Shape`] for rows of
    /// ranges that are not those of the batch, [`Nf4Error::DeviceDtype`] if the device has no such type,
    /// [`Nf4Error::Variant`] if it cannot run the kernels on these sizes.
    pub fn new(
        client: &Client,
        problem: AttentionProblem,
        variant: Option<AttentionVariant>,
    ) -> Result<Self, Nf4Error> {
        problem.check()?;
        check_dtype(client, problem.dtype)?;
        let blueprints = || Blueprints::new(client, &problem);
        let blueprints = match variant {
            None => blueprints().ok(),
            Some(AttentionVariant::Rows) => None,
            Some(AttentionVariant::TensorCore) => Some(blueprints()?),
        };
        let kernels = match blueprints {
            Some(blueprints) => Kernels::TensorCore(blueprints),
            None => {
                plain::check(&problem)?;
                Kernels::Rows
            }
        };
        Ok(Self {
            client: client.clone(),
            problem,
            kernels,
        })
    }

    /// Strides of all tensors are to be multiples of so many elements.
    pub fn stride_multiple(&self) -> usize {
        match self.kernels {
            Kernels::Rows => 1,
            Kernels::TensorCore(_) => tensor_core::PIECE,
        }
    }

    /// The kernels.
    pub fn variant(&self) -> AttentionVariant {
        match self.kernels {
            Kernels::Rows => AttentionVariant::Rows,
            Kernels::TensorCore(_) => AttentionVariant::TensorCore,
        }
    }

    /// The sizes.
    pub fn problem(&self) -> &AttentionProblem {
        &self.problem
    }

    /// Makes the launch of the forward pass.
    ///
    /// # Shapes
    /// - `out`: as `q`, contiguous, [`AttentionProblem::query_bytes`]
    /// - `lse`: `[batch, heads, queries]`, f32
    ///
    /// # Errors
    /// [`Nf4Error::Length`] if a buffer is too small, [`Nf4Error::Alignment`] if it does not begin
    /// at a multiple of 16 bytes.
    pub fn forward(
        &self,
        operands: &AttentionOperands,
        out: Handle,
        lse: Handle,
    ) -> Result<(), Nf4Error> {
        let problem = &self.problem;
        operands.check(problem)?;
        check_bytes("output", &out, problem.query_bytes())?;
        check_bytes("log-sum-exp", &lse, problem.lse_bytes())?;
        match &self.kernels {
            // SAFETY: the problem and all buffers have been checked, here and in `new`.
            Kernels::Rows => unsafe {
                plain::forward(&self.client, problem, operands, out, lse);
            },
            Kernels::TensorCore(blueprints) => {
                tensor_core::check_strides(&operands.tensors(problem))?;
                // SAFETY: as above, and the strides.
                unsafe {
                    tensor_core::forward(&self.client, blueprints, problem, operands, out, lse)
                }
            }
        }
        Ok(())
    }

    /// Makes the launches of the backward pass.
    ///
    /// # Shapes
    /// - `grads`: those of `q`, `k` and `v`, of their shapes, contiguous
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn backward(
        &self,
        operands: &AttentionOperands,
        results: &AttentionResults,
        grads: [Handle; 3],
    ) -> Result<(), Nf4Error> {
        let problem = &self.problem;
        operands.check(problem)?;
        let dims = problem.query_dims();
        results.output.check("output", dims, problem.dtype)?;
        results.grad.check("gradient", dims, problem.dtype)?;
        check_bytes("log-sum-exp", &results.lse, problem.lse_bytes())?;
        let [dq, dk, dv] = &grads;
        check_bytes("gradient of q", dq, problem.query_bytes())?;
        check_bytes("gradient of k", dk, problem.key_bytes())?;
        check_bytes("gradient of v", dv, problem.key_bytes())?;
        match &self.kernels {
            // SAFETY: the problem and all buffers have been checked, here and in `new`.
            Kernels::Rows => unsafe {
                plain::backward(&self.client, problem, operands, results, grads);
            },
            Kernels::TensorCore(blueprints) => {
                tensor_core::check_strides(&operands.tensors(problem))?;
                tensor_core::check_strides(&[(&results.grad, dims)])?;
                let contiguous = TokenMajor::contiguous(results.output.handle.clone(), dims);
                if results.output.steps(dims) != contiguous.steps(dims) {
                    return Err(Nf4Error::Variant {
                        variant: self.variant().name(),
                        reason: "the output is not contiguous".into(),
                    });
                }
                // SAFETY: as above, and the strides.
                unsafe {
                    tensor_core::backward(
                        &self.client,
                        blueprints,
                        problem,
                        operands,
                        results,
                        grads,
                    )
                }
            }
        }
        Ok(())
    }
}

fn check_bytes(name: &'static str, handle: &Handle, bytes: usize) -> Result<(), Nf4Error> {
    Buffer {
        name,
        handle,
        dims: [bytes, 1],
        elem_bytes: 1,
    }
    .check()
}
