//! Both crossings with stock CRIU, in every version of it that is here: our page server under its `lazy-pages`, its
//! dump under our daemon. A process that knows every page of its memory is what crosses.
//!
//! ```text
//!   criu dump ─▶ images ─▶ source-server page-server ─▶ criu lazy-pages ─▶ criu restore
//!   criu dump --lazy-pages ─────────────────────────▶ uffd-daemon lazy-pages ─▶ criu restore
//! ```
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::net::SocketAddr;
use std::process::Command;

use experiments::stamp::Options;
use host::criu::Criu;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use tests::processes::{self, Entry};
use tests::site::{Site, assert_ends};
use tests::stamps::{self, Stamp};
use tests::stock::{self, Job};
use tests::tool::Tool;
use tests::valve::{End, Valve};
use tests::{STEP, eventually, programs};

const MIB: usize = 64;

fn each_criu(test: impl Fn(&Site, &Criu)) {
    let Some(site) = Site::new() else { return };
    for criu in stock::crius() {
        test(&site, &criu);
        site.assert_clean(&[]);
    }
}

fn steady(site: &Site) -> Options {
    stamps::small(site, MIB)
}

/// Several processes with memory in common.
fn tree(site: &Site) -> Options {
    Options { mib: MIB / 4, tree: 4, ..steady(site) }
}

/// All that a userfaultfd reports happens to it: faults, removes, unmaps, remaps, forks.
fn changing(site: &Site) -> Options {
    Options { churn: true, fork: true, ..steady(site) }
}

/// Our page server, and where it listens.
fn page_server(arguments: impl FnOnce(&mut Command)) -> (Tool, SocketAddr) {
    let mut command = Command::new(programs::program("source-server"));
    command.args(["page-server", "--address", "127.0.0.1", "--port", "0"]);
    arguments(&mut command);
    let tool = Tool::start("source-server", command);
    let address = tool.wait_for(STEP, |line| line.strip_prefix("listening on ")?.parse().ok());
    (tool, address)
}

fn image_server(job: &Job) -> (Tool, SocketAddr) {
    page_server(|command| {
        command.arg("--images-dir").arg(&job.images);
    })
}

/// What makes a `lazy-pages` fetch from `address`.
fn from(mut command: Command, address: SocketAddr) -> Command {
    command.args(["--page-server", "--address", &address.ip().to_string()]);
    command.args(["--port", &address.port().to_string()]);
    command
}

/// A checkpoint of a workload that has ended with it.
fn dumped(site: &Site, criu: &Criu, options: &Options) -> (Job, Stamp) {
    stock::until_lazy(MIB, || {
        let job = Job::new(site, criu);
        let mut stamp = Stamp::start(options);
        job.dump(stamp.pid());
        stamp.mark_moved();
        (job, stamp)
    })
}

/// A workload under a `criu dump` that waits as a page server.
struct Waiting {
    // Dropped in this order: nobody can wait for the end of a process that a dump holds.
    dump: Tool,
    stamp: Stamp,
    address: SocketAddr,
}

fn waiting(site: &Site, criu: &Criu, options: &Options, dump_options: &[&str]) -> (Job, Waiting) {
    stock::until_lazy(MIB, || {
        let job = Job::new(site, criu);
        let stamp = Stamp::start(options);
        let (dump, address) = job.dump_lazily(stamp.pid(), dump_options);
        (job, Waiting { dump, stamp, address })
    })
}

/// The restored workload is whole.
fn finish(mut stamp: Stamp, restored: Tool) {
    stamp.assert_unharmed();
    stamp.quit();
    drop(restored);
}

fn assert_ended(mut tool: Tool, status: i32, job: &Job) {
    assert_eq!(tool.wait(STEP), status, "{}\n{}", tool.last_lines(), job.log("lazy-pages"));
}

/// Our daemon logs what goes wrong, and what an operator of CRIU's would look for.
fn assert_logged_well(job: &Job) {
    let log = fs::read_to_string(job.work.join("lazy-pages.log")).unwrap();
    assert!(log.contains("all pages are here"), "{log}");
    assert!(!log.contains("ERROR") && !log.contains("WARN"), "{log}");
}

#[test]
fn our_page_server_gives_images_to_stock_lazy_pages() {
    each_criu(|site, criu| {
        // None that changes its mappings: stock lazy-pages unregisters what was removed, which splits mappings so
        // that their next mremap fails.
        for options in [steady(site), tree(site)] {
            let (job, stamp) = dumped(site, criu, &options);
            let (server, address) = image_server(&job);
            let lazy = job.start_ready("lazy-pages", from(job.criu("lazy-pages"), address));
            let restored = job.restore(&[]).unwrap_or_else(|_| panic!("{}", job.log("restore")));
            assert_ended(lazy, 0, &job);
            assert_ended(server, 0, &job);
            finish(stamp, restored);
        }
    });
}

#[test]
fn our_page_server_gives_the_memory_of_a_frozen_process_to_stock_lazy_pages() {
    each_criu(|site, criu| {
        // The dump's own page server waits for a client that never comes.
        let (job, waiting) = waiting(site, criu, &steady(site), &["--leave-stopped"]);
        let Waiting { mut stamp, dump, .. } = waiting;
        let (server, address) = page_server(|command| {
            command.args(["--pid", &stamp.pid().to_string()]);
        });
        let lazy = job.start_ready("lazy-pages", from(job.criu("lazy-pages"), address));
        let restored = job.restore(&[]).unwrap_or_else(|_| panic!("{}", job.log("restore")));
        assert_ended(lazy, 0, &job);
        assert_ended(server, 0, &job);
        // Never two of them: the dump resumes what it holds when it ends.
        processes::signal(stamp.pid(), Signal::SIGKILL);
        drop(dump);
        stamp.mark_moved();
        finish(stamp, restored);
    });
}

#[test]
fn our_daemon_fetches_from_a_stock_dump_that_waits() {
    each_criu(|site, criu| {
        for options in [steady(site), changing(site), tree(site)] {
            let (job, waiting) = waiting(site, criu, &options, &[]);
            let Waiting { mut stamp, mut dump, address } = waiting;
            let daemon = job.start_ready("lazy-pages", from(job.daemon(), address));
            let restored = job.restore(&[]).unwrap_or_else(|_| panic!("{}", job.log("restore")));
            assert_ended(daemon, 0, &job);
            assert_logged_well(&job);
            assert_eq!(dump.wait(STEP), 0, "{}", job.log("dump"));
            stamp.mark_moved();
            finish(stamp, restored);
        }
    });
}

#[test]
fn our_daemon_goes_into_the_background_like_stock_lazy_pages() {
    each_criu(|site, criu| {
        let (job, waiting) = waiting(site, criu, &steady(site), &[]);
        let Waiting { mut stamp, mut dump, address } = waiting;
        let mut command = from(job.daemon(), address);
        command.args(["-d", "--pidfile", "lazy-pages.pid"]);
        let mut starter = job.start_ready("lazy-pages", command);
        assert_eq!(starter.wait(STEP), 0, "{}", starter.last_lines());
        let pid: u32 = fs::read_to_string(job.work.join("lazy-pages.pid")).unwrap().parse().unwrap();
        assert!(
            Entry::of(pid).is_some_and(|daemon| daemon.parent == std::process::id()),
            "it is an orphan, ours"
        );
        let restored = job.restore(&[]).unwrap_or_else(|_| panic!("{}", job.log("restore")));
        assert_ends(pid, STEP);
        let pid = Pid::from_raw(pid.try_into().unwrap());
        assert_eq!(waitpid(pid, None), Ok(WaitStatus::Exited(pid, 0)), "{}", job.log("lazy-pages"));
        assert_logged_well(&job);
        assert_eq!(dump.wait(STEP), 0, "{}", job.log("dump"));
        stamp.mark_moved();
        finish(stamp, restored);
    });
}

#[test]
fn our_daemon_reads_local_images() {
    each_criu(|site, criu| {
        for options in [steady(site), changing(site)] {
            let (job, stamp) = dumped(site, criu, &options);
            let daemon = job.start_ready("lazy-pages", job.daemon());
            let restored = job.restore(&[]).unwrap_or_else(|_| panic!("{}", job.log("restore")));
            assert_ended(daemon, 0, &job);
            assert_logged_well(&job);
            finish(stamp, restored);
        }
    });
}

#[test]
fn our_daemon_fetches_from_our_page_server() {
    each_criu(|site, criu| {
        for options in [steady(site), changing(site)] {
            let (job, stamp) = dumped(site, criu, &options);
            let (server, address) = image_server(&job);
            let daemon = job.start_ready("lazy-pages", from(job.daemon(), address));
            let restored = job.restore(&[]).unwrap_or_else(|_| panic!("{}", job.log("restore")));
            assert_ended(daemon, 0, &job);
            assert_logged_well(&job);
            assert_ended(server, 0, &job);
            finish(stamp, restored);
        }
    });
}

/// A daemon that ends takes the userfaultfds with it, and what is missing reads as zero then: not with a keeper.
#[test]
fn a_page_server_that_is_lost_leaves_the_tasks_waiting_and_whole() {
    each_criu(|site, criu| {
        for end in [End::Reset, End::Closed] {
            let (job, mut stamp) = dumped(site, criu, &steady(site));
            let (server, address) = image_server(&job);
            let valve = Valve::to(address, MIB << 18);
            let mut daemon = job.start_ready("lazy-pages", from(job.daemon(), valve.address()));
            let restored = job.restore(&[]).unwrap_or_else(|_| panic!("{}", job.log("restore")));
            let root = site.moved(stamp.pid()).expect("the restored root");
            valve.wait_stalled();
            drop(server);
            valve.end(end);
            assert_eq!(daemon.wait(STEP), 1, "{}", daemon.last_lines());
            let error = daemon.wait_line("pages missing", STEP);
            let keeper = error.split_once("process ").and_then(|(_, tail)| tail.split(' ').next());
            let keeper: u32 = keeper.and_then(|pid| pid.parse().ok()).unwrap_or_else(|| panic!("{error}"));
            assert!(!processes::has_ended(keeper), "{error}");
            eventually("a thread that waits for a page", STEP, || waits_for_a_page(root).then_some(()));
            assert_eq!(stamp.wrong_lines(), [""; 0]);
            stamp.give_up();
            processes::signal(root, Signal::SIGKILL);
            assert_ends(keeper, STEP);
            drop(restored);
            assert_eq!(stamp.wrong_lines(), [""; 0]);
        }
    });
}

/// Whether a thread of the process is in a page fault that a userfaultfd has to resolve.
fn waits_for_a_page(pid: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let stacks = threads.filter_map(|thread| fs::read_to_string(thread.path().join("stack")).ok());
    stacks.into_iter().any(|stack| stack.contains("handle_userfault"))
}

#[test]
fn a_restore_that_fails_leaves_the_source_of_a_stock_dump_running() {
    each_criu(|site, criu| {
        let (job, waiting) = waiting(site, criu, &steady(site), &[]);
        let Waiting { mut stamp, mut dump, address } = waiting;
        let mut daemon = job.start_ready("lazy-pages", from(job.daemon(), address));
        // After every task was restored and its userfaultfd handed over, before the word that all is well.
        let script = site.path("fail");
        fs::write(&script, "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != post-restore ]\n").unwrap();
        nix::sys::stat::fchmodat(
            nix::fcntl::AT_FDCWD,
            &script,
            nix::sys::stat::Mode::S_IRWXU,
            nix::sys::stat::FchmodatFlags::FollowSymlink,
        )
        .unwrap();
        let failed = job.restore(&["--action-script", script.to_str().unwrap()]);
        assert!(failed.is_err(), "{}", job.log("restore"));
        assert_eq!(daemon.wait(STEP), 1, "{}", daemon.last_lines());
        daemon.wait_line("restore failed", STEP);
        assert_ne!(dump.wait(STEP), 0, "{}", job.log("dump"));
        stamp.assert_unharmed();
        stamp.quit();
    });
}
