//! The documents of the tree, and what a page consists of.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A document.
pub(crate) struct Page {
    /// From the root of the tree.
    pub(crate) path: PathBuf,
    pub(crate) text: String,
}

/// Lines between two fences.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Block<'a> {
    /// The number of its first line.
    pub(crate) line: usize,
    /// What stands behind its fence.
    pub(crate) kind: &'a str,
    pub(crate) lines: Vec<&'a str>,
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// Every document of the tree.
pub(crate) fn all() -> Vec<Page> {
    let root = root();
    let mut pages = Vec::new();
    collect(&root, &root, &mut pages);
    assert!(pages.len() > 20, "the documents are not found");
    pages.sort_by(|a, b| a.path.cmp(&b.path));
    pages
}

fn collect(root: &Path, folder: &Path, pages: &mut Vec<Page>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && !path.is_symlink() {
            // What is built, and what other programs keep.
            if name != "target" && !name.starts_with('.') {
                collect(root, &path, pages);
            }
        } else if name.ends_with(".md") {
            let text = fs::read_to_string(&path).unwrap();
            pages.push(Page { path: path.strip_prefix(root).unwrap().to_owned(), text });
        }
    }
}

fn fence(line: &str) -> Option<&str> {
    line.trim_start().strip_prefix("```").filter(|kind| !kind.contains('`'))
}

impl Page {
    /// Its blocks, and its other lines with their numbers.
    pub(crate) fn parts(&self) -> (Vec<Block<'_>>, Vec<(usize, &str)>) {
        let (mut blocks, mut prose) = (Vec::new(), Vec::new());
        let mut open: Option<Block<'_>> = None;
        for (at, line) in self.text.lines().enumerate() {
            match (fence(line), &mut open) {
                (Some(_), Some(_)) => blocks.extend(open.take()),
                (Some(kind), None) => {
                    open = Some(Block { line: at + 2, kind: kind.trim(), lines: Vec::new() });
                }
                (None, Some(block)) => block.lines.push(line),
                (None, None) => prose.push((at + 1, line)),
            }
        }
        assert!(open.is_none(), "{}: a block has no end", self.path.display());
        (blocks, prose)
    }

    /// What its headings are called in links.
    pub(crate) fn anchors(&self) -> Vec<String> {
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        let headings = self.parts().1;
        let headings = headings.into_iter().filter_map(|(_, line)| {
            let text = line.trim_start_matches('#');
            (text.len() < line.len()).then(|| text.strip_prefix(' ')).flatten()
        });
        let mut anchor = |heading: &str| {
            let slug = slug(heading);
            let count = seen.entry(slug.clone()).or_default();
            *count += 1;
            if *count == 1 { slug } else { format!("{slug}-{}", *count - 1) }
        };
        headings.map(&mut anchor).collect()
    }
}

/// As web sites that show a tree make it, and as the book's program does.
fn slug(heading: &str) -> String {
    let mut slug = String::new();
    for it in shown(heading).trim().to_lowercase().chars() {
        match it {
            ' ' => slug.push('-'),
            it if it.is_alphanumeric() || "-_".contains(it) => slug.push(it),
            _ => {}
        }
    }
    slug
}

/// A heading without the targets of its links.
fn shown(heading: &str) -> String {
    let mut parts = heading.split("](");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + part.split_once(')').map_or("", |(_, rest)| rest))
}

#[test]
fn a_page_has_blocks_prose_and_anchors() {
    let text = "# `--insecure`: a *word*\n\ntext\n   ```sh\n   # no heading\n   ```\n## The way, [here](x.md)\n## The way, here\n";
    let page = Page { path: "x.md".into(), text: text.into() };
    let (blocks, prose) = page.parts();
    assert_eq!(blocks, [Block { line: 5, kind: "sh", lines: vec!["   # no heading"] }]);
    assert_eq!(prose[2], (3, "text"));
    assert_eq!(page.anchors(), ["--insecure-a-word", "the-way-here", "the-way-here-1"]);
}
