//! The bookkeeping of the source, against naive models.

use std::collections::BTreeSet;

use arbitrary::{Arbitrary, Unstructured};
use protocol::bitmap::Bitmap;
use protocol::lazy_map::LazyMap;
use protocol::units::{ImageAddr, PageRun, TaskId};
use protocol::wire::frame::TaskRun;
use source_server::lanes::Order;
use source_server::ledger::{Ledger, index_of};

fn run(page: u64, pages: u64) -> PageRun {
    PageRun::new(ImageAddr::containing(page << 12), pages).expect("a small run")
}

#[derive(Arbitrary, Debug)]
enum LedgerOp {
    Sent {
        first: u8,
        pages: u8,
    },
    TakeFrom {
        first: u8,
        most: u8,
    },
    TakeChunk {
        chunk: u8,
        most: u8,
    },
    /// What a peer says, unchecked.
    Acknowledge {
        task: u32,
        page: u64,
        pages: u32,
    },
    AcknowledgeNear {
        task: u8,
        page: u8,
        pages: u8,
    },
}

/// What was sent and acknowledged. First how many pages make a chunk, then operations.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_ledger(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(chunk_pages) = input.int_in_range(1..=20_u64) else { return };
    let runs = vec![run(16, 6), run(22, 4), run(40, 9)];
    let map = LazyMap::new([(TaskId(1), runs), (TaskId(2), vec![]), (TaskId(3), vec![run(16, 13)])]);
    let map = map.expect("a small map");
    let all = map.pages();
    let mut ledger = Ledger::new(all, chunk_pages);
    let (mut sent, mut acknowledged) = (BTreeSet::new(), BTreeSet::new());
    while !input.is_empty() {
        let Ok(op) = input.arbitrary::<LedgerOp>() else { return };
        match op {
            LedgerOp::Sent { first, pages } => {
                let range = u64::from(first) % all..(u64::from(first) % all + u64::from(pages)).min(all);
                let fresh = range.clone().any(|index| !sent.contains(&index));
                assert_eq!(ledger.sent(range.start, range.end - range.start), fresh);
                sent.extend(range);
            }
            LedgerOp::TakeFrom { first, most } => {
                let first = u64::from(first) % (all + 2);
                let unsent = (first..all).take_while(|index| !sent.contains(index));
                let taken: Vec<u64> = unsent.take(usize::from(most)).collect();
                assert_eq!(ledger.take_unsent_from(first, u64::from(most)), taken.len() as u64);
                sent.extend(taken);
            }
            LedgerOp::TakeChunk { chunk, most } => {
                let (chunk, most) = (u64::from(chunk) % ledger.chunks(), u64::from(most) + 1);
                let mut runs = Vec::new();
                ledger.take_unsent(&map, chunk, most, &mut runs);
                let mut due: Vec<u64> = ledger.chunk(chunk).filter(|index| !sent.contains(index)).collect();
                for taken in &runs {
                    let TaskRun { run, .. } = taken.what;
                    assert!(run.pages <= most);
                    assert_eq!(index_of(&map, &taken.what), Ok(taken.first));
                    let range = taken.first..taken.first + run.pages;
                    due.retain(|index| !range.contains(index));
                    assert!(range.into_iter().all(|index| sent.insert(index)), "sent twice: {taken:?}");
                }
                assert!(due.is_empty(), "left out: {due:?}");
            }
            LedgerOp::Acknowledge { task, page, pages } => {
                let start = ImageAddr::containing(page);
                let Some(run) = PageRun::new(start, u64::from(pages)) else { continue };
                take(&map, &mut ledger, &mut acknowledged, &mut sent, &TaskRun { task: TaskId(task), run });
            }
            LedgerOp::AcknowledgeNear { task, page, pages } => {
                let run = run(u64::from(page) % 64, u64::from(pages) % 16 + 1);
                let what = TaskRun { task: TaskId(u32::from(task) % 4), run };
                take(&map, &mut ledger, &mut acknowledged, &mut sent, &what);
            }
        }
        assert_eq!(ledger.missing(), all - acknowledged.len() as u64);
    }
}

/// An acknowledgement as the lane takes it: checked against the map first.
fn take(
    map: &LazyMap,
    ledger: &mut Ledger,
    acknowledged: &mut BTreeSet<u64>,
    sent: &mut BTreeSet<u64>,
    what: &TaskRun,
) {
    let lazy = |index: u64| {
        let (task, addr, _) = map.locate(index).expect("an index of the map");
        task == what.task && what.run.contains(addr)
    };
    let indices: Vec<u64> = (0..map.pages()).filter(|index| lazy(*index)).collect();
    let Ok(first) = index_of(map, what) else { return };
    assert_eq!(indices, (first..first + what.run.pages).collect::<Vec<_>>());
    let complete = |acknowledged: &BTreeSet<u64>, chunk: &u64| {
        let mut pages = ledger.chunk(*chunk);
        pages.all(|index| acknowledged.contains(&index))
    };
    let before: Vec<u64> = (0..ledger.chunks()).filter(|chunk| complete(acknowledged, chunk)).collect();
    acknowledged.extend(&indices);
    sent.extend(&indices);
    let mut after: Vec<u64> = (0..ledger.chunks()).filter(|chunk| complete(acknowledged, chunk)).collect();
    after.retain(|chunk| !before.contains(chunk));
    assert_eq!(ledger.acknowledge(first, what.run.pages), after);
}

/// In which order chunks are pushed: how many there are, then what faults want, and how many more are there.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_push_order(data: &[u8]) {
    let Some((chunks, wishes)) = data.split_first() else { return };
    let chunks = u64::from(*chunks);
    let mut order = Order::new(chunks);
    let mut pushed = BTreeSet::new();
    let mut ready = 0;
    for wish in wishes.chunks(2) {
        ready = chunks.min(ready + wish.get(1).map_or(0, |more| u64::from(*more) % 8));
        let wish = &wish[0];
        // The largest stand for none, and for what no lane has.
        let wanted = match wish {
            255 => None,
            254 => Some(u64::MAX),
            near => Some(u64::from(*near)),
        };
        let next = order.next(wanted, ready);
        assert_eq!(next.is_some(), (pushed.len() as u64) < chunks);
        let Some(next) = next else { return };
        let wanted = wanted.filter(|wanted| *wanted < ready && !pushed.contains(wanted));
        assert!(next < ready || (0..ready).all(|chunk| pushed.contains(&chunk)), "{next} is not there yet");
        assert!(wanted.is_none_or(|wanted| wanted == next), "{wanted:?} was wanted, {next} came");
        assert!(next < chunks && pushed.insert(next), "{next} again");
    }
    while let Some(next) = order.next(None, chunks) {
        assert!(next < chunks && pushed.insert(next), "{next} again");
    }
    assert_eq!(pushed.len() as u64, chunks);
}

#[derive(Arbitrary, Debug)]
enum BitmapOp {
    Set(u64, u64),
    Unset(u64, u64),
    SetNear(u16, u16),
    UnsetNear(u16, u16),
    Look(u16, u16),
    LookFar(u64, u64),
}

/// Ranges of bits, near and far past the end. First how many bits there are.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_bitmap(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(len) = input.int_in_range(0..=300_u64) else { return };
    let mut map = Bitmap::clear(len);
    let mut model = BTreeSet::new();
    while !input.is_empty() {
        let Ok(op) = input.arbitrary::<BitmapOp>() else { return };
        let near = |bit: u16| u64::from(bit) % (len + 10);
        let (set, start, end) = match op {
            BitmapOp::Set(start, end) => (Some(true), start, end),
            BitmapOp::Unset(start, end) => (Some(false), start, end),
            BitmapOp::SetNear(start, end) => (Some(true), near(start), near(end)),
            BitmapOp::UnsetNear(start, end) => (Some(false), near(start), near(end)),
            BitmapOp::Look(start, end) => (None, near(start), near(end)),
            BitmapOp::LookFar(start, end) => (None, start, end),
        };
        let inside = || start.min(len)..end.min(len);
        match set {
            Some(true) => {
                let fresh = inside().filter(|bit| model.insert(*bit)).count();
                assert_eq!(map.set_range(start, end), fresh as u64);
            }
            Some(false) => {
                let gone = inside().filter(|bit| model.remove(bit)).count();
                assert_eq!(map.unset_range(start, end), gone as u64);
            }
            None => {
                let first = inside().find(|bit| model.contains(bit));
                let behind =
                    |first| (first..end.min(len)).find(|bit| !model.contains(bit)).unwrap_or(end.min(len));
                assert_eq!(map.run_in(start, end), first.map(|first| (first, behind(first))));
                let inside = inside().filter(|bit| model.contains(bit)).count();
                assert_eq!(map.count_range(start, end), inside as u64);
                assert_eq!(map.get(start), model.contains(&start));
            }
        }
        assert_eq!(map.count(), model.len() as u64);
    }
}
