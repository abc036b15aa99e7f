//! Programs that were not written to be moved: interpreters with heaps of their own making, a database server, a
//! tree of processes around shared memory. Each is asked for its data before the move and after it.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use experiments::lab::{Host, Lab};
use experiments::redis::Redis;
use experiments::workload::{Files, Order, Process, field};
use nix::sys::signal::Signal;
use nix::unistd::User;
use tests::accounts::Memory;
use tests::moves::{Ended, Plan};
use tests::site::{Site, assert_ends};
use tests::tool::Tool;
use tests::{STEP, processes, programs, stock};

/// What an interpreter keeps in its table; its heap is larger.
const TABLE_MIB: usize = 100;
/// Of it, the pages that the move is about.
const TABLE_PAGES: u64 = 100 << 8;

#[test]
fn a_python_program_moves_with_its_heap() {
    move_table("python3", &[]);
}

#[test]
fn a_node_program_moves_with_its_heap() {
    move_table("node", &[]);
}

/// Moves an interpreter that runs `programs/table.*`.
fn move_table(interpreter: &str, options: &[&str]) {
    let Some(interpreter) = installed(interpreter) else { return };
    let Some(site) = Site::new() else { return };
    let script = match interpreter.file_name().and_then(|name| name.to_str()) {
        Some("node") => "table.js",
        _ => "table.py",
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs").join(script);
    let files = Files::in_dir(&site.path(""), "table");
    // CRIU dumps sessions whole, so it has to lead its own.
    let mut command = Command::new("setsid");
    command.arg(interpreter).args(options).arg(script).arg(TABLE_MIB.to_string());
    command.arg(&files.status).arg(&files.control);
    let mut table = Process::start(command, &files).unwrap();
    table.wait_line("READY", None, STEP).unwrap();
    assert_right(&mut table, Order::Check);

    let ended = Plan::new().run(&site, table.pid());
    ended.assert_released(Memory::Changing);
    assert_moved_late(&ended, TABLE_PAGES);
    table.mark_moved();
    table.wait_gone(STEP).unwrap();
    assert_right(&mut table, Order::Check);
    assert_right(&mut table, Order::Quit);
    site.assert_clean(&[]);
}

/// Every value in the table is what it was last set to.
#[track_caller]
fn assert_right(table: &mut Process, order: Order) {
    let number = table.order(order).unwrap();
    let word = if order == Order::Quit { "DONE" } else { "CHECK" };
    let line = table.wait_line(word, Some(number), STEP).unwrap();
    let (values, wrong) = (field::<usize>(&line, "values"), field::<usize>(&line, "wrong"));
    assert_eq!((values, wrong), (Some(TABLE_MIB << 10), Some(0)), "{line}");
}

/// So many pages came after the program ran again.
#[track_caller]
fn assert_moved_late(ended: &Ended, pages: u64) {
    let report = ended.destination.report();
    assert!(report.pages.lazy > pages, "{report}");
    println!("{report}");
}

#[test]
fn a_program_of_another_user_is_refused_where_criu_cannot_dump_it() {
    if host::facts::has_capability(host::facts::CAP_SYS_RESOURCE) {
        tests::skip("with CAP_SYS_RESOURCE it can");
        return;
    }
    let Some(site) = Site::new() else { return };
    let mut command = Command::new("sleep");
    command.arg("1000").uid(65534).gid(65534);
    let sleep = Tool::start("sleep", command);
    let ended = Plan::new().run(&site, sleep.pid());
    ended.source.assert(2, "rolled_back", &["belongs to another user", "CAP_SYS_RESOURCE"]);
    assert!(!sleep.has_ended() && !processes::is_stopped(sleep.pid()), "nothing was touched");
}

const KEYS: usize = 40_000;
const VALUE_BYTES: usize = 1000;

#[test]
fn a_redis_moves_with_its_keys() {
    if installed("redis-server").is_none() {
        return;
    }
    let Some(site) = Site::new() else { return };
    // Each host has a loopback of its own, so that both can listen on it.
    let lab = Lab::new().unwrap();
    let mut redis = Redis::start(Ipv4Addr::LOCALHOST, |program| lab.run_in(Host::Source, program)).unwrap();
    let address = redis.address();
    lab.inside(Host::Source, || write_keys(address)).unwrap();
    lab.inside(Host::Source, || assert_keys(address)).unwrap();
    // The newest: earlier ones cannot dump a listening socket on every kernel.
    let criu = stock::crius().pop().unwrap();
    let criu = ["--criu".as_ref(), criu.path.as_os_str()];
    let ended = Plan::between(&lab).source(criu).destination(criu).run(&site, redis.pid());
    if ended.source.status == 2 && ended.source.said().contains("has Internet sockets") {
        tests::skip(ended.source.said());
        return;
    }
    ended.assert_released(Memory::Changing);
    assert_moved_late(&ended, u64::try_from(KEYS * VALUE_BYTES).unwrap() >> 12);
    redis.wait_gone(STEP).unwrap();
    lab.inside(Host::Destination, || assert_keys(address)).unwrap();
    lab.inside(Host::Destination, || write_keys(address)).unwrap();
}

fn value(key: usize) -> String {
    format!("{key:010}").repeat(VALUE_BYTES / 10)
}

fn write_keys(address: SocketAddr) {
    let commands: String = (0..KEYS).map(|key| format!("SET {key} {}\r\n", value(key))).collect();
    assert_eq!(answers(address, commands, "+OK\r\n".len() * KEYS), "+OK\r\n".repeat(KEYS));
}

fn assert_keys(address: SocketAddr) {
    let commands: String = (0..KEYS).map(|key| format!("GET {key}\r\n")).collect();
    let wanted: String = (0..KEYS).map(|key| format!("${VALUE_BYTES}\r\n{}\r\n", value(key))).collect();
    // Not compared with assert_eq: nobody wants to read 40 MB.
    assert!(answers(address, commands, wanted.len()) == wanted, "a key has another value than it was given");
}

/// What a fresh connection answers to these commands, as many bytes as are due.
fn answers(address: SocketAddr, commands: String, due: usize) -> String {
    let mut stream = TcpStream::connect_timeout(&address, STEP).unwrap();
    stream.set_read_timeout(Some(STEP)).unwrap();
    let mut sender = stream.try_clone().unwrap();
    let sending = std::thread::spawn(move || sender.write_all(commands.as_bytes()).unwrap());
    let mut answers = vec![0; due];
    stream.read_exact(&mut answers).unwrap();
    sending.join().unwrap();
    String::from_utf8(answers).unwrap()
}

#[test]
fn a_postgresql_cluster_moves_with_its_data() {
    let Some(bin) = postgresql() else {
        tests::skip("there is no PostgreSQL: scripts/setup --tests installs it");
        return;
    };
    let Some(site) = Site::new() else { return };
    let cluster = Cluster::new(&site, bin);
    let mut server = cluster.start();
    cluster.query("CREATE TABLE t AS SELECT i, md5(i::text) AS m FROM generate_series(1, 200000) AS i");
    let question =
        "SELECT count(*), sum(i), min(md5(i || m)), max(md5(i || m)) FROM t WHERE m = md5(i::text)";
    let before = cluster.query(question);
    assert!(before.starts_with("200000|20000100000|"), "{before}");

    // The servers of past connections are on their way out.
    let others =
        cluster.query("SELECT count(*) FROM pg_stat_activity WHERE backend_type <> 'client backend'");
    let others: usize = others.parse().unwrap();
    let alone = || (processes::below(server.pid()).len() == others).then_some(());
    tests::eventually("a cluster without clients", STEP, alone);
    let ended = Plan::new().run(&site, server.pid());
    ended.assert_released(Memory::Changing);
    println!("{}", ended.destination.report());
    assert_eq!(ended.destination.report().tasks.len(), 1 + others, "{:#?}", ended.destination);
    let root = site.moved(server.pid()).expect("the moved postmaster");
    assert_eq!(server.wait(STEP), 128 + Signal::SIGKILL as i32);
    assert_eq!(cluster.query(question), before);
    // It still writes, forks servers for its clients, and knows how to end.
    assert_eq!(cluster.query("UPDATE t SET i = -i; SELECT sum(i) FROM t"), "UPDATE 200000\n-20000100000");
    processes::signal(root, Signal::SIGINT);
    assert_ends(root, STEP);
    site.assert_clean(&[]);
}

/// A PostgreSQL cluster of this test's own.
struct Cluster {
    bin: PathBuf,
    dir: PathBuf,
    user: User,
}

impl Cluster {
    fn new(site: &Site, bin: PathBuf) -> Self {
        // It refuses to run as root; its user has to get into the test's directory.
        let user = User::from_name("postgres").unwrap().expect("the user that the package makes");
        fs::set_permissions(site.path(""), fs::Permissions::from_mode(0o711)).unwrap();
        let dir = site.path("cluster");
        fs::create_dir(&dir).unwrap();
        chown(&dir, Some(user.uid.as_raw()), Some(user.gid.as_raw())).unwrap();
        let cluster = Self { bin, dir, user };
        let mut initdb = cluster.command("initdb");
        initdb.arg("--pgdata").arg(cluster.dir.join("data"));
        initdb.args(["--username=postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"]);
        let output = initdb.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        cluster
    }

    /// One of PostgreSQL's programs, as its user.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command.uid(self.user.uid.as_raw()).gid(self.user.gid.as_raw());
        command.current_dir(&self.dir).stdin(Stdio::null());
        command
    }

    /// Starts the server as root, whom it refuses unless it takes him for its own user: without CAP_SYS_RESOURCE,
    /// which root lacks in many a container and VM, CRIU cannot read the limits of anybody else's process.
    fn start(&self) -> Tool {
        let disguise = self.dir.join("disguise.so");
        let source = format!(
            "unsigned getuid(void) {{ return {0}; }} unsigned geteuid(void) {{ return {0}; }}",
            self.user.uid
        );
        fs::write(self.dir.join("disguise.c"), source).unwrap();
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-o"]).arg(&disguise).arg(self.dir.join("disguise.c"));
        assert!(cc.status().unwrap().success());
        // Against a second postmaster it holds System V memory, which CRIU dumps with a namespace of its own only.
        let mut command = Command::new("setsid");
        command.args([
            "unshare",
            "--ipc",
            "sh",
            "-c",
            "exec \"$@\" </dev/null >server.log 2>&1",
            "sh",
            "env",
        ]);
        command.arg(format!("LD_PRELOAD={}", disguise.display()));
        command.arg(self.bin.join("postgres")).arg("-D").arg(self.dir.join("data")).current_dir(&self.dir);
        let sockets = format!("unix_socket_directories={}", self.dir.display());
        for setting in [
            &sockets,
            "listen_addresses=",
            "shared_buffers=16MB",
            "max_connections=10",
            "fsync=off",
            "autovacuum=off",
        ] {
            command.args(["-c", setting]);
        }
        let server = Tool::start("postgres", command);
        tests::eventually("a server that answers", STEP, || {
            assert!(!server.has_ended(), "{}", fs::read_to_string(self.dir.join("server.log")).unwrap());
            self.psql("SELECT 1").output().unwrap().status.success().then_some(())
        });
        server
    }

    fn psql(&self, sql: &str) -> Command {
        let mut command = self.command("psql");
        command.arg("--host").arg(&self.dir).args(["--username=postgres", "--no-psqlrc", "-At", "-c", sql]);
        command
    }

    /// The answer that a fresh connection gets.
    #[track_caller]
    fn query(&self, sql: &str) -> String {
        let output = self.psql(sql).output().unwrap();
        let log = fs::read_to_string(self.dir.join("server.log")).unwrap_or_default();
        assert!(output.status.success(), "{}\n{log}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }
}

/// Where PostgreSQL's programs are, the newest if there are several.
fn postgresql() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let bins = versions.map(|version| version.path().join("bin")).filter(|bin| bin.join("postgres").exists());
    bins.max()
}

/// The program of that name, if it is here: the distribution's, rather than one that somebody put before it.
fn installed(name: &str) -> Option<PathBuf> {
    let of_system = Path::new("/usr/bin").join(name);
    match (of_system.exists(), programs::on_path(name)) {
        (true, _) => Some(of_system),
        (false, true) => Some(name.into()),
        (false, false) => {
            tests::skip(format!("there is no {name}: scripts/setup --tests installs it"));
            None
        }
    }
}
