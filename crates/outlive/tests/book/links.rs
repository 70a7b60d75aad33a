//! Where links lead.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use crate::pages::{self, Page};

/// Targets of the links in a line. What stands in code is no link.
fn targets(line: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = line;
    while let Some(at) = rest.find(['`', '(']) {
        let (before, here) = rest.split_at(at);
        if here.starts_with('`') {
            // As many open it as close it.
            let ticks = here.len() - here.trim_start_matches('`').len();
            let inner = &here[ticks..];
            let end = inner.find(&here[..ticks]).map_or(inner.len(), |end| end + ticks);
            rest = &inner[end..];
            // A link may stand around it.
            continue;
        }
        rest = &here[1..];
        if before.ends_with(']')
            && let Some((target, _)) = rest.split_once(')')
        {
            found.push(target.split_whitespace().next().unwrap_or_default());
        }
    }
    found
}

/// A path without `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            other => plain.push(other),
        }
    }
    plain
}

/// What is wrong with the links of a page.
fn broken(page: &Page, anchors: &BTreeMap<&Path, Vec<String>>) -> Vec<String> {
    let folder = page.path.parent().unwrap_or(Path::new(""));
    let mut wrong = Vec::new();
    for (number, line) in page.parts().1 {
        for target in targets(line) {
            let is_elsewhere = ["http://", "https://", "mailto:"].iter().any(|it| target.starts_with(it));
            if is_elsewhere {
                continue;
            }
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            let path = if path.is_empty() { page.path.clone() } else { plain(&folder.join(path)) };
            let has = |known: &Vec<String>| known.iter().any(|it| it == anchor);
            let leads = pages::root().join(&path).exists()
                && (anchor.is_empty() || anchors.get(path.as_path()).is_some_and(has));
            if !leads {
                wrong.push(format!("{}:{number}: {target} leads nowhere", page.path.display()));
            }
        }
    }
    wrong
}

#[test]
fn every_link_leads_somewhere() {
    let pages = pages::all();
    let anchors = pages.iter().map(|page| (page.path.as_path(), page.anchors())).collect();
    let wrong: Vec<_> = pages.iter().flat_map(|page| broken(page, &anchors)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A page that nobody finds is not read.
#[test]
fn every_page_is_in_the_table_of_contents_once() {
    let pages = pages::all();
    let contents = pages.iter().find(|page| page.path == Path::new("docs/SUMMARY.md")).expect("the contents");
    let mut listed = BTreeSet::new();
    for (number, line) in contents.parts().1 {
        for target in targets(line) {
            assert!(listed.insert(target.to_owned()), "SUMMARY.md:{number}: {target} is there twice");
        }
    }
    let name = |page: &Page| page.path.strip_prefix("docs").ok().map(|it| it.display().to_string());
    let written: BTreeSet<_> = pages.iter().filter_map(name).filter(|it| it != "SUMMARY.md").collect();
    let missing: Vec<_> = written.difference(&listed).collect();
    let surplus: Vec<_> = listed.difference(&written).collect();
    assert!(missing.is_empty(), "docs/SUMMARY.md lacks {missing:?}");
    assert!(surplus.is_empty(), "docs/SUMMARY.md has {surplus:?}, which are no pages");
}

#[test]
fn links_are_found_and_code_is_none() {
    let line = "see [a](a.md#x) and [`b`](b.md \"title\"), not `[c](c.md)`, nor (d.md); ![e](e.svg)";
    assert_eq!(targets(line), ["a.md#x", "b.md", "e.svg"]);
    assert_eq!(plain(Path::new("docs/../crates/./x.md")), Path::new("crates/x.md"));
}

/// A test that finds nothing would be no test.
#[test]
fn a_broken_link_is_found() {
    let page = |text: &str| Page { path: "docs/x.md".into(), text: text.into() };
    let readme = Path::new("README.md");
    let anchors = BTreeMap::from([(readme, vec!["two-commands".to_owned()])]);
    let wrong = |text: &str| broken(&page(text), &anchors).len();
    assert_eq!(wrong("[a](../README.md#two-commands) [b](api/openapi.json) [c](https://no.where)"), 0);
    assert_eq!(wrong("[a](../README.md#three) [b](no.md) [c](#no)"), 3);
}
