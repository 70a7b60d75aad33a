//! Where the memory of a VM is written, in two lines: a strip over its addresses, and a sentence.

use super::lanes::STEPS;
use super::text::{bytes, count};
use crate::figures::Heat;

/// What a full character stands for, in pages a second. An eighth of one stands for one page.
const MOST: f64 = 100_000.0;

/// How high each of so many columns is, the first address first: 0 where nothing is written. The scale is logarithmic.
pub(super) fn strip(heat: &Heat, columns: u16) -> Vec<u16> {
    let steps = f64::from(STEPS - 1);
    let height = |rate: u64| match rate {
        0 => 0,
        rate => 1 + ((rate as f64).ln() / MOST.ln() * steps).min(steps) as u16,
    };
    heat.columns(columns).into_iter().map(height).collect()
}

/// All of it.
pub(super) fn total(heat: &Heat) -> String {
    format!("{}/s", count(heat.total()))
}

/// Where most of it is.
pub(super) fn sentence(heat: &Heat) -> String {
    match heat.spot() {
        _ if heat.total() == 0 => "nothing is written".to_owned(),
        None => "written all over".to_owned(),
        Some(spot) => format!("three quarters of it in {} at {:#x}", bytes(spot.bytes), spot.first),
    }
}

/// What the lines mean.
pub(super) const LEGEND: &str = "Memory: pages that the guest writes in a second, from the lowest address to the highest: ▁ one, █ a \
                                 hundred thousand";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::life;

    #[test]
    fn a_strip_has_what_is_written_where_it_is() {
        let heat = Heat::read(life::heat()).unwrap();
        assert_eq!(total(&heat), "58 k/s");
        assert_eq!(sentence(&heat), "three quarters of it in 128 MiB at 0x8c000000");
        let strip_ = strip(&heat, 130);
        assert_eq!((strip_.len(), strip_[72], strip_[65]), (130, 6, 0));
        assert!(strip(&heat, 10).iter().all(|it| *it <= STEPS), "{strip_:?}");
        let of = |rates: &[u64]| {
            let said = serde_json::json!({ "cell_bytes": 4096, "ranges": [{ "first": 0, "bytes": 4096 * rates.len() }],
                "pages_per_s": rates });
            Heat::read(said).unwrap()
        };
        let heights = strip(&of(&[0, 1, 2, 10, 1000, 99_999, 100_000, 1 << 44]), 8);
        assert_eq!(heights, [0, 1, 1, 2, 5, 7, 8, 8]);
        assert_eq!(
            (sentence(&of(&[0])), sentence(&of(&[1; 8]))),
            ("nothing is written".into(), "written all over".into())
        );
    }
}
