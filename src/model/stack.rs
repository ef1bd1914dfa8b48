//! Parameters that a checkpoint holds as one tensor.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::TensorData;

use super::layers::LinearLayers;
use super::names::of_linear;
use crate::BlockWeight;
use crate::error::Nf4Error;
use crate::format::{
    Absmax, BlockTensor, CodedScales, FloatType, QuantConfig, QuantType, ScaleType, matrix_dims,
};
use crate::nn::AnyLinear;

/// Where a parameter of a linear layer lies in a stack of such ones, see [`LinearLayers::stacked`].
///
/// A stack of weights is `[matrices, d_input, d_output * parts]`, one of biases `[matrices, d_output * parts]`,
/// with an output of each part in turn: as
/// [`unstack_columns`](crate::checkpoint::CheckpointStore::unstack_columns) takes them apart. Weights in MXFP4
/// lie as gpt-oss has them: blocks `[matrices, d_output * parts, d_input / 32, 16]` and their scales.
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

/// The stacks of a model that are whole and of one type.
#[derive(Debug, Default)]
pub(super) struct Stacks {
    /// By the names of parameters.
    places: BTreeMap<String, StackPlace>,
    /// Stacks of which some parts are there.
    open: BTreeMap<String, Stack>,
    are_packed: bool,
}

/// A parameter that has a place in a stack.
struct Part {
    name: String,
    place: StackPlace,
    dtype: FloatType,
    is_packed: bool,
}

/// A stack that is being put together.
#[derive(Debug)]
struct Stack {
    /// Floats, or the codes of a packed weight.
    data: Vec<u8>,
    /// Scales of a packed weight.
    scales: Vec<u8>,
    missing: usize,
}

impl Stacks {
    pub fn of<M: LinearLayers>(model: &M) -> Self {
        let linears = model.linears();
        // The form has experts alone: beside weights in another, they are written apart.
        let mut packed = linears.iter().filter_map(|(module, layer)| match layer {
            AnyLinear::Nf4(layer) => Some((module, layer)),
            _ => None,
        });
        let packs = packed.all(|(module, layer)| {
            let has_place = model.stacked(&of_linear(module, "weight")).is_some();
            has_place && has_blocks(&layer.weight)
        });
        let mut found: BTreeMap<String, Vec<Part>> = BTreeMap::new();
        for (module, layer) in linears {
            let (weight, bias) = match layer {
                AnyLinear::Dense(layer) => (layer.weight.dtype(), &layer.bias),
                AnyLinear::Nf4(layer) if packs => (layer.weight.dtype().into(), &layer.bias),
                _ => continue,
            };
            let bias = bias.as_ref().map(|bias| ("bias", bias.dtype()));
            for (parameter, dtype) in [("weight", weight)].into_iter().chain(bias) {
                let name = of_linear(&module, parameter);
                if let Some(place) = model.stacked(&name)
                    && let Ok(dtype) = FloatType::from_dtype(dtype, &name)
                {
                    let is_packed = parameter == "weight" && layer.is_quantized();
                    found.entry(place.stack.clone()).or_default().push(Part {
                        name,
                        place,
                        dtype,
                        is_packed,
                    });
                }
            }
        }
        let is_packed = |parts: &Vec<Part>| parts.iter().any(|part| part.is_packed);
        let is_whole = |parts: &Vec<Part>| {
            let Part { place, dtype, .. } = &parts[0];
            let of_one_type = parts
                .iter()
                .all(|part| part.dtype == *dtype && part.is_packed == parts[0].is_packed);
            of_one_type && parts.len() == place.matrices * place.parts
        };
        let modules = |packed: bool| {
            let weights = found.iter().filter(move |(_, parts)| {
                is_packed(parts) == packed && parts[0].name.ends_with(".weight")
            });
            weights
                .map(|(stack, _)| module_of(stack))
                .collect::<BTreeSet<_>>()
        };
        let (packed, floats) = (modules(true), modules(false));
        let are_packed = !packed.is_empty()
            && packed.is_disjoint(&floats)
            && found
                .values()
                .filter(|parts| is_packed(parts))
                .all(is_whole);
        if !are_packed {
            let packed: BTreeSet<String> = packed.into_iter().map(String::from).collect();
            found.retain(|stack, _| !packed.contains(module_of(stack)));
        }
        let whole = found.into_values().filter(is_whole).flatten();
        Self {
            places: whole.map(|part| (part.name, part.place)).collect(),
            open: BTreeMap::new(),
            are_packed,
        }
    }

    /// Whether there are stacks of packed weights.
    pub fn are_packed(&self) -> bool {
        self.are_packed
    }

    /// Where a parameter lies, if it is to be written in a stack.
    pub fn take(&mut self, name: &str) -> Option<StackPlace> {
        self.places.remove(name)
    }

    /// Puts a parameter of floats into its stack. The last one gives the stack and its shape.
    ///
    /// # Shapes
    /// - `data`: `[d_input, d_output]` or `[d_output]`
    pub fn add(
        &mut self,
        place: &StackPlace,
        data: TensorData,
    ) -> Option<(TensorData, Vec<usize>)> {
        let stack = self.with(place, [(data.as_bytes(), data.dtype().size()), (&[], 1)])?;
        let mut shape = vec![place.matrices];
        shape.extend_from_slice(data.shape());
        if let Some(outputs) = shape.last_mut() {
            *outputs *= place.parts;
        }
        let all = TensorData::from_bytes_vec(stack.data, shape.clone(), data.dtype());
        Some((all, shape))
    }

    /// Puts a weight in MXFP4 into its stack. The last one gives the stack.
    ///
    /// # Errors
    /// [`Nf4Error::Scales`] for a weight of another type.
    ///
    /// # Shapes
    /// - `weight`: `[d_output, d_input]`
    /// - returns `[matrices, d_output * parts, d_input]`
    pub fn add_packed(
        &mut self,
        place: &StackPlace,
        weight: &BlockTensor,
    ) -> Result<Option<BlockTensor>, Nf4Error> {
        let Absmax::Coded(scales) = weight.absmax() else {
            return Err(Nf4Error::Scales {
                tensor: place.stack.clone(),
                format: weight.quant_type().name(),
                expected: ScaleType::E8m0,
            });
        };
        let [outputs, inputs] = matrix_dims(&place.stack, weight.shape())?;
        let rows = [weight.codes(), &scales.codes].map(|codes| (codes, codes.len() / outputs));
        let Some(stack) = self.with(place, rows) else {
            return Ok(None);
        };
        let scales = CodedScales {
            codes: stack.scales,
            tensor_scale: scales.tensor_scale,
        };
        let stack = BlockTensor::from_parts(
            stack.data,
            Absmax::Coded(scales),
            vec![place.matrices, outputs * place.parts, inputs],
            weight.block_size(),
            weight.dtype(),
            weight.quant_type(),
        );
        stack.map(Some)
    }

    /// Puts a part into its stack, an output of each part in turn. The last part gives the stack.
    ///
    /// - `bytes`: of the data and of the scales, and how many of them are one piece
    fn with(&mut self, place: &StackPlace, bytes: [(&[u8], usize); 2]) -> Option<Stack> {
        let &StackPlace {
            ref stack,
            matrix,
            matrices,
            part,
            parts,
        } = place;
        let [data, scales] = bytes.map(|(bytes, _)| bytes.len() * parts);
        let entry = self.open.entry(stack.clone()).or_insert_with(|| Stack {
            data: vec![0; matrices * data],
            scales: vec![0; matrices * scales],
            missing: matrices * parts,
        });
        for (all, (bytes, piece)) in [&mut entry.data, &mut entry.scales].into_iter().zip(bytes) {
            let size = bytes.len() * parts;
            let of_matrix = all[matrix * size..][..size].chunks_exact_mut(piece);
            let places = of_matrix.skip(part).step_by(parts);
            for (place, piece) in places.zip(bytes.chunks_exact(piece)) {
                place.copy_from_slice(piece);
            }
        }
        entry.missing -= 1;
        match entry.missing {
            0 => self.open.remove(stack),
            _ => None,
        }
    }
}

/// The module that a stack belongs to, with those of its other projections.
pub(super) fn module_of(stack: &str) -> &str {
    stack.rsplit_once('.').map_or("", |(module, _)| module)
}

/// Whether a weight is in MXFP4, and the inputs of each output are whole blocks.
fn has_blocks(weight: &BlockWeight) -> bool {
    let config = QuantConfig::of(QuantType::Mxfp4);
    let is_whole = |shape: &[usize]| {
        let inputs = shape.last();
        inputs.is_some_and(|inputs| inputs.is_multiple_of(config.block_size.elems()))
    };
    weight.config() == config && !weight.is_transposed() && is_whole(weight.shape())
}
