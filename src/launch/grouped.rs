//! Launches of the grouped products of experts.

use std::fmt;

use cubecl::features::TypeUsage;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::dequantize::{decode_blueprint, packed_view};
use super::embedding::largest;
use super::{
    address_type, check_buffers, check_dtype, cube_count, elem_type, has_barriers, lanes_of_plane,
    units_per_cube, vector_size,
};
use crate::activation::Activation;
use crate::error::Nf4Error;
use crate::format::{FloatType, check_len};
use crate::kernel::decode::DequantizeBlueprint;
use crate::kernel::grouped::{
    GroupedBlueprint, GroupedSizesLaunch, GroupedWeight, GroupedWeightLaunch, grouped_gemv_kernel,
};
use crate::stack_layout::StackLayout;

/// Products of rows of `x` with the weights of experts, by their sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupedProblem {
    /// Ids, the rows of the result.
    pub entries: usize,
    /// Entries that have a row of `x` in common, a divisor of `entries`.
    pub per_row: usize,
    /// Tokens that the entries are of. An expert is sent no more entries at once where no token has it twice;
    /// where one has, the result is the same.
    pub tokens: usize,
    /// Type of the ids: an integer.
    pub ids_dtype: ElemType,
    /// Type of `x`, biases and the result.
    pub dtype: FloatType,
    /// What joins the products with the weights of a gate and of what it opens.
    pub gate: Option<Activation>,
}

/// What goes into a grouped product.
#[derive(Debug, Clone)]
pub struct GroupedOperands {
    /// `[entries / per_row, k]`, row-major.
    pub x: Handle,
    /// `[entries]`.
    pub ids: Handle,
    /// The words of each stack, and `[experts, rows]` of its bias; all have one, or none.
    pub weights: Vec<(Handle, Option<Handle>)>,
}

/// A launch of grouped products, worked out but not yet made.
// The fields are private and never change: the bounds of the launch rest on them.
#[derive(Clone)]
pub struct GroupedPlan {
    client: Client,
    stacks: Vec<StackLayout>,
    problem: GroupedProblem,
    /// Columns of the result.
    n: usize,
    /// The largest id of an expert, of those that the type of the ids can hold.
    last: usize,
    /// Columns of the result that a plane computes one after the other.
    steps: usize,
    vector: usize,
    cube_dim: CubeDim,
    cube_count: CubeCount,
    blueprint: GroupedBlueprint,
    address: AddressType,
}

impl fmt::Debug for GroupedPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupedPlan")
            .field("problem", &self.problem)
            .field("blueprint", &self.blueprint)
            .field("steps", &self.steps)
            .field("cube_dim", &self.cube_dim)
            .field("cube_count", &self.cube_count)
            .finish_non_exhaustive()
    }
}

/// Entries of an expert that are multiplied with its weight at once, at most: registers hold their sums.
const MAX_COLUMNS: usize = 8;

/// Cubes from which a cube takes more than one range of columns, so that entries are not looked through more
/// often than there is something to gain. Not measured.
const MANY_CUBES: usize = 8192;

/// The same where a cube is a thread's task.
const MANY_TASKS: usize = 64;

impl GroupedPlan {
    /// Works out a grouped product: of one stack, or with a gate of two of the same sizes, or of one whose even
    /// rows are those of the gate. Nothing is launched.
    ///
    /// # Errors
    /// [`Nf4Error::Length`] unless there are one or two stacks, one without a gate, all of the same sizes and
    /// quantized in one way, and with an even number of rows where one has a gate's,
    /// and for entries that are no multiple of `per_row`;
    /// [`Nf4Error::ElementCount`] for no entries or more elements than memory can address,
    /// [`Nf4Error::Dtype`] if the ids are no integers, [`Nf4Error::DeviceDtype`] if the device has no such
    /// types.
    pub fn new(
        client: &Client,
        stacks: &[StackLayout],
        problem: GroupedProblem,
    ) -> Result<Self, Nf4Error> {
        let n = check_sizes(stacks, &problem)?;
        let GroupedProblem {
            entries,
            per_row,
            tokens,
            ids_dtype,
            dtype,
            gate,
        } = problem;
        check_dtype(client, dtype)?;
        let largest_id = largest(ids_dtype)?;
        let usage = client.properties().type_usage(ids_dtype);
        if !usage.contains(TypeUsage::Buffer) {
            return Err(Nf4Error::DeviceDtype {
                device: client.name().into(),
                dtype: format!("{ids_dtype:?}"),
            });
        }
        let stack = &stacks[0];
        let [_, k] = stack.matrix_dims();
        let lanes = lanes_of_plane(client);
        let rows = units_per_cube(client) / lanes;
        let decode = decode_blueprint(stack.image());
        let word_elems = decode.codes_a_word();
        let aligned = k.is_multiple_of(word_elems);
        let blueprint = GroupedBlueprint {
            decode: DequantizeBlueprint {
                shared: has_barriers(client),
                ..decode
            },
            columns: tokens.clamp(1, MAX_COLUMNS).next_power_of_two(),
            aligned,
            planes: lanes > 1,
            gate,
        };
        let vector = match aligned {
            true => vector_size(client, dtype, word_elems, &[k]),
            false => 1,
        };
        let many = match has_barriers(client) {
            true => MANY_CUBES,
            false => MANY_TASKS,
        };
        let ranges = n.div_ceil(rows as usize);
        let steps = (entries * ranges).div_ceil(many).min(ranges);
        let cubes = entries * n.div_ceil(rows as usize * steps);
        let most = stacks.iter().map(StackLayout::words).max().unwrap_or(0);
        let most = most.max(stack.image().elems());
        Ok(Self {
            client: client.clone(),
            stacks: stacks.to_vec(),
            problem,
            n,
            last: usize::try_from(largest_id)
                .map_or(usize::MAX, |id| id)
                .min(stack.experts() - 1),
            steps,
            vector,
            cube_dim: CubeDim::new_2d(lanes, rows),
            cube_count: cube_count(client, cubes),
            blueprint,
            address: address_type(most.max(entries * n).max(entries / per_row * k)),
        })
    }

    /// Columns of the result.
    pub fn columns(&self) -> usize {
        self.n
    }

    /// Bytes of the result.
    pub fn out_bytes(&self) -> usize {
        self.problem.entries * self.n * self.problem.dtype.size_bytes()
    }

    /// Makes the launch. An id that no expert has gives a row of NaN.
    ///
    /// # Shapes
    /// - `out`: `[entries, n]`, row-major
    ///
    /// # Errors
    /// [`Nf4Error::Length`] if a buffer is too small or one is missing, [`Nf4Error::Alignment`] if one does not
    /// begin at a multiple of 16 bytes.
    pub fn launch(&self, operands: GroupedOperands, out: Handle) -> Result<(), Nf4Error> {
        let Self {
            n,
            last,
            steps,
            problem,
            stacks,
            ..
        } = self;
        let &GroupedProblem {
            entries, per_row, ..
        } = problem;
        let [_, k] = stacks[0].matrix_dims();
        self.check_operands(&operands, &out)?;
        let GroupedOperands { x, ids, weights } = operands;
        let x_elems = entries / per_row * k;
        let elem = elem_type(problem.dtype);
        // SAFETY: the buffers hold what is declared here and begin where vectors may (checked above). An id is
        // taken for an expert if it is at most `last`, which is one, and images have `n * k` elements (checked by
        // `new`). The kernel guards every row by `n`, every element by `k` and every entry by `entries`.
        unsafe {
            let weights = self.stacks_in_turn().zip(self.weights_in_turn(weights));
            let weights: SequenceArg<GroupedWeight<_>> = weights
                .enumerate()
                .map(|(i, (stack, (packed, bias)))| self.weight(i, stack, packed, bias))
                .collect();
            grouped_gemv_kernel::launch_unchecked(
                &self.client,
                self.cube_count.clone(),
                self.cube_dim,
                self.address,
                self.vector,
                BufferArg::from_raw_parts(x, x_elems),
                BufferArg::from_raw_parts(ids, entries),
                weights,
                BufferArg::from_raw_parts(out, entries * n),
                GroupedSizesLaunch::new(entries, per_row, *last, *n, k, *steps),
                self.blueprint,
                elem,
                problem.ids_dtype,
            );
        }
        Ok(())
    }

    /// Whether the weights of a gate and of what it opens are the even and the odd rows of one stack.
    fn is_interleaved(&self) -> bool {
        self.problem.gate.is_some() && self.stacks.len() == 1
    }

    /// The stack of each weight that the kernel multiplies with.
    fn stacks_in_turn(&self) -> impl Iterator<Item = &StackLayout> {
        let times = 1 + usize::from(self.is_interleaved());
        std::iter::repeat_n(&self.stacks, times).flatten()
    }

    fn weights_in_turn(
        &self,
        weights: Vec<(Handle, Option<Handle>)>,
    ) -> impl Iterator<Item = (Handle, Option<Handle>)> {
        let times = 1 + usize::from(self.is_interleaved());
        std::iter::repeat_n(weights, times).flatten()
    }

    /// The argument for a weight.
    ///
    /// # Safety
    /// The buffers have the elements of the stack and of its bias.
    unsafe fn weight<F: Float>(
        &self,
        i: usize,
        stack: &StackLayout,
        packed: Handle,
        bias: Option<Handle>,
    ) -> GroupedWeightLaunch<F> {
        let image = stack.image();
        let [rows, _] = stack.matrix_dims();
        let (first_row, row_step) = match self.is_interleaved() {
            true => (i, 2),
            false => (0, 1),
        };
        // SAFETY: see above; a buffer that is there twice is only read.
        unsafe {
            let bias = bias.map(|bias| BufferArg::from_raw_parts(bias, stack.experts() * rows));
            GroupedWeightLaunch::new(
                BufferArg::from_raw_parts(packed, stack.words()),
                bias.into(),
                packed_view(image, 0, image.elems()),
                stack.image_stride(),
                stack.elem_stride(),
                rows,
                first_row,
                row_step,
            )
        }
    }

    fn check_operands(&self, operands: &GroupedOperands, out: &Handle) -> Result<(), Nf4Error> {
        let GroupedProblem {
            entries,
            per_row,
            ids_dtype,
            dtype,
            ..
        } = self.problem;
        let GroupedOperands { x, ids, weights } = operands;
        let [rows, k] = self.stacks[0].matrix_dims();
        let size = dtype.size_bytes();
        check_buffers([
            ("x", x, [entries / per_row, k], size),
            ("ids", ids, [entries, 1], ids_dtype.size()),
            ("y", out, [entries, self.n], size),
        ])?;
        check_len("weights", self.stacks.len(), weights.len())?;
        let biases = weights.iter().filter(|(_, bias)| bias.is_some()).count();
        if biases > 0 {
            check_len("biases", self.stacks.len(), biases)?;
        }
        for (stack, (packed, bias)) in self.stacks.iter().zip(weights) {
            let packed = ("packed weights", packed, [stack.words(), 1], 4);
            let bias = bias.as_ref();
            let bias = bias.map(|bias| ("bias", bias, [stack.experts(), rows], size));
            check_buffers(std::iter::once(packed).chain(bias))?;
        }
        Ok(())
    }
}

/// Columns of the result.
fn check_sizes(stacks: &[StackLayout], problem: &GroupedProblem) -> Result<usize, Nf4Error> {
    let &GroupedProblem {
        entries,
        per_row,
        dtype,
        gate,
        ..
    } = problem;
    let Some(first) = stacks.first() else {
        return Err(Nf4Error::Length {
            tensor: "weights".into(),
            expected: 1,
            given: 0,
        });
    };
    let most = 1 + usize::from(gate.is_some());
    check_len("weights", stacks.len().min(most), stacks.len())?;
    let [rows, k] = first.matrix_dims();
    for other in stacks {
        let fits = other.experts() == first.experts()
            && other.matrix_dims() == first.matrix_dims()
            && other.image().config() == first.image().config();
        if !fits {
            return Err(Nf4Error::Length {
                tensor: "weights of the gate and of what it opens".into(),
                expected: first.words(),
                given: other.words(),
            });
        }
    }
    let n = match (gate, stacks.len()) {
        (Some(_), 1) => {
            check_len("rows of a gate and of what it opens", rows / 2 * 2, rows)?;
            rows / 2
        }
        _ => rows,
    };
    let per_entry = k.max(n).max(1).checked_mul(dtype.size_bytes());
    let bytes = per_entry.and_then(|bytes| bytes.checked_mul(entries));
    if entries == 0 || n == 0 || bytes.is_none_or(|bytes| bytes > isize::MAX as usize) {
        return Err(Nf4Error::ElementCount {
            tensor: "y".into(),
            shape: vec![entries, n],
        });
    }
    if per_row == 0 || !entries.is_multiple_of(per_row) {
        return Err(Nf4Error::Length {
            tensor: "ids".into(),
            expected: entries.next_multiple_of(per_row.max(1)),
            given: entries,
        });
    }
    Ok(n)
}
