//! Links that authenticate carry a move as tcp does, and nobody passes who is not known: that is found out before
//! anything is touched, and each side says who was seen and what to do.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::io::Write;
use std::net::{TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};

use experiments::stamp::Options;
use nix::sys::signal::Signal;
use tests::accounts::Memory;
use tests::keys::{Key, Keys, identity};
use tests::moves::{Daemon, Ended, Plan, Side};
use tests::proxy::Proxy;
use tests::site::{Site, assert_ends};
use tests::stamps::{self, Stamp, move_once};
use tests::{MOVE, STEP, processes, programs};

/// Links whose sides prove who they are.
const SECURE: [&str; 2] = ["tls", "quic"];

fn changing(site: &Site) -> Options {
    Options { mib: 256, threads: 2, churn: true, fork: true, ..stamps::options(site, "changing") }
}

#[test]
fn a_process_that_changes_its_mappings_and_forks() {
    for link in SECURE {
        for store in ["pipes", "frozen"] {
            let Some(site) = Site::new() else { return };
            let plan = Keys::new(&site).plan(link).source(["--store", store]);
            move_once(&site, &plan, &changing(&site), Memory::Changing);
        }
    }
}

#[test]
fn every_page_arrives_once_and_is_counted() {
    for link in SECURE {
        let Some(site) = Site::new() else { return };
        let options = Options { mib: 512, ..stamps::options(&site, "steady") };
        move_once(&site, &Keys::new(&site).plan(link), &options, Memory::Steady);
    }
}

#[test]
fn faults_alone_bring_everything_over() {
    for link in SECURE {
        let Some(site) = Site::new() else { return };
        let plan = Keys::new(&site).plan(link).source(["--push-rate", "16M"]);
        move_once(&site, &plan, &Options { mib: 64, ..changing(&site) }, Memory::Changing);
    }
}

#[test]
fn what_is_copied_ahead_comes_over_and_is_installed_before_or_after_the_resume() {
    for link in SECURE {
        for prefill in ["none", "hot", "all"] {
            let Some(site) = Site::new() else { return };
            let plan = Keys::new(&site).plan(link).source(["--precopy-rounds", "2"]);
            let plan = plan.destination(["--prefill", prefill, "--prefill-ms", "10000"]);
            let options = Options { mib: 64, rate_us: 100, ..changing(&site) };
            let ended = move_once(&site, &plan, &options, Memory::Changing);
            let (pages, said) = (ended.destination.report().pages, ended.destination.said());
            assert!(pages.precopied + pages.zero > 0, "{pages:?}");
            assert_eq!(said.contains("prefilled"), prefill != "none", "{said}");
        }
    }
}

#[test]
fn a_link_that_is_cut_pauses_the_move() {
    for link in SECURE {
        let Some(site) = Site::new() else { return };
        let mut stamp = Stamp::start(&Options { rate_us: 500, ..stamps::small(&site, 128) });
        let patience = ["--give-up-after", "2"];
        let plan = Keys::new(&site).plan(link).source(["--push-rate", "8M"]);
        let plan = plan.source(patience).destination(patience);
        let destination = plan.serve(&site);
        let way = if link == "quic" { Proxy::of_datagrams_to } else { Proxy::to };
        let line = way(&destination.address);
        let source = plan.source_to(&site, stamp.pid(), line.address());
        for tool in [&source.tool, &destination.tool] {
            tool.wait_line("phase=\"push\"", STEP);
        }
        stamp.give_up();
        line.cut();
        Ended { source: source.wait(MOVE), destination: destination.wait(STEP) }.assert_paused();
        // Neither killed nor let go: what is missing at the destination is waited for.
        let moved = site.moved(stamp.pid()).expect("the moved process");
        assert!(!processes::has_ended(moved));
        stamp.assert_alone();
        assert_eq!(stamp.wrong_lines(), Vec::<String>::new());
        processes::signal(moved, Signal::SIGKILL);
        assert_ends(moved, STEP);
    }
}

#[test]
fn noise_at_the_port_disturbs_nobody() {
    let noise: [&[u8]; 5] = [&[], &[0], &[0x5a; 1200], &[22, 3, 1, 0xff, 0xff], &[0xc3; 1200]];
    for link in SECURE {
        let Some(site) = Site::new() else { return };
        let plan = Keys::new(&site).plan(link);
        let destination = plan.serve(&site);
        for bytes in noise {
            if link == "quic" {
                let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
                socket.send_to(bytes, &destination.address).unwrap();
            } else {
                // It may have been closed on the way.
                let _ = TcpStream::connect(&destination.address).unwrap().write_all(bytes);
            }
        }
        let mut stamp = Stamp::start(&stamps::small(&site, 8));
        plan.source_to(&site, stamp.pid(), &destination.address).wait(MOVE).assert(0, "released", &[]);
        destination.wait(STEP).assert(0, "released", &[]);
        stamp.mark_moved();
        stamp.assert_unharmed();
        stamp.quit();
    }
}

/// The daemon says `word` of who was refused, and goes on until it is told to stop.
#[track_caller]
fn assert_goes_on(daemon: Daemon, word: &str) {
    daemon.tool.wait_line(word, STEP);
    daemon.tool.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(STEP).status, 0);
}

/// A move that is refused at the handshake, of which the daemon says `word`.
#[track_caller]
fn refused(site: &Site, stamp: &Stamp, plan: &Plan<'_>, word: &str) -> Side {
    let daemon = plan.serve(site);
    let source = plan.source_to(site, stamp.pid(), &daemon.address).wait(STEP);
    assert_goes_on(daemon, word);
    source
}

#[test]
fn who_is_not_known_is_refused_before_anything_is_touched() {
    for link in SECURE {
        let Some(site) = Site::new() else { return };
        let keys = Keys::new(&site);
        let stranger = Key::new(&site, "uffd-daemon", "stranger");
        let mut stamp = Stamp::start(&stamps::small(&site, 8));

        // The source does not know the destination, and says what it saw.
        let knows_another = Keys {
            destination: Key { dir: keys.destination.dir.clone(), ..stranger.clone() },
            ..keys.clone()
        };
        let source = refused(&site, &stamp, &knows_another.plan(link), "not let in");
        let seen = &keys.destination.fingerprint;
        source.assert(2, "rolled_back", &[seen, &format!("give --peer {seen}"), "uffd-daemon identity"]);

        // The destination does not know the source: both say whom.
        let knows_another = Keys { source: Key { dir: keys.source.dir.clone(), ..stranger }, ..keys.clone() };
        let own = &keys.source.fingerprint;
        let source = refused(&site, &stamp, &knows_another.plan(link), &format!("--peer {own}"));
        source.assert(2, "rolled_back", &[&format!("with --peer {own}"), "uffd-daemon serve"]);

        stamp.assert_unharmed();
        stamp.quit();
        site.assert_clean(&[]);
    }
}

#[test]
fn sides_with_different_links_say_so() {
    let Some(site) = Site::new() else { return };
    let mut stamp = Stamp::start(&stamps::small(&site, 8));
    let (plain, secure) = (Plan::new(), Keys::new(&site).plan("tls"));
    for (source, destination, word) in [(&plain, &secure, "plain tcp"), (&secure, &plain, "speaks tls")] {
        let daemon = destination.serve(&site);
        let refused = source.source_to(&site, stamp.pid(), &daemon.address).wait(STEP);
        refused.assert(2, "rolled_back", &["--link"]);
        assert_goes_on(daemon, word);
    }
    stamp.assert_unharmed();
    stamp.quit();
    site.assert_clean(&[]);
}

/// Refused, for a reason with each of `words` in it.
#[track_caller]
fn assert_refused(output: &Output, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is missing: {said}");
    }
}

#[test]
fn a_link_without_a_key_or_a_peer_is_wrong_usage() {
    let Some(site) = Site::new() else { return };
    let key = Key::new(&site, "uffd-daemon", "key");
    let [dir, nowhere] = [key.dir.clone(), site.path("nowhere")].map(|path| path.display().to_string());
    let sides: [&[&str]; 2] = [
        &["source-server", "move", "--pid", "1", "--to", "127.0.0.1:1"],
        &["uffd-daemon", "serve", "--listen", "127.0.0.1:0"],
    ];
    for side in sides {
        let run = |more: &[&str]| {
            let mut command = Command::new(programs::program(side[0]));
            command.args(&side[1..]).args(more).stdin(Stdio::null()).output().unwrap()
        };
        for link in SECURE {
            let with = |more: &[&str]| run(&[&["--link", link][..], more].concat());
            assert_refused(&with(&["--identity", &dir]), &["--peer FINGERPRINT", "--ca FILE", "identity"]);
            assert_refused(
                &with(&["--identity", &nowhere, "--peer", &key.fingerprint]),
                &["there is no key", &nowhere, "uffd-daemon identity --dir"],
            );
            assert_refused(&with(&["--identity", &dir, "--peer", "beef"]), &["64 hexadecimal digits"]);
            assert_refused(&with(&["--identity", &dir, "--ca", &nowhere]), &["--ca", &nowhere]);
            fs::set_permissions(key.dir.join("identity.key"), fs::Permissions::from_mode(0o644)).unwrap();
            assert_refused(&with(&["--identity", &dir, "--peer", &key.fingerprint]), &["644", "chmod 600"]);
            fs::set_permissions(key.dir.join("identity.key"), fs::Permissions::from_mode(0o600)).unwrap();
        }
        // Nobody is to believe that it authenticates.
        assert_refused(&run(&["--peer", &key.fingerprint]), &["--peer has no effect", "--link tls"]);
    }
    site.assert_clean(&[]);
}

#[test]
fn a_key_is_made_once_and_shown_again_by_either_program() {
    let Some(site) = Site::new() else { return };
    let key = Key::new(&site, "uffd-daemon", "key");
    assert_eq!(key.fingerprint.len(), 64, "{}", key.fingerprint);
    for program in ["uffd-daemon", "source-server"] {
        let again = identity(program, &key.dir);
        assert_eq!(String::from_utf8_lossy(&again.stdout).trim(), key.fingerprint);
    }
    fs::set_permissions(&key.dir, fs::Permissions::from_mode(0o755)).unwrap();
    assert_refused(&identity("uffd-daemon", &key.dir), &["chmod 700"]);
}
