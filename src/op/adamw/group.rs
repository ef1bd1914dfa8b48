//! The moments of tensors that are kept in one way.

use burn::backend::Dispatch;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{Bytes, DType, Device, Int, Shape, Tensor, TensorData};

use super::AdamWMoments;
use super::base::Moments;
use crate::error::Nf4Error;
use crate::flat::{FlatLayout, TILE_ELEMS};
use crate::format::{DYNAMIC_MAP, check_len};
use crate::unsigned_map::UNSIGNED_MAP;

/// What an optimizer has learned of a tensor, in host memory.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorState {
    /// The tensor itself.
    pub values: Vec<f32>,
    /// Of its gradients.
    pub moments: MomentState,
    /// Steps that were made of it.
    pub steps: u32,
}

/// The moments of a tensor of `len` elements, in host memory.
#[derive(Debug, Clone, PartialEq)]
pub enum MomentState {
    /// In f32.
    F32 {
        /// `[len]`: the average of the gradients.
        first: Vec<f32>,
        /// `[len]`: the average of their squares.
        second: Vec<f32>,
    },
    /// In 8 bit.
    Bits8 {
        /// `[len]`: codes of bitsandbytes' signed dynamic map.
        first: Vec<u8>,
        /// `[len]`: codes of its unsigned one.
        second: Vec<u8>,
        /// What the first moments of each 256 elements are multiplied by.
        first_max: Vec<f32>,
        /// What their second moments are multiplied by.
        second_max: Vec<f32>,
    },
}

impl MomentState {
    /// Those before the first step.
    pub fn new(len: usize, kind: AdamWMoments) -> Self {
        match kind {
            AdamWMoments::F32 => Self::F32 {
                first: vec![0.0; len],
                second: vec![0.0; len],
            },
            AdamWMoments::Bits8 => {
                let maxima = || vec![0.0; len.div_ceil(TILE_ELEMS)];
                Self::Bits8 {
                    first: vec![0; len],
                    second: vec![0; len],
                    first_max: maxima(),
                    second_max: maxima(),
                }
            }
        }
    }

    fn check(&self, len: usize, kind: AdamWMoments) -> Result<(), Nf4Error> {
        match (self, kind) {
            (Self::F32 { first, second }, AdamWMoments::F32) => {
                check_len("first moments", len, first.len())?;
                check_len("second moments", len, second.len())
            }
            (
                Self::Bits8 {
                    first,
                    second,
                    first_max,
                    second_max,
                },
                AdamWMoments::Bits8,
            ) => {
                let tiles = len.div_ceil(TILE_ELEMS);
                check_len("first moments", len, first.len())?;
                check_len("second moments", len, second.len())?;
                check_len("maxima of first moments", tiles, first_max.len())?;
                check_len("maxima of second moments", tiles, second_max.len())
            }
            (Self::F32 { .. }, AdamWMoments::Bits8) => Err(wrong("8 bit", "f32")),
            (Self::Bits8 { .. }, AdamWMoments::F32) => Err(wrong("f32", "8 bit")),
        }
    }
}

fn wrong(expected: &str, given: &str) -> Nf4Error {
    Nf4Error::Dtype {
        tensor: "moments".into(),
        expected: expected.into(),
        given: given.into(),
    }
}

/// Tensors whose moments are kept in one way.
pub(super) struct Group {
    tensors: Vec<usize>,
    /// The first tile of each among those of the group.
    starts: Vec<usize>,
    count: usize,
    tiles: Tensor<1, Int>,
    kind: AdamWMoments,
    /// Taken out while an operation has them, so that they have one owner and are written to in place.
    moments: Option<Moments<Dispatch>>,
}

fn float(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let shape = [values.len()];
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

/// Bytes as words of four.
fn words(bytes: Vec<u8>, device: &Device) -> Tensor<1, Int> {
    let shape = Shape::from([bytes.len() / 4]);
    let words: Vec<u32> = bytes
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        .collect();
    let data = TensorData::from_bytes(Bytes::from_elems(words), shape, DType::U32);
    Tensor::from_data(data, (device, DType::U32))
}

impl Group {
    pub fn new(
        layout: &FlatLayout,
        tensors: Vec<usize>,
        kind: AdamWMoments,
        device: &Device,
    ) -> Self {
        let table = layout.tiles_of(&tensors);
        let mut starts = Vec::with_capacity(tensors.len());
        let mut count = 0;
        for &tensor in &tensors {
            starts.push(count);
            count += layout.range(tensor).len().div_ceil(TILE_ELEMS);
        }
        let elems = count * TILE_ELEMS;
        let zeros = |len| Tensor::<1>::zeros([len], (device, DType::F32)).into_dispatch();
        let zero_words =
            || Tensor::<1, Int>::zeros([elems / 4], (device, DType::U32)).into_dispatch();
        let moments = match kind {
            AdamWMoments::F32 => Moments::F32 {
                first: zeros(elems),
                second: zeros(elems),
            },
            AdamWMoments::Bits8 => Moments::Bits8 {
                first: zero_words(),
                second: zero_words(),
                first_max: zeros(count),
                second_max: zeros(count),
                maps: maps(device).into_dispatch(),
            },
        };
        let rows = [table.len()];
        let table = TensorData::new(table, rows);
        Self {
            tensors,
            starts,
            count,
            tiles: Tensor::from_data(table, (device, DType::U32)),
            kind,
            moments: Some(moments),
        }
    }

    /// Tiles of all tensors.
    pub fn count(&self) -> usize {
        self.count
    }

    pub fn tiles(&self) -> IntTensor<Dispatch> {
        self.tiles.clone().into_dispatch()
    }

    pub fn take(&mut self) -> Moments<Dispatch> {
        self.moments
            .take()
            .expect("whoever takes them puts them back")
    }

    pub fn put(&mut self, moments: Moments<Dispatch>) {
        self.moments = Some(moments);
    }

    /// Copies the moments of each tensor to its place.
    pub fn read(&self, layout: &FlatLayout, all: &mut [Option<MomentState>]) {
        let floats = |tensor: &FloatTensor<Dispatch>| {
            let tensor = Tensor::<1>::from_dispatch(tensor.clone());
            tensor.into_data().iter::<f32>().collect::<Vec<f32>>()
        };
        let bytes = |tensor: &IntTensor<Dispatch>| {
            let tensor = Tensor::<1, Int>::from_dispatch(tensor.clone());
            let words = tensor.into_data();
            let words = words.iter::<u32>();
            words.flat_map(u32::to_le_bytes).collect::<Vec<u8>>()
        };
        let places = self
            .tensors
            .iter()
            .zip(&self.starts)
            .map(|(&tensor, &tile)| {
                let len = layout.range(tensor).len();
                let start = tile * TILE_ELEMS;
                (
                    tensor,
                    start..start + len,
                    tile..tile + len.div_ceil(TILE_ELEMS),
                )
            });
        match self.moments.as_ref() {
            None => unreachable!("whoever takes them puts them back"),
            Some(Moments::F32 { first, second }) => {
                let [first, second] = [first, second].map(floats);
                for (tensor, elems, _) in places {
                    all[tensor] = Some(MomentState::F32 {
                        first: first[elems.clone()].to_vec(),
                        second: second[elems].to_vec(),
                    });
                }
            }
            Some(Moments::Bits8 {
                first,
                second,
                first_max,
                second_max,
                ..
            }) => {
                let [first, second] = [first, second].map(bytes);
                let [first_max, second_max] = [first_max, second_max].map(floats);
                for (tensor, elems, tiles) in places {
                    all[tensor] = Some(MomentState::Bits8 {
                        first: first[elems.clone()].to_vec(),
                        second: second[elems].to_vec(),
                        first_max: first_max[tiles.clone()].to_vec(),
                        second_max: second_max[tiles].to_vec(),
                    });
                }
            }
        }
    }

    /// Checks that a state has moments for this group.
    pub fn check(&self, layout: &FlatLayout, state: &[TensorState]) -> Result<(), Nf4Error> {
        self.tensors.iter().try_for_each(|&tensor| {
            let len = layout.range(tensor).len();
            state[tensor].moments.check(len, self.kind)
        })
    }

    /// Takes the moments of a state, which was checked.
    pub fn write(&mut self, state: &[TensorState], device: &Device) {
        let elems = self.count * TILE_ELEMS;
        let mut floats = [(); 2].map(|()| Vec::new());
        let mut codes = [(); 2].map(|()| Vec::new());
        let mut maxima = [(); 2].map(|()| Vec::new());
        for (&tensor, &tile) in self.tensors.iter().zip(&self.starts) {
            let start = tile * TILE_ELEMS;
            match &state[tensor].moments {
                MomentState::F32 { first, second } => {
                    for (all, part) in floats.iter_mut().zip([first, second]) {
                        all.resize(start, 0.0);
                        all.extend_from_slice(part);
                    }
                }
                MomentState::Bits8 {
                    first,
                    second,
                    first_max,
                    second_max,
                } => {
                    for (all, part) in codes.iter_mut().zip([first, second]) {
                        all.resize(start, 0);
                        all.extend_from_slice(part);
                    }
                    for (all, part) in maxima.iter_mut().zip([first_max, second_max]) {
                        all.extend_from_slice(part);
                    }
                }
            }
        }
        self.moments = Some(match self.kind {
            AdamWMoments::F32 => {
                let [first, second] = floats.map(|mut all| {
                    all.resize(elems, 0.0);
                    float(all, device).into_dispatch()
                });
                Moments::F32 { first, second }
            }
            AdamWMoments::Bits8 => {
                let [first, second] = codes.map(|mut all| {
                    all.resize(elems, 0);
                    words(all, device).into_dispatch()
                });
                let [first_max, second_max] = maxima.map(|all| float(all, device).into_dispatch());
                Moments::Bits8 {
                    first,
                    second,
                    first_max,
                    second_max,
                    maps: maps(device).into_dispatch(),
                }
            }
        });
    }
}

/// The values of the codes of first and of second moments.
fn maps(device: &Device) -> Tensor<1> {
    float([DYNAMIC_MAP, UNSIGNED_MAP].concat(), device)
}
