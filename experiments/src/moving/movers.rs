//! Who moves the workload: our tools, CRIU's own lazy pages, or our daemon out of images.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::ensure;

use crate::cli::Common;
use crate::report::MoveReport;
use crate::tool::{Tool, Used, beside, wait_both, wait_both_until};

/// Nothing in a run takes longer.
pub(super) const PATIENCE: Duration = Duration::from_secs(180);
/// CRIU's move of a busy task may take minutes. It is cut after this: the accesses until then count, the last page as
/// at least this late.
const CUT_AFTER: Duration = Duration::from_secs(60);

/// The programs.
#[derive(Clone, Debug)]
pub struct Programs {
    pub(super) own: PathBuf,
    source_server: PathBuf,
    uffd_daemon: PathBuf,
    criu: PathBuf,
    /// What CRIU says of itself.
    pub criu_version: String,
}

impl Programs {
    /// Finds them: ours beside this program, CRIU as our tools would.
    ///
    /// # Errors
    /// If one is missing.
    pub fn find(common: &Common) -> anyhow::Result<Self> {
        let criu = host::criu::Criu::find(common.criu.as_deref())?;
        Ok(Self {
            own: std::env::current_exe()?,
            source_server: beside("source-server")?,
            uffd_daemon: beside("uffd-daemon")?,
            criu: criu.path,
            criu_version: criu.version,
        })
    }

    /// Their versions, for the environment of a results folder.
    #[must_use]
    pub fn versions(&self) -> Vec<(&'static str, String)> {
        vec![("criu", self.criu_version.clone())]
    }
}

/// Between which places a move goes, and how.
#[derive(Clone, Debug)]
pub struct Route {
    /// What the source's programs, the workload included, are started with: for example `nsenter --net=FILE`.
    pub source: Vec<OsString>,
    /// The same for the destination's.
    pub destination: Vec<OsString>,
    /// What `uffd-daemon serve` is to listen on.
    pub listen: String,
    /// The host that the source dials, if it is not the one that is listened on; the port is always the same.
    pub dial: Option<String>,
}

impl Default for Route {
    /// On this host, over loopback.
    fn default() -> Self {
        Self { source: Vec::new(), destination: Vec::new(), listen: "127.0.0.1:0".to_owned(), dial: None }
    }
}

/// A move by `source-server` and `uffd-daemon`.
#[derive(Clone, Debug)]
pub struct Ours {
    /// `--link`
    pub link: String,
    /// `--store`
    pub store: String,
    /// `--push-rate`
    pub push_rate: String,
    /// From where to where.
    pub route: Route,
    /// Further arguments of `source-server move`.
    pub source_arguments: Vec<OsString>,
    /// Further arguments of `uffd-daemon serve`.
    pub destination_arguments: Vec<OsString>,
}

impl Default for Ours {
    /// As the tools do without being told.
    fn default() -> Self {
        Self {
            link: "tcp".to_owned(),
            store: "pipes".to_owned(),
            push_rate: "unlimited".to_owned(),
            route: Route::default(),
            source_arguments: Vec::new(),
            destination_arguments: Vec::new(),
        }
    }
}

/// Who moves the workload.
#[derive(Clone, Debug)]
pub enum Mover {
    /// `source-server` and `uffd-daemon`.
    Ours(Box<Ours>),
    /// `criu dump --lazy-pages`, `criu lazy-pages`, `criu restore --lazy-pages`.
    Criu,
    /// `criu dump`, and a lazy restore from the images with `uffd-daemon lazy-pages`.
    Images,
    /// `criu dump` and `criu restore` of everything, through a memory file system.
    StopAndCopy,
}

impl fmt::Display for Mover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ours(_) => "ours",
            Self::Criu => "criu",
            Self::Images => "images",
            Self::StopAndCopy => "stop-and-copy",
        })
    }
}

/// What a mover reports to the measurement.
#[derive(Debug)]
pub(super) struct Moved {
    pub(super) source: Used,
    pub(super) destination: Used,
    /// Source's and destination's, from our tools.
    pub(super) reports: Option<(MoveReport, MoveReport)>,
    /// Whether it was cut before the last page; then processor time is not a number.
    pub(super) cut: bool,
    /// Kept as long as the workload must live.
    pub(super) _kept: Vec<Tool>,
}

impl Mover {
    /// What the workload is started with.
    pub(super) fn prefix(&self) -> &[OsString] {
        match self {
            Self::Ours(ours) => &ours.route.source,
            Self::Criu | Self::Images | Self::StopAndCopy => &[],
        }
    }

    /// Moves the process `pid`, which has `mib` MiB; files go to `dir`. A command may have to run right before the freeze.
    pub(super) fn run(
        &self,
        programs: &Programs,
        pid: u32,
        mib: usize,
        before_freeze: Option<&str>,
        dir: &Path,
    ) -> anyhow::Result<Moved> {
        if let Self::Ours(ours) = self {
            return ours.run(programs, pid, mib, before_freeze, dir);
        }
        if let Some(words) = before_freeze {
            ensure!(Command::new("sh").args(["-c", words]).status()?.success(), "{words} failed");
        }
        match self {
            Self::Criu => criu(programs, pid, mib, dir),
            Self::StopAndCopy => stop_and_copy(programs, pid, dir),
            _ => images(programs, pid, dir),
        }
    }
}

/// A program behind a prefix.
pub(super) fn prefixed(prefix: &[OsString], program: &Path) -> Command {
    let mut words = prefix.iter().map(OsString::as_os_str).chain([program.as_os_str()]);
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words);
    command
}

/// A tool behind a prefix, in a process group of its own: Ctrl-C is for the experiment, which lets the run in hand
/// end.
fn command(prefix: &[OsString], program: &Path) -> Command {
    let mut command = prefixed(prefix, program);
    command.process_group(0);
    command
}

impl Ours {
    fn run(
        &self,
        programs: &Programs,
        pid: u32,
        mib: usize,
        before_freeze: Option<&str>,
        dir: &Path,
    ) -> anyhow::Result<Moved> {
        let (source_json, destination_json) = (dir.join("source.json"), dir.join("destination.json"));
        let listen = if self.link == "unix" {
            dir.join("link").display().to_string()
        } else {
            self.route.listen.clone()
        };
        let mut serve = command(&self.route.destination, &programs.uffd_daemon);
        serve.args([
            "serve",
            "--once",
            "--pidns",
            "new",
            "--insecure",
            "--link",
            &self.link,
            "--listen",
            &listen,
        ]);
        serve.arg("--criu").arg(&programs.criu).arg("--json").arg(&destination_json);
        serve.args(&self.destination_arguments);
        let mut destination = Tool::start("uffd-daemon", serve, dir.join("uffd-daemon.log"))?;
        let listening = |line: &str| line.strip_prefix("listening on ").map(str::to_owned);
        let address = self.dialled(&destination.wait_line(PATIENCE, listening)?);
        let mut start = command(&self.route.source, &programs.source_server);
        start.args(["move", "--pid", &pid.to_string(), "--insecure", "--link", &self.link, "--to", &address]);
        start.args(["--store", &self.store, "--push-rate", &self.push_rate]);
        start.arg("--criu").arg(&programs.criu).arg("--json").arg(&source_json);
        if let Some(command) = before_freeze {
            start.arg("--hook").arg(format!("pre-freeze={command}"));
        }
        start.args(&self.source_arguments);
        let mut source = Tool::start("source-server", start, dir.join("source-server.log"))?;
        let (source, destination) = wait_both(&mut source, &mut destination, PATIENCE)?;
        let reports = (MoveReport::read(&source_json)?, MoveReport::read(&destination_json)?);
        ensure_lazy(reports.1.pages.lazy * 4096, mib)?;
        Ok(Moved { source, destination, reports: Some(reports), cut: false, _kept: Vec::new() })
    }

    /// Where the source finds who listens on `address`.
    fn dialled(&self, address: &str) -> String {
        match (&self.route.dial, address.rsplit_once(':')) {
            (Some(host), Some((_, port))) => format!("{host}:{port}"),
            _ => address.to_owned(),
        }
    }
}

fn criu(programs: &Programs, pid: u32, mib: usize, dir: &Path) -> anyhow::Result<Moved> {
    let images = dir.join("images");
    fs::create_dir(&images)?;
    let port = free_port()?.to_string();
    let ready = dir.join("ready");
    fs::write(&ready, "")?;
    let mut dump = command(&[], Path::new("sh"));
    // The status descriptor is a file that is looked at: one zero byte when the page server listens.
    dump.args(["-c", "exec \"$@\" 3>\"$0\""]).arg(&ready).arg(&programs.criu);
    dump.args(["dump", "-t", &pid.to_string(), "-D"]).arg(&images);
    dump.args(["-o", "dump.log", "-v0", "--lazy-pages", "--address", "127.0.0.1", "--port", &port]);
    dump.args(["--status-fd", "3"]);
    let mut source = Tool::start("criu dump", dump, dir.join("criu-dump.log"))?;
    source.wait_until(PATIENCE, |_| fs::metadata(&ready).is_ok_and(|meta| meta.len() > 0))?;
    let mut lazy = command(&[], &programs.criu);
    lazy.arg("lazy-pages").arg("-D").arg(&images).args(["-o", "lazy.log", "-v0"]);
    lazy.args(["--page-server", "--address", "127.0.0.1", "--port", &port]);
    let mut destination = Tool::start("criu lazy-pages", lazy, dir.join("criu-lazy-pages.log"))?;
    destination.wait_until(PATIENCE, |_| images.join("lazy-pages.socket").exists())?;
    let namespace = restore(programs, &images, &["--lazy-pages"], dir)?;
    let used = wait_both_until(&mut source, &mut destination, CUT_AFTER)?;
    ensure_lazy(((mib as u64) << 20).saturating_sub(bytes_in_images(&images)?), mib)?;
    let cut = used.iter().any(Option::is_none);
    let [its, others] = match used {
        [Some(source), Some(destination)] => [source, destination],
        _ => [source.used_so_far(), destination.used_so_far()],
    };
    // One that was cut needs its programs until the workload has ended.
    let kept = vec![namespace, destination, source];
    Ok(Moved { source: its, destination: others, reports: None, cut, _kept: kept })
}

fn images(programs: &Programs, pid: u32, dir: &Path) -> anyhow::Result<Moved> {
    let images = dir.join("images");
    fs::create_dir(&images)?;
    let mut dump = command(&[], &programs.criu);
    dump.args(["dump", "-t", &pid.to_string(), "-D"]).arg(&images).args(["-o", "dump.log", "-v0"]);
    let mut dump = Tool::start("criu dump", dump, dir.join("criu-dump.log"))?;
    let source = dump.wait_used(PATIENCE)?;
    let mut lazy = command(&[], &programs.uffd_daemon);
    lazy.arg("lazy-pages").arg("-D").arg(&images);
    let mut destination = Tool::start("uffd-daemon lazy-pages", lazy, dir.join("uffd-daemon.log"))?;
    destination.wait_until(PATIENCE, |_| images.join("lazy-pages.socket").exists())?;
    let namespace = restore(programs, &images, &["--lazy-pages"], dir)?;
    let destination = destination.wait_used(PATIENCE)?;
    Ok(Moved { source, destination, reports: None, cut: false, _kept: vec![namespace] })
}

fn stop_and_copy(programs: &Programs, pid: u32, dir: &Path) -> anyhow::Result<Moved> {
    let images = dir.join("images");
    fs::create_dir(&images)?;
    let mut dump = command(&[], &programs.criu);
    dump.args(["dump", "-t", &pid.to_string(), "-D"]).arg(&images).args(["-o", "dump.log", "-v0"]);
    let source = Tool::start("criu dump", dump, dir.join("criu-dump.log"))?.wait_used(PATIENCE)?;
    // The command behind the options runs once the tasks do.
    let restored = dir.join("restored");
    let mut namespace = restore(programs, &images, &[], dir)?;
    namespace.wait_until(PATIENCE, |_| restored.exists())?;
    let destination = namespace.used_so_far();
    Ok(Moved { source, destination, reports: None, cut: false, _kept: vec![namespace] })
}

/// A restore into a PID namespace of its own, which lives as long as the tool that is returned.
fn restore(programs: &Programs, images: &Path, options: &[&str], dir: &Path) -> anyhow::Result<Tool> {
    let mut restore = command(&[], Path::new("unshare"));
    restore.args(["--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c"]);
    restore.arg("\"$@\" || exit; echo > \"$0\"; while sleep 1; do :; done").arg(dir.join("restored"));
    restore.arg(&programs.criu).args(["restore", "-D"]).arg(images);
    restore.args(["-o", "restore.log", "-v0", "-d"]).args(options);
    Tool::start("criu restore", restore, dir.join("criu-restore.log"))
}

fn bytes_in_images(images: &Path) -> anyhow::Result<u64> {
    let pages = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with("pages-");
    let files = fs::read_dir(images)?.flatten().filter(|entry| pages(&entry.file_name()));
    Ok(files.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum())
}

/// A process with a page-aligned stack pointer is copied as a whole, by either: that measures nothing here.
fn ensure_lazy(bytes: u64, mib: usize) -> anyhow::Result<()> {
    ensure!(bytes >> 20 >= mib as u64 / 10 * 9, "only {} of {mib} MiB were lazy", bytes >> 20);
    Ok(())
}

fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_dials_the_port_that_is_listened_on() {
        let mut ours = Ours::default();
        assert_eq!(ours.dialled("127.0.0.1:7000"), "127.0.0.1:7000");
        assert_eq!(ours.dialled("/run/link"), "/run/link");
        ours.route.dial = Some("10.0.0.2".to_owned());
        assert_eq!(ours.dialled("0.0.0.0:7000"), "10.0.0.2:7000");
    }

    #[test]
    fn a_prefix_comes_before_the_program() {
        let prefix = ["nsenter".into(), "--net=/x".into()];
        let command = command(&prefix, Path::new("/bin/y"));
        let arguments: Vec<_> = command.get_args().collect();
        assert_eq!(
            (command.get_program().to_str(), arguments),
            (Some("nsenter"), vec!["--net=/x".as_ref(), "/bin/y".as_ref()])
        );
    }
}
