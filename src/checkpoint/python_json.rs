//! Numbers in JSON text as Python's `json.dumps` writes them.

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
    use super::float_repr;
    use rstest::rstest;

    /// The texts are what Python 3.11 prints.
    #[rstest]
    #[case(0.0, "0.0")]
    #[case(-0.0, "-0.0")]
    #[case(64992.0, "64992.0")]
    #[case(0.208683013916015625, "0.20868301391601562")]
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
