//! Rotary position embeddings on the device.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use burn_nf4::op::{CachedKeys, TokenHeads, rotary, rotary_append};

use crate::model::rope::RopeConfig;

/// The tables of all rotary embeddings of a model.
///
/// A clone shares what they hold on the device.
#[derive(Debug, Clone)]
pub struct RopeTables(Vec<RopeTable>);

/// Cosines and sines of the positions used so far, on the device.
///
/// The sine table carries the sign of the rotation, so that a rotation is
/// `x cos + swap_halves(x) sin`. As in transformers, angles are in f32 and the tables are cast at the
/// end.
#[derive(Debug, Clone)]
struct RopeTable {
    config: RopeConfig,
    device: Device,
    dtype: DType,
    /// That of the sequence that the tables are for: see [`RopeConfig::regime`].
    regime: usize,
    rows: usize,
    cos: Option<Tensor<2>>,
    sin: Option<Tensor<2>>,
}

/// The two tables at the positions of one forward pass: `[batch or 1, length, rotary_dim]`.
#[derive(Debug, Clone)]
pub struct Rotation {
    cos: Tensor<3>,
    sin: Tensor<3>,
}

/// The tables grow by this many positions at a time.
const ROWS_STEP: usize = 1024;

impl RopeTables {
    /// Tables of this type that grow as positions are asked for.
    pub fn new(configs: &[RopeConfig], device: &Device, dtype: DType) -> Self {
        let tables = configs.iter().cloned();
        Self(
            tables
                .map(|config| RopeTable::new(config, device, dtype))
                .collect(),
        )
    }

    /// The rotations of positions `start..start + length`, one for each rotary embedding, each row of the
    /// batch shifted left by its padding.
    pub fn rotations(&mut self, start: usize, length: usize, padding: &[usize]) -> Vec<Rotation> {
        self.rotations_within(start + length, start, length, padding)
    }

    /// As [`rotations`](Self::rotations), with the angles of a text that goes on to the position `end`.
    pub(crate) fn rotations_within(
        &mut self,
        end: usize,
        start: usize,
        length: usize,
        padding: &[usize],
    ) -> Vec<Rotation> {
        let tables = self.0.iter_mut();
        tables
            .map(|table| table.rotation(end, start, length, padding))
            .collect()
    }

    /// The rotations of texts packed into rows, one for each rotary embedding: positions begin at 0 with each
    /// text. The longest one is the sequence for all.
    ///
    /// - `ends`: for each row where its texts end
    pub(crate) fn packed_rotations(&mut self, ends: &[Vec<usize>]) -> Vec<Rotation> {
        let texts = ends.iter().flat_map(|row| {
            let starts = std::iter::once(0).chain(row.iter().copied());
            starts.zip(row).map(|(start, end)| end - start)
        });
        let texts: Vec<usize> = texts.collect();
        let longest = texts.iter().copied().max().unwrap_or(0);
        let positions = texts.into_iter().flat_map(|length| 0..length as i64);
        let positions: Vec<i64> = positions.collect();
        let tables = self.0.iter_mut();
        tables
            .map(|table| {
                let tables = table.tables(longest, longest);
                table.rows_at(positions.clone(), ends.len(), tables)
            })
            .collect()
    }

    /// Tables for the same model on another device, or on the same one without autodiff.
    pub(crate) fn on(&self, device: &Device) -> Self {
        let tables = self.0.iter();
        let on = |table: &RopeTable| RopeTable::new(table.config.clone(), device, table.dtype);
        Self(tables.map(on).collect())
    }

    /// Makes the tables of so many positions, as they are for a sequence of this length.
    pub(crate) fn reserve(&mut self, positions: usize, sequence: usize) {
        for table in &mut self.0 {
            table.tables(positions, sequence);
        }
    }

    /// The rotations of one token of each row, at positions, `[batch or 1]`, that may be known on the
    /// device only.
    ///
    /// # Panics
    /// If the tables were not [reserved](Self::reserve).
    pub(crate) fn rotations_at(&self, positions: &Tensor<1, Int>) -> Vec<Rotation> {
        let [rows] = positions.dims();
        let tables = self.0.iter();
        tables
            .map(|table| {
                let [cos, sin] = [&table.cos, &table.sin].map(|table| {
                    let table = table.clone().expect("the tables were reserved");
                    let rotary_dim = table.dims()[1];
                    let at = table.select(0, positions.clone());
                    at.reshape([rows, 1, rotary_dim])
                });
                Rotation { cos, sin }
            })
            .collect()
    }
}

impl RopeTable {
    fn new(config: RopeConfig, device: &Device, dtype: DType) -> Self {
        Self {
            config,
            device: device.clone(),
            dtype,
            regime: 0,
            rows: 0,
            cos: None,
            sin: None,
        }
    }

    fn rotation(
        &mut self,
        text_end: usize,
        start: usize,
        length: usize,
        padding: &[usize],
    ) -> Rotation {
        let end = start + length;
        // The longest row is the sequence.
        let sequence = text_end.saturating_sub(padding.iter().min().copied().unwrap_or(0));
        let (cos, sin) = self.tables(text_end, sequence);
        let rotary_dim = self.config.rotary_dim;
        if padding.iter().all(|&pad| pad == 0) {
            let rows = |table: Tensor<2>| {
                table
                    .slice([start..end, 0..rotary_dim])
                    .reshape([1, length, rotary_dim])
            };
            return Rotation {
                cos: rows(cos),
                sin: rows(sin),
            };
        }
        let positions: Vec<i64> = padding
            .iter()
            .flat_map(|&pad| (start..end).map(move |index| index.saturating_sub(pad) as i64))
            .collect();
        self.rows_at(positions, padding.len(), (cos, sin))
    }

    /// The rows of tables at positions, `[batch, length]`.
    fn rows_at(
        &self,
        positions: Vec<i64>,
        batch: usize,
        (cos, sin): (Tensor<2>, Tensor<2>),
    ) -> Rotation {
        let count = positions.len();
        let positions =
            Tensor::<1, Int>::from_data(TensorData::new(positions, [count]), &self.device);
        let rotary_dim = self.config.rotary_dim;
        let rows = |table: Tensor<2>| {
            let rows = table.select(0, positions.clone());
            rows.reshape([batch, count / batch.max(1), rotary_dim])
        };
        Rotation {
            cos: rows(cos),
            sin: rows(sin),
        }
    }

    /// Tables of at least `end` positions.
    fn tables(&mut self, end: usize, sequence: usize) -> (Tensor<2>, Tensor<2>) {
        let regime = self.config.regime(sequence);
        if let (Some(cos), Some(sin)) = (&self.cos, &self.sin)
            && self.rows >= end
            && self.regime == regime
        {
            return (cos.clone(), sin.clone());
        }
        let rows = end.div_ceil(ROWS_STEP) * ROWS_STEP;
        self.regime = regime;
        self.rows = rows;
        let frequencies = self.config.inverse_frequencies(sequence);
        let factor = self.config.attention_factor() as f32;
        let angles: Vec<f32> = (0..rows)
            .flat_map(|position| {
                frequencies
                    .iter()
                    .map(move |frequency| position as f32 * frequency)
            })
            .collect();
        let half = frequencies.len();
        let table = |value: fn(f32) -> f32, first_sign: f32| {
            let halves: Vec<f32> = angles
                .chunks(half)
                .flat_map(|row| {
                    let values = row.iter().map(move |&angle| value(angle) * factor);
                    values.clone().map(move |v| v * first_sign).chain(values)
                })
                .collect();
            Tensor::<2>::from_data(
                TensorData::new(halves, [rows, 2 * half]),
                (&self.device, DType::F32),
            )
            .cast(self.dtype)
        };
        let (cos, sin) = (table(f32::cos, 1.0), table(f32::sin, -1.0));
        self.cos = Some(cos.clone());
        self.sin = Some(sin.clone());
        (cos, sin)
    }
}

impl Rotation {
    /// The same in buffers of its own: those of one pass can be views of the tables.
    pub(super) fn copied(&self) -> Self {
        Self {
            cos: self.cos.clone() + 0.0,
            sin: self.sin.clone() + 0.0,
        }
    }

    /// `[batch or 1, length, rotary_dim]`.
    pub(super) fn dims(&self) -> [usize; 3] {
        self.cos.dims()
    }

    /// Writes other tables of the same sizes into the buffers of these.
    pub(super) fn write(&mut self, other: Self) {
        let all = self.cos.dims().map(|dim| 0..dim);
        self.cos
            .inplace(|held| held.slice_assign(all.clone(), other.cos));
        self.sin.inplace(|held| held.slice_assign(all, other.sin));
    }

    /// Rotates queries or keys, `[batch, heads, length, head_dim]`, or the first elements of each, in the
    /// type of the tables.
    pub fn apply(&self, x: Tensor<4>) -> Tensor<4> {
        rotary(x, self.cos.clone(), self.sin.clone()).expect("the tables fit")
    }

    /// Rotates queries and keys of one token a row, and writes keys and values into a cache.
    pub(super) fn append(
        &self,
        token: TokenHeads,
        cache: CachedKeys,
        position: Tensor<1, Int>,
    ) -> (Tensor<4>, CachedKeys) {
        let tables = [self.cos.clone(), self.sin.clone()];
        rotary_append(token, tables, cache, position).expect("the tables fit")
    }
}
