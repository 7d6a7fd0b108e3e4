//! Sizes in bytes as people write and read them: `40GiB`, `1.5GB`, `123456`.

use crate::{Error, Result};

/// Suffixes and their factors. A letter alone is binary, as in Slurm's `--mem`.
const UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("kib", 1 << 10),
    ("kb", 1_000),
    ("m", 1 << 20),
    ("mib", 1 << 20),
    ("mb", 1_000_000),
    ("g", 1 << 30),
    ("gib", 1 << 30),
    ("gb", 1_000_000_000),
    ("t", 1 << 40),
    ("tib", 1 << 40),
    ("tb", 1_000_000_000_000),
];

/// Reads a size: a decimal number and a unit, in any case, with or without a space between them.
///
/// `KiB`, `MiB`, `GiB`, `TiB` and the bare letters are powers of 1024, `KB`, `MB`, `GB`, `TB` powers of 1000, no unit is
/// bytes. Fractions are exact and rounded down to a whole byte.
///
/// # Errors
/// Anything else, a fraction of a byte, zero, and sizes of 2⁶³ bytes and more.
pub fn parse(text: &str) -> Result<u64> {
    size_of(text.trim()).ok_or_else(|| {
        Error::usage(format!(
            "size \"{text}\": write a number above 0 and a unit, such as 40GiB, 512MiB, 1.5GB or 123456"
        ))
    })
}

fn size_of(text: &str) -> Option<u64> {
    let number_end = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = text.split_at(number_end.unwrap_or(text.len()));
    let unit = unit.trim_start().to_ascii_lowercase();
    let factor = u128::from(UNITS.iter().find(|(name, _)| *name == unit)?.1);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let no_fraction_meant = !number.contains('.');
    if whole.is_empty() || (fraction.is_empty() != no_fraction_meant) || fraction.len() > 18 {
        return None;
    }
    if factor == 1 && !no_fraction_meant {
        return None;
    }
    let scale = 10u128.pow(fraction.len() as u32);
    let fraction = if fraction.is_empty() { "0" } else { fraction };
    let whole: u64 = whole.parse().ok()?;
    let fraction: u128 = fraction.parse().ok()?;
    let total = u128::from(whole) * factor + fraction * factor / scale;
    u64::try_from(total)
        .ok()
        .filter(|&bytes| bytes > 0 && bytes < 1 << 63)
}

/// Writes a size in the largest binary unit that it fills: `67.70 GiB`, `1.50 MiB`, `512 bytes`.
pub fn format(bytes: u64) -> String {
    let units = [
        ("TiB", 1u64 << 40),
        ("GiB", 1 << 30),
        ("MiB", 1 << 20),
        ("KiB", 1 << 10),
    ];
    match units.iter().find(|(_, unit)| bytes >= *unit) {
        Some((name, unit)) => format!("{:.2} {name}", bytes as f64 / *unit as f64),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let cases = [
            ("40GiB", 42_949_672_960),
            ("512MiB", 536_870_912),
            ("1.5GB", 1_500_000_000),
            ("123456", 123_456),
            ("40G", 42_949_672_960),
            (" 2 tib ", 2_199_023_255_552),
            ("0.1KiB", 102),
            ("0.3gb", 300_000_000),
            ("16 KB", 16_000),
            ("7b", 7),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused_with_the_text() {
        for text in [
            "",
            " ",
            "GiB",
            "-1GiB",
            "+1",
            "1e9",
            "1.",
            ".5GiB",
            "1..5GB",
            "1.5",
            "0",
            "0GiB",
            "40GiBs",
            "0x10",
            "inf",
            "NaN",
            "1,5GB",
            "9223372036854775808",
            "99999999999TiB",
            "1.0000000000000000000GB",
            "４GiB",
        ] {
            let message = parse(text).expect_err(text).to_string();
            assert!(message.contains("write a number"), "{message}");
            assert!(message.starts_with("size \""), "{message}");
        }
    }

    #[test]
    fn sizes_are_printed_in_the_unit_they_fill() {
        assert_eq!(format(0), "0 bytes");
        assert_eq!(format(1023), "1023 bytes");
        assert_eq!(format(1536), "1.50 KiB");
        assert_eq!(format(40 << 30), "40.00 GiB");
        assert_eq!(format(u64::MAX), "16777216.00 TiB");
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,24}") {
            let _ = parse(&text);
        }

        #[test]
        fn a_printed_size_reads_back_within_its_rounding(bytes in 1u64..1 << 62) {
            let back = parse(&format(bytes).replace(" bytes", "")).unwrap();
            // Two decimals of the unit, which is at most the size itself.
            prop_assert!(back.abs_diff(bytes) as f64 <= 0.006 * bytes as f64);
        }
    }
}
