//! `outlive image`: what an operator can do with images by hand.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use outlive_epoch::{Lineage, VmId};
use serde::Serialize;

use super::import;
use super::prepare::{self, PrepareError};
use super::provenance::{Accepted, DangerKind, KnownArbiter, Provenance};
use super::shared::Note;
use super::sidecar::{Role, Sidecar};
use super::standing::{Told, judge, judge_shared};
use super::start::{SidecarNotWritten, cannot_write, new_vm, record};
use crate::arbiter::{self, Arbiter, ArbiterError, ArbiterSpecError, Claim};
use crate::cli::{ImageCommand, ImageOptions};
use crate::exit;

/// `outlive image`: returns the exit code.
pub(crate) fn command(options: &ImageOptions) -> u8 {
    let mut out = outlive_node::printed();
    let done = match &options.command {
        ImageCommand::Show { images, arbiter, json } => show(images, arbiter.as_deref(), *json, &mut out),
        ImageCommand::Accept { images, arbiter, name, yes } => {
            accept(images, arbiter.as_deref(), name.as_deref(), *yes, &mut out)
        }
        ImageCommand::Import(options) => import::import(options, &mut out).map_err(CommandError::from),
        ImageCommand::Seed(options) => import::seed(options, &mut out).map_err(CommandError::from),
    };
    match done {
        Ok(()) => exit::OK,
        Err(line) => exit::usage(line),
    }
}

/// Why a command of `outlive image` failed.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    /// The option `--arbiter` is wrong.
    #[error(transparent)]
    Place(#[from] ArbiterSpecError),
    /// The arbiter does not answer.
    #[error(transparent)]
    Arbiter(#[from] ArbiterError),
    /// The arbiter does not answer to a claim.
    #[error("the arbiter cannot be used: {0}")]
    Claim(String),
    /// An image cannot be used.
    #[error(transparent)]
    Image(#[from] PrepareError),
    /// A sidecar cannot be written.
    #[error(transparent)]
    Write(#[from] SidecarNotWritten),
    /// The operator has not said yes.
    #[error(
        "nothing was changed: make sure that no host runs this VM or needs what its other images have, then add \
         --yes to begin a new VM with what is in these images"
    )]
    NotConfirmed,
    /// Another host was faster.
    #[error("{owner} has just taken over VM {vm}: check that host first")]
    TakenOver { owner: String, vm: VmId },
    /// The host has no random numbers.
    #[error("this host has no random numbers: {0}")]
    NoRandom(#[source] io::Error),
    /// No image is made of a file.
    #[error(transparent)]
    Import(#[from] import::ImportError),
    /// No seed is made.
    #[error(transparent)]
    Seed(#[from] import::SeedCommandError),
    /// The result cannot be shown.
    #[error("cannot print: {0}")]
    Print(#[source] io::Error),
}

fn open(arbiter: Option<&str>) -> Result<Option<Box<dyn Arbiter>>, ArbiterSpecError> {
    arbiter.map(arbiter::parse).transpose()
}

/// What is known of an image, for people and as JSON.
#[derive(Debug, Serialize)]
struct Shown {
    image: PathBuf,
    /// Missing if the image belongs to no VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    vm: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disk: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<Role>,
    #[serde(skip_serializing_if = "Option::is_none")]
    whole: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    arbiter: Option<String>,
    /// Of a shared disk, the host where its VM ran last.
    #[serde(skip_serializing_if = "Option::is_none")]
    shared_by: Option<String>,
    #[serde(skip)]
    never_had_an_arbiter: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    accepted: Vec<Accepted>,
    /// Another program has it now.
    in_use: bool,
    /// Why no VM starts from the image as it is.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    refusals: Vec<String>,
}

impl Shown {
    fn of(image: &Path, arbiter: Option<&mut (dyn Arbiter + 'static)>) -> Result<Self, CommandError> {
        let mut shown = Self {
            image: image.to_path_buf(),
            vm: None,
            name: None,
            disk: None,
            role: None,
            whole: None,
            generation: None,
            arbiter: None,
            shared_by: None,
            never_had_an_arbiter: false,
            accepted: Vec::new(),
            in_use: prepare::is_in_use(image),
            refusals: Vec::new(),
        };
        match Note::read(image) {
            Ok(Some(note)) => return shown.of_note(note, arbiter),
            Ok(None) => {}
            Err(error) => shown.refusals.push(error.to_string()),
        }
        let (sidecar, stamp) = match Sidecar::read_stamped(image) {
            Ok(None) => return Ok(shown),
            Ok(Some(read)) => read,
            Err(error) => {
                shown.refusals.push(error.to_string());
                return Ok(shown);
            }
        };
        let differs = stamp.and_then(|stamp| stamp.differs(image));
        let standing = judge(&sidecar, differs.as_ref(), arbiter)?;
        let Provenance { vm, name, arbiter, .. } = &sidecar.provenance;
        shown.vm = Some(vm.to_string());
        shown.name = Some(name.clone());
        shown.disk = Some(sidecar.disk);
        shown.role = Some(standing.role.into());
        shown.whole = Some(sidecar.whole);
        shown.generation = Some(standing.generation);
        shown.arbiter = arbiter.id().map(str::to_owned);
        shown.never_had_an_arbiter = *arbiter == KnownArbiter::None;
        shown.accepted = sidecar.accepted;
        if !sidecar.whole {
            shown.refusals.push(PrepareError::NotWhole(image.to_path_buf()).to_string());
        }
        shown.refusals.extend(standing.dangers.iter().map(|danger| danger.refusal(image)));
        Ok(shown)
    }

    fn of_note(
        mut self,
        note: Note,
        arbiter: Option<&mut (dyn Arbiter + 'static)>,
    ) -> Result<Self, CommandError> {
        let standing = judge_shared(&note, arbiter)?;
        let Note { provenance: Provenance { vm, name, arbiter, .. }, host, .. } = note;
        self.vm = Some(vm.to_string());
        self.name = Some(name);
        self.generation = Some(standing.generation);
        self.shared_by = Some(host);
        self.arbiter = arbiter.id().map(str::to_owned);
        self.never_had_an_arbiter = arbiter == KnownArbiter::None;
        self.refusals.extend(standing.dangers.iter().map(|danger| danger.refusal(&self.image)));
        Ok(self)
    }

    fn print(&self, out: &mut impl Write) -> Result<(), CommandError> {
        let image = self.image.display();
        match (&self.vm, self.generation) {
            (Some(vm), Some(generation)) if let Some(host) = &self.shared_by => {
                let name = self.name.as_deref().filter(|name| !name.is_empty()).unwrap_or("(no name)");
                let text = format!(
                    "{image}: shared disk of VM {name} ({vm}), generation {generation}, last on host {host}"
                );
                print(out, &text)?;
            }
            (Some(vm), Some(generation)) => {
                let role = if self.role == Some(Role::Replica) { "a standby's copy" } else { "the VM's own" };
                let name = self.name.as_deref().filter(|name| !name.is_empty()).unwrap_or("(no name)");
                let (disk, whole) = (self.disk.unwrap_or_default(), self.whole == Some(true));
                let whole = if whole { "" } else { ", not whole" };
                print(
                    out,
                    &format!(
                        "{image}: disk {disk} of VM {name} ({vm}), generation {generation}, {role}{whole}"
                    ),
                )?;
                let unsaid = if self.never_had_an_arbiter { "none yet" } else { "unknown" };
                let arbiter = self.arbiter.as_deref().unwrap_or(unsaid);
                print(out, &format!("  arbiter: {arbiter}"))?;
            }
            _ if self.refusals.is_empty() => {
                let start = if self.in_use { "" } else { "; a new VM would start from it" };
                print(out, &format!("{image}: belongs to no VM{start}"))?;
            }
            _ => print(out, &format!("{image}: its sidecar cannot be read"))?,
        }
        for Accepted { at, host, about, .. } in &self.accepted {
            print(out, &format!("  accepted {at} on {host}: {about}"))?;
        }
        if self.in_use {
            print(out, "  in use now")?;
        } else if self.vm.is_some() && self.refusals.is_empty() {
            print(out, "  a VM would start from it")?;
        }
        self.refusals.iter().try_for_each(|why| print(out, &format!("  cannot start: {why}")))
    }
}

fn show(
    images: &[PathBuf],
    arbiter: Option<&str>,
    json: bool,
    out: &mut impl Write,
) -> Result<(), CommandError> {
    let mut arbiter = open(arbiter)?;
    let mut all = Vec::new();
    for image in images {
        prepare::is_an_image(image)?;
        all.push(Shown::of(image, arbiter.as_deref_mut())?);
    }
    if json {
        return print(out, &serde_json::to_string_pretty(&all).map_err(|e| CommandError::Print(e.into()))?);
    }
    all.iter().try_for_each(|shown| shown.print(out))
}

fn accept(
    images: &[PathBuf],
    arbiter: Option<&str>,
    name: Option<&str>,
    yes: bool,
    out: &mut impl Write,
) -> Result<(), CommandError> {
    let mut arbiter = open(arbiter)?;
    images.iter().try_for_each(|image| prepare::is_an_image(image))?;
    // The images stay locked until the sidecars are written, so that nobody runs on them.
    let _locked: Vec<_> = images.iter().map(|image| prepare::open(image)).collect::<Result<_, _>>()?;
    let mut known = Vec::new();
    for image in images {
        // It is locked here, so it is in no other use.
        Shown { in_use: false, ..Shown::of(image, arbiter.as_deref_mut())? }.print(out)?;
        known.extend(Sidecar::read(image).ok().flatten().map(|sidecar| sidecar.provenance));
        known.extend(Note::read(image).ok().flatten().map(|note| note.provenance));
    }
    let earlier: Vec<&Provenance> = known.iter().collect();
    if !yes {
        return Err(CommandError::NotConfirmed);
    }
    if let Some(arbiter) = arbiter.as_deref_mut() {
        end(&earlier, arbiter)?;
    }
    let name = name.or_else(|| earlier.first().map(|it| it.name.as_str())).unwrap_or_default();
    let provenance = Provenance {
        vm: new_vm().map_err(CommandError::NoRandom)?,
        name: name.to_owned(),
        arbiter: KnownArbiter::None,
        lineage: Lineage::default(),
    };
    for (disk, image) in images.iter().enumerate() {
        let before = Shown::of(image, None)?;
        let before = before.vm.map_or_else(|| "of no VM".into(), |vm| format!("of VM {vm}"));
        let accepted = vec![record(DangerKind::Unknown, format!("accepted as it is; it was {before}"))];
        let sidecar = Sidecar { disk: disk as u16, accepted, ..Sidecar::primary(&provenance, 0, None) };
        sidecar.write(image).map_err(|e| cannot_write(image, e))?;
        Note::remove(image).map_err(|e| cannot_write(image, e))?;
    }
    print(out, &format!("VM {}: begins with these images", provenance.vm))
}

/// Wins the next generation of the VMs that the images belonged to, so that their standbys cannot take over.
fn end(earlier: &[&Provenance], arbiter: &mut dyn Arbiter) -> Result<(), CommandError> {
    let mut vms: Vec<VmId> = earlier.iter().map(|it| it.vm).collect();
    vms.sort_unstable();
    vms.dedup();
    for vm in vms {
        let Some(highest) = arbiter.highest(&vm)? else { continue };
        match arbiter.claim(&vm, highest + 1, &arbiter::owner("image accept")) {
            Claim::Won => {}
            Claim::Lost { owner } => return Err(CommandError::TakenOver { owner, vm }),
            Claim::Unreachable { why } => return Err(CommandError::Claim(why)),
        }
    }
    Ok(())
}

fn print(out: &mut impl Write, text: &str) -> Result<(), CommandError> {
    writeln!(out, "{text}").map_err(CommandError::Print)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::sidecar::beside;
    use super::*;
    use crate::arbiter::FileArbiter;
    use crate::disk::tests::provenance;

    const VM: VmId = VmId([9; 16]);

    fn printed(
        work: impl FnOnce(&mut Vec<u8>) -> Result<(), CommandError>,
    ) -> (String, Result<(), CommandError>) {
        let mut out = Vec::new();
        let result = work(&mut out);
        (String::from_utf8(out).unwrap(), result)
    }

    #[test]
    fn an_image_is_shown_and_taken_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let (image, place) = (directory.path().join("a.img"), directory.path().join("arbiter"));
        fs::write(&image, [7; 4096]).unwrap();
        fs::create_dir(&place).unwrap();
        let (mut arbiter, _) = FileArbiter::init(&place).unwrap();
        let spec = format!("file:{}", place.display());
        let images = [image.clone()];
        let show = |json| printed(|out| show(&images, Some(&spec), json, out)).0;
        let accept = |yes| printed(|out| accept(&images, Some(&spec), None, yes, out));
        assert!(show(false).contains("belongs to no VM; a new VM would start from it"), "{}", show(false));

        assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
        let mut known = provenance(VM);
        known.arbiter = KnownArbiter::Id(arbiter.identity().into());
        let torn = Sidecar { whole: false, ..Sidecar::primary(&known, 1, None) };
        torn.write(&image).unwrap();
        let text = show(false);
        assert!(
            text.contains("generation 1, the VM's own, not whole") && text.contains("cannot start"),
            "{text}"
        );
        let json: serde_json::Value = serde_json::from_str(&show(true)).unwrap();
        assert_eq!((&json[0]["vm"], &json[0]["whole"]), (&VM.to_string().into(), &false.into()));

        let (text, refused) = accept(false);
        assert!(
            text.contains(&VM.to_string()) && refused.unwrap_err().to_string().contains("add --yes"),
            "{text}"
        );
        assert_eq!(Sidecar::read(&image).unwrap(), Some(torn));
        accept(true).1.unwrap();
        let now = Sidecar::read(&image).unwrap().unwrap();
        assert!(now.whole && now.provenance.vm != VM && now.provenance.lineage == Lineage::default());
        assert_eq!((now.provenance.name.as_str(), &now.provenance.arbiter), ("server", &KnownArbiter::None));
        assert_eq!(now.accepted.len(), 1);
        // A standby of the old VM can no longer take over.
        assert!(matches!(arbiter.claim(&VM, 2, "standby"), Claim::Lost { .. }));
        assert!(show(false).ends_with("  a VM would start from it\n"), "{}", show(false));
        assert!(show(false).contains("arbiter: none yet"), "{}", show(false));

        // The remedy where nothing can be read.
        fs::write(beside(&image, "outlive"), "damaged").unwrap();
        assert!(show(false).contains("cannot be read"), "{}", show(false));
        accept(true).1.unwrap();
        assert!(Sidecar::read(&image).unwrap().unwrap().whole);
        let held = fs::File::options().read(true).write(true).open(&image).unwrap();
        held.lock().unwrap();
        assert!(show(false).ends_with("  in use now\n"), "{}", show(false));
        assert!(show(false).contains("VM (no name) ("), "{}", show(false));
        assert!(accept(true).1.unwrap_err().to_string().contains("is in use"));
    }

    #[test]
    fn what_is_no_image_is_refused_like_by_the_others() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("a.img");
        for (path, why) in [
            (directory.path(), "is neither a file nor a block device"),
            (&missing, "a.img does not exist: correct the path"),
        ] {
            let path = [path.to_owned()];
            let (text, shown) = printed(|out| show(&path, None, false, out));
            let accepted = printed(|out| accept(&path, None, None, true, out)).1;
            for refused in [shown.unwrap_err().to_string(), accepted.unwrap_err().to_string()] {
                assert!(text.is_empty() && refused.contains(why), "{text}{refused}");
            }
        }
    }
}
