//! Weaves all changes into the text of a file, each behind a switch: so one build has all of them.

use std::ops::Range;

use super::find::{Site, What};

/// Says in the woven text whether a change is on; [`SWITCH`] defines it.
const ASK: &str = "crate::mutant";

/// Goes into the crate.
pub(super) const SWITCH: &str = "
/// Whether this change is the one that is tried.
pub(crate) fn mutant(number: u32) -> bool {
    static WHICH: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    let read = || std::env::var(\"OUTLIVE_MUTANT\").ok().and_then(|it| it.parse().ok()).unwrap_or(0);
    *WHICH.get_or_init(read) == number
}
";

/// A site, with the number of its first change. The numbers of its others follow.
pub(super) struct Numbered<'a> {
    pub(super) site: &'a Site,
    pub(super) number: u32,
}

/// The text with these changes, which are in the order of [`super::find::sites`].
pub(super) fn weave(text: &str, changes: &[Numbered]) -> String {
    render(text, 0..text.len(), changes)
}

/// The changes of a line of woven text, by its switches.
pub(super) fn numbers_in(line: &str) -> impl Iterator<Item = u32> {
    let after = line.split(ASK).skip(1);
    after.filter_map(|rest| rest.strip_prefix('(')?.split(')').next()?.parse().ok())
}

/// The text of a range, with the changes in it. `changes` may have others, too.
fn render(text: &str, range: Range<usize>, changes: &[Numbered]) -> String {
    let mut woven = String::new();
    let mut at = range.start;
    for (index, change) in changes.iter().enumerate() {
        let whole = &change.site.whole;
        // What lies in a change that is rendered already starts before its end.
        if whole.start < at || whole.end > range.end {
            continue;
        }
        woven.push_str(&text[at..whole.start]);
        woven.push_str(&one(text, change, &changes[index + 1..]));
        at = whole.end;
    }
    woven + &text[at..range.end]
}

/// One change and the text that it is for. `inner` are the changes after it.
fn one(text: &str, Numbered { site, number }: &Numbered, inner: &[Numbered]) -> String {
    let part = |range: &Range<usize>| render(text, range.clone(), inner);
    match &site.what {
        What::Operator { left, operator, right, others } => {
            let (left, right) = (part(left), part(right));
            let operator = &text[operator.clone()];
            if matches!(operator, "==" | "!=") {
                return format!("(({left} {operator} {right}) ^ {ASK}({number}))");
            }
            let cases = (*number..).zip(others.iter());
            let cases: String = cases
                .map(|(number, other)| format!("if {ASK}({number}) {{ {left} {other} {right} }} else "))
                .collect();
            format!("({cases}{{ {left} {operator} {right} }})")
        }
        What::Not(negated) => {
            let negated = part(negated);
            format!("(if {ASK}({number}) {{ {negated} }} else {{ !{negated} }})")
        }
        What::Truth => format!("({ASK}({number}) ^ {})", &text[site.whole.clone()]),
        What::Statement => format!("if !{ASK}({number}) {{ {} }}", part(&site.whole)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::find::sites;
    use super::*;

    fn woven(text: &str) -> String {
        let sites = sites(text).unwrap();
        let mut number = 1;
        let numbered = sites.iter().map(|site| {
            let first = number;
            number += site.what.ways() as u32;
            Numbered { site, number: first }
        });
        weave(text, &numbered.collect::<Vec<_>>())
    }

    #[test]
    fn each_change_has_a_switch_also_in_another() {
        let m = |number: u32| format!("{ASK}({number})");
        assert_eq!(
            woven("fn f() { g(a == !b); }"),
            format!(
                "fn f() {{ if !{} {{ g(((a == (if {} {{ b }} else {{ !b }})) ^ {})); }} }}",
                m(1),
                m(3),
                m(2)
            )
        );
        assert_eq!(
            woven("fn f() -> bool { a < 1 }"),
            format!(
                "fn f() -> bool {{ (if {} {{ a <= 1 }} else if {} {{ a > 1 }} else {{ a < 1 }}) }}",
                m(1),
                m(2)
            )
        );
    }

    #[test]
    fn a_line_tells_its_changes() {
        let line = woven("fn f() -> bool { a && !b }");
        assert_eq!(numbers_in(&line).collect::<Vec<_>>(), [1, 2, 2]);
        assert_eq!(numbers_in("crate::mutants(1) mutant(2)").count(), 0);
    }
}
