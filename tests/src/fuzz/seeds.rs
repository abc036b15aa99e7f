//! Inputs made by our encoders, valid ones and each malformation that a decoder looks for; with them every corpus begins.

use experiments::random::Random;
use protocol::criu::handover::{FD_BYTE, send};
use protocol::criu::images::{
    self, CoreTask, DumpStats, Inventory, MmEntry, NetworkLock, PageFlags, Pagemap, PagemapEntry,
    PagemapHead, PstreeEntry, RestoreStats, Stats, TaskState, build,
};
use protocol::criu::page_server::{Command, Header as CriuHeader, HeaderLayout, MAX_HEADER_LEN};
use protocol::units::{ImageAddr, PAGE_SIZE, PageRun, TaskId};
use protocol::wire::control::{
    Clean, Control, Dumped, FileCheck, ImageChunk, LatencySummary, Offer, PageCounts, Problem, Summary,
};
use protocol::wire::frame::{HEADER_LEN, Header, Kind, TaskRun, encode_ack};
use protocol::wire::hello::{Hello, Refusal, Role, SessionId, SessionSecret, encode_reply};
use protocol::wire::limits::VERSION_MAX;
use protocol::wire::lz4::Compressor;
use protocol::wire::precopy::{Areas, Round};
use protocol::wire::settled_map::MapPiece;

use super::images::FILES;

/// An input of a target, and its name in the corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seed {
    /// Of which target.
    pub target: &'static str,
    /// Its name.
    pub name: String,
    /// Its bytes.
    pub data: Vec<u8>,
}

/// All of them.
#[must_use]
pub fn all() -> Vec<Seed> {
    let mut seeds = Vec::new();
    let mut add = |target, name: &str, data: Vec<u8>| {
        seeds.push(Seed { target, name: format!("seed-{name}"), data });
    };
    wire(&mut add);
    page_servers(&mut add);
    image_files(&mut add);
    streams(&mut add);
    operations(&mut add);
    malformed_frames(&mut add);
    malformed_images(&mut add);
    seeds
}

type Add<'a> = dyn FnMut(&'static str, &str, Vec<u8>) + 'a;

fn run(page: u64, pages: u64) -> PageRun {
    PageRun::new(ImageAddr::containing(page << 12), pages).expect("a small run")
}

fn wire(add: &mut Add<'_>) {
    for (name, role) in [("control", Role::Control), ("fault", Role::Fault), ("push", Role::Push)] {
        let hello = Hello::new(role, SessionId([1; 16]), SessionSecret([2; 16]));
        add("hello", name, hello.encode().to_vec());
        let again = Hello { attempt: 3, ..hello };
        add("hello", &format!("{name}-again"), again.encode().to_vec());
    }
    for (name, verdict) in [
        ("accepted", Ok(VERSION_MAX)),
        ("busy", Err(Refusal::Busy)),
        ("link", Err(Refusal::Link)),
        ("not-yet", Err(Refusal::NotYet)),
        ("rolled-back", Err(Refusal::RolledBack)),
    ] {
        add("hello", name, encode_reply(verdict).to_vec());
    }
    let what = TaskRun { task: TaskId(12), run: run(0x7_f000, 2) };
    let mut frames = Vec::new();
    for (kind, data_len) in [
        (Kind::Demand, 0),
        (Kind::Prefetch, 0),
        (Kind::Pages, 2 * PAGE_SIZE),
        (Kind::Settled, 0),
        (Kind::Declined, 0),
        (Kind::Precopy, 2 * PAGE_SIZE),
        (Kind::PrecopyZero, 0),
        (Kind::PrecopyLz4, 300),
    ] {
        let frame = what.frame(kind, 3, data_len);
        add("frames", &format!("{kind:?}").to_lowercase(), frame.to_vec());
        frames.extend(frame);
    }
    add("frames", "one-behind-the-other", frames);
    let runs = [what, TaskRun { task: TaskId(13), run: run(1, 1) }];
    add("acknowledgement", "two", encode_ack(&runs)[HEADER_LEN..].to_vec());
    add("acknowledgement", "none", encode_ack(&[])[HEADER_LEN..].to_vec());
    let areas =
        Areas { task: TaskId(12), starts_again: true, areas: vec![run(16, 4), run(20, 1), run(64, 9)] };
    add("precopy", "areas", areas.encode()[HEADER_LEN..].to_vec());
    add("precopy", "round", Round { number: 3, last: true }.encode()[HEADER_LEN..].to_vec());
    let text: Vec<u8> = b"over and over ".iter().copied().cycle().take(PAGE_SIZE).collect();
    add("precopy", "lz4", Compressor::default().compress(&text).unwrap_or_default().to_vec());
    for message in messages() {
        let (kind, body) = message.encode();
        let head = Header { kind, id: 1, body_len: body.len() }.encode();
        add("control", &format!("{kind:?}").to_lowercase(), [&[kind as u8][..], &body].concat());
        add("frames", &format!("{kind:?}").to_lowercase(), head.to_vec());
    }
}

fn messages() -> Vec<Control> {
    let offer = Offer {
        release: "0.1.0".into(),
        criu_version: "Version: 4.2".into(),
        machine: "x86_64".into(),
        cpu_flags: "fpu sse2 avx2".into(),
        root: TaskId(12),
        name: "redis-server".into(),
        pids: vec![12, 13, 14],
        memory_bytes: 1 << 30,
        precopy_pages: 1 << 18,
        files: vec![
            FileCheck { path: "/usr/bin/redis-server".into(), size: 9, build_id: vec![7; 20] },
            FileCheck { path: "/lib/libc.so.6".into(), size: 10, build_id: vec![] },
        ],
        criu_options: vec!["--tcp-established".into(), "--shell-job".into()],
    };
    let problem = |what: &str| Problem { what: what.into(), remedy: "install it".into() };
    let image = ImageChunk { name: "pages-1.img".into(), size: 9, offset: 4, data: vec![1, 2, 3] };
    let pages = PageCounts { lazy: 6, demand: 1, push: 2, gone: 3, ..PageCounts::default() };
    let latency = LatencySummary { count: 1, max_ns: 2, ..LatencySummary::default() };
    vec![
        Control::Offer(offer),
        Control::Verdict(vec![problem("no criu"), problem("no memory")]),
        Control::Image(image),
        Control::Dumped(Dumped { images: 3, frozen_us: 4, lazy_pages: 5, clean_pages: 2 }),
        Control::Clean(Clean { first: 8, bits: vec![1, 0x80] }),
        Control::Prepared,
        Control::Commit,
        Control::Running,
        Control::Complete(Summary { pages, latency, brownout_us: 9, ..Summary::default() }),
        Control::Released,
        Control::Abort("a hook failed".into()),
        Control::RolledBack,
        Control::SettledMap(MapPiece { first: 64, pages: 12, bits: vec![0xff, 0x0f] }),
        Control::Resumed,
    ]
}

fn criu_header(header: CriuHeader, layout: HeaderLayout) -> Vec<u8> {
    let mut bytes = [0; MAX_HEADER_LEN];
    let len = header.encode(layout, &mut bytes).expect("a small header");
    bytes[..len].to_vec()
}

fn page_servers(add: &mut Add<'_>) {
    for (number, layout) in [(1, HeaderLayout::Compact), (2, HeaderLayout::Wide)] {
        let header = |header| criu_header(header, layout);
        let get = header(CriuHeader::get(TaskId(5), run(16, 4)));
        let reply = header(CriuHeader::reply(TaskId(5), run(16, 3)));
        let close = header(CriuHeader::close(Command::Close));
        add("page_server", &format!("{layout}-session"), [&[number][..], &get, &reply, &close].concat());
        add("page_server", &format!("{layout}-detected"), [&[30][..], &get, &get, &close].concat());
        add("page_server", &format!("{layout}-close"), [&[0][..], &close].concat());

        let how = 2 * 2 + u8::from(layout == HeaderLayout::Wide);
        let answer = |page, pages: u64, fill| {
            let mut bytes = header(CriuHeader::reply(TaskId(1), run(page, pages)));
            bytes.resize(bytes.len() + usize::try_from(pages).expect("few") * PAGE_SIZE, fill);
            bytes
        };
        let answers = [&[how, 16, 2, 32, 1][..], &answer(16, 1, 8), &answer(32, 1, 9)].concat();
        add("page_server_answers", &format!("{layout}"), answers);
        add("page_server_answers", &format!("{layout}-unasked"), [&[how % 2][..], &close].concat());
    }
    let message = |fds: u8, bytes: &[u8]| {
        let length = u8::try_from(bytes.len()).expect("short");
        [&[fds * 8 + length][..], bytes].concat()
    };
    let tasks = [5_u32, 6].map(u32::to_le_bytes).concat();
    let task = message(0, &send::task(TaskId(5)).expect("a pid"));
    let zombie = message(0, &send::zombie(TaskId(6)).expect("a pid"));
    let fd = message(1, &FD_BYTE);
    let finish = message(0, &send::finish());
    let all = [&[2][..], &tasks, &task, &fd, &zombie, &finish].concat();
    add("handover", "whole", all);
    add("handover", "without-a-descriptor", [&[2][..], &tasks, &task, &message(0, &FD_BYTE)].concat());
    add("handover", "finished-early", [&[2][..], &tasks, &zombie, &finish].concat());
    add("handover", "split", [&[2][..], &tasks, &task[..3], &[3], &task[3..]].concat());
    for (name, text) in [
        ("compact", "Version: 4.1.1\nGitID: v4.1.1\n"),
        ("wide", "Version: 4.2\n"),
        ("between", "Version: 4.1\nGitID: v4.1-123-g0123456\n"),
    ] {
        add("criu_version", name, text.into());
    }
}

fn entry(page: u64, pages: u64, flags: PageFlags, wide: bool) -> PagemapEntry {
    PagemapEntry { run: run(page, pages), flags, wide }
}

fn pagemap(pages_id: u32, wide: bool) -> Vec<u8> {
    let entries = vec![
        entry(16, 2, PageFlags::LAZY_PRESENT, wide),
        entry(18, 3, PageFlags::LAZY, wide),
        entry(30, 1, PageFlags::PARENT, wide),
        entry(31, 1, PageFlags::PRESENT, wide),
    ];
    images::write_pagemap(&Pagemap { head: PagemapHead { pages_id }, entries })
}

fn mm() -> Vec<u8> {
    let vmas = vec![build::anonymous_vma(0x1_0000, 0x1_3000), build::anonymous_vma(0x1_3000, 0x4_0000)];
    images::write_mm(&MmEntry { vmas, start_stack: 0x7ffe_1234, start_brk: 1, brk: 2, exe_file_id: 3 })
}

fn pstree() -> Vec<u8> {
    let task =
        |pid: u32, ppid| PstreeEntry { pid: TaskId(pid), ppid, pgid: 1, sid: 1, threads: vec![pid, 9] };
    images::write_pstree(&[task(1, 0), task(2, 1)])
}

fn core(state: TaskState) -> Vec<u8> {
    images::write_core(&CoreTask { state, exit_code: 0x300, comm: "redis-server".into() })
}

fn image_files(add: &mut Add<'_>) {
    let inventory = Inventory {
        dump_uptime_us: Some(77),
        tcp_close: true,
        network_lock_method: NetworkLock::Nftables,
        dump_criu_run_id: Some("0b9c2a4e-7b1d-4c6f-9a53-2f6f0c1d8e77".into()),
        ..Inventory::default()
    };
    add("inventory", "whole", images::write_inventory(&inventory));
    add("inventory", "plain", images::write_inventory(&Inventory::default()));
    add("pstree", "two-tasks", pstree());
    for (name, state) in [("alive", TaskState::Alive), ("dead", TaskState::Dead)] {
        add("core", name, core(state));
    }
    add("mm", "two-vmas", mm());
    for (name, wide) in [("compact", false), ("wide", true)] {
        add("pagemap", name, pagemap(1, wide));
    }
    let dump = Some(DumpStats { freezing_us: 228, pages_scanned: 24_140, ..DumpStats::default() });
    add("stats", "dump", images::write_stats(&Stats { dump, restore: None }));
    let restore =
        Some(RestoreStats { pages_compared: 1, pages_restored: Some(5), ..RestoreStats::default() });
    add("stats", "restore", images::write_stats(&Stats { dump: None, restore }));

    for (name, wide) in [("compact", false), ("wide", true)] {
        let mut data = archive(&[
            (0, &images::write_inventory(&Inventory::default())),
            (1, &pstree()),
            (2, &core(TaskState::Alive)),
            (3, &core(TaskState::Dead)),
            (4, &mm()),
            (6, &pagemap(1, wide)),
            (10, &pagemap_of_parent()),
        ]);
        let pages = u8::try_from(FILES.len()).expect("few");
        data.extend([pages, 8, 3, pages, 11, 2]);
        add("checkpoint", name, data);
    }
}

fn pagemap_of_parent() -> Vec<u8> {
    let entries = vec![entry(29, 2, PageFlags::PRESENT, true)];
    images::write_pagemap(&Pagemap { head: PagemapHead { pages_id: 1 }, entries })
}

fn streams(add: &mut Add<'_>) {
    let what = TaskRun { task: TaskId(12), run: run(16, 1) };
    let pages = [&what.frame(Kind::Pages, 7, PAGE_SIZE)[..], &[5; PAGE_SIZE]].concat();
    let settled = what.frame(Kind::Settled, 8, 0);
    add("fault_lane", "answers", [&pages[..], &settled, &pages[..40]].concat());
    add("fault_lane", "a-request", what.frame(Kind::Demand, 1, 0).to_vec());

    let hello = b"pages and pages";
    let record =
        |kind: u8, data: &[u8]| [&[kind, u8::try_from(data.len()).expect("short")][..], data].concat();
    let (data, alert) = (record(23, hello), record(21, &[1, 0]));
    let (update, padded) = (record(22, &[24, 0, 0, 1, 1]), record(0, &[65, 23, 0, 0]));
    let all = [&data[..], &update, &padded, &data, &alert].concat();
    add("tls_records", "sealed", [&[1][..], &all].concat());
    add("tls_records", "changed", [&[3, 20, 0][..], &all].concat());
    add("tls_records", "no-place-here", [&[1][..], &record(22, &[4, 0, 0, 0])].concat());
    add("tls_records", "forged", [&[0, 23, 3, 3, 0, 32][..], &[9; 32]].concat());
    add("tls_records", "too-long", [&[0, 23, 3, 3, 0x41, 1][..], &[9; 64]].concat());
}

/// Bytes that stand for operations: any do, and mutation finds the rest.
fn operations(add: &mut Add<'_>) {
    for target in ["page_space", "page_cache", "ledger", "bitmap", "prefetch", "in_flight", "push_order"] {
        for number in 0..6_u64 {
            let mut random = Random::new(number);
            let length = 40 << number;
            let data = (0..length).map(|_| random.next().to_le_bytes()[0]).collect();
            add(target, &format!("random-{number}"), data);
        }
    }
    add("prefetch", "two-streams", [[1_u8, 1, 1, 4, 1, 1, 200, 255, 255, 255].repeat(20)].concat());
    add("push_order", "all", (0..=255).collect());
}

fn malformed_frames(add: &mut Add<'_>) {
    let hello = Hello::new(Role::Control, SessionId([1; 16]), SessionSecret([2; 16])).encode();
    for (name, at, value) in
        [("magic", 0, 0), ("tls", 0, 22), ("version", 4, 9), ("role", 8, 9), ("page-size", 13, 1)]
    {
        let mut bad = hello;
        (bad[at], bad[1]) = (value, if name == "tls" { 3 } else { bad[1] });
        add("hello", &format!("bad-{name}"), bad.to_vec());
    }
    let frame = TaskRun { task: TaskId(5), run: run(7, 2) }.frame(Kind::Pages, 1, 2 * PAGE_SIZE);
    for (name, at, value) in [
        ("kind", 4, 99),
        ("reserved", 6, 1),
        ("length", 3, 0xff),
        ("count", 20, 3),
        ("no-pages", 20, 0),
        ("address", 24, 1),
    ] {
        let mut bad = frame;
        bad[at] = value;
        add("frames", &format!("bad-{name}"), bad.to_vec());
    }
    let ack = &encode_ack(&[TaskRun { task: TaskId(5), run: run(7, 2) }])[HEADER_LEN..];
    add("acknowledgement", "bad-count", [&[0xff; 4][..], &ack[4..]].concat());
    add("acknowledgement", "bad-rest", [ack, &[0]].concat());
    add("acknowledgement", "bad-end", ack[..19].to_vec());
    let control = |kind: Kind, body: &[u8]| [&[kind as u8][..], body].concat();
    let text = |bytes: &[u8]| [&u32::try_from(bytes.len()).expect("short").to_le_bytes()[..], bytes].concat();
    add("control", "bad-text", control(Kind::Abort, &text(&[0xff; 8192])));
    add("control", "bad-text-length", control(Kind::Abort, &[0, 0x21, 0, 0, 1]));
    add("control", "bad-list-length", control(Kind::Verdict, &[0xff; 4]));
    let empty = [&4000_u32.to_le_bytes()[..], &[0; 32_000]].concat();
    add("control", "bad-list-of-nothing", control(Kind::Verdict, &empty));
    for (name, file) in
        [("parent", "../x.img"), ("root", "/etc/passwd"), ("hidden", ".x"), ("nul", "a\0b"), ("none", "")]
    {
        let body = [&text(file.as_bytes())[..], &[0; 20]].concat();
        add("control", &format!("bad-image-name-{name}"), control(Kind::Image, &body));
    }
    for (name, pages, bits) in [("count", u64::MAX, 0_usize), ("short", 64, 7), ("long", 8, 2)] {
        let body = [&[0; 8], &pages.to_le_bytes()[..], &text(&vec![0xff; bits])].concat();
        add("control", &format!("bad-map-{name}"), control(Kind::SettledMap, &body));
    }
    for (name, size, offset) in [("size", u64::MAX, 0_u64), ("offset", 9, u64::MAX)] {
        let body = [&text(b"a.img")[..], &size.to_le_bytes(), &offset.to_le_bytes(), &text(&[1])].concat();
        add("control", &format!("bad-image-{name}"), control(Kind::Image, &body));
    }
}

fn malformed_images(add: &mut Add<'_>) {
    use images::ImageKind;
    let one = |kind, record: &[u8]| build::frame(kind, [record.to_vec()]);
    add("mm", "bad-empty-vmas", one(ImageKind::Mm, &[0x72, 0].repeat(2000)));
    add("mm", "bad-vma-that-breaks-off", one(ImageKind::Mm, &[0x72, 5, 0]));
    let ids = [&[0x08, 7, 0x10, 0, 0x18, 1, 0x20, 1, 0x2a, 0xe8, 7][..], &[1; 1000]].concat();
    add("pstree", "bad-packed-threads", one(ImageKind::Pstree, &ids));
    add("pstree", "bad-twice", build::frame(ImageKind::Pstree, vec![ids[..8].to_vec(); 2]));
    add("inventory", "bad-run-id", one(ImageKind::Inventory, &[0x08, 2, 0x6a, 3, b'a', b'/', b'b']));
    add("core", "bad-name", one(ImageKind::Core, &[0x08, 1, 0x1a, 8, 0x08, 1, 0x10, 0, 0x32, 2, 0xff, 0xfe]));
    add("pagemap", "bad-record-length", [&pagemap(1, true)[..8], &[0xff; 8]].concat());
    add("pagemap", "bad-version-one", pagemap(1, true)[4..].to_vec());
    let entries = vec![entry(16, 1 << 51, PageFlags::LAZY, true)];
    let huge = images::write_pagemap(&Pagemap { head: PagemapHead { pages_id: 1 }, entries });
    add("pagemap", "bad-size", huge.clone());

    // More lazy pages than a bitmap can be made for.
    let vmas = vec![build::anonymous_vma(0x1_0000, !0xfff)];
    let mm = images::write_mm(&MmEntry { vmas, ..MmEntry::default() });
    let (inventory, core) = (images::write_inventory(&Inventory::default()), core(TaskState::Alive));
    let files =
        [(0, &inventory), (1, &pstree()), (2, &core), (3, &core), (4, &mm), (5, &mm), (6, &huge), (7, &huge)];
    add("checkpoint", "bad-size", archive(&files));
    let files = [(0, &inventory), (1, &pstree()), (2, &core), (3, &core), (4, &mm), (6, &pagemap(1, true))];
    add("checkpoint", "bad-image-missing", archive(&files));
}

/// Files by number, as the target takes them.
fn archive(files: &[(u8, &Vec<u8>)]) -> Vec<u8> {
    let mut data = Vec::new();
    for (number, image) in files {
        data.push(*number);
        data.extend(u16::try_from(image.len()).expect("a small image").to_le_bytes());
        data.extend(*image);
    }
    data
}
