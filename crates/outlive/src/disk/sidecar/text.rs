//! The text of a sidecar.

use std::path::PathBuf;
use std::time::SystemTime;

use outlive_epoch::{Ancestor, Lineage};
use serde::{Deserialize, Serialize};

use super::{CopyEnd, Role, Sidecar, old};
use crate::disk::provenance::{Accepted, KnownArbiter, Provenance};
use crate::disk::stamp::Stamp;
use crate::process;

/// Version of the text that this release writes.
const VERSION: u32 = 2;

/// The fields of the text.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    version: u32,
    vm: String,
    name: String,
    disk: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    disks: Option<u16>,
    role: Role,
    whole: bool,
    end: Option<CopyEnd>,
    generation: u64,
    checkpoint: u64,
    arbiter: Option<String>,
    process: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    earlier: Vec<String>,
    journal: Option<PathBuf>,
    /// Name of the host that wrote it.
    host: String,
    written: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    image: Option<Stamp>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ancestors: Vec<AncestorText>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    accepted: Vec<Accepted>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AncestorText {
    vm: String,
    through: u64,
}

/// The time, as sidecars have it.
pub(in crate::disk) fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

impl Sidecar {
    pub(in crate::disk) fn text(&self, image: Option<Stamp>) -> Result<String, toml::ser::Error> {
        self.text_of(image, &process::host_name(), &now())
    }

    /// The same, as a host writes it at some time.
    pub(super) fn text_of(
        &self,
        image: Option<Stamp>,
        host: &str,
        written: &str,
    ) -> Result<String, toml::ser::Error> {
        let Self { provenance, generation, role, whole, end, checkpoint, disk, disks, .. } = self;
        let ancestors = provenance.lineage.ancestors().iter();
        let ancestors =
            ancestors.map(|it| AncestorText { vm: it.vm.to_string(), through: it.through }).collect();
        let text = toml::to_string(&Text {
            version: VERSION,
            vm: provenance.vm.to_string(),
            name: provenance.name.clone(),
            disk: *disk,
            disks: *disks,
            role: *role,
            whole: *whole,
            end: *end,
            generation: *generation,
            checkpoint: *checkpoint,
            arbiter: provenance.arbiter.to_text(),
            process: self.process.clone(),
            earlier: self.earlier.clone(),
            journal: self.journal.clone(),
            host: host.to_owned(),
            written: written.to_owned(),
            image,
            ancestors,
            accepted: self.accepted.clone(),
        })?;
        Ok(format!(
            "# Written by Outlive: whose disk the image beside this file is. See `outlive image show`.\n{text}"
        ))
    }

    /// Returns the stamp of the image, too. On an error, returns the invalid line and why.
    pub(in crate::disk) fn parse(text: &str) -> Result<(Self, Option<Stamp>), (usize, String)> {
        if old::is_old(text) {
            let old = old::parse(text).map_err(|line| (line, "Outlive does not write this".into()))?;
            return Ok((old, None));
        }
        let text: Text = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(0, |span| text[..span.start].matches('\n').count() + 1);
            let why = error.message().lines().next().unwrap_or_default();
            // Leave out the list of everything that would be valid.
            (line, why.split(", expected one of").next().unwrap_or_default().to_owned())
        })?;
        let nonsense = |what: &str| (0, what.to_owned());
        if text.version != VERSION {
            return Err((0, format!("it has version {}, but this release knows {VERSION}", text.version)));
        }
        let vm = |text: &str| text.parse().map_err(|_| nonsense("a VM's id is invalid"));
        let ancestors: Result<Vec<_>, _> =
            text.ancestors.iter().map(|it| Ok(Ancestor { vm: vm(&it.vm)?, through: it.through })).collect();
        let provenance = Provenance {
            vm: vm(&text.vm)?,
            name: text.name,
            arbiter: KnownArbiter::from_text(text.arbiter),
            lineage: Lineage::new(ancestors?),
        };
        let sidecar = Self {
            provenance,
            generation: text.generation,
            role: text.role,
            whole: text.whole,
            end: text.end,
            checkpoint: text.checkpoint,
            disk: text.disk,
            disks: text.disks,
            journal: text.journal,
            process: text.process,
            earlier: text.earlier,
            accepted: text.accepted,
        };
        Ok((sidecar, text.image))
    }
}
