//! JSON as Python's `json` module reads and writes it.
//!
//! Python's JSON holds more than JSON does: `NaN`, `Infinity` and `-Infinity` (a number too large
//! for a double, such as `1e999`, is read as one of these), and integers of any length. Files of
//! transformers and PEFT hold all of them.
//!
//! [`from_slice`] reads each of them as an object with one key of this module's, whose value is
//! the text of the number, so that it passes through [`serde_json::Value`] and through whatever
//! else keeps entries that it does not know. [`to_string`] and [`to_string_pretty`] write such an
//! object as the number again. A field of a struct that may be one of them is a [`Float`].
//!
//! ```
//! use burn_nf4::checkpoint::python_json;
//!
//! let text = br#"{"time_step_limit": [0.0, Infinity], "max_length": 1000000000000000019884624838656}"#;
//! let config: serde_json::Value = python_json::from_slice(text)?;
//! assert_eq!(
//!     python_json::to_string(&config)?,
//!     r#"{"max_length": 1000000000000000019884624838656, "time_step_limit": [0.0, Infinity]}"#,
//! );
//! # Ok::<(), serde_json::Error>(())
//! ```

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::ops::Range;

use serde::de::{DeserializeOwned, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Number;
use serde_json::ser::{Formatter, PrettyFormatter};

/// The only key of an object that stands for a number which JSON has no form for.
const NUMBER: &str = "$python::number";

/// The key of the object that transformers 5 writes for such a number in a `config.json`.
const FLOAT_TAG: &str = "__float__";

/// `json.loads`: reads what Python reads, and a byte order mark before it, which Python refuses.
///
/// As in Python, the last of two values of one key counts, unless `T` has it otherwise.
///
/// # Errors
/// For text that Python does not read, and for what serde_json does not: half of a surrogate pair
/// in a string, and nesting of more than 128 levels.
pub fn from_slice<T: DeserializeOwned>(text: &[u8]) -> Result<T, serde_json::Error> {
    let text = match text {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => {
            return Err(serde_json::Error::custom("is UTF-16, expected UTF-8"));
        }
        _ => text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text),
    };
    let text = std::str::from_utf8(text).map_err(|error| {
        let before = &text[..error.valid_up_to()];
        let line = 1 + before.iter().filter(|&&byte| byte == b'\n').count();
        serde_json::Error::custom(format!("is not UTF-8 in line {line}"))
    })?;
    let pieces = Pieces::new(text);
    match pieces.next_number() {
        None => serde_json::from_str(text),
        // serde sees a map where the file has such a number.
        Some(_) => serde_json::from_reader(pieces).map_err(|error| {
            let message = error.to_string();
            serde_json::Error::custom(message.replace(
                "invalid type: map",
                "invalid type: map, or NaN, an infinity or an integer beyond 64 bits",
            ))
        }),
    }
}

/// `json.dumps(value)`, with keys in the order that `value` has them in.
///
/// # Errors
/// For a map whose keys are not strings, and what the value's own `Serialize` refuses.
pub fn to_string<T: Serialize + ?Sized>(value: &T) -> Result<String, serde_json::Error> {
    write(value, Spaced)
}

/// `json.dumps(value, indent=2)`, with keys in the order that `value` has them in. transformers
/// and PEFT sort them, as a [`serde_json::Map`] does; transformers ends its files with a line
/// break.
///
/// # Errors
/// As [`to_string`].
pub fn to_string_pretty<T: Serialize + ?Sized>(value: &T) -> Result<String, serde_json::Error> {
    write(value, PrettyFormatter::new())
}

/// A number of Python's JSON, as the nearest `f64`; also one in the form that transformers 5
/// writes, `{"__float__": "Infinity"}`.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Float(pub f64);

impl Serialize for Float {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.is_finite() {
            return serializer.serialize_f64(self.0);
        }
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry(NUMBER, non_finite(self.0))?;
        map.end()
    }
}

impl<'de> Deserialize<'de> for Float {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FloatVisitor;

        impl<'de> Visitor<'de> for FloatVisitor {
            type Value = Float;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number")
            }

            fn visit_f64<E>(self, value: f64) -> Result<Float, E> {
                Ok(Float(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Float, E> {
                Ok(Float(value as f64))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Float, E> {
                Ok(Float(value as f64))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Float, A::Error> {
                let entry = map.next_entry::<String, String>()?;
                let value = match entry
                    .as_ref()
                    .map(|(key, text)| (key.as_str(), text.as_str()))
                {
                    Some((NUMBER, text)) if is_beyond_json(text) => text.parse().ok(),
                    Some((FLOAT_TAG, text)) if is_non_finite(text) => text.parse().ok(),
                    _ => None,
                };
                match (value, map.next_key::<IgnoredAny>()?) {
                    (Some(value), None) => Ok(Float(value)),
                    _ => Err(A::Error::custom("an object, expected a number")),
                }
            }
        }

        deserializer.deserialize_any(FloatVisitor)
    }
}

fn non_finite(value: f64) -> &'static str {
    if value.is_nan() {
        "NaN"
    } else if value < 0.0 {
        "-Infinity"
    } else {
        "Infinity"
    }
}

fn is_non_finite(text: &str) -> bool {
    ["NaN", "Infinity", "-Infinity"].contains(&text)
}

/// Whether a text is one that [`as_json`] puts into an object.
fn is_beyond_json(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    is_non_finite(text) || (!digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
}

/// The text of Python's JSON as that of JSON, piece by piece: a file of nothing but `NaN` would
/// be five times as long.
struct Pieces<'a> {
    text: &'a str,
    /// One past the piece.
    at: usize,
    piece: io::Cursor<Cow<'a, [u8]>>,
}

impl<'a> Pieces<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            text,
            at: 0,
            piece: io::Cursor::new(b"".into()),
        }
    }

    /// The next number that is written otherwise in JSON: where it is, and how it is written.
    fn next_number(&self) -> Option<(Range<usize>, String)> {
        let bytes = self.text.as_bytes();
        let mut at = self.at;
        while let Some(&byte) = bytes.get(at) {
            let end = match byte {
                b'"' => end_of_string(bytes, at),
                b'-' | b'0'..=b'9' | b'N' | b'I' => end_of_token(bytes, at),
                _ => at + 1,
            };
            if byte != b'"'
                && let Some(json) = as_json(&self.text[at..end])
            {
                return Some((at..end, json));
            }
            at = end;
        }
        None
    }
}

impl io::Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.piece.read(buffer)?;
            if read > 0 || self.at == self.text.len() || buffer.is_empty() {
                return Ok(read);
            }
            let (piece, end) = match self.next_number() {
                Some((range, json)) if range.start == self.at => {
                    (json.into_bytes().into(), range.end)
                }
                next => {
                    let end = next.map_or(self.text.len(), |(range, _)| range.start);
                    (self.text.as_bytes()[self.at..end].into(), end)
                }
            };
            self.piece = io::Cursor::new(piece);
            self.at = end;
        }
    }
}

/// One past the quote that ends the string which begins at `start`.
fn end_of_string(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    bytes.len()
}

fn end_of_token(bytes: &[u8], start: usize) -> usize {
    let is_part = |byte: &u8| byte.is_ascii_alphanumeric() || b"+-.".contains(byte);
    let len = bytes[start..]
        .iter()
        .take_while(|byte| is_part(byte))
        .count();
    start + len.max(1)
}

/// What stands for a number that serde_json would not read as Python does. `None` for one that it
/// does, and for what is no number: serde_json's own error says what is wrong with it.
fn as_json(token: &str) -> Option<String> {
    let number = match token {
        _ if is_non_finite(token) => token,
        // An integer in Python, a float to serde_json.
        "-0" => return Some("0".into()),
        _ => {
            let integer = is_beyond_json(token);
            match serde_json::from_str::<Number>(token) {
                Ok(number) if integer && number.is_f64() => token,
                Ok(_) => return None,
                // Well-formed, so it is out of range.
                Err(_) if serde_json::from_str::<IgnoredAny>(token).is_ok() => match integer {
                    true => token,
                    false if token.starts_with('-') => "-Infinity",
                    false => "Infinity",
                },
                Err(_) => return None,
            }
        }
    };
    Some(format!(r#"{{"{NUMBER}":"{number}"}}"#))
}

/// The reverse of [`as_json`]. Within a string the quotes of the key would be escaped, so that it
/// is found only where it is a key.
fn unescape(text: String) -> String {
    let key = format!("\"{NUMBER}\"");
    if !text.contains(&key) {
        return text;
    }
    let mut plain = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(at) = rest.find(&key) {
        let (before, after) = (&rest[..at], &rest[at + key.len()..]);
        match (
            before.trim_end().strip_suffix('{'),
            value_of_only_key(after),
        ) {
            (Some(before), Some((number, after))) => {
                plain += before;
                plain += number;
                rest = after;
            }
            _ => {
                plain += before;
                plain += &key;
                rest = after;
            }
        }
    }
    plain + rest
}

/// The number after the key, and what follows the object, if the object has no other key.
fn value_of_only_key(after_key: &str) -> Option<(&str, &str)> {
    let value = after_key
        .strip_prefix(':')?
        .trim_start()
        .strip_prefix('"')?;
    let (number, rest) = value.split_once('"')?;
    let rest = rest.trim_start().strip_prefix('}')?;
    is_beyond_json(number).then_some((number, rest))
}

fn write<T: Serialize + ?Sized, L: Formatter>(
    value: &T,
    layout: L,
) -> Result<String, serde_json::Error> {
    let mut text = Vec::new();
    let formatter = PythonFormatter { layout };
    value.serialize(&mut serde_json::Serializer::with_formatter(
        &mut text, formatter,
    ))?;
    String::from_utf8(text)
        .map(unescape)
        .map_err(serde_json::Error::custom)
}

/// The separators of `json.dumps` without an indent.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Floats and text beyond ASCII look different in Python.
struct PythonFormatter<L> {
    layout: L,
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

impl<L: Formatter> Formatter for PythonFormatter<L> {
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
        return scientific; // NaN and infinity, which serde_json writes as null
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
    use super::{Float, float_repr, from_slice, to_string, to_string_pretty};
    use rstest::rstest;
    use serde_json::{Map, Value, json};

    fn read(text: &str) -> Result<Value, serde_json::Error> {
        from_slice(text.as_bytes())
    }

    #[test]
    fn text_reads_as_in_python() {
        let value = json!({
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
}"#;
        assert_eq!(to_string_pretty(&value).unwrap(), python);
        // print(json.dumps({...}, sort_keys=True))
        let python = r#"{"a": {"x\n": {}, "\u00e9\"\ud83d\ude00": null}, "b": [1, 1e-06, []]}"#;
        assert_eq!(to_string(&value).unwrap(), python);
    }

    /// `json.dumps(json.loads(text))` of Python 3.11 is the same text, or the other one.
    #[rstest]
    #[case("[NaN, Infinity, -Infinity]", None)]
    #[case("NaN", None)]
    #[case(r#"{"a": Infinity}"#, None)]
    #[case(r#"{"a": {"b": [[-Infinity], {"c": NaN}]}}"#, None)]
    #[case("[NaN,Infinity ,\n-Infinity\t]", Some("[NaN, Infinity, -Infinity]"))]
    #[case(r#"["NaN", "Infinity", ", -Infinity", "\"NaN", "a\\", NaN]"#, None)]
    #[case(r#"{"NaN": 1, "\\": Infinity, "x\": NaN, \"": 2}"#, None)]
    #[case("[1000000000000000019884624838656, -18446744073709551616]", None)]
    #[case("[18446744073709551615, -9223372036854775808]", None)]
    #[case("[18446744073709551616, -9223372036854775809]", None)]
    #[case("[1e999, -1E+999, 1.5e400]", Some("[Infinity, -Infinity, Infinity]"))]
    #[case("[1e-999, -0, -0.0, 0]", Some("[0.0, 0, -0.0, 0]"))]
    #[case("[1E5, 1e16, 0.1e1, 1e-7]", Some("[100000.0, 1e+16, 1.0, 1e-07]"))]
    // Digits that the quick way of reading floats gets wrong.
    #[case("[0.20868301391601562, 0.6228983767061911, 0.17677669529663687]", None)]
    #[case("[1.7976931348623157e+308, 2.2250738585072014e-308, 5e-324]", None)]
    #[case(r#"{"a": 1, "a": Infinity}"#, Some(r#"{"a": Infinity}"#))]
    #[case(r#"{"__float__": "Infinity"}"#, None)]
    // What stands for a number is one only where this module puts it.
    #[case(r#"{"$python::number": "x"}"#, None)]
    #[case(r#"{"$python::number": 1, "b": NaN}"#, None)]
    #[case(r#"["$python::number", Infinity]"#, None)]
    fn numbers_are_kept_as_python_keeps_them(#[case] text: &str, #[case] again: Option<&str>) {
        let value = read(text).unwrap();
        assert_eq!(to_string(&value).unwrap(), again.unwrap_or(text));
        let pretty = to_string_pretty(&value).unwrap();
        assert_eq!(read(&pretty).unwrap(), value, "{pretty}");
    }

    /// None of them is read by Python 3.11, but for the one of which the comment says so.
    #[rstest]
    #[case("", "EOF")]
    #[case("nan", "expected")]
    #[case("[inf]", "expected")]
    #[case("[NaNN]", "expected")]
    #[case("[+Infinity]", "expected")]
    #[case("[-NaN]", "number")]
    #[case("[Infinity0]", "expected")]
    #[case("[- 1]", "number")]
    #[case("[0000000000000000000000001]", "number")]
    #[case("[1.e999]", "number")]
    #[case("[.5e999]", "expected")]
    #[case("{NaN: 1}", "key must be a string")]
    #[case("[1] NaN", "trailing")]
    #[case("\"NaN", "EOF")]
    #[case("[Infinity", "EOF")]
    // Python reads halves of surrogate pairs; a string here cannot hold one.
    #[case(r#"["\ud800"]"#, "hex escape")]
    fn other_text_is_refused(#[case] text: &str, #[case] words: &str) {
        let error = read(text).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }

    #[rstest]
    #[case(b"\xff\xfe{\0}\0", "UTF-16")]
    #[case(b"\xfe\xff\0{\0}", "UTF-16")]
    #[case(b"{\n\"a\": \"\xe9\"}", "not UTF-8 in line 2")]
    fn other_encodings_are_named(#[case] text: &[u8], #[case] words: &str) {
        let error = from_slice::<Value>(text).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }

    #[test]
    fn a_byte_order_mark_is_skipped() {
        let value: Value = from_slice(b"\xef\xbb\xbf{\"a\": NaN}").unwrap();
        assert_eq!(to_string(&value).unwrap(), r#"{"a": NaN}"#);
    }

    #[test]
    fn deep_nesting_is_an_error() {
        for text in ["[".repeat(1_000_000), r#"{"a":"#.repeat(1_000_000)] {
            assert!(read(&text).unwrap_err().to_string().contains("recursion"));
        }
    }

    #[test]
    fn a_field_of_another_type_names_what_the_file_holds() {
        for text in ["Infinity", "18446744073709551616"] {
            let error = from_slice::<usize>(text.as_bytes())
                .unwrap_err()
                .to_string();
            assert!(
                error.contains("an infinity or an integer beyond 64 bits"),
                "{error}"
            );
        }
    }

    /// Also where serde first buffers what it reads, as it does for untagged enums.
    #[test]
    fn a_field_can_be_any_number() {
        #[derive(serde::Deserialize)]
        #[serde(untagged)]
        enum OneOrMany {
            One(Float),
            Many(Vec<Option<Float>>),
        }
        let text = br#"[1, 0.5, null, Infinity, {"__float__": "-Infinity"}, -1e400, 100000000000000000000]"#;
        let expected = [
            Some(1.0),
            Some(0.5),
            None,
            Some(f64::INFINITY),
            Some(f64::NEG_INFINITY),
            Some(f64::NEG_INFINITY),
            Some(1e20),
        ];
        let floats = match from_slice(text).unwrap() {
            OneOrMany::Many(floats) => floats,
            OneOrMany::One(_) => panic!("a list"),
        };
        assert!(floats.iter().map(|float| float.map(|f| f.0)).eq(expected));
        let again = "[1.0, 0.5, null, Infinity, -Infinity, -Infinity, 1e+20]";
        assert_eq!(to_string(&floats).unwrap(), again);
        let OneOrMany::One(Float(nan)) = from_slice(b"NaN").unwrap() else {
            panic!("one");
        };
        assert!(nan.is_nan());
    }

    #[rstest]
    fn a_field_is_nothing_but_a_number(
        #[values(
            r#""Infinity""#,
            "{}",
            "[]",
            "true",
            r#"{"__float__": "1.5"}"#,
            r#"{"__float__": "NaN", "a": 1}"#,
            r#"{"a": "NaN"}"#
        )]
        text: &str,
    ) {
        let error = from_slice::<Float>(text.as_bytes())
            .unwrap_err()
            .to_string();
        assert!(error.contains("number"), "{error}");
    }

    #[test]
    fn entries_of_a_map_are_sorted() {
        let entries: Map<String, Value> = from_slice(br#"{"b": NaN, "a": 1}"#).unwrap();
        assert_eq!(to_string(&entries).unwrap(), r#"{"a": 1, "b": NaN}"#);
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
