//! What a packed weight is, as a part of its module.

use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
};
use burn::tensor::{Device, Int, Tensor};

use crate::error::Nf4Error;
use crate::format::{HEADER_WORDS, Nf4Tensor, PackedLayout, WeightForm, check_header_words};

/// What a packed weight is.
///
/// A module without parameters. A visitor is told the form as a name that is entered and left at
/// once, in [`FORM_CONTAINER`]: the header of the packed tensor has a hash of the shape only, and
/// to read it a tensor that may not exist yet would have to be made and downloaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WeightSpec {
    pub form: WeightForm,
    pub layout: PackedLayout,
}

/// The container type under which a visitor is told a [`WeightForm`], as JSON text.
pub(crate) const FORM_CONTAINER: &str = "WeightForm";

impl WeightSpec {
    /// Checks a form.
    pub fn new(form: WeightForm) -> Result<Self, Nf4Error> {
        if form.transposed && form.shape.len() != 2 {
            return Err(Nf4Error::NotAMatrix {
                tensor: "weight".into(),
                shape: form.shape,
            });
        }
        let layout = PackedLayout::for_shape(&form.shape, form.config)?;
        Ok(Self { form, layout })
    }

    /// The image of a weight that decodes to zeros.
    pub fn zero_words(&self) -> Vec<u32> {
        let Self { form, layout } = self;
        let mut words = Nf4Tensor::zeros(&form.stored_shape(), form.config, form.dtype)
            .expect("the shape was checked")
            .to_packed();
        words[layout.header..].copy_from_slice(&layout.form_header(form));
        words
    }

    /// Reads the header of a packed tensor that a record brings.
    pub fn assert_header(&self, packed: &Tensor<1, Int>) {
        let header = self.layout.header;
        let found = packed
            .clone()
            .slice(header..header + HEADER_WORDS)
            .into_data();
        let found: Vec<u32> = found.iter::<u32>().collect();
        if let Err(error) = check_header_words(&self.layout.form_header(&self.form), &found) {
            panic!("cannot load the record: {error}");
        }
    }
}

impl Module for WeightSpec {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        let form = serde_json::to_string(&self.form).expect("numbers and names");
        visitor.enter_module(&form, FORM_CONTAINER);
        visitor.exit_module(&form, FORM_CONTAINER);
    }

    fn map<M: ModuleMapper>(self, _mapper: &mut M) -> Self {
        self
    }

    fn to_device(self, _device: &Device) -> Self {
        self
    }

    fn fork(self, _device: &Device) -> Self {
        self
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        devices
    }

    fn materialize(self) -> Self {
        self
    }

    fn valid(&self) -> Self {
        self.clone()
    }

    fn train(self) -> Self {
        self
    }
}

impl ModuleDisplayDefault for WeightSpec {
    fn content(&self, content: Content) -> Option<Content> {
        let text = format!("{:?}, {}", self.form.shape, self.form);
        content.add_formatted(&text).optional()
    }
}

impl ModuleDisplay for WeightSpec {}
