//! What cloud-init understands. What it does not, it passes over with a line in a log inside the guest, where nobody can
//! log in then: so it is said here.

/// What cloud-init would pass over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MistakeError {
    /// There is nothing.
    #[error("it is empty: for a seed that does nothing, give a file with the line #cloud-config")]
    Empty,
    /// Something else than text.
    #[error("it is no text (UTF-8): byte {0} is not")]
    NotText(usize),
    /// A space where none may be.
    #[error("its first line is {0:?}, which is a comment: write #cloud-config without a space")]
    Space(String),
    /// Nothing says what it is.
    #[error(
        "its first line is {0:?}, by which cloud-init does not know what it is and passes over all of it: begin it with \
         #cloud-config (YAML), #! (a script), #include, #cloud-boothook, #part-handler, ## template: jinja, or a MIME header"
    )]
    Unknown(String),
    /// A script that no Linux can start.
    #[error(
        "its lines end as on Windows (CR LF), so its first line names no program: convert it, for example with dos2unix"
    )]
    Windows,
    /// YAML has no tabs there.
    #[error("line {0} begins with a tab, and YAML is indented by spaces only")]
    Tab(usize),
    /// A meta-data without an identity.
    #[error(
        "it has no line `instance-id: ...`, by which cloud-init knows whether its work is done: add one, or leave the file out"
    )]
    NoInstance,
    /// A network-config that says nothing.
    #[error("it has no `version:`, so it is no network configuration: begin it with the line `version: 2`")]
    NoVersion,
}

/// What user-data and vendor-data begin with, in lower case, as cloud-init compares it.
const BEGINNINGS: [&str; 9] = [
    // Also #cloud-config-archive and #cloud-config-jsonp.
    "#cloud-config",
    "#!",
    // Also #include-once.
    "#include",
    "#cloud-boothook",
    "#part-handler",
    "## template:",
    "content-type:",
    "mime-version:",
    "from nobody",
];
/// Compressed user-data, which cloud-init unpacks.
const GZIP: &[u8] = b"\x1f\x8b";
/// How much of a line is shown.
const SHOWN: usize = 60;

/// Checks user-data or vendor-data.
pub(super) fn check_user_data(bytes: &[u8]) -> Result<(), MistakeError> {
    if bytes.starts_with(GZIP) {
        return Ok(());
    }
    let text = text(bytes)?;
    let first = text.trim_start().lines().next().unwrap_or_default();
    let low = first.to_lowercase();
    if !BEGINNINGS.iter().any(|beginning| low.starts_with(beginning)) {
        let shown: String = first.chars().take(SHOWN).collect();
        let is_meant = low.trim_start_matches(['#', ' ']).starts_with("cloud-config");
        return Err(if is_meant { MistakeError::Space(shown) } else { MistakeError::Unknown(shown) });
    }
    if first.starts_with("#!") && text.lines().count() > 0 && text.contains("\r\n") {
        return Err(MistakeError::Windows);
    }
    let is_yaml = low.starts_with("#cloud-config") && !low.starts_with("#cloud-config-");
    if is_yaml { check_tabs(text) } else { Ok(()) }
}

/// Checks a network-config.
pub(super) fn check_network(bytes: &[u8]) -> Result<(), MistakeError> {
    let text = text(bytes)?;
    check_tabs(text)?;
    // Also within `network:`, and in JSON.
    if text.contains("version") { Ok(()) } else { Err(MistakeError::NoVersion) }
}

/// Checks a meta-data.
pub(super) fn check_meta_data(bytes: &[u8]) -> Result<(), MistakeError> {
    let text = text(bytes)?;
    check_tabs(text)?;
    if text.contains("instance-id") { Ok(()) } else { Err(MistakeError::NoInstance) }
}

fn text(bytes: &[u8]) -> Result<&str, MistakeError> {
    let text = std::str::from_utf8(bytes).map_err(|error| MistakeError::NotText(error.valid_up_to()))?;
    if let Some(at) = text.find('\0') {
        return Err(MistakeError::NotText(at));
    }
    if text.trim().is_empty() { Err(MistakeError::Empty) } else { Ok(text) }
}

fn check_tabs(text: &str) -> Result<(), MistakeError> {
    let wrong = text.lines().position(|line| line.starts_with('\t') && !line.trim().is_empty());
    wrong.map_or(Ok(()), |at| Err(MistakeError::Tab(at + 1)))
}
