//! A file system in the guest: files whose names are their checksums, acknowledged after `fsync`, through
//! takeovers.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::thread;
use std::time::Duration;

use super::stage::{Guest, SHORT, Side, Stage};
use super::{Context, ProofError, ensure};
use crate::nested::cluster::{DATA, SHARE};
use crate::nested::image::GuestKernel;
use crate::nested::kernel::Series;
use crate::packages;
use crate::run::Workspace;

/// The image of the file system on each host.
const IMAGE: &str = "files.img";
const SIZE: &str = "48M";
const LOAD: Duration = Duration::from_secs(10);
/// How many of the newest files are kept.
const KEPT: i64 = 200;
/// Writes files named NUMBER-CHECKSUM, makes each and its name durable, and only then prints its number.
const WRITER: &str = "perl -MDigest::MD5=md5_hex -MIO::Handle -e '$| = 1; for (my $n = 0; ; $n++) { \
    my $data = join(q(), map { chr rand 256 } 1 .. 1 + rand 20000); my $name = qq(/files/$n-) . md5_hex($data); \
    open(F, q(>), q(/files/new)) or die; print F $data; F->flush or die; F->sync or die; close F; \
    rename q(/files/new), $name or die; open(D, q(<), q(/files)) or die; D->sync or die; close D; \
    unlink glob(qq(/files/) . ($n - 200) . q(-*)) if $n >= 200; print qq($n\\n) }'";
const VERIFY: &str = "pkill -f '[M]D5=md5_hex'; sleep 1; cd /files && for file in [0-9]*; do echo \"${file#*-}  $file\"; done | md5sum --check --quiet";

pub(super) fn prove(context: &Context<'_>) -> Result<(), ProofError> {
    let mut stage = Stage::new(context.workspace, context.fetch, &[Series::Bookworm; 2])?;
    let mut guest = Guest::debian(GuestKernel::SidCloud, "");
    guest.disks.push(IMAGE.into());
    for host in [1, 2] {
        stage.cluster.command(host, &format!("truncate -s {SIZE} {DATA}/{IMAGE}"))?;
    }
    let [first, second] =
        stage.pair(&guest, "mkfs.ext4 -q /dev/vdb && mkdir -p /files && mount /dev/vdb /files")?;

    let written = Written::start(&stage)?;
    first.program.wait("files", SHORT, || (written.last() >= 10).then_some(()))?;
    thread::sleep(LOAD);
    let before = written.last();
    stage.cut(1, &second)?;
    check_image(context.workspace, &mut stage, &second, before)?;
    thread::sleep(LOAD);
    stage.cluster.switch_on(&[1])?;
    let third = stage.standby(1, None, &guest)?;
    stage.wait_until_protected(&second)?;
    thread::sleep(LOAD);
    let before = written.last();
    stage.cut(2, &third)?;
    check_image(context.workspace, &mut stage, &third, before)?;
    thread::sleep(LOAD);
    let last = written.last();
    ensure(last > before, || format!("after the last takeover no file was written, the last is {last}"))?;
    ensure(last > 30, || format!("only {last} files: too few to prove anything"))?;
    stage.in_guest(VERIFY, SHORT)?;
    stage.say(&format!(
        "{last} files were written and acknowledged over one connection; all have their checksums"
    ));
    Ok(())
}

/// The number of the last file that the guest has reported durable.
struct Written(Arc<AtomicI64>);

impl Written {
    fn start(stage: &Stage) -> Result<Written, ProofError> {
        let client = |source| ProofError::Client { what: "the writer of files".into(), source };
        let mut stream: TcpStream = stage.cluster.connect(Stage::agent(), SHORT).map_err(client)?;
        stream.write_all(format!("{WRITER}\n").as_bytes()).map_err(client)?;
        let last = Arc::new(AtomicI64::new(-1));
        let seen = Arc::clone(&last);
        thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                match line.parse() {
                    Ok(number) => seen.store(number, Ordering::Relaxed),
                    Err(_) => println!("the writer of files says: {line}"),
                }
            }
        });
        Ok(Written(last))
    }

    fn last(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Checks the image of a host that has just taken over, while the guest is stopped: with its journal
/// replayed, the file system is clean and has all files that had been acknowledged before the power cut.
fn check_image(
    workspace: &Workspace,
    stage: &mut Stage,
    side: &Side,
    acknowledged: i64,
) -> Result<(), ProofError> {
    let host = side.program.host;
    stage.cluster.signal(&side.program, "STOP")?;
    stage.cluster.command(host, &format!("cp {DATA}/{IMAGE} {SHARE}/{IMAGE}"))?;
    stage.cluster.signal(&side.program, "CONT")?;
    let image = stage.cluster.share().join(IMAGE);
    let fsck = |arguments: &[&str]| output(program(workspace, "e2fsck").args(arguments).arg(&image));
    // 1: fsck repaired something.
    let (status, said) = fsck(&["-y", "-E", "journal_only"])?;
    ensure(status <= 1, || format!("the journal cannot be replayed ({status}):\n{said}"))?;
    let (status, said) = fsck(&["-f", "-n"])?;
    ensure(status == 0, || format!("fsck finds the file system broken ({status}):\n{said}"))?;
    let directory = stage.cluster.share().join("files");
    fs::create_dir(&directory).map_err(|source| ProofError::Client { what: "a directory".into(), source })?;
    let dump = format!("rdump / {}", directory.display());
    output(program(workspace, "debugfs").args(["-R", &dump]).arg(&image))?;
    let found = sums(&directory)?;
    let _ = fs::remove_dir_all(&directory);
    let first = (acknowledged - KEPT + 2).max(0);
    for number in first..=acknowledged {
        let is_there = found.iter().any(|(name, _)| name.starts_with(&format!("{number}-")));
        ensure(is_there, || {
            format!("file {number} had been acknowledged before the power cut, and is lost")
        })?;
    }
    for (name, sum) in found.iter().filter(|(name, _)| name.contains('-')) {
        ensure(name.ends_with(sum.as_str()), || format!("the contents of file {name} are wrong: {sum}"))?;
    }
    let count = acknowledged + 1 - first;
    stage.say(&format!(
        "host {host}'s image: fsck finds nothing, {count} acknowledged files have their checksums"
    ));
    Ok(())
}

/// Name and checksum of each file in a directory.
fn sums(directory: &Path) -> Result<Vec<(String, String)>, ProofError> {
    let file_error = |source| ProofError::Client { what: "files of the image".into(), source };
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(directory).map_err(file_error)?.flatten() {
        if entry.path().is_file() {
            files.push(entry.path());
        }
    }
    if files.is_empty() {
        return Ok(Vec::new());
    }
    let (_, said) = output(Command::new("md5sum").args(&files))?;
    let name = |path: &str| Path::new(path).file_name().map(|it| it.to_string_lossy().into_owned());
    let line =
        |line: &str| line.split_once("  ").and_then(|(sum, path)| Some((name(path)?, sum.to_string())));
    Ok(said.lines().filter_map(line).collect())
}

fn program(workspace: &Workspace, name: &str) -> Command {
    Command::new(packages::find(workspace, name).unwrap_or_else(|| name.into()))
}

/// Exit status and standard output of a program.
fn output(command: &mut Command) -> Result<(i32, String), ProofError> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|source| ProofError::Client { what: name, source })?;
    Ok((output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stdout).into_owned()))
}
