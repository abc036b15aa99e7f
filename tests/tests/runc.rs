//! `runc checkpoint --lazy-pages` and `runc restore --lazy-pages`, with our daemon in the place of `criu lazy-pages`.
//!
//! ```text
//!   runc checkpoint ─▶ criu dump ──pages──▶ uffd-daemon lazy-pages ◀──userfaultfds── criu restore ◀─ runc restore
//! ```
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::cell::Cell;
use std::ffi::OsString;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use experiments::stamp::Options;
use experiments::workload::Files;
use host::criu::Criu;
use serde_json::{Value, json};
use tests::site::Site;
use tests::stamps::Stamp;
use tests::stock::{self, Job, Status};
use tests::tool::Tool;
use tests::{STEP, programs};

const MIB: usize = 64;
/// Where the workload's program is in the container.
const PROGRAM: &str = "/experiments";

#[test]
fn a_container_moves_with_our_daemon() {
    if !programs::on_path("runc") {
        tests::skip("there is no runc: scripts/setup --tests installs it");
        return;
    }
    let Some(site) = Site::new() else { return };
    for criu in stock::crius() {
        let options = options(&site, &criu);
        let runc = Runc::new(&site, &criu, &options);
        move_container(&site, &runc, &options);
        drop(runc);
        site.assert_clean(&[]);
    }
}

/// A container under a `runc checkpoint` that waits as a page server.
struct Checkpoint<'a> {
    // Dropped in this order: nobody can wait for the end of a process that a dump holds.
    server: PageServer,
    tool: Tool,
    container: Container<'a>,
    stamp: Stamp,
}

/// CRIU's page server under a dump. Dropping it ends it, and with it the dump.
struct PageServer(SocketAddr);

impl Drop for PageServer {
    fn drop(&mut self) {
        // A connection without a request is a session; most often it has had one and is not there any more.
        let _ = TcpStream::connect(self.0);
    }
}

fn checkpoint<'a>(runc: &'a Runc, job: &Job, options: &Options) -> Checkpoint<'a> {
    let container = runc.container("original");
    // What it is given as arguments is in the bundle already.
    let mut run = Command::new("sh");
    run.args(["-c", "exec runc --root \"$1\" run --bundle \"$2\" \"$3\" 2>\"$2/run.log\"", "sh"]);
    run.arg(&runc.root).arg(&runc.bundle).arg(&container.id);
    let stamp = Stamp::start_as(run, options);

    let address = stock::free_address();
    let mut command = runc.command("checkpoint");
    command.arg("--image-path").arg(&job.images).arg("--work-path").arg(&job.work);
    command.args(["--lazy-pages", "--page-server", &address.to_string()]);
    let status = Status::add_to(&mut command);
    command.arg(&container.id);
    let tool = status.start("runc checkpoint", command, &job.work.join("dump.log"));
    Checkpoint { server: PageServer(address), tool, container, stamp }
}

fn move_container(site: &Site, runc: &Runc, options: &Options) {
    let (job, checkpoint) = stock::until_lazy(MIB, || {
        let job = Job::new(site, &runc.criu);
        let checkpoint = checkpoint(runc, &job, options);
        (job, checkpoint)
    });
    let Checkpoint { mut stamp, container: _original, mut tool, server } = checkpoint;

    let mut daemon = job.daemon();
    daemon.args(["--page-server", "--address", &server.0.ip().to_string()]);
    daemon.args(["--port", &server.0.port().to_string()]);
    let mut daemon = job.start_ready("lazy-pages", daemon);

    let copy = runc.container("copy");
    let mut restore = runc.command("restore");
    restore.arg("--image-path").arg(&job.images).arg("--work-path").arg(&job.work);
    restore.arg("--lazy-pages").arg("--bundle").arg(&runc.bundle).arg(&copy.id);
    let mut restore = Tool::start("runc restore", restore);

    let said = |restore: &Tool| format!("{}\n{}", restore.last_lines(), job.log("restore"));
    assert_eq!(daemon.wait(STEP), 0, "{}\n{}", job.log("lazy-pages"), said(&restore));
    assert_eq!(tool.wait(STEP), 0, "{}\n{}", tool.last_lines(), job.log("dump"));
    stamp.mark_moved();
    stamp.assert_unharmed();
    stamp.quit();
    assert_eq!(restore.wait(STEP), 0, "{}", said(&restore));
}

/// A workload whose files are in a directory that the container has, too.
fn options(site: &Site, criu: &Criu) -> Options {
    let shared = site.path(&format!("shared-{}", criu.version));
    fs::create_dir(&shared).unwrap();
    Options { mib: MIB, threads: 2, churn: true, fork: true, ..Options::new(Files::in_dir(&shared, "stamp")) }
}

/// runc, its state and a bundle of this test's own.
struct Runc {
    criu: Criu,
    path: OsString,
    root: PathBuf,
    bundle: PathBuf,
    name: String,
    containers: Cell<u32>,
}

/// A container, there or not. Dropping it deletes it.
struct Container<'a> {
    runc: &'a Runc,
    id: String,
}

impl Runc {
    fn new(site: &Site, criu: &Criu, options: &Options) -> Self {
        let dir = site.path(&format!("runc-{}", criu.version));
        let bundle = dir.join("bundle");
        write_bundle(&bundle, options);
        // runc takes the criu that it finds first.
        let bin = dir.join("bin");
        fs::create_dir(&bin).unwrap();
        symlink(&criu.path, bin.join("criu")).unwrap();
        let mut path = bin.into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let name = format!("postcopy-test-{}-{}", std::process::id(), criu.version);
        Self { criu: criu.clone(), path, root: dir.join("state"), bundle, name, containers: Cell::new(0) }
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new("runc");
        command.env("PATH", &self.path).arg("--root").arg(&self.root).arg(verb);
        command
    }

    fn container(&self, role: &str) -> Container<'_> {
        let number = self.containers.replace(self.containers.get() + 1);
        Container { runc: self, id: format!("{}-{role}-{number}", self.name) }
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        // Most often it has ended and is not there any more.
        let _ = self.runc.command("delete").arg("--force").arg(&self.id).output();
    }
}

/// A bundle that needs no image: the host's programs and libraries, for reading only.
fn write_bundle(bundle: &Path, options: &Options) {
    let rootfs = bundle.join("rootfs");
    fs::create_dir_all(&rootfs).unwrap();
    let shared = options.files.status.parent().unwrap();
    let mut mounts = vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc"}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}),
        bind(Path::new("/usr"), Path::new("/usr"), "ro"),
        bind(&programs::program("experiments"), Path::new(PROGRAM), "ro"),
        bind(shared, shared, "rw"),
    ];
    for dir in ["bin", "lib", "lib64"] {
        let on_host = Path::new("/").join(dir);
        match fs::read_link(&on_host) {
            Ok(target) => symlink(target, rootfs.join(dir)).unwrap(),
            Err(_) if on_host.is_dir() => mounts.push(bind(&on_host, &on_host, "ro")),
            Err(_) => {}
        }
    }
    let none: [&str; 0] = [];
    // The network stays the host's: nothing here uses it.
    let namespaces = ["pid", "ipc", "uts", "mount"].map(|kind| json!({"type": kind}));
    let config = json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": arguments(options),
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "capabilities": {"bounding": none, "effective": none, "permitted": none},
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": false},
        "mounts": mounts,
        "linux": {"namespaces": namespaces},
    });
    fs::write(bundle.join("config.json"), config.to_string()).unwrap();
}

fn bind(from: &Path, to: &Path, mode: &str) -> Value {
    json!({"destination": to, "type": "bind", "source": from, "options": ["rbind", mode]})
}

fn arguments(options: &Options) -> Vec<String> {
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let mut arguments = [PROGRAM, "workload", "stamp", "--churn", "--fork"].map(str::to_owned).to_vec();
    for (name, value) in [
        ("--mib", options.mib.to_string()),
        ("--threads", options.threads.to_string()),
        ("--status", text(&options.files.status)),
        ("--control", text(&options.files.control)),
    ] {
        arguments.extend([name.to_owned(), value]);
    }
    arguments
}
