//! Methods of Python's texts and lists, for templates that were made for it.

use minijinja::value::{Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Those of `minijinja_contrib`, and those that it lacks.
pub fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let own = match (value.kind(), value.as_str()) {
        (_, Some(text)) => of_text(text, name, args)?,
        (ValueKind::Seq, _) if name == "index" => Some(index_of(value, args)?),
        _ => None,
    };
    match own {
        Some(result) => Ok(result),
        None => unknown_method_callback(state, value, name, args),
    }
}

fn of_text(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let result = match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "partition" => {
            let separator = separator(args)?;
            triple(match text.split_once(separator) {
                Some((before, after)) => [before, separator, after],
                None => [text, "", ""],
            })
        }
        "rpartition" => {
            let separator = separator(args)?;
            triple(match text.rsplit_once(separator) {
                Some((before, after)) => [before, separator, after],
                None => ["", "", text],
            })
        }
        // Without a number of cuts it is `split`.
        "rsplit" => match from_args(args)? {
            (Some(separator), Some(cuts)) if cuts >= 0 => rsplit(text, separator, cuts)?,
            (None, Some(_)) => return Err(invalid("rsplit by white space has no limit here")),
            _ => return Ok(None),
        },
        "index" => {
            let (part,): (&str,) = from_args(args)?;
            let at = text
                .find(part)
                .ok_or_else(|| invalid("substring not found"))?;
            text[..at].chars().count().into()
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swap = |letter: char| match letter.is_uppercase() {
                true => letter.to_lowercase().collect::<String>(),
                false => letter.to_uppercase().collect(),
            };
            text.chars().map(swap).collect::<String>().into()
        }
        "casefold" => {
            let () = from_args(args)?;
            text.to_lowercase().replace('ß', "ss").into()
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = match text.starts_with(['+', '-']) {
                true => text.split_at(1),
                false => ("", text),
            };
            let zeros = "0".repeat(missing(text, width)?);
            format!("{sign}{zeros}{digits}").into()
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<&str>) = from_args(args)?;
            let missing = missing(text, width)?;
            let before = match name {
                "ljust" => 0,
                "rjust" => missing,
                // Where Python puts the odd one.
                _ => missing / 2 + (missing & width & 1),
            };
            let fill = |count| fill.unwrap_or(" ").repeat(count);
            format!("{}{text}{}", fill(before), fill(missing - before)).into()
        }
        _ => return Ok(None),
    };
    Ok(Some(result))
}

fn triple(texts: [&str; 3]) -> Value {
    Value::from(Tuple::from(texts.map(Value::from)))
}

/// The widest text that a template may ask for.
const MAX_WIDTH: usize = 10_000;

/// Refuses a width that no text has, and for which there may be no memory.
pub(super) fn check_width(width: usize) -> Result<usize, Error> {
    match width > MAX_WIDTH {
        true => Err(invalid("a width of more than 10000")),
        false => Ok(width),
    }
}

/// Letters that a text lacks to a width.
fn missing(text: &str, width: usize) -> Result<usize, Error> {
    Ok(check_width(width)?.saturating_sub(text.chars().count()))
}

fn separator(args: &[Value]) -> Result<&str, Error> {
    let (separator,): (&str,) = from_args(args)?;
    match separator.is_empty() {
        true => Err(invalid("empty separator")),
        false => Ok(separator),
    }
}

fn rsplit(text: &str, separator: &str, cuts: i64) -> Result<Value, Error> {
    if separator.is_empty() {
        return Err(invalid("empty separator"));
    }
    let parts = text.rsplitn(cuts as usize + 1, separator);
    let mut parts: Vec<&str> = parts.collect();
    parts.reverse();
    Ok(parts.into_iter().map(Value::from).collect())
}

fn index_of(list: &Value, args: &[Value]) -> Result<Value, Error> {
    let (wanted,): (Value,) = from_args(args)?;
    let at = list.try_iter()?.position(|item| item == wanted);
    at.map(Value::from)
        .ok_or_else(|| invalid("the value is not in the list"))
}

fn invalid(message: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
