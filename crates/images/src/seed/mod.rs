//! A NoCloud seed: the small disk from which cloud-init configures a server at its first start. It is a FAT file system
//! with the label CIDATA and up to four files.
//!
//! The same input gives the same bytes: no time, no random number is in it. So both hosts of a pair, and an operator who
//! makes it again, have the same disk.

mod fat;
mod kinds;
#[cfg(test)]
mod tests;

pub use kinds::MistakeError;

/// Most bytes of all files together. Seeds have some kilobytes; other clouds take 16 to 64 KiB.
pub const MOST: usize = 1 << 20;
/// Length of a seed in bytes, whatever is in it.
pub const BYTES: u64 = fat::BYTES as u64;

/// By which cloud-init finds it.
const LABEL: &[u8; 11] = b"CIDATA     ";

/// What a seed says.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seed<'a> {
    /// What is to be done, in one of cloud-init's forms.
    pub user_data: &'a [u8],
    /// Which instance this is; without it, it is made from everything else.
    pub meta_data: Option<&'a [u8]>,
    /// The network, in version 1 or 2 of its form.
    pub network_config: Option<&'a [u8]>,
    /// What the vendor of the image wants, in one of cloud-init's forms.
    pub vendor_data: Option<&'a [u8]>,
    /// The server's name, for a meta-data that is made here.
    pub hostname: Option<&'a str>,
}

/// Why no seed is made.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// cloud-init would pass over it in silence.
    #[error("{file}: {mistake}")]
    Mistake {
        /// Which of the four.
        file: &'static str,
        /// What is wrong.
        mistake: MistakeError,
    },
    /// There is too much of it.
    #[error(
        "the files have {0} bytes together, and {MOST} are the most: let the server fetch what is large (#include with \
         a URL, or a command in user-data)"
    )]
    TooMuch(usize),
    /// A name that no server can have.
    #[error("{0:?} is not a host name: letters, digits and hyphens, with dots between parts, 253 at most")]
    Hostname(String),
}

impl Seed<'_> {
    /// Makes the file system.
    ///
    /// # Errors
    /// See [`SeedError`].
    pub fn image(&self) -> Result<Vec<u8>, SeedError> {
        let mistake = |file| move |mistake| SeedError::Mistake { file, mistake };
        kinds::check_user_data(self.user_data).map_err(mistake("user-data"))?;
        if let Some(text) = self.vendor_data {
            kinds::check_user_data(text).map_err(mistake("vendor-data"))?;
        }
        if let Some(text) = self.network_config {
            kinds::check_network(text).map_err(mistake("network-config"))?;
        }
        if let Some(text) = self.meta_data {
            kinds::check_meta_data(text).map_err(mistake("meta-data"))?;
        }
        if let Some(name) = self.hostname.filter(|name| !is_host_name(name)) {
            return Err(SeedError::Hostname(name.to_owned()));
        }
        let made = self.made_meta_data();
        let meta_data = self.meta_data.unwrap_or(made.as_bytes());
        let files: Vec<fat::File<'_>> = [
            ("user-data", Some(self.user_data)),
            ("meta-data", Some(meta_data)),
            ("network-config", self.network_config),
            ("vendor-data", self.vendor_data),
        ]
        .into_iter()
        .filter_map(|(name, contents)| Some(fat::File { name, contents: contents? }))
        .collect();
        let bytes = files.iter().map(|file| file.contents.len()).sum();
        if bytes > MOST { Err(SeedError::TooMuch(bytes)) } else { Ok(fat::file_system(LABEL, &files)) }
    }

    /// cloud-init does its work once for each `instance-id`. So it is made of everything that the seed says: a changed
    /// seed is carried out at the next start of the guest, and an unchanged one is not.
    fn made_meta_data(&self) -> String {
        let mut hash = blake3::Hasher::new();
        let name = self.hostname.map(str::as_bytes);
        for part in [Some(self.user_data), self.network_config, self.vendor_data, name] {
            let part = part.unwrap_or_default();
            hash.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        let id = &hash.finalize().to_hex()[..32];
        let name = self.hostname.map(|name| format!("local-hostname: \"{name}\"\n")).unwrap_or_default();
        format!("instance-id: outlive-{id}\n{name}")
    }
}

fn is_host_name(name: &str) -> bool {
    let is_part = |part: &str| {
        (1..=63).contains(&part.len())
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(is_part)
}
