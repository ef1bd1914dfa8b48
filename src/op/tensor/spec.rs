//! What a packed weight is.

use crate::error::Nf4Error;
use crate::format::{BlockTensor, PackedLayout, WeightForm, matrix_dims};

/// A form that was checked, and its layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WeightSpec {
    pub form: WeightForm,
    pub layout: PackedLayout,
}

impl WeightSpec {
    /// Checks a form.
    pub fn new(form: WeightForm) -> Result<Self, Nf4Error> {
        if form.transposed {
            matrix_dims("weight", &form.shape)?;
            // The scales of the others follow rows: those of the transpose are others.
            let quant_type = form.config.quant_type;
            if !quant_type.is_bitsandbytes() {
                return Err(Nf4Error::Config {
                    field: "transposed",
                    expected: "false for types that bitsandbytes does not have",
                    given: format!("true for a weight in {}", quant_type.name()),
                });
            }
        }
        let layout = PackedLayout::for_shape(&form.shape, form.config)?;
        Ok(Self { form, layout })
    }

    /// The image of a weight that decodes to zeros.
    pub fn zero_words(&self) -> Vec<u32> {
        let Self { form, layout } = self;
        let mut words = BlockTensor::zeros(&form.stored_shape(), form.config, form.dtype)
            .expect("the shape was checked")
            .to_packed();
        words[layout.header_start()..].copy_from_slice(&layout.form_header(form));
        words
    }
}
