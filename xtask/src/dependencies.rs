//! The rules of `deny.toml` that need nothing but cargo: licences, banned crates, sources. cargo-deny knows more of
//! them, but takes minutes to build, so it runs only where it is installed.

use std::fs;
use std::process::Command;

use serde::Deserialize;
use spdx::{Expression, Licensee, ParseMode};

use crate::run::{StepError, Workspace, output};

const FILE: &str = "deny.toml";
const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";
/// The payload is in the program, and a workspace of its own.
const MANIFESTS: [&str; 2] = ["Cargo.toml", "guest/payload/Cargo.toml"];

/// What is read of the rules.
#[derive(Deserialize)]
struct Rules {
    licenses: Licences,
    bans: Bans,
}

#[derive(Deserialize)]
struct Licences {
    allow: Vec<String>,
}

#[derive(Deserialize)]
struct Bans {
    deny: Vec<Name>,
}

#[derive(Deserialize)]
struct Name {
    name: String,
}

/// What cargo says of all crates.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    req: String,
    source: Option<String>,
}

/// Checks every dependency of the program, its tests and the payload.
pub(crate) fn check(workspace: &Workspace) -> Result<(), StepError> {
    let path = workspace.root.join(FILE);
    let rules = fs::read_to_string(&path).map_err(|source| StepError::File { path, source })?;
    let rules: Rules =
        toml::from_str(&rules).map_err(|error| StepError::Failed(format!("{FILE}: {error}")))?;
    let allowed = allowed(&rules).map_err(StepError::Failed)?;
    let mut wrong = Vec::new();
    for manifest in MANIFESTS {
        let mut cargo = metadata(workspace, manifest);
        let text = output(&mut cargo).ok_or_else(|| StepError::Failed("cargo metadata".into()))?;
        let metadata: Metadata = serde_json::from_str(&text)
            .map_err(|error| StepError::Failed(format!("cargo metadata: {error}")))?;
        wrong.extend(metadata.packages.iter().flat_map(|package| complaints(package, &rules, &allowed)));
    }
    wrong.sort();
    wrong.dedup();
    if wrong.is_empty() { Ok(()) } else { Err(StepError::Failed(wrong.join("\n  "))) }
}

fn metadata(workspace: &Workspace, manifest: &str) -> Command {
    let mut cargo = workspace.cargo(["metadata", "--format-version", "1", "--locked", "--all-features"]);
    cargo.args(["--filter-platform", "x86_64-unknown-linux-gnu", "--manifest-path", manifest]);
    cargo
}

fn allowed(rules: &Rules) -> Result<Vec<Licensee>, String> {
    let parse = |text: &String| Licensee::parse(text).map_err(|_| format!("{FILE}: no licence: {text}"));
    rules.licenses.allow.iter().map(parse).collect()
}

/// What is wrong with a crate, one line each.
fn complaints(package: &Package, rules: &Rules, allowed: &[Licensee]) -> Vec<String> {
    let Package { name, version, license, source, dependencies } = package;
    let mut wrong = Vec::new();
    let licence = license.as_deref().unwrap_or("none");
    let expression = Expression::parse_mode(licence, ParseMode::LAX);
    if !expression.is_ok_and(|it| it.evaluate(|req| allowed.iter().any(|it| it.satisfies(req)))) {
        wrong.push(format!("{name} {version}: its licence, {licence}, is not in the list of {FILE}"));
    }
    if rules.bans.deny.iter().any(|banned| banned.name == *name) {
        wrong.push(format!(
            "{name} {version}: {FILE} bans it; `cargo tree --workspace -i {name}` says who needs it"
        ));
    }
    match source.as_deref() {
        None => {
            let any = dependencies.iter().filter(|it| it.req == "*" && it.source.is_some());
            wrong.extend(any.map(|it| format!("{name}: give {} a version instead of '*'", it.name)));
        }
        Some(CRATES_IO) => {}
        Some(other) => wrong.push(format!("{name} {version}: comes from {other}, not from crates.io")),
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(licence: Option<&str>) -> Package {
        Package {
            name: "foo".into(),
            version: "1.0.0".into(),
            license: licence.map(Into::into),
            source: Some(CRATES_IO.into()),
            dependencies: Vec::new(),
        }
    }

    fn rules() -> Rules {
        toml::from_str(
            "[licenses]\nallow = ['MIT', 'ISC', 'Apache-2.0 WITH LLVM-exception']\n[bans]\ndeny = [{ name = 'openssl-sys' }]",
        )
        .unwrap()
    }

    fn of(package: &Package) -> usize {
        complaints(package, &rules(), &allowed(&rules()).unwrap()).len()
    }

    #[test]
    fn of_a_choice_of_licences_one_is_enough_and_of_several_all_are_needed() {
        for good in ["MIT", "MIT/Apache-2.0", "GPL-2.0 OR (MIT AND ISC)", "Apache-2.0 WITH LLVM-exception"] {
            assert_eq!(of(&package(Some(good))), 0, "{good}");
        }
        for bad in ["Apache-2.0", "MIT AND GPL-3.0-only", "GPL-2.0-or-later", "no such licence", ""] {
            assert_eq!(of(&package(Some(bad))), 1, "{bad}");
        }
        assert_eq!(of(&package(None)), 1);
    }

    #[test]
    fn banned_crates_other_sources_and_any_version_are_named() {
        let good = package(Some("MIT"));
        assert_eq!(of(&Package { name: "openssl-sys".into(), ..package(Some("MIT")) }), 1);
        assert_eq!(of(&Package { source: Some("git+https://example.org/foo".into()), ..good }), 1);
        let needs = |req: &str, source: Option<&str>| {
            let needs = Dependency { name: "bar".into(), req: req.into(), source: source.map(Into::into) };
            of(&Package { source: None, dependencies: vec![needs], ..package(Some("MIT")) })
        };
        assert_eq!(needs("*", None), 0, "named by its path");
        assert_eq!(needs("*", Some(CRATES_IO)), 1);
        assert_eq!(needs("^1", Some(CRATES_IO)), 0);
    }

    #[test]
    fn the_crates_of_this_workspace_keep_the_rules() {
        check(&Workspace::find()).unwrap();
    }
}
