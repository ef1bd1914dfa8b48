//! AdamW over all parameters of a model at once.

mod base;
mod group;
mod parts;

use std::fmt;
use std::sync::Arc;

use burn::backend::Dispatch;
use burn::tensor::{DType, Device, Tensor, TensorData};

#[doc(hidden)]
pub use base::{AccumulateSpec, AdamWBackend, AdamWSpec, Moments};
pub use group::{MomentState, TensorState};
#[doc(hidden)]
pub use parts::FlatParts;

use self::group::Group;
use super::tensor::{check_device, check_dtype};
use crate::error::Nf4Error;
use crate::flat::{AdamWForm, AdamWScalars, FlatLayout, MAX_PARTS, TILE_ELEMS};
use crate::format::{FloatType, check_len};

/// What AdamW is set to, but for the learning rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSettings {
    /// How much of the average of gradients is kept in a step.
    pub beta1: f64,
    /// How much of the average of their squares is kept in a step.
    pub beta2: f64,
    /// Added to the root of the average of squares.
    pub eps: f64,
    /// How much of a parameter is taken off in a step, in learning rates.
    pub weight_decay: f64,
    /// The largest norm of all gradients together; larger ones are scaled down to it, as by PyTorch's
    /// `clip_grad_norm_`.
    pub max_grad_norm: Option<f64>,
}

const SHARE: &str = "a number of at least 0 and below 1";
const AT_LEAST_0: &str = "a finite number of at least 0";

impl Default for AdamWSettings {
    /// PyTorch's: 0.9, 0.999, 1e-8 and a decay of 0.01, without a largest norm.
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            max_grad_norm: None,
        }
    }
}

impl AdamWSettings {
    /// Checks that the numbers make sense.
    ///
    /// # Errors
    /// [`Nf4Error::Config`].
    pub fn check(&self) -> Result<(), Nf4Error> {
        let share = |value: f64| (0.0..1.0).contains(&value);
        let at_least_0 = |value: f64| value >= 0.0 && value.is_finite();
        let above_0 = |value: f64| value > 0.0 && value.is_finite();
        let norm = self.max_grad_norm;
        for (field, given, fits, expected) in [
            ("beta1", self.beta1, share(self.beta1), SHARE),
            ("beta2", self.beta2, share(self.beta2), SHARE),
            ("eps", self.eps, at_least_0(self.eps), AT_LEAST_0),
            (
                "weight_decay",
                self.weight_decay,
                at_least_0(self.weight_decay),
                AT_LEAST_0,
            ),
            (
                "max_grad_norm",
                norm.unwrap_or(1.0),
                norm.is_none_or(above_0),
                "a finite number above 0",
            ),
        ] {
            if !fits {
                return Err(Nf4Error::Config {
                    field,
                    expected,
                    given: given.to_string(),
                });
            }
        }
        Ok(())
    }

    fn scalars(&self, rate: f64) -> AdamWScalars {
        AdamWScalars {
            decay: (1.0 - rate * self.weight_decay) as f32,
            keep_first: self.beta1 as f32,
            first: (1.0 - self.beta1) as f32,
            keep_second: self.beta2 as f32,
            second: (1.0 - self.beta2) as f32,
            eps: self.eps as f32,
            max_norm: self.max_grad_norm.map_or(f32::MAX, |norm| norm as f32),
        }
    }

    /// `rate / (1 - beta1^t)` and `sqrt(1 - beta2^t)` at step `t` of a tensor, as `form` has them.
    fn factors(&self, rate: f64, t: u32, form: AdamWForm) -> [f32; 2] {
        let correction = |beta: f64| 1.0 - beta.powf(f64::from(t));
        let root = correction(self.beta2).sqrt();
        let step_size = rate / correction(self.beta1);
        let step_size = match form {
            AdamWForm::Torch => step_size,
            AdamWForm::Bnb => step_size * root,
        };
        [step_size as f32, root as f32]
    }
}

/// How moments are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AdamWMoments {
    /// In f32, with the arithmetic of `torch.optim.AdamW`.
    #[default]
    F32,
    /// In 8 bit with a scale for each 256, as `bitsandbytes.optim.AdamW8bit` keeps them, and with its arithmetic;
    /// those of tensors under [`MIN_8BIT_ELEMS`] elements in f32. See arXiv 2110.02861.
    Bits8,
}

/// Elements from which on a tensor has moments in 8 bit: `min_8bit_size` of bitsandbytes.
pub const MIN_8BIT_ELEMS: usize = 4096;

impl AdamWMoments {
    fn form(self) -> AdamWForm {
        match self {
            Self::F32 => AdamWForm::Torch,
            Self::Bits8 => AdamWForm::Bnb,
        }
    }
}

/// What became of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// The loss that was given.
    pub loss: f32,
    /// The norm of all gradients together, before they were clipped.
    pub grad_norm: f32,
}

impl StepReport {
    /// Whether the step was made. It is left out if the loss or the norm is not finite: then parameters, moments
    /// and numbers of steps are what they were before.
    pub fn is_applied(&self) -> bool {
        self.loss.is_finite() && self.grad_norm.is_finite()
    }
}

/// AdamW (arXiv 1711.05101) over many parameters: their f32 values, gradients and moments lie in flat buffers, and
/// a step is one launch over
/// all of them, or two where some moments are in 8 bit, after two for the norm. Nothing is read by the host but
/// the loss and the norm, together.
///
/// The arithmetic is that which [`AdamWMoments`] names, in f32. A tensor without a gradient in a step stays as it is, and
/// so does its number of steps. A step whose loss or norm is not finite is left out, which the device decides.
///
/// ```
/// use burn::tensor::{DType, Device, Tensor};
/// use burn_nf4::op::{AdamWMoments, AdamWSettings, FlatAdamW};
///
/// let device = Device::default();
/// let parameters = vec![Tensor::ones([3], &device)];
/// let mut optimizer = FlatAdamW::new(parameters, AdamWMoments::F32)?;
/// optimizer.accumulate(vec![(0, Tensor::from_floats([3.0, 0.0, 4.0], &device))])?;
/// optimizer.step(0.1, &AdamWSettings::default(), Tensor::from_floats([0.5], &device))?;
/// let report = optimizer.report()?.expect("a step was made");
/// assert_eq!((report.loss, report.grad_norm), (0.5, 5.0));
/// let values = optimizer.values(DType::F32);
/// let parameter = optimizer.view(&values, 0, [3]).into_data();
/// parameter.assert_approx_eq::<f32>(&[0.899, 0.999, 0.899].into(), Default::default());
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
pub struct FlatAdamW {
    pub(crate) layout: Arc<FlatLayout>,
    pub(crate) device: Device,
    form: AdamWForm,
    pub(crate) values: Buffer,
    pub(crate) grads: Buffer,
    /// The moments, by how they are kept.
    groups: Vec<Group>,
    /// Steps made of each tensor.
    steps: Vec<u32>,
    /// Whether a tensor has a gradient that was not used yet.
    pub(crate) has_gradient: Vec<bool>,
    unread: Option<Unread>,
}

impl fmt::Debug for FlatAdamW {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlatAdamW")
            .field("tensors", &self.layout.tensors())
            .field("elems", &self.layout.elems())
            .field("form", &self.form)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

/// A step that the host has not looked at yet.
struct Unread {
    /// The loss and the norm.
    report: Tensor<1>,
    /// Which tensors it is a step of.
    of: Vec<bool>,
}

/// A flat buffer, `[elems]`, f32. It is taken out while an operation has it, so that it has one owner and is
/// written to in place.
pub(crate) struct Buffer(Option<Tensor<1>>);

impl Buffer {
    pub(crate) fn take(&mut self) -> Tensor<1> {
        self.0.take().expect("whoever takes it puts it back")
    }

    pub(crate) fn put(&mut self, tensor: Tensor<1>) {
        self.0 = Some(tensor);
    }

    pub(crate) fn tensor(&self) -> Tensor<1> {
        self.0.clone().expect("whoever takes it puts it back")
    }
}

impl FlatAdamW {
    /// An optimizer of tensors, which are copied, and which have numbers in their order.
    ///
    /// # Errors
    /// [`Nf4Error::ElementCount`] if there is none, or one without elements, [`Nf4Error::Dtype`] unless they are
    /// f16, bf16 or f32, [`Nf4Error::Device`] unless all are on one device.
    pub fn new(parameters: Vec<Tensor<1>>, moments: AdamWMoments) -> Result<Self, Nf4Error> {
        let layout = FlatLayout::new(parameters.iter().map(|parameter| parameter.dims()[0]))?;
        let device = parameters[0].device().without_autodiff();
        let zeros = || Buffer(Some(Tensor::zeros([layout.elems()], (&device, DType::F32))));
        let (in_8_bit, in_f32): (Vec<usize>, Vec<usize>) =
            (0..layout.tensors()).partition(|&tensor| {
                moments == AdamWMoments::Bits8 && layout.range(tensor).len() >= MIN_8BIT_ELEMS
            });
        let groups = [(in_8_bit, AdamWMoments::Bits8), (in_f32, AdamWMoments::F32)];
        let groups = groups
            .into_iter()
            .filter(|(tensors, _)| !tensors.is_empty());
        let groups = groups.map(|(tensors, kind)| Group::new(&layout, tensors, kind, &device));
        let mut optimizer = Self {
            form: moments.form(),
            values: zeros(),
            grads: zeros(),
            groups: groups.collect(),
            steps: vec![0; layout.tensors()],
            has_gradient: vec![false; layout.tensors()],
            unread: None,
            layout: Arc::new(layout),
            device,
        };
        let parts = parameters.into_iter().enumerate().collect();
        let parts = optimizer.checked(parts, "parameter")?;
        add(&mut optimizer.values, &optimizer.layout, parts);
        Ok(optimizer)
    }

    /// Where the tensors lie.
    pub fn layout(&self) -> &FlatLayout {
        &self.layout
    }

    /// The device of the buffers.
    pub fn device(&self) -> Device {
        self.device.clone()
    }

    /// Adds gradients of some tensors, by their numbers, to those that are there: in f32, 16 a launch.
    ///
    /// # Shapes
    /// - each `[len]`
    ///
    /// # Errors
    /// [`Nf4Error::Length`] for one that does not fit its tensor, or that there is no tensor for,
    /// [`Nf4Error::Dtype`] unless it is f16, bf16 or f32, [`Nf4Error::Device`] unless it is where the parameters
    /// are. Then nothing is added.
    pub fn accumulate(&mut self, gradients: Vec<(usize, Tensor<1>)>) -> Result<(), Nf4Error> {
        let parts = self.checked(gradients, "gradient")?;
        for (_, tensors, _) in &parts {
            for &tensor in tensors {
                self.has_gradient[tensor] = true;
            }
        }
        add(&mut self.grads, &self.layout, parts);
        Ok(())
    }

    /// The tensors by their types, up to sixteen together.
    fn checked(&self, parts: Vec<(usize, Tensor<1>)>, name: &str) -> Result<Vec<Parts>, Nf4Error> {
        let device = self.device();
        let mut all: Vec<Parts> = Vec::new();
        for (tensor, part) in parts {
            if tensor >= self.layout.tensors() {
                return Err(Nf4Error::Length {
                    tensor: "layout".into(),
                    expected: tensor + 1,
                    given: self.layout.tensors(),
                });
            }
            check_len(name, self.layout.range(tensor).len(), part.dims()[0])?;
            check_device(name, &part.device(), &device)?;
            let dtype = FloatType::from_dtype(part.dtype(), name)?;
            // A tensor that comes twice is in two launches: those of one launch do not wait for each other.
            let open = all.iter_mut().find(|(of, tensors, _)| {
                *of == dtype && tensors.len() < MAX_PARTS && !tensors.contains(&tensor)
            });
            let part = without_autodiff(part);
            match open {
                Some((_, tensors, parts)) => {
                    tensors.push(tensor);
                    parts.push(part);
                }
                None => all.push((dtype, vec![tensor], vec![part])),
            }
        }
        Ok(all)
    }

    /// The tensors that have gradients since the last step, by their numbers.
    pub fn with_gradients(&self) -> Vec<usize> {
        let all = self.has_gradient.iter().enumerate();
        all.filter(|&(_, &has)| has)
            .map(|(tensor, _)| tensor)
            .collect()
    }

    /// Says that tensors have gradients now, which the device has added without the host: a recorded pass that was
    /// replayed.
    ///
    /// # Panics
    /// If there is no such tensor.
    pub fn set_with_gradients(&mut self, tensors: &[usize]) {
        for &tensor in tensors {
            self.has_gradient[tensor] = true;
        }
    }

    /// Drops the gradients that were accumulated; their buffer is set to zeros in place.
    pub fn drop_gradients(&mut self) {
        let zeros = Tensor::zeros([self.layout.elems()], (&self.device, DType::F32));
        let grads = self.grads.take();
        #[allow(clippy::single_range_in_vec_init, reason = "one axis")]
        let grads = grads.slice_assign([0..self.layout.elems()], zeros);
        self.grads.put(grads);
        self.has_gradient.fill(false);
    }

    /// The first and the last 256 of the values and of the gradients, `[1024]`, f32, to see whether a recorded pass
    /// reads and writes the buffers that are here.
    pub fn probe(&self) -> Tensor<1> {
        let last = self.layout.elems() - TILE_ELEMS;
        let parts = [&self.values, &self.grads].into_iter().flat_map(|buffer| {
            let tensor = buffer.tensor();
            [0, last].map(|start| tensor.clone().narrow(0, start, TILE_ELEMS))
        });
        Tensor::cat(parts.collect(), 0)
    }

    /// Makes a step with the gradients that were accumulated since the last, and sets them to zero. The host waits
    /// for nothing; [`report`](Self::report) says what became of it.
    ///
    /// The values are written in place if no [`view`](Self::view) of them is left, else they are copied first.
    ///
    /// # Shapes
    /// - `loss`: `[1]`, f32
    ///
    /// # Errors
    /// [`Nf4Error::Config`] for settings that make no sense, [`Nf4Error::Length`], [`Nf4Error::Dtype`] or
    /// [`Nf4Error::Device`] for a loss that is something else. Then nothing is changed. [`Nf4Error::Execution`] as of
    /// [`report`](Self::report), for the step before.
    pub fn step(
        &mut self,
        rate: f64,
        settings: &AdamWSettings,
        loss: Tensor<1>,
    ) -> Result<(), Nf4Error> {
        settings.check()?;
        if !(rate >= 0.0 && rate.is_finite()) {
            return Err(Nf4Error::Config {
                field: "rate",
                expected: AT_LEAST_0,
                given: rate.to_string(),
            });
        }
        check_len("loss", 1, loss.dims()[0])?;
        check_dtype("loss", &loss, "as the sums of it are", &[DType::F32])?;
        check_device("loss", &loss.device(), &self.device())?;
        // The number of this step depends on whether the last was made.
        self.report()?;
        let of = std::mem::replace(&mut self.has_gradient, vec![false; self.steps.len()]);
        let mut factors = Vec::with_capacity(2 * of.len());
        for (&steps, &has_gradient) in self.steps.iter().zip(&of) {
            factors.extend(match has_gradient {
                true => settings.factors(rate, steps + 1, self.form),
                false => [0.0, 0.0],
            });
        }
        let factors = TensorData::new(factors, [2 * of.len()]);
        let factors = Tensor::<1>::from_data(factors, (&self.device(), DType::F32));
        let grads = self.grads.take();
        let report = <Dispatch as AdamWBackend>::step_report(
            grads.clone().into_dispatch(),
            without_autodiff(loss).into_dispatch(),
        );
        let report = Tensor::<1>::from_dispatch(report);
        let factors = factors.into_dispatch();
        let [mut values, mut grads] = [self.values.take(), grads].map(Tensor::into_dispatch);
        for group in &mut self.groups {
            let spec = AdamWSpec {
                layout: self.layout.clone(),
                count: group.count(),
                scalars: settings.scalars(rate),
                form: self.form,
            };
            let moments;
            (values, grads, moments) = <Dispatch as AdamWBackend>::flat_adamw(
                values,
                grads,
                report.clone().into_dispatch(),
                group.tiles(),
                factors.clone(),
                group.take(),
                spec,
            );
            group.put(moments);
        }
        self.values.put(Tensor::from_dispatch(values));
        self.grads.put(Tensor::from_dispatch(grads));
        self.unread = Some(Unread { report, of });
        Ok(())
    }

    /// Waits for the last step and says what became of it, once.
    ///
    /// # Errors
    /// [`Nf4Error::Execution`] if the device failed at it or at what came before it, such as for want of memory.
    pub fn report(&mut self) -> Result<Option<StepReport>, Nf4Error> {
        let Some(Unread { report, of }) = self.unread.take() else {
            return Ok(None);
        };
        let report = report
            .try_into_data()
            .map_err(|error| Nf4Error::execution(&self.device, &error))?;
        let report: Vec<f32> = report.iter::<f32>().collect();
        let report = StepReport {
            loss: report[0],
            grad_norm: report[1],
        };
        if report.is_applied() {
            for (steps, made) in self.steps.iter_mut().zip(of) {
                *steps += u32::from(made);
            }
        }
        Ok(Some(report))
    }

    /// The values of all parameters, `[elems]`: the buffer itself in f32, else a copy.
    pub fn values(&self, dtype: DType) -> Tensor<1> {
        match self.values.tensor() {
            values if dtype == DType::F32 => values,
            values => values.cast(dtype),
        }
    }

    /// One tensor of a flat buffer: a view of it on CubeCL if its bytes are a multiple of 512, else a copy.
    ///
    /// # Panics
    /// If there is no such tensor, or it has not so many elements.
    pub fn view<const D: usize>(
        &self,
        flat: &Tensor<1>,
        tensor: usize,
        shape: [usize; D],
    ) -> Tensor<D> {
        let range = self.layout.range(tensor);
        let part = flat.clone().narrow(0, range.start, range.len());
        #[cfg(feature = "flex")]
        let part = super::backends::flex::copied(part);
        part.reshape(shape)
    }

    /// What is to be kept of each tensor, in host memory.
    ///
    /// # Errors
    /// Those of [`report`](Self::report).
    pub fn state(&mut self) -> Result<Vec<TensorState>, Nf4Error> {
        self.report()?;
        let values: Vec<f32> = self.values.tensor().into_data().iter::<f32>().collect();
        let mut moments = vec![None; self.layout.tensors()];
        for group in &self.groups {
            group.read(&self.layout, &mut moments);
        }
        let all = moments.into_iter().enumerate();
        let all = all.map(|(tensor, moments)| TensorState {
            values: values[self.layout.range(tensor)].to_vec(),
            moments: moments.expect("a tensor is in a group"),
            steps: self.steps[tensor],
        });
        Ok(all.collect())
    }

    /// Goes on from a state. Gradients that were not used are dropped.
    ///
    /// # Errors
    /// [`Nf4Error::Length`] for one that does not fit the tensors, [`Nf4Error::Dtype`] for moments that are kept
    /// otherwise here. Then nothing is changed.
    pub fn load_state(&mut self, state: &[TensorState]) -> Result<(), Nf4Error> {
        check_len("state", self.layout.tensors(), state.len())?;
        for (tensor, one) in state.iter().enumerate() {
            check_len("values", self.layout.range(tensor).len(), one.values.len())?;
        }
        for group in &self.groups {
            group.check(&self.layout, state)?;
        }
        let elems = self.layout.elems();
        let mut values = vec![0.0; elems];
        for (tensor, one) in state.iter().enumerate() {
            values[self.layout.range(tensor)].copy_from_slice(&one.values);
            self.steps[tensor] = one.steps;
        }
        let options = (&self.device, DType::F32);
        let values = TensorData::new(values, [elems]);
        self.values.put(Tensor::from_data(values, options));
        self.grads.put(Tensor::zeros([elems], options));
        for group in &mut self.groups {
            group.write(state, &self.device);
        }
        self.has_gradient.fill(false);
        self.unread = None;
        Ok(())
    }
}

/// Up to sixteen tensors of one type, by their numbers.
type Parts = (FloatType, Vec<usize>, Vec<Tensor<1>>);

fn add(buffer: &mut Buffer, layout: &Arc<FlatLayout>, parts: Vec<Parts>) {
    for (dtype, tensors, parts) in parts {
        let spec = AccumulateSpec {
            layout: layout.clone(),
            tensors,
            dtype,
        };
        let parts = parts.into_iter().map(Tensor::into_dispatch).collect();
        let parts = FlatParts::<Dispatch>::new(parts).expect("one to sixteen");
        let flat = buffer.take().into_dispatch();
        let flat = <Dispatch as AdamWBackend>::flat_accumulate(flat, parts, spec);
        buffer.put(Tensor::from_dispatch(flat));
    }
}

fn without_autodiff(tensor: Tensor<1>) -> Tensor<1> {
    match tensor.is_autodiff() {
        true => tensor.inner(),
        false => tensor,
    }
}
