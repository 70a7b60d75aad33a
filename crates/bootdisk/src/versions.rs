//! Which of two versions is newer: the comparison of the Boot Loader Specification (UAPI.10), which sorts Debian's and
//! RPM's versions of kernels as well.

use std::cmp::Ordering;

/// Compares two versions; a newer one is greater.
pub(crate) fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        a = skip(a);
        b = skip(b);
        // What precedes a release: 6.1~rc3 comes before 6.1.
        match (a.first(), b.first()) {
            (Some(b'~'), Some(b'~')) => {
                (a, b) = (&a[1..], &b[1..]);
                continue;
            }
            (Some(b'~'), _) => return Ordering::Less,
            (_, Some(b'~')) => return Ordering::Greater,
            (None, None) => return Ordering::Equal,
            (None, _) => return Ordering::Less,
            (_, None) => return Ordering::Greater,
            _ => {}
        }
        // `-` begins a revision, `^` what follows a release, `.` the next number; in this order.
        let special = |text: &[u8]| b"-^.".iter().position(|it| Some(it) == text.first());
        match (special(a), special(b)) {
            (Some(x), Some(y)) if x == y => {
                (a, b) = (&a[1..], &b[1..]);
                continue;
            }
            (None, None) => {}
            (x, y) => return x.unwrap_or(usize::MAX).cmp(&y.unwrap_or(usize::MAX)),
        }
        let number = a[0].is_ascii_digit() || b[0].is_ascii_digit();
        let (x, after_a) = segment(a, number);
        let (y, after_b) = segment(b, number);
        let ordering = if number {
            let (x, y) = (trim_zeros(x), trim_zeros(y));
            x.len().cmp(&y.len()).then_with(|| x.cmp(y))
        } else {
            x.cmp(y)
        };
        if ordering != Ordering::Equal {
            return ordering;
        }
        (a, b) = (after_a, after_b);
    }
}

/// Without the characters that no version has.
fn skip(text: &[u8]) -> &[u8] {
    let is_one = |it: &u8| it.is_ascii_alphanumeric() || b"~-^.".contains(it);
    let from = text.iter().position(is_one).unwrap_or(text.len());
    &text[from..]
}

/// The digits, or letters, at the begin, and the rest.
fn segment(text: &[u8], number: bool) -> (&[u8], &[u8]) {
    let belongs = |it: &u8| if number { it.is_ascii_digit() } else { it.is_ascii_alphabetic() };
    text.split_at(text.iter().position(|it| !belongs(it)).unwrap_or(text.len()))
}

fn trim_zeros(digits: &[u8]) -> &[u8] {
    let from = digits.iter().position(|digit| *digit != b'0').unwrap_or(digits.len());
    &digits[from..]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn versions_of_kernels_are_sorted_by_age() {
        let sorted = [
            "5.10.0-9-amd64",
            "5.10.0-28-amd64",
            "6.1.0~rc3",
            "6.1.0",
            "6.1.0-9-amd64",
            "6.1.0-13-amd64",
            "6.1.0-13-cloud-amd64",
            "6.2.9-300.fc38.x86_64",
            "6.5.6-300.fc39.x86_64",
            "6.12.6-200.fc41.x86_64",
        ];
        for pair in sorted.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(compare(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
        assert_eq!(compare("6.01.0_x", "6.1.0x"), Ordering::Equal, "zeros and other characters");
    }

    proptest! {
        #[test]
        fn it_is_an_order(a in "[0-9a-c.~^_-]{0,8}", b in "[0-9a-c.~^_-]{0,8}", c in "[0-9a-c.~^_-]{0,8}") {
            prop_assert_eq!(compare(&a, &b), compare(&b, &a).reverse());
            if compare(&a, &b).is_le() && compare(&b, &c).is_le() {
                prop_assert!(compare(&a, &c).is_le(), "{} {} {}", a, b, c);
            }
        }
    }
}
