//! Whoever is woken finds the alert in the operator's page, too.

use std::fs;

use crate::pages::root;

#[test]
fn every_alert_has_its_row() {
    let read = |path: &str| fs::read_to_string(root().join(path)).unwrap();
    let (rules, page) = (read("monitoring/outlive.rules.yml"), read("docs/operations.md"));
    let alerts: Vec<_> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() > 15);
    let row = |alert: &str| format!("| [{alert}](metrics.md#{}) | ", alert.to_lowercase());
    let missing: Vec<_> = alerts.iter().filter(|alert| !page.contains(&row(alert))).collect();
    assert!(missing.is_empty(), "docs/operations.md has no row about {missing:?}");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| [Outlive")?.split(']').next());
    let old: Vec<_> = rows.filter(|name| !alerts.contains(&format!("Outlive{name}").as_str())).collect();
    assert!(old.is_empty(), "docs/operations.md tells of alerts that are not there: {old:?}");
}
