//! `face.txt` lists everything of this crate that other programs can use: a name or a signature that changes
//! unnoticed fails this test. For a change that is meant: `OUTLIVE_WRITE_FACE=1 cargo test -p outlive-dirty
//! --test face`, and a line in CHANGELOG.md.
//!
//! The list is read from the sources, so that it needs only the compiler that builds the crate (tools for
//! this use rustdoc's JSON, which needs a nightly one).

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use quote::ToTokens;
use syn::{Attribute, Fields, ImplItem, Item, Signature, Type, UseTree, Visibility};

/// Every item in the crate's files, except tests.
fn items(directory: &Path, all: &mut Vec<Item>) {
    let mut files: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    for file in files {
        let stem = file.file_stem().unwrap().to_str().unwrap();
        if file.is_dir() && stem != "tests" {
            items(&file, all);
        } else if file.extension().is_some_and(|extension| extension == "rs") && stem != "tests" {
            let text = fs::read_to_string(&file).unwrap();
            all.extend(syn::parse_file(&text).unwrap_or_else(|error| panic!("{file:?}: {error}")).items);
        }
    }
}

/// Without comments, and with spaces only where words meet.
fn text(tokens: impl ToTokens) -> String {
    let tokens = tokens.to_token_stream().to_string();
    let is_word = |it: Option<char>| it.is_some_and(|it| it.is_alphanumeric() || it == '_');
    let mut out = String::new();
    let mut rest = tokens.chars().peekable();
    while let Some(next) = rest.next() {
        if !next.is_whitespace() || is_word(out.chars().last()) && is_word(rest.peek().copied()) {
            out.push(next);
        }
    }
    out
}

/// Attributes that are a promise.
fn promises(attributes: &[Attribute]) -> String {
    let kept = ["derive", "non_exhaustive", "cfg", "must_use", "repr"];
    let is_kept = |it: &&Attribute| kept.iter().any(|name| it.path().is_ident(name));
    let words = attributes.iter().filter(is_kept).map(|it| match it.path().is_ident("must_use") {
        true => "#[must_use] ".into(),
        false => text(it) + " ",
    });
    words.collect()
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|it| text(it) == "#[cfg(test)]")
}

fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

fn names(tree: &UseTree, into: &mut BTreeSet<String>) {
    match tree {
        UseTree::Path(path) => names(&path.tree, into),
        UseTree::Name(name) => _ = into.insert(name.ident.to_string()),
        UseTree::Rename(name) => _ = into.insert(name.rename.to_string()),
        UseTree::Group(group) => group.items.iter().for_each(|tree| names(tree, into)),
        UseTree::Glob(_) => panic!("the face of the crate names what it has"),
    }
}

fn function(attributes: &[Attribute], signature: &Signature) -> String {
    format!("{}pub {}", promises(attributes), text(signature))
}

fn fields(fields: &Fields) -> String {
    let public = fields.iter().filter(|field| is_public(&field.vis));
    let list: Vec<_> = public.map(|field| format!("{}:{}", text(&field.ident), text(&field.ty))).collect();
    if list.len() == fields.len() { list.join(", ") } else { list.join(", ") + ", .." }
}

fn lines(item: &Item, public: &BTreeSet<String>, list: &mut BTreeSet<String>) {
    let is_named = |name: &dyn ToString| public.contains(&name.to_string());
    match item {
        Item::Struct(it) if is_public(&it.vis) && is_named(&it.ident) => {
            let (name, generics) = (&it.ident, text(&it.generics));
            list.insert(format!(
                "{name}: {}struct{generics} {{ {} }}",
                promises(&it.attrs),
                fields(&it.fields)
            ));
        }
        Item::Enum(it) if is_public(&it.vis) && is_named(&it.ident) => {
            list.insert(format!("{}: {}enum", it.ident, promises(&it.attrs)));
            for variant in &it.variants {
                let inside = variant.fields.iter().map(|field| text(&field.ident) + ":" + &text(&field.ty));
                let inside: Vec<_> = inside.collect();
                let cfg = promises(&variant.attrs);
                list.insert(format!("{}::{} {cfg}({})", it.ident, variant.ident, inside.join(", ")));
            }
        }
        Item::Trait(it) if is_public(&it.vis) && is_named(&it.ident) => {
            let items = it.items.iter().map(|item| match item {
                syn::TraitItem::Fn(function) => text(&function.sig),
                other => text(other),
            });
            let items: Vec<_> = items.collect();
            let bounds = text(&it.supertraits);
            list.insert(format!("{}: trait: {bounds} {{ {} }}", it.ident, items.join("; ")));
        }
        Item::Fn(it) if is_public(&it.vis) && is_named(&it.sig.ident) => {
            list.insert(format!("{}: {}", it.sig.ident, function(&it.attrs, &it.sig)));
        }
        Item::Const(it) if is_public(&it.vis) && is_named(&it.ident) => {
            list.insert(format!("{}: const {}", it.ident, text(&it.ty)));
        }
        Item::Type(it) if is_public(&it.vis) && is_named(&it.ident) => {
            list.insert(format!("{}: type {}", it.ident, text(&it.ty)));
        }
        Item::Impl(it) if !is_test(&it.attrs) => {
            let Type::Path(path) = &*it.self_ty else { return };
            let name = &path.path.segments.last().unwrap().ident;
            if !is_named(name) {
                return;
            }
            let of = text(&it.self_ty);
            if let Some((_, trait_, _)) = &it.trait_ {
                list.insert(format!("{name}: {}impl {} for {of}", promises(&it.attrs), text(trait_)));
                return;
            }
            for item in &it.items {
                match item {
                    ImplItem::Fn(it) if is_public(&it.vis) && !is_test(&it.attrs) => {
                        list.insert(format!("{name}: {of}::{}", function(&it.attrs, &it.sig)));
                    }
                    ImplItem::Const(it) if is_public(&it.vis) => {
                        list.insert(format!("{name}: {of}::const {}:{}", it.ident, text(&it.ty)));
                    }
                    _ => (),
                }
            }
        }
        _ => (),
    }
}

#[test]
fn the_face_is_what_the_list_says() {
    let crate_ = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut all = Vec::new();
    items(&crate_.join("src"), &mut all);
    // Everything that lib.rs and its public modules name.
    let mut public = BTreeSet::new();
    let root = syn::parse_file(&fs::read_to_string(crate_.join("src/lib.rs")).unwrap()).unwrap();
    for item in &root.items {
        match item {
            Item::Use(it) if is_public(&it.vis) => names(&it.tree, &mut public),
            Item::Const(it) if is_public(&it.vis) => _ = public.insert(it.ident.to_string()),
            Item::Mod(it) if is_public(&it.vis) => {
                let base = crate_.join("src").join(it.ident.to_string());
                let files = [base.with_extension("rs"), base.join("mod.rs")];
                let file = files.iter().find(|file| file.exists()).expect("the file of a module");
                for item in syn::parse_file(&fs::read_to_string(file).unwrap()).unwrap().items {
                    match item {
                        Item::Use(it) if is_public(&it.vis) => names(&it.tree, &mut public),
                        Item::Struct(it) if is_public(&it.vis) => _ = public.insert(it.ident.to_string()),
                        Item::Enum(it) if is_public(&it.vis) => _ = public.insert(it.ident.to_string()),
                        Item::Fn(it) if is_public(&it.vis) => _ = public.insert(it.sig.ident.to_string()),
                        Item::Const(it) if is_public(&it.vis) => _ = public.insert(it.ident.to_string()),
                        _ => (),
                    }
                }
            }
            _ => (),
        }
    }
    let mut list = BTreeSet::new();
    all.iter().for_each(|item| lines(item, &public, &mut list));
    assert!(
        public.iter().all(|name| list.iter().any(|line| line.starts_with(&format!("{name}:")))),
        "{public:?}"
    );
    let now = list.into_iter().collect::<Vec<_>>().join("\n") + "\n";
    let file = crate_.join("tests/face.txt");
    if std::env::var_os("OUTLIVE_WRITE_FACE").is_some() {
        fs::write(&file, &now).unwrap();
    }
    let then = fs::read_to_string(&file).unwrap_or_default();
    let missing = |from: &str, of: &str| {
        let of: BTreeSet<_> = of.lines().collect();
        from.lines().filter(|line| !of.contains(line)).map(|line| format!("  {line}\n")).collect::<String>()
    };
    let (gone, new) = (missing(&then, &now), missing(&now, &then));
    assert!(
        gone.is_empty() && new.is_empty(),
        "the face of the crate has changed.\ngone:\n{gone}new:\n{new}If that is meant: \
         OUTLIVE_WRITE_FACE=1 cargo test -p outlive-dirty --test face, and say so in CHANGELOG.md"
    );
}
