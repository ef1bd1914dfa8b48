//! Parameters that a checkpoint holds as one tensor.

use std::collections::BTreeMap;

use burn::tensor::TensorData;

use super::layers::LinearLayers;
use super::names::of_linear;
use crate::format::FloatType;
use crate::nn::AnyLinear;

/// Where a parameter of a linear layer lies in a stack of such ones, see [`LinearLayers::stacked`].
///
/// A stack of weights is `[matrices, d_input, d_output * parts]`, one of biases `[matrices, d_output * parts]`,
/// with an output of each part in turn: as
/// [`unstack_columns`](crate::checkpoint::CheckpointStore::unstack_columns) takes them apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StackPlace {
    /// The name of the stack in a checkpoint.
    pub stack: String,
    /// The index of the matrix, or vector, that the parameter is a part of.
    pub matrix: usize,
    /// How many there are.
    pub matrices: usize,
    /// The index of the parameter among the parts of its matrix.
    pub part: usize,
    /// How many there are.
    pub parts: usize,
}

/// The stacks of a model that are whole and of floats of one type.
#[derive(Debug, Default)]
pub(super) struct Stacks {
    /// By the names of parameters.
    places: BTreeMap<String, StackPlace>,
    /// Stacks of which some parts are there.
    open: BTreeMap<String, Stack>,
}

/// A stack that is being put together.
#[derive(Debug)]
struct Stack {
    data: Vec<u8>,
    shape: Vec<usize>,
    missing: usize,
}

impl Stacks {
    pub fn of<M: LinearLayers>(model: &M) -> Self {
        let mut found: BTreeMap<String, Vec<(String, StackPlace, FloatType)>> = BTreeMap::new();
        for (module, layer) in model.linears() {
            let AnyLinear::Dense(layer) = layer else {
                continue;
            };
            let weight = Some(("weight", layer.weight.dtype()));
            let bias = layer.bias.as_ref().map(|bias| ("bias", bias.dtype()));
            for (parameter, dtype) in weight.into_iter().chain(bias) {
                let name = of_linear(&module, parameter);
                if let Some(place) = model.stacked(&name)
                    && let Ok(dtype) = FloatType::from_dtype(dtype, &name)
                {
                    let parts = found.entry(place.stack.clone()).or_default();
                    parts.push((name, place, dtype));
                }
            }
        }
        let is_whole = |parts: &Vec<(String, StackPlace, FloatType)>| {
            let (_, place, dtype) = &parts[0];
            let of_one_type = parts.iter().all(|(.., other)| other == dtype);
            of_one_type && parts.len() == place.matrices * place.parts
        };
        let whole = found.into_values().filter(is_whole).flatten();
        Self {
            places: whole.map(|(name, place, _)| (name, place)).collect(),
            open: BTreeMap::new(),
        }
    }

    /// Where a parameter lies, if it is to be written in a stack.
    pub fn take(&mut self, name: &str) -> Option<StackPlace> {
        self.places.remove(name)
    }

    /// Puts a parameter into its stack. The last one gives the stack and its shape.
    ///
    /// # Shapes
    /// - `data`: `[d_input, d_output]` or `[d_output]`
    pub fn add(
        &mut self,
        place: &StackPlace,
        data: TensorData,
    ) -> Option<(TensorData, Vec<usize>)> {
        let &StackPlace {
            ref stack,
            matrix,
            matrices,
            part,
            parts,
        } = place;
        let (bytes, elem_bytes) = (data.as_bytes(), data.dtype().size());
        let size_bytes = bytes.len() * parts;
        let entry = self.open.entry(stack.clone()).or_insert_with(|| {
            let mut shape = vec![matrices];
            shape.extend_from_slice(data.shape());
            if let Some(outputs) = shape.last_mut() {
                *outputs *= parts;
            }
            Stack {
                data: vec![0; matrices * size_bytes],
                shape,
                missing: matrices * parts,
            }
        });
        let of_matrix = &mut entry.data[matrix * size_bytes..][..size_bytes];
        let places = of_matrix
            .chunks_exact_mut(elem_bytes)
            .skip(part)
            .step_by(parts);
        for (place, elem) in places.zip(bytes.chunks_exact(elem_bytes)) {
            place.copy_from_slice(elem);
        }
        entry.missing -= 1;
        if entry.missing > 0 {
            return None;
        }
        let Stack {
            data: all, shape, ..
        } = self.open.remove(stack)?;
        let all = TensorData::from_bytes_vec(all, shape.clone(), data.dtype());
        Some((all, shape))
    }
}
