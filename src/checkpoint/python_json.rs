//! JSON text as Python's `json.dumps` writes it.

use std::io;

use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use serde_json::{Map, Value};

/// `json.dumps(entries, indent=2, sort_keys=True)` and a final newline, as transformers writes
/// its files.
pub(super) fn pretty(entries: &Map<String, Value>) -> String {
    let mut text = Vec::new();
    let mut serializer = Serializer::with_formatter(
        &mut text,
        PythonFormatter {
            layout: PrettyFormatter::new(),
        },
    );
    // Writing to memory cannot fail, nor can a value whose keys are strings.
    let _ = entries.serialize(&mut serializer);
    text.push(b'\n');
    String::from_utf8(text).unwrap_or_default()
}

/// serde_json's layout is Python's; floats and text beyond ASCII look different.
struct PythonFormatter {
    layout: PrettyFormatter<'static>,
}

/// Methods that are those of the layout.
macro_rules! as_in_layout {
    ($($name:ident($($argument:ident: $type:ty)?)),*) => {
        $(fn $name<W: ?Sized + io::Write>(
            &mut self,
            writer: &mut W,
            $($argument: $type)?
        ) -> io::Result<()> {
            self.layout.$name(writer, $($argument)?)
        })*
    };
}

impl Formatter for PythonFormatter {
    as_in_layout!(
        begin_array(),
        end_array(),
        begin_array_value(first: bool),
        end_array_value(),
        begin_object(),
        end_object(),
        begin_object_key(first: bool),
        begin_object_value(),
        end_object_value()
    );

    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(float_repr(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        for character in fragment.chars() {
            if character.is_ascii() && character != '\x7f' {
                write!(writer, "{character}")?;
            } else {
                let mut units = [0; 2];
                for unit in character.encode_utf16(&mut units) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }
}

/// `repr` of a Python float: the fewest digits that read back as the same value, with an exponent
/// below 1e-4 and from 1e16 on.
pub(super) fn float_repr(value: f64) -> String {
    let shortest = format!("{value:e}");
    // Where two texts of that length are equally near, which happens with widened f32, Python
    // takes the one with an even last digit.
    let decimals = shortest
        .bytes()
        .take_while(|&byte| byte != b'e')
        .filter(u8::is_ascii_digit)
        .count()
        .saturating_sub(1);
    let nearest = format!("{value:.decimals$e}");
    let scientific = if nearest.parse() == Ok(value) {
        nearest
    } else {
        shortest
    };
    let Some((mantissa, exponent)) = scientific.split_once('e') else {
        return scientific; // NaN and infinity; nothing that is written here holds them
    };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{mantissa}e{sign}{:02}", exponent.unsigned_abs());
    }
    // Without exponent the same digits take this many decimals, and at least one.
    let decimals = usize::try_from(decimals as i32 - exponent)
        .unwrap_or(0)
        .max(1);
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::{float_repr, pretty};
    use rstest::rstest;

    #[test]
    fn text_reads_as_in_python() {
        let value = serde_json::json!({
            "b": [1, 1e-6, []],
            "a": { "é\"😀": null, "x\n": {} },
        });
        // print(json.dumps({...}, indent=2, sort_keys=True))
        let python = r#"{
  "a": {
    "x\n": {},
    "\u00e9\"\ud83d\ude00": null
  },
  "b": [
    1,
    1e-06,
    []
  ]
}
"#;
        let serde_json::Value::Object(entries) = value else {
            panic!("an object");
        };
        assert_eq!(pretty(&entries), python);
    }

    /// The texts are what Python 3.11 prints.
    #[rstest]
    #[case(0.0, "0.0")]
    #[case(-0.0, "-0.0")]
    #[case(64992.0, "64992.0")]
    #[case(f64::from(0.20868301f32), "0.20868301391601562")]
    #[case(123456.7, "123456.7")]
    #[case(0.05175971984863281, "0.05175971984863281")]
    #[case(5.187241214343885e-08, "5.187241214343885e-08")]
    #[case(0.0001, "0.0001")]
    #[case(f64::from(1e-4f32), "9.999999747378752e-05")]
    #[case(1e-45f32 as f64, "1.401298464324817e-45")]
    #[case(1e-7, "1e-07")]
    #[case(1e15, "1000000000000000.0")]
    #[case(1e16, "1e+16")]
    #[case(f64::from(f32::MAX), "3.4028234663852886e+38")]
    #[case(1e-100, "1e-100")]
    fn floats_read_as_in_python(#[case] value: f64, #[case] text: &str) {
        assert_eq!(float_repr(value), text);
    }
}
