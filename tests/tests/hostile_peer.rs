//! Whoever connects to the daemon and whatever they send: it goes on, and the next real move is as good as ever. And
//! whoever the source takes for the destination: the process is not lost.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::time::Duration;

use nix::sys::signal::Signal;
use protocol::criu::images::{
    self, CoreTask, Inventory, MmEntry, PageFlags, Pagemap, PagemapEntry, PagemapHead, PstreeEntry,
    TaskState, build,
};
use protocol::units::{ImageAddr, PAGE_SIZE, PageRun, TaskId};
use protocol::wire::control::{Clean, Control, Dumped, ImageChunk, Offer, Problem, Summary};
use protocol::wire::frame::{Header, Kind, TaskRun, encode_ack, encode_frame};
use protocol::wire::hello::{Hello, HelloError, Refusal, Role, SessionSecret};
use protocol::wire::limits::{HELLO_TIMEOUT, VERSION_MAX};
use protocol::wire::precopy::{Areas, Round};
use tests::moves::{Daemon, Plan, Side, Source};
use tests::peer::{Impostor, Peer, Session, bytes, dumped, image, new_session, offer};
use tests::processes;
use tests::site::Site;
use tests::stamps::{self, Stamp};
use tests::{MOVE, STEP};

/// A daemon that goes on serving, and what it is asked to do between hostilities.
struct Target {
    daemon: Daemon,
    site: Site,
}

impl Target {
    fn new() -> Option<Self> {
        let site = Site::new()?;
        let daemon = Plan { keep_serving: true, ..Plan::new() }.serve(&site);
        Some(Self { daemon, site })
    }

    fn address(&self) -> &str {
        &self.daemon.address
    }

    /// The daemon takes a real move, now.
    fn assert_serves(&self) {
        let mut stamp = Stamp::start(&stamps::small(&self.site, 8));
        let source = Plan::new().source_to(&self.site, stamp.pid(), self.address()).wait(MOVE);
        source.assert(0, "released", &[]);
        stamp.mark_moved();
        stamp.assert_unharmed();
        stamp.quit();
        self.assert_clean();
    }

    fn assert_clean(&self) {
        assert!(!self.daemon.tool.has_ended(), "{}", self.daemon.tool.last_lines());
        let panics = self.daemon.tool.lines().into_iter().find(|line| line.contains("panicked"));
        assert_eq!(panics, None);
        self.site.assert_clean(&[self.daemon.tool.pid()]);
    }

    /// Ends it: nothing was left to wait for.
    fn finish(self) {
        self.assert_serves();
        self.daemon.tool.signal(Signal::SIGTERM);
        assert_eq!(self.daemon.wait(STEP).status, 0);
        self.site.assert_clean(&[]);
    }
}

#[test]
fn what_is_no_hello_is_dropped() {
    let Some(target) = Target::new() else { return };
    let mut other_role = new_session().encode();
    other_role[8] = 9;
    for stranger in [
        &b"GET / HTTP/1.1\r\nHost: move\r\nAccept: text/html\r\n\r\n"[..],
        &[0; 4096],
        &[0xff; 48],
        &other_role,
    ] {
        let mut peer = Peer::connect(target.address());
        peer.send(stranger);
        peer.assert_ends(STEP);
        target.assert_serves();
    }
    for length in [0, 1, 47] {
        let mut peer = Peer::connect(target.address());
        peer.send(&new_session().encode()[..length]);
        drop(peer);
        target.assert_serves();
    }
    target.finish();
}

#[test]
fn a_hello_that_cannot_be_served_is_refused() {
    let Some(target) = Target::new() else { return };
    let known = new_session();
    let (mut session, answer) = Peer::hello(target.address(), &known);
    assert_eq!(answer, Ok(VERSION_MAX));
    let unknown = new_session();
    for (hello, refusal) in [
        (Hello { versions: (VERSION_MAX + 1, 9), ..unknown }, Refusal::Version),
        (Hello { versions: (0, 0), ..unknown }, Refusal::Version),
        (Hello { page_size: 65_536, ..unknown }, Refusal::PageSize),
        (Hello { role: Role::Fault, ..unknown }, Refusal::Session),
        (Hello { role: Role::Push, ..unknown }, Refusal::Session),
        (Hello { role: Role::Push, secret: SessionSecret([0; 16]), ..known }, Refusal::Session),
        (Hello { role: Role::Control, ..known }, Refusal::Session),
        // Who takes over somebody's session: only with its secret, and only behind its switchover.
        (Hello { attempt: 1, ..unknown }, Refusal::Session),
        (Hello { attempt: 1, secret: SessionSecret([0; 16]), ..known }, Refusal::Session),
        (Hello { attempt: 1, role: Role::Fault, secret: SessionSecret([0; 16]), ..known }, Refusal::Session),
        (Hello { attempt: 1, ..known }, Refusal::NotYet),
        (Hello { attempt: 1, role: Role::Push, ..known }, Refusal::NotYet),
    ] {
        let (mut peer, answer) = Peer::hello(target.address(), &hello);
        assert_eq!(answer, Err(HelloError::Refused(refusal)), "{hello:?}");
        peer.assert_ends(STEP);
    }
    // The session that they tried to join is as it was.
    session.say(&Control::Offer(offer()));
    assert_eq!(session.receive(), Some(Control::Verdict(vec![])));
    let lanes = [Role::Fault, Role::Push].map(|role| Peer::hello(target.address(), &Hello { role, ..known }));
    assert!(lanes.iter().all(|(_, answer)| *answer == Ok(VERSION_MAX)));
    // More lanes than it has a use for wait for it, so many and no more.
    let more = || Peer::hello(target.address(), &Hello { role: Role::Push, ..known });
    let refused = (0..100).map(|_| more().1).find(Result::is_err);
    assert_eq!(refused, Some(Err(HelloError::Refused(Refusal::Busy))));
    session.say(&Control::Abort("for no reason".into()));
    session.assert_gives_up("for no reason");
    target.finish();
}

#[test]
fn who_says_nothing_is_dropped_and_blocks_nobody() {
    let Some(target) = Target::new() else { return };
    let silent: Vec<Peer> = (0..40).map(|_| Peer::connect(target.address())).collect();
    let (_open_session, answer) = Peer::hello(target.address(), &new_session());
    assert_eq!(answer, Ok(VERSION_MAX));
    let (_accepted, _lanes) = Peer::accepted(target.address());
    target.daemon.tool.wait_line("offered", STEP);
    let mut stamp = Stamp::start(&stamps::small(&target.site, 8));
    let source = Plan::new().source_to(&target.site, stamp.pid(), target.address()).wait(MOVE);
    source.assert(0, "released", &[]);
    stamp.mark_moved();
    stamp.assert_unharmed();
    stamp.quit();
    for mut peer in silent {
        peer.assert_ends(HELLO_TIMEOUT * 2);
    }
    drop((_open_session, _accepted, _lanes));
    target.finish();
}

#[test]
fn sessions_that_begin_otherwise_than_with_an_offer_are_closed() {
    let Some(target) = Target::new() else { return };
    let header = |kind, body_len| Header { kind, id: 0, body_len }.encode().to_vec();
    let cut = bytes(&Control::Offer(offer()));
    for (what, sent) in [
        ("garbage", vec![0x5a; 64]),
        ("an oversized frame", header(Kind::Offer, 1 << 30)),
        ("an unknown kind", [&[0, 0, 0, 0, 77, 0][..], &[0; 10]].concat()),
        ("a frame of a lane", encode_frame(Kind::Demand, 0, &[0; 16])),
        ("a body that ends early", encode_frame(Kind::Offer, 0, &[1, 0, 0])),
        ("a list without an end", encode_frame(Kind::Offer, 0, &[0xff; 64])),
        ("a frame that ends early", cut[..cut.len() - 1].to_vec()),
        ("a commit", bytes(&Control::Commit)),
        ("an image", bytes(&image("core-1.img", b"x"))),
        ("a verdict", bytes(&Control::Verdict(vec![]))),
        ("a farewell", bytes(&Control::Released)),
    ] {
        let (mut peer, answer) = Peer::hello(target.address(), &new_session());
        assert_eq!(answer, Ok(VERSION_MAX), "{what}");
        peer.send(&sent);
        if what == "a frame that ends early" {
            drop(peer);
        } else {
            peer.assert_ends(STEP);
        }
        target.assert_serves();
    }
    target.finish();
}

#[test]
fn offers_that_do_not_fit_are_refused_with_reasons() {
    let Some(target) = Target::new() else { return };
    let (mut peer, answer) = Peer::hello(target.address(), &new_session());
    assert_eq!(answer, Ok(VERSION_MAX));
    let mut bad = offer();
    bad.machine = "pdp11".into();
    bad.memory_bytes = u64::MAX;
    bad.criu_version = "99.0".into();
    peer.say(&Control::Offer(bad));
    let verdict = peer.receive();
    let Some(Control::Verdict(problems)) = &verdict else { panic!("{verdict:?}") };
    assert!(problems.len() >= 3 && problems.iter().all(|problem| !problem.remedy.is_empty()), "{problems:?}");
    peer.assert_ends(STEP);
    target.finish();
}

#[test]
fn a_session_without_lanes_is_given_up() {
    let Some(target) = Target::new() else { return };
    let (mut peer, answer) = Peer::hello(target.address(), &new_session());
    assert_eq!(answer, Ok(VERSION_MAX));
    peer.say(&Control::Offer(offer()));
    assert_eq!(peer.receive(), Some(Control::Verdict(vec![])));
    peer.assert_gives_up("no lanes");
    target.finish();
}

#[test]
fn images_that_are_none_are_given_up() {
    let Some(target) = Target::new() else { return };
    let chunk = |size, offset| {
        Control::Image(ImageChunk { name: "core-1.img".into(), size, offset, data: b"x".to_vec() })
    };
    let long_name = "a".repeat(256);
    let named = |name: &str| vec![image(name, b"x")];
    let escape = target.site.path("escape");
    let absolute = escape.display().to_string();
    for (what, messages, word) in [
        ("a way up", named("../escape"), "image name"),
        ("a way up, twice", named("../../escape"), "image name"),
        ("an absolute path", named(&absolute), "image name"),
        ("a hidden file", named(".escape"), "image name"),
        ("nothing", named(""), "image name"),
        ("a slash", named("a/escape"), "image name"),
        ("a zero", named("core\0.img"), "image name"),
        ("a long name", named(&long_name), "image name"),
        ("a gap", vec![chunk(10, 5)], "continues at"),
        ("a piece twice", vec![chunk(10, 0), chunk(10, 0)], "continues at"),
        ("another size", vec![chunk(10, 0), chunk(11, 1)], "continues at"),
        ("a size without bound", vec![chunk(u64::MAX, 0)], "image size"),
        ("a piece behind the end", vec![chunk(1, 1)], "image size"),
        ("a count that is wrong", vec![image("core-1.img", b"x"), dumped(2)], "1 images came"),
        ("a part that is missing", vec![chunk(2, 0), dumped(1)], "1 of 2 bytes"),
        ("no images at all", vec![dumped(0)], "inventory.img"),
        ("images of nothing", vec![image("inventory.img", b"x"), dumped(1)], "inventory.img"),
        ("a commit", vec![Control::Commit], "commit while"),
        ("an offer", vec![Control::Offer(offer())], "an offer while"),
        ("an abort", vec![Control::Abort("for no reason".into())], "for no reason"),
    ] {
        println!("{what}");
        let (mut peer, _lanes) = Peer::accepted(target.address());
        messages.iter().for_each(|message| peer.say(message));
        peer.assert_gives_up(word);
        target.assert_clean();
    }
    assert!(!escape.exists());
    target.finish();
}

const TASK: TaskId = TaskId(77_777);

fn page_run(page: u64, pages: u64) -> TaskRun {
    TaskRun { task: TASK, run: PageRun::new(ImageAddr::containing(page << 12), pages).unwrap() }
}

/// 64 pages from page 16 on.
fn areas() -> Vec<u8> {
    Areas { task: TASK, starts_again: false, areas: vec![page_run(16, 64).run] }.encode()
}

fn pages(page: u64, pages: u64, round: u64) -> Vec<u8> {
    let bytes = usize::try_from(pages).unwrap() * PAGE_SIZE;
    [&page_run(page, pages).frame(Kind::Precopy, round, bytes)[..], &vec![7; bytes]].concat()
}

fn round(number: u32, last: bool) -> Vec<u8> {
    Round { number, last }.encode()
}

#[test]
fn rounds_that_are_none_are_given_up() {
    let Some(target) = Target::new() else { return };
    let zeros = |page, pages| page_run(page, pages).frame(Kind::PrecopyZero, 1, 0).to_vec();
    let most = 40;
    for (what, frames, word) in [
        ("pages of no area", vec![pages(16, 1, 1)], "no area"),
        ("pages behind an area", vec![areas(), pages(79, 2, 1)], "no area"),
        ("zeros before an area", vec![areas(), zeros(15, 1)], "no area"),
        ("more pages than offered", vec![areas(), pages(16, 40, 1), pages(56, 1, 1)], "more than the 40"),
        ("more zeros than offered", vec![areas(), zeros(16, 41)], "more than the 40"),
        ("pages of the next round", vec![areas(), pages(16, 1, 2)], "of round 2 in round 1"),
        ("the end of another round", vec![areas(), round(3, true)], "of round 3 in round 1"),
        ("a round twice", vec![round(1, false), round(1, false)], "of round 1 in round 2"),
        ("pushed pages", vec![page_run(16, 1).frame(Kind::Pages, 1, PAGE_SIZE).to_vec()], "frame kind"),
        ("an acknowledgement", vec![encode_ack(&[page_run(16, 1)])], "frame kind"),
        ("garbage", vec![vec![0xee; 64]], "malformed"),
        ("areas that overlap", vec![encode_frame(Kind::Areas, 0, &[0xee; 44])], "malformed"),
    ] {
        println!("{what}");
        let offer = Offer { precopy_pages: most, ..offer() };
        let (mut control, [_fault, mut push]) = Peer::accepted_with(target.address(), offer);
        frames.iter().for_each(|frame| push.send(frame));
        control.assert_gives_up(word);
        target.assert_clean();
    }
    // What it says beside the rounds, and where it leaves in one.
    let offer = || Offer { precopy_pages: most, ..offer() };
    for (message, word) in [
        (Control::Abort("for no reason".into()), "for no reason"),
        (image("core-1.img", b"x"), "an image while"),
        (Control::Commit, "commit while"),
    ] {
        let (mut control, [_fault, mut push]) = Peer::accepted_with(target.address(), offer());
        push.send(&[areas(), pages(16, 40, 1)].concat()[..9000]);
        control.say(&message);
        control.assert_gives_up(word);
    }
    let (mut control, [fault, mut push]) = Peer::accepted_with(target.address(), offer());
    push.send(&areas());
    drop(push);
    control.assert_gives_up("closed the push lane");
    let (control, [_fault, mut push]) = Peer::accepted_with(target.address(), offer());
    push.send(&[areas(), pages(16, 40, 1), round(1, false)].concat());
    push.assert_receives(&round(1, false));
    drop((control, push, fault));
    target.finish();
}

#[test]
fn clean_pages_that_cannot_be_are_given_up() {
    let Some(target) = Target::new() else { return };
    // The images of a task with 20 lazy pages.
    let task = PstreeEntry { pid: TASK, ppid: 0, pgid: TASK.0, sid: TASK.0, threads: vec![TASK.0] };
    let core = CoreTask { state: TaskState::Alive, exit_code: 0, comm: "nobody".into() };
    let vmas = vec![build::anonymous_vma(0x1_0000, 0x4_0000)];
    let mm = MmEntry { vmas, start_stack: 0x3_0000, start_brk: 1, brk: 2, exe_file_id: 3 };
    let lazy = PagemapEntry { run: page_run(16, 20).run, flags: PageFlags::LAZY, wide: false };
    let pagemap = Pagemap { head: PagemapHead { pages_id: 1 }, entries: vec![lazy] };
    let images = [
        image("inventory.img", &images::write_inventory(&Inventory::default())),
        image("pstree.img", &images::write_pstree(&[task])),
        image("core-77777.img", &images::write_core(&core)),
        image("mm-77777.img", &images::write_mm(&mm)),
        image("pagemap-77777.img", &images::write_pagemap(&pagemap)),
        image("pages-1.img", b""),
    ];
    let count = u32::try_from(images.len()).unwrap();
    let dumped = |lazy_pages, clean_pages| {
        Control::Dumped(Dumped { images: count, frozen_us: 1000, lazy_pages, clean_pages })
    };
    let piece = |first, bits: &[u8]| Control::Clean(Clean { first, bits: bits.to_vec() });
    // Pages 16 to 31 are kept.
    let rounds = || [areas(), pages(16, 16, 1), round(1, true)].concat();
    for (what, messages, word) in [
        ("more than there are", vec![dumped(20, 21)], "21 clean pages of 20"),
        ("more than there can be", vec![dumped(u64::MAX, 1)], "which cannot be"),
        ("a gap", vec![dumped(20, 9), piece(0, &[0xff]), piece(16, &[1])], "where page 8 was due"),
        ("a piece twice", vec![dumped(20, 9), piece(0, &[0xff]), piece(0, &[0xff])], "where page 8 was due"),
        ("nothing at all", vec![dumped(20, 9), piece(0, &[])], "where page 0 was due"),
        ("pages behind the last", vec![dumped(20, 9), piece(0, &[0xff, 1, 0x10])], "behind the last"),
        ("too few", vec![dumped(20, 9), piece(0, &[0xff, 0, 0])], "tells 8 clean pages, and counts 9"),
        ("too many", vec![dumped(20, 9), piece(0, &[0xff, 0xff])], "tells 16 clean pages, and counts 9"),
        ("images between", vec![dumped(20, 9), image("a.img", b"")], "an image while"),
        ("another number of pages", vec![dumped(21, 1), piece(0, &[1, 0, 0])], "hold 20 lazy pages"),
        (
            "one that is not here",
            vec![dumped(20, 1), piece(0, &[0, 0, 1])],
            "at 0x20000 of task 77777 is here",
        ),
    ] {
        println!("{what}");
        let offer = Offer { precopy_pages: 40, ..offer() };
        let (mut control, [_fault, mut push]) = Peer::accepted_with(target.address(), offer);
        push.send(&rounds());
        push.assert_receives(&round(1, true));
        images.iter().chain(&messages).for_each(|message| control.say(message));
        control.assert_gives_up(word);
        target.assert_clean();
    }
    let (mut control, _lanes) = Peer::accepted(target.address());
    images.iter().chain([&dumped(20, 1)]).for_each(|message| control.say(message));
    control.assert_gives_up("there was no pre-copy");
    target.finish();
}

#[test]
fn a_source_that_vanishes_leaves_nothing() {
    let Some(target) = Target::new() else { return };
    for messages in [vec![], vec![image("core-1.img", &[0; 1000])]] {
        let (mut peer, lanes) = Peer::accepted(target.address());
        messages.iter().for_each(|message| peer.say(message));
        drop((peer, lanes));
        target.assert_serves();
    }
    target.finish();
}

// From here on the source is what is tested.

/// A source that moves a process to whoever the test plays.
struct Victim {
    stamp: Stamp,
    impostor: Impostor,
    site: Site,
}

impl Victim {
    fn new() -> Option<Self> {
        let site = Site::new()?;
        let stamp = Stamp::start(&stamps::small(&site, 32));
        Some(Self { stamp, impostor: Impostor::new(), site })
    }

    fn source(&self, store: &str) -> Source {
        Plan::new().source(["--store", store, "--give-up-after", "1"]).source_to(
            &self.site,
            self.stamp.pid(),
            &self.impostor.address(),
        )
    }

    fn assert_undone(&mut self, source: &Side, status: i32, word: &str) {
        source.assert(status, "rolled_back", &[word]);
        self.stamp.assert_unharmed();
        self.site.assert_clean(&[self.stamp.pid()]);
    }

    /// The source has stopped the process and says how to go on; the test, who knows that it runs nowhere else,
    /// does so.
    fn assert_stopped(&mut self, source: &Side, word: &str) {
        source.assert(3, "paused", &[word, "kill -CONT"]);
        let pid = self.stamp.pid();
        // The stop that is pending behind CRIU's takes effect before anything runs, as soon as the scheduler gets to it.
        tests::eventually("the stop of the source", STEP, || processes::is_stopped(pid).then_some(()));
        processes::signal(pid, Signal::SIGCONT);
        self.stamp.assert_unharmed();
        for left in self.site.processes().iter().filter(|entry| entry.name == "postcopy-hold") {
            processes::signal(left.pid, Signal::SIGKILL);
        }
        self.site.assert_clean(&[pid]);
    }
}

#[test]
fn a_destination_that_is_none_is_found_out_before_anything_is_frozen() {
    let Some(mut victim) = Victim::new() else { return };
    for refusal in [Refusal::Version, Refusal::PageSize, Refusal::Session, Refusal::Busy, Refusal::Other(99)]
    {
        let source = victim.source("pipes");
        victim.impostor.refuse(refusal);
        victim.assert_undone(&source.wait(STEP), 2, "refused");
    }
    let source = victim.source("pipes");
    victim.impostor.answer(b"HTTP/1.1 400 Bad").assert_ends(STEP);
    victim.assert_undone(&source.wait(STEP), 2, "is the port right?");
    let source = victim.source("pipes");
    victim.impostor.answer(&[]).assert_ends(HELLO_TIMEOUT * 2);
    victim.assert_undone(&source.wait(STEP), 2, "uffd-daemon serve");
    for (message, word) in [
        (bytes(&Control::Prepared), "prepared while a verdict"),
        (vec![0xff; 64], "malformed"),
        (encode_frame(Kind::Verdict, 0, &[0xff; 4]), "malformed"),
    ] {
        let source = victim.source("pipes");
        let mut control = victim.impostor.offered();
        control.send(&message);
        victim.assert_undone(&source.wait(STEP), 2, word);
    }
    let source = victim.source("pipes");
    let problem = Problem { what: "no room".into(), remedy: "make some".into() };
    victim.impostor.offered().say(&Control::Verdict(vec![problem]));
    victim.assert_undone(&source.wait(STEP), 2, "destination: no room: make some");
}

#[test]
fn a_destination_that_misbehaves_before_the_switchover_is_given_up() {
    let Some(mut victim) = Victim::new() else { return };
    let demand = TaskRun { task: TaskId(1), run: PageRun::new(ImageAddr::containing(4096), 1).unwrap() };
    type Act<'a> = &'a dyn Fn(&mut Session);
    let acts: [(&str, Act<'_>, &str); 8] = [
        ("running", &|session| session.control.say(&Control::Running), "running while prepared"),
        (
            "complete",
            &|session| session.control.say(&Control::Complete(Summary::default())),
            "complete while prepared",
        ),
        ("garbage", &|session| session.control.send(&[0xee; 64]), "malformed"),
        (
            "an abort",
            &|session| session.control.say(&Control::Abort("no more".into())),
            "destination: no more",
        ),
        ("garbage on a lane", &|session| session.fault.send(&[0xee; 64]), "malformed"),
        (
            "a demand for nothing",
            &|session| session.fault.send(&demand.frame(Kind::Demand, 1, 0)),
            "no lazy run",
        ),
        (
            "pages on the wrong way",
            &|session| session.fault.send(&demand.frame(Kind::Settled, 1, 0)),
            "malformed",
        ),
        ("an oversized frame", &|session| session.fault.send(&[0xff; 32]), "malformed"),
    ];
    // What comes over a lane is waited out, as a reason may follow: once is enough.
    for (store, acts) in [("pipes", &acts[..]), ("frozen", &acts[..4])] {
        for (what, act, word) in acts {
            println!("{store}: {what}");
            let source = victim.source(store);
            let mut session = victim.impostor.accept();
            session.take_images();
            act(&mut session);
            // It is told, and may say that it is clean.
            while let Some(message) = session.control.receive() {
                if matches!(message, Control::Abort(_)) {
                    session.control.say(&Control::RolledBack);
                    break;
                }
            }
            victim.assert_undone(&source.wait(MOVE), 1, word);
        }
    }
}

#[test]
fn a_destination_that_gives_up_behind_the_commit_and_is_clean_is_believed() {
    let Some(mut victim) = Victim::new() else { return };
    for store in ["pipes", "frozen"] {
        let source = victim.source(store);
        let mut session = victim.impostor.accept();
        session.take_commit();
        session.control.say(&Control::Abort("interrupted".into()));
        session.control.say(&Control::RolledBack);
        drop(session);
        victim.assert_undone(&source.wait(MOVE), 1, "destination: interrupted");
    }
}

#[test]
fn a_destination_that_misbehaves_behind_the_commit_does_not_get_the_process_resumed() {
    let Some(mut victim) = Victim::new() else { return };
    type Act<'a> = &'a dyn Fn(Session);
    let acts: [(&str, Act<'_>, &str); 4] = [
        ("it closes", &|session| drop(session), "lost the destination"),
        ("it fails", &|mut session| session.control.say(&Control::Abort("oh".into())), "oh"),
        ("garbage", &|mut session| session.control.send(&[0xee; 64]), "malformed"),
        (
            "complete",
            &|mut session| session.control.say(&Control::Complete(Summary::default())),
            "complete while running",
        ),
    ];
    for store in ["pipes", "frozen"] {
        for (what, act, word) in acts {
            println!("{store}: {what}");
            // With nothing left of the act before, which was dialled again.
            victim.impostor = Impostor::new();
            let source = victim.source(store);
            let mut session = victim.impostor.accept();
            session.take_commit();
            act(session);
            victim.assert_stopped(&source.wait(MOVE), word);
        }
    }
}

#[test]
fn nothing_is_freed_on_a_word_without_acknowledgements() {
    let Some(victim) = Victim::new() else { return };
    let Victim { mut stamp, impostor, site } = victim;
    let plan = Plan::new().source(["--store", "frozen"]);
    let nothing = TaskRun { task: TaskId(1), run: PageRun::new(ImageAddr::containing(4096), 1).unwrap() };
    let source = plan.source_to(&site, stamp.pid(), &impostor.address());
    let mut session = impostor.accept();
    session.take_commit();
    session.control.say(&Control::Running);
    session.push.send(&encode_ack(&[nothing]));
    let source = source.wait(MOVE);
    source.assert(3, "paused", &["no lazy run", "kill -CONT"]);
    // Everything is still there.
    processes::signal(stamp.pid(), Signal::SIGCONT);
    stamp.assert_unharmed();
    if tests::long() {
        let source = plan.source_to(&site, stamp.pid(), &impostor.address());
        let mut session = impostor.accept();
        session.take_commit();
        session.control.say(&Control::Running);
        session.control.say(&Control::Complete(Summary::default()));
        let source = source.wait(MOVE);
        source.assert(3, "paused", &["has not acknowledged every page", "kill -CONT"]);
        processes::signal(stamp.pid(), Signal::SIGCONT);
        stamp.assert_unharmed();
    }
    stamp.quit();
}

/// The timeouts that make a silent session end by itself are too long for every run.
#[test]
fn a_session_that_falls_silent_is_dropped() {
    if !tests::long() {
        tests::skip("takes half a minute; POSTCOPY_TEST_LONG=1 runs it");
        return;
    }
    let Some(target) = Target::new() else { return };
    let (mut peer, answer) = Peer::hello(target.address(), &new_session());
    assert_eq!(answer, Ok(VERSION_MAX));
    peer.assert_ends(Duration::from_secs(40));
    let (mut peer, _lanes) = Peer::accepted(target.address());
    let whole = bytes(&image("core-1.img", b"x"));
    peer.send(&whole[..whole.len() - 1]);
    peer.assert_gives_up("lost the source");
    target.finish();
}
