//! A disk for cloud-init.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use outlive_images::seed::{self, Seed, SeedError};

use super::source::Identity;
use super::target::{Target, TargetError};
use crate::cli::SeedOptions;
use crate::ui::shell_word;

/// Why no seed was made.
#[derive(Debug, thiserror::Error)]
pub(in crate::disk) enum SeedCommandError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    /// cloud-init would not do what is in it.
    #[error("{}{source}", place(.path.as_deref()))]
    Seed { path: Option<PathBuf>, source: SeedError },
    /// The image cannot be made.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The result cannot be shown.
    #[error("cannot print: {0}")]
    Print(#[from] io::Error),
}

fn place(path: Option<&Path>) -> String {
    path.map(|path| format!("{} as ", path.display())).unwrap_or_default()
}

/// Makes a NoCloud seed, and says how it is used.
pub(in crate::disk) fn seed(options: &SeedOptions, out: &mut impl Write) -> Result<(), SeedCommandError> {
    let SeedOptions { user_data, meta_data, network_config, vendor_data, hostname, to, overwrite } = options;
    let read_one = |path: &Option<PathBuf>| path.as_deref().map(read).transpose();
    let (user, meta) = (read(user_data)?, read_one(meta_data)?);
    let (network, vendor) = (read_one(network_config)?, read_one(vendor_data)?);
    let seed = Seed {
        user_data: &user,
        meta_data: meta.as_deref(),
        network_config: network.as_deref(),
        vendor_data: vendor.as_deref(),
        hostname: hostname.as_deref(),
    };
    let image = seed.image().map_err(|source| {
        let path = match &source {
            SeedError::Mistake { file: "user-data", .. } => Some(user_data.clone()),
            SeedError::Mistake { file: "meta-data", .. } => meta_data.clone(),
            SeedError::Mistake { file: "network-config", .. } => network_config.clone(),
            SeedError::Mistake { .. } => vendor_data.clone(),
            _ => None,
        };
        SeedCommandError::Seed { path, source }
    })?;
    let files = [Some(user_data), meta_data.as_ref(), network_config.as_ref(), vendor_data.as_ref()];
    let files = files.into_iter().flatten().filter_map(|path| std::fs::metadata(path).ok());
    let read: Vec<_> = files.map(|about| Identity::of(&about)).collect();
    let mut target = Target::open(to, &read, *overwrite)?;
    // There may be passwords in it.
    target.close_to_others()?;
    let bytes = target.begin(image.len() as u64, false)?;
    target.write(0, &image)?;
    target.finish(image.len() as u64, bytes)?;
    target.keep()?;
    let word = shell_word(to);
    writeln!(out, "{}: a seed for cloud-init", to.display())?;
    writeln!(out, "  give it to the VM:   outlive run ... --disk path={word}     behind its own disk")?;
    writeln!(out, "  its standby's image: truncate --size {bytes} {word}")?;
    Ok(())
}

/// Reads a file that has a reasonable length.
fn read(path: &Path) -> Result<Vec<u8>, SeedCommandError> {
    let failed = |source| SeedCommandError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(seed::MOST as u64 + 1).read_to_end(&mut bytes))
        .map_err(failed)?;
    Ok(bytes)
}
