//! What is refused before anything is touched: exit status 2, and one message that says what to do about it.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};

use tests::programs;
use tests::site::Site;
use tests::stamps::{self, Stamp};

const NOWHERE: &str = "127.0.0.1:1";

fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

/// Refused, for a reason with each of `words` in it.
#[track_caller]
fn assert_refused(output: &Output, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is missing: {said}");
    }
    assert!(!said.contains("panicked") && said.len() < 2000, "{said}");
}

fn source(arguments: &[&str]) -> Output {
    run(Command::new(programs::program("source-server")).arg("move").args(arguments))
}

fn daemon(arguments: &[&str]) -> Output {
    run(Command::new(programs::program("uffd-daemon")).arg("serve").args(arguments))
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.wait();
    }
}

#[test]
fn what_cannot_be_moved() {
    let Some(_site) = Site::new() else { return };
    assert_refused(&source(&["--pid", "4194303", "--to", NOWHERE]), &["no process 4194303", "give the pid"]);
    assert_refused(&source(&["--pid", "1", "--to", NOWHERE]), &["this program itself", "from outside"]);
    let own = format!("exec {:?} move --pid $$ --to {NOWHERE}", programs::program("source-server"));
    assert_refused(&run(Command::new("sh").args(["-c", &own])), &["this program itself", "from outside"]);
    let me = std::process::id().to_string();
    assert_refused(&source(&["--pid", &me, "--to", NOWHERE]), &["this program itself", "from outside"]);
    assert_refused(&source(&["--pid", "2", "--to", NOWHERE]), &["kernel thread"]);
    let mut ended = Ended(Command::new("true").stdout(Stdio::piped()).spawn().unwrap());
    // Its output closes with its end; it is not reaped yet.
    let output = ended.0.stdout.take().unwrap();
    std::io::read_to_string(output).unwrap();
    let pid = ended.0.id();
    tests::eventually("a zombie", tests::STEP, || tests::processes::has_ended(pid).then_some(()));
    assert_refused(&source(&["--pid", &pid.to_string(), "--to", NOWHERE]), &["has ended"]);
}

#[test]
fn what_the_source_is_not_told_rightly() {
    let Some(site) = Site::new() else { return };
    let mut stamp = Stamp::start(&stamps::small(&site, 8));
    let pid = stamp.pid().to_string();
    let with = |more: &[&str]| source(&[&["--pid", &pid, "--to", NOWHERE][..], more].concat());
    assert_refused(&source(&["--to", NOWHERE]), &["--pid"]);
    assert_refused(&source(&["--pid", &pid]), &["--to"]);
    assert_refused(&source(&["--pid", "me", "--to", NOWHERE]), &["--pid"]);
    assert_refused(&source(&["--pid", &pid, "--to", "192.0.2.1:7000"]), &["unencrypted", "--insecure"]);
    assert_refused(&source(&["--pid", &pid, "--to", "7000"]), &["HOST:PORT"]);
    assert_refused(
        &source(&["--pid", &pid, "--to", "nowhere.invalid:7000"]),
        &["nowhere.invalid", "HOST:PORT"],
    );
    assert_refused(&with(&["--link", "smoke"]), &["smoke", "tcp"]);
    assert_refused(&with(&["--hook", "post-dump"]), &["PHASE=COMMAND", "post-dump"]);
    assert_refused(&with(&["--hook", "later=true"]), &["later", "pre-freeze"]);
    for rate in ["fast", "0", "-1", "1T"] {
        assert_refused(&with(&[&format!("--push-rate={rate}")]), &["push-rate", "unlimited, off"]);
        assert_refused(&with(&[&format!("--precopy-rate={rate}")]), &["precopy-rate", "unlimited"]);
    }
    assert_refused(&with(&["--store", "attic"]), &["pipes", "frozen"]);
    for rounds in ["many", "-1", "1.5", "101"] {
        assert_refused(&with(&[&format!("--precopy-rounds={rounds}")]), &["precopy-rounds", "auto"]);
    }
    assert_refused(&with(&["--precopy-rate=off"]), &["--precopy-rounds 0"]);
    assert_refused(&with(&["--criu", "/nonexistent/criu"]), &["/nonexistent/criu", "scripts/setup"]);
    assert_refused(&with(&["--criu", "/bin/true"]), &["/bin/true", "4.1 or later"]);
    assert_refused(&with(&[]), &[NOWHERE, "uffd-daemon serve"]);
    stamp.assert_unharmed();
    stamp.quit();
    site.assert_clean(&[]);
}

#[test]
fn what_the_daemon_is_not_told_rightly() {
    let Some(site) = Site::new() else { return };
    assert_refused(&daemon(&[]), &["--listen"]);
    assert_refused(&daemon(&["--listen", "0.0.0.0:0"]), &["unencrypted", "--insecure"]);
    assert_refused(&daemon(&["--listen", "7000"]), &["HOST:PORT"]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    assert_refused(&daemon(&["--listen", &address]), &[&address, "choose another"]);
    let with = |more: &[&str]| daemon(&[&["--listen", "127.0.0.1:0"][..], more].concat());
    assert_refused(&with(&["--hook", "x"]), &["PHASE=COMMAND"]);
    assert_refused(&with(&["--pidns", "maybe"]), &["auto", "host", "new"]);
    assert_refused(&with(&["--criu", "/nonexistent/criu"]), &["/nonexistent/criu", "scripts/setup"]);
    assert_refused(&with(&["--metrics", "127.0.0.1:9"]), &["--metrics", "--json"]);
    site.assert_clean(&[]);
}

#[test]
fn who_has_no_privileges() {
    let Some(site) = Site::new() else { return };
    let unprivileged = |program: &str| {
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--inh-caps=-all",
            "--no-new-privs",
        ]);
        command.arg(programs::program(program));
        command
    };
    match unprivileged("source-server").arg("--version").output() {
        Ok(output) if output.status.success() => {}
        other => {
            tests::skip(format!("no setpriv, or nobody else may run these programs: {other:?}"));
            return;
        }
    }
    let mut stamp = Stamp::start(&stamps::small(&site, 8));
    let pid = stamp.pid().to_string();
    let refused = run(unprivileged("source-server").args(["move", "--pid", &pid, "--to", NOWHERE]));
    assert_refused(&refused, &["root"]);
    let refused = run(unprivileged("uffd-daemon").args(["serve", "--listen", "127.0.0.1:0"]));
    assert_refused(&refused, &["root"]);
    stamp.assert_unharmed();
    stamp.quit();
    site.assert_clean(&[]);
}
