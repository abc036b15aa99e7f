//! Before anything is frozen: what stands against this move on the source, and what the destination must
//! know to say the same for its side.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;

use host::criu::Criu;
use host::facts::{self, problem};
use protocol::wire::control::{Offer, Problem};

use crate::limits;
use crate::process::{self, ProcessTree, Task};

/// Options of a dump that the restore needs as well.
const SHARED_OPTIONS: [&str; 7] =
    ["--tcp-established", "--tcp-close", "--shell-job", "-j", "--ext-unix-sk", "--file-locks", "-l"];

/// What stands against moving `tree` from here; all of it, so that it can be mended at once.
#[must_use]
pub fn problems(tree: &ProcessTree) -> Vec<Problem> {
    let mut found = Vec::new();
    if let Some(problem) = no_program(tree.root()) {
        // Whatever else there is to say about it does not matter.
        return vec![problem];
    }
    found.extend(facts::privileges());
    found.extend(pipe_size());
    found.extend(descriptors(tree));
    for task in &tree.tasks {
        found.extend(traced(task.pid));
    }
    found.extend(other_pid_namespace(tree));
    if !facts::has_capability(facts::CAP_SYS_RESOURCE) {
        found.extend(tree.tasks.iter().find_map(|task| other_user(task.pid)));
    }
    if tree.tasks.iter().any(|task| task.pid == std::process::id()) {
        found.push(problem("the tree holds this program itself", "run it from outside the tree"));
    }
    found
}

/// A process that runs no program: one that has ended, or a part of the kernel.
fn no_program(root: &Task) -> Option<Problem> {
    let pid = root.pid;
    let remedy = "give the pid of a running process";
    if process::has_ended(pid) {
        return Some(problem(format!("process {pid} has ended"), remedy));
    }
    let program = fs::read_link(format!("/proc/{pid}/exe"));
    program
        .is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        .then(|| problem(format!("process {pid} is a kernel thread"), remedy))
}

/// CRIU needs pipes of 4 MiB; without CAP_SYS_RESOURCE the system's limit must allow them.
fn pipe_size() -> Option<Problem> {
    let path = "/proc/sys/fs/pipe-max-size";
    let now = facts::sysctl("fs/pipe-max-size")?;
    if now >= limits::PIPE_MAX_SIZE {
        return None;
    }
    if fs::write(path, limits::PIPE_MAX_SIZE.to_string()).is_ok() {
        tracing::info!(from = now, to = limits::PIPE_MAX_SIZE, "raised fs.pipe-max-size: criu needs it");
        return None;
    }
    let remedy = format!("sysctl -w fs.pipe-max-size={}", limits::PIPE_MAX_SIZE);
    Some(problem(
        format!("fs.pipe-max-size is {now}, criu's page server needs {}", limits::PIPE_MAX_SIZE),
        remedy,
    ))
}

/// CRIU takes two descriptors per 4 MiB; ours are counted when the pages are.
fn descriptors(tree: &ProcessTree) -> Option<Problem> {
    let limit = facts::raise_open_files_limit();
    let needed = 2 * tree.memory_bytes().div_ceil(limits::CRIU_BYTES_PER_PIPE) + limits::SPARE_DESCRIPTORS;
    (needed > limit).then(|| {
        let what = format!("{needed} open files are needed for this much memory, the limit is {limit}");
        problem(what, format!("ulimit -n {needed}"))
    })
}

fn traced(pid: u32) -> Option<Problem> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?.trim().to_owned();
    (tracer != "0")
        .then(|| problem(format!("task {pid} is traced by process {tracer}"), "detach the debugger first"))
}

/// CRIU reads every task's limits, which `prlimit(2)` allows with `CAP_SYS_RESOURCE` or for one's own user and group.
fn other_user(pid: u32) -> Option<Problem> {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user")).ok();
    if namespace(&pid.to_string())? != namespace("self")? {
        // There it may have the capability although it has not here.
        return None;
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let [user, group] = [nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw()];
    (!is_all(&status, "Uid:", user) || !is_all(&status, "Gid:", group)).then(|| {
        problem(
            format!("task {pid} belongs to another user, and without CAP_SYS_RESOURCE criu cannot read its limits"),
            "give source-server CAP_SYS_RESOURCE (in a container: --cap-add), or run the service as this user",
        )
    })
}

/// Whether real, effective and saved id in a line of `/proc/PID/status` are all `id`.
fn is_all(status: &str, key: &str, id: u32) -> bool {
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
    line.split_whitespace().take(3).filter(|found| found.parse() == Ok(id)).count() == 3
}

fn other_pid_namespace(tree: &ProcessTree) -> Option<Problem> {
    let root = tree.root();
    let theirs = fs::read_link(format!("/proc/{}/ns/pid", root.pid)).ok()?;
    let ours = fs::read_link("/proc/self/ns/pid").ok()?;
    (theirs != ours).then(|| {
        problem(
            format!("task {} lives in another PID namespace", root.pid),
            format!("run source-server inside it: nsenter -t {} --pid --mount ...", root.pid),
        )
    })
}

/// Internet sockets that this CRIU cannot dump on this kernel.
#[must_use]
pub fn socket_problem(tree: &ProcessTree, criu: &Criu) -> Option<Problem> {
    if criu.dumps_internet_sockets() {
        return None;
    }
    let task = tree.tasks.iter().find(|task| has_internet_socket(task.pid))?;
    let what = format!(
        "task {} has Internet sockets, which criu {} cannot dump on this kernel",
        task.pid, criu.version
    );
    Some(problem(what, "use criu 4.2 or later (scripts/setup --criu-next, then --criu PATH) on both hosts"))
}

fn has_internet_socket(pid: u32) -> bool {
    let mut inodes = BTreeSet::new();
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        let text = fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        inodes.extend(text.lines().skip(1).filter_map(|l| l.split_whitespace().nth(9).map(str::to_owned)));
    }
    let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    fds.flatten().any(|fd| {
        let target = fs::read_link(fd.path()).unwrap_or_default();
        let inode = target.to_str().and_then(|name| name.strip_prefix("socket:[")?.strip_suffix(']'));
        inode.is_some_and(|inode| inodes.contains(inode))
    })
}

/// What the destination's preflight needs to know.
#[must_use]
pub fn offer(tree: &ProcessTree, criu: &Criu, dump_options: &[OsString]) -> Offer {
    let root = tree.root();
    Offer {
        release: env!("CARGO_PKG_VERSION").to_owned(),
        criu_version: criu.version.clone(),
        machine: facts::machine(),
        cpu_flags: facts::cpu_flags(),
        root: root.id,
        name: root.name.clone(),
        pids: tree.pids(),
        memory_bytes: tree.memory_bytes(),
        precopy_pages: 0,
        files: mapped_files(tree).iter().filter_map(|path| facts::file_check(path).ok()).collect(),
        criu_options: dump_options
            .iter()
            .filter_map(|option| option.to_str())
            .filter(|option| SHARED_OPTIONS.contains(option))
            .map(str::to_owned)
            .collect(),
    }
}

/// Executables and libraries: every file that is mapped for execution.
fn mapped_files(tree: &ProcessTree) -> BTreeSet<String> {
    let mut files = BTreeSet::new();
    for task in &tree.tasks {
        let maps = fs::read_to_string(format!("/proc/{}/maps", task.pid)).unwrap_or_default();
        for line in maps.lines() {
            let mut words = line.splitn(6, char::is_whitespace);
            let executable = words.nth(1).is_some_and(|perms| perms.contains('x'));
            let path = words.last().map(str::trim).unwrap_or_default();
            if executable && path.starts_with('/') && !path.ends_with(" (deleted)") {
                files.insert(path.to_owned());
            }
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_files_hold_the_program_and_its_libraries() {
        let tree = ProcessTree::of(std::process::id()).unwrap();
        let files = mapped_files(&tree);
        let exe = std::env::current_exe().unwrap();
        assert!(files.contains(exe.to_str().unwrap()), "{files:?}");
        assert!(files.iter().any(|file| file.contains("libc")), "{files:?}");
    }

    #[test]
    fn an_internet_socket_is_seen() {
        let me = std::process::id();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(has_internet_socket(me));
        drop(listener);
    }

    #[test]
    fn another_user_is_told_from_the_own_one() {
        let status = "Name:\tx\nUid:\t0\t0\t0\t7\nGid:\t0\t7\t0\t0\n";
        assert!(is_all(status, "Uid:", 0) && !is_all(status, "Uid:", 7));
        assert!(!is_all(status, "Gid:", 0) && !is_all("", "Uid:", 0));
        assert!(other_user(std::process::id()).is_none());
    }

    #[test]
    fn this_program_does_not_move_itself() {
        let tree = ProcessTree::of(std::process::id()).unwrap();
        assert!(problems(&tree).iter().any(|problem| problem.what.contains("this program itself")));
    }
}
