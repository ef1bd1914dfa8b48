//! What a `quantization_config` says.

use std::fmt;

use serde_json::Value;

use crate::checkpoint::{Dtype, python_json};
use crate::error::Nf4Error;

/// A `quantization_config` of a `config.json` or of a part of it.
#[derive(Debug)]
pub(crate) struct Claim {
    /// The part, such as `text_config`; empty for the model itself.
    part: String,
    value: Value,
}

/// The names of bitsandbytes: the usual one, and transformers' name for 4 bit alone.
const METHODS: [&str; 2] = ["bitsandbytes", "bitsandbytes_4bit"];

/// Flags by the names of transformers' arguments and by those of its attributes, as it saves both.
const IN_4BIT: [&str; 2] = ["load_in_4bit", "_load_in_4bit"];
const IN_8BIT: [&str; 2] = ["load_in_8bit", "_load_in_8bit"];

impl Claim {
    /// The name of the entry.
    pub const FIELD: &str = "quantization_config";

    /// `None` for what Python takes for false, as transformers' `get_hf_quantizer` does.
    pub fn new(part: &str, value: &Value) -> Option<Self> {
        let is_false = match value {
            Value::Null => true,
            Value::Bool(flag) => !flag,
            Value::Number(number) => number.as_f64() == Some(0.0),
            Value::String(text) => text.is_empty(),
            Value::Array(items) => items.is_empty(),
            Value::Object(entries) => entries.is_empty(),
        };
        (!is_false).then(|| Self {
            part: part.into(),
            value: value.clone(),
        })
    }

    /// Checks that it claims bitsandbytes in 4 bit. One of bitsandbytes that sets no flag at all is
    /// taken for that; transformers 5.24 reads no weight in such a folder, nor where the flag is
    /// false. It refuses flags that are not booleans.
    ///
    /// # Errors
    /// [`Nf4Error::Config`].
    pub fn check(&self) -> Result<(), Nf4Error> {
        let refuse = |expected, given| {
            Err(Nf4Error::Config {
                field: Self::FIELD,
                expected,
                given,
            })
        };
        let (mut in_4bit, mut in_8bit) = (None, None);
        for (names, flag) in [(IN_4BIT, &mut in_4bit), (IN_8BIT, &mut in_8bit)] {
            for name in names {
                match self.value.get(name) {
                    Some(&Value::Bool(value)) => *flag = Some(flag.unwrap_or(false) | value),
                    None | Some(Value::Null) => {}
                    Some(other) => {
                        let value = python_json::to_string(other).unwrap_or_default();
                        let given = format!("{name} {value}{}", self.place());
                        return refuse("true or false for its flags", given);
                    }
                }
            }
        }
        let in_8bit = in_8bit == Some(true);
        let is_method = match self.value.get("quant_method") {
            // Older files name no method, and set a flag.
            None | Some(Value::Null) => in_4bit == Some(true) || in_8bit,
            Some(method) => method
                .as_str()
                .is_some_and(|method| METHODS.contains(&method)),
        };
        let expected = "bitsandbytes in 4 bit, or none";
        match (is_method, in_8bit) {
            (true, false) if in_4bit == Some(false) => {
                refuse(expected, format!("{self} with {} false", IN_4BIT[0]))
            }
            (true, false) => Ok(()),
            _ => refuse(expected, self.to_string()),
        }
    }

    /// The part of the model that it is found in.
    pub fn part(&self) -> &str {
        &self.part
    }

    /// What it says.
    pub fn value(&self) -> &Value {
        &self.value
    }

    /// ` in PART` for errors; nothing for the model itself.
    fn place(&self) -> String {
        match self.part.as_str() {
            "" => String::new(),
            part => format!(" in {part}"),
        }
    }

    /// The float type that it says codes are stored as.
    pub fn storage(&self) -> Option<Dtype> {
        match self.value.get("bnb_4bit_quant_storage")?.as_str()? {
            "float16" => Some(Dtype::F16),
            "bfloat16" => Some(Dtype::BF16),
            "float32" => Some(Dtype::F32),
            _ => None,
        }
    }
}

/// The method, and where it is claimed.
impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.value.get("quant_method") {
            Some(Value::String(method)) => f.write_str(method)?,
            _ => f.write_str("a method without a name")?,
        }
        let is_set = |name: &str| self.value.get(name) == Some(&Value::Bool(true));
        if IN_8BIT.iter().any(|name| is_set(name)) {
            f.write_str(" in 8 bit")?;
        }
        f.write_str(&self.place())
    }
}
