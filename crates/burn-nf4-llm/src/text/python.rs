//! Values as Python writes them, for templates that were made for it.

use burn_nf4::checkpoint::python_json::{self, Float};
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

use crate::text::methods::check_width;

/// How `json.dumps` is asked to write.
#[derive(Debug, Clone)]
struct Layout {
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
}

/// The filter `tojson` of transformers: `json.dumps`, and not Jinja's own, which escapes HTML.
pub fn tojson(value: &Value, ensure_ascii: Option<bool>, options: Kwargs) -> Result<Value, Error> {
    let indent = match options.get::<Option<Value>>("indent")? {
        None => None,
        Some(value) if value.is_none() => None,
        Some(value) => Some(match (value.as_usize(), value.as_str()) {
            (Some(spaces), _) => " ".repeat(check_width(spaces)?),
            (_, Some(text)) => text.to_string(),
            _ => return Err(invalid(format!("tojson cannot indent by {value}"))),
        }),
    };
    let (mut item_separator, mut key_separator) = match indent {
        Some(_) => (",".to_string(), ": ".to_string()),
        None => (", ".to_string(), ": ".to_string()),
    };
    if let Some(separators) = options.get::<Option<Value>>("separators")?
        && !separators.is_none()
    {
        let texts: Vec<String> = separators
            .try_iter()?
            .map(|text| text.to_string())
            .collect();
        [item_separator, key_separator] = texts
            .try_into()
            .map_err(|_| invalid("tojson takes two separators".into()))?;
    }
    let layout = Layout {
        ensure_ascii: match ensure_ascii {
            Some(ascii) => ascii,
            None => options
                .get::<Option<bool>>("ensure_ascii")?
                .unwrap_or(false),
        },
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        item_separator,
        key_separator,
    };
    options.assert_all_used()?;
    let mut text = String::new();
    layout.write(value, 0, &mut text)?;
    Ok(Value::from(text))
}

/// The filter `int` of Jinja, which has a default for what is no number.
pub fn int(value: &Value, default: Option<Value>) -> Value {
    let number = match value.as_str() {
        Some(text) => text.trim().replace('_', "").parse().ok().or_else(|| {
            let float: f64 = text.trim().parse().ok()?;
            float.is_finite().then_some(float as i64)
        }),
        None if value.kind() == ValueKind::Bool => Some(i64::from(value.is_true())),
        None => match i64::try_from(value.clone()) {
            Ok(number) => Some(number),
            Err(_) => f64::try_from(value.clone()).ok().map(|float| float as i64),
        },
    };
    match number {
        Some(number) => number.into(),
        None => default.unwrap_or_else(|| 0.into()),
    }
}

/// The filter `escape` of MarkupSafe.
pub fn escape(value: &Value) -> Value {
    if value.is_safe() {
        return value.clone();
    }
    let mut text = String::new();
    for letter in value.to_string().chars() {
        match letter {
            '&' => text.push_str("&amp;"),
            '<' => text.push_str("&lt;"),
            '>' => text.push_str("&gt;"),
            '"' => text.push_str("&#34;"),
            '\'' => text.push_str("&#39;"),
            letter => text.push(letter),
        }
    }
    Value::from_safe_string(text)
}

impl Layout {
    fn write(&self, value: &Value, depth: usize, text: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => text.push_str("null"),
            ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => text.push_str(&number(value)),
            ValueKind::String => self.write_text(value.as_str().unwrap_or_default(), text),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.write_all(&items, ['[', ']'], depth, text, |item, text| {
                    self.write(item, depth + 1, text)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.write_all(&keys, ['{', '}'], depth, text, |key, text| {
                    match key.kind() {
                        ValueKind::Bool | ValueKind::None | ValueKind::Number => {
                            text.push('"');
                            self.write(key, depth, text)?;
                            text.push('"');
                        }
                        _ => self.write_text(&key.to_string(), text),
                    }
                    text.push_str(&self.key_separator);
                    self.write(&value.get_item(key)?, depth + 1, text)
                })?;
            }
            kind => {
                return Err(invalid(format!(
                    "tojson cannot write a value that is {kind}"
                )));
            }
        }
        Ok(())
    }

    fn write_all(
        &self,
        items: &[Value],
        [open, close]: [char; 2],
        depth: usize,
        text: &mut String,
        mut write: impl FnMut(&Value, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        text.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                text.push_str(&self.item_separator);
            }
            self.new_line(depth + 1, text);
            write(item, text)?;
        }
        if !items.is_empty() {
            self.new_line(depth, text);
        }
        text.push(close);
        Ok(())
    }

    fn new_line(&self, depth: usize, text: &mut String) {
        if let Some(indent) = &self.indent {
            text.push('\n');
            text.push_str(&indent.repeat(depth));
        }
    }

    fn write_text(&self, value: &str, text: &mut String) {
        text.push('"');
        for character in value.chars() {
            match character {
                '"' => text.push_str("\\\""),
                '\\' => text.push_str("\\\\"),
                '\n' => text.push_str("\\n"),
                '\r' => text.push_str("\\r"),
                '\t' => text.push_str("\\t"),
                '\u{8}' => text.push_str("\\b"),
                '\u{c}' => text.push_str("\\f"),
                ' '..='~' => text.push(character),
                _ if character < ' ' || self.ensure_ascii => {
                    let mut units = [0; 2];
                    for unit in character.encode_utf16(&mut units) {
                        text.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                _ => text.push(character),
            }
        }
        text.push('"');
    }
}

fn number(value: &Value) -> String {
    let float = match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => Float(float),
        _ => return value.to_string(),
    };
    python_json::to_string(&float).unwrap_or_else(|_| value.to_string())
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
