//! The destination's side of pre-copy, played by the test: keeps what comes, and holds the source to the protocol.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context, bail, ensure};
use protocol::link::Stream;
use protocol::units::{ImageAddr, PAGE_SIZE, PageRun, TaskId};
use protocol::wire::frame::{HEADER_LEN, Header, Kind, RUN_HEADER_LEN, RunFrame};
use protocol::wire::lz4::decompress;
use protocol::wire::precopy::{Areas, Round};

/// What came, by task and address.
#[derive(Debug, Default)]
pub struct Kept {
    /// Pages.
    pub pages: HashMap<TaskId, BTreeMap<u64, Box<[u8]>>>,
    /// Pages that came in each round.
    pub rounds: Vec<u64>,
    /// Bytes received.
    pub bytes: u64,
    /// Most pages that were kept at once.
    pub most: usize,
    areas: HashMap<TaskId, Vec<PageRun>>,
}

impl Kept {
    /// Takes everything up to the last round, and confirms each; after `rounds` of them it closes the lane.
    ///
    /// # Errors
    /// Whatever the source does that it may not.
    pub fn receive(lane: &Stream, rounds: usize) -> anyhow::Result<Self> {
        let mut kept = Self::default();
        let (mut seen, mut came) = (BTreeSet::new(), 0);
        loop {
            let mut head = [0; HEADER_LEN];
            lane.receive_all(&mut head)?;
            let header = Header::decode(&head)?;
            let mut body = vec![0; header.body_len];
            lane.receive_all(&mut body)?;
            kept.bytes += (HEADER_LEN + body.len()) as u64;
            match header.kind {
                Kind::Areas => {
                    let areas = Areas::decode(&body)?;
                    ensure!(seen.insert(areas.task), "areas of task {} twice in a round", areas.task);
                    kept.keep_within(areas);
                }
                Kind::Precopy | Kind::PrecopyLz4 | Kind::PrecopyZero => came += kept.take(&head, &body)?,
                Kind::Round => {
                    let round = Round::decode(&body)?;
                    kept.rounds.push(std::mem::take(&mut came));
                    ensure!(round.number as usize == kept.rounds.len(), "{round:?}: {:?}", kept.rounds);
                    if kept.rounds.len() == rounds {
                        lane.shutdown();
                        return Ok(kept);
                    }
                    kept.pages.retain(|task, _| seen.contains(task));
                    seen.clear();
                    lane.send_all(&round.encode(), false)?;
                    if round.last {
                        return Ok(kept);
                    }
                }
                other => bail!("{other:?} in pre-copy"),
            }
        }
    }

    fn keep_within(&mut self, areas: Areas) {
        let pages = self.pages.entry(areas.task).or_default();
        let within = |at: u64| areas.areas.iter().any(|area| area.contains(ImageAddr::containing(at)));
        pages.retain(|&at, _| !areas.starts_again && within(at));
        self.areas.insert(areas.task, areas.areas);
    }

    fn take(&mut self, head: &[u8; HEADER_LEN], body: &[u8]) -> anyhow::Result<u64> {
        let (run, data) = body.split_at(RUN_HEADER_LEN - HEADER_LEN);
        let whole: [u8; RUN_HEADER_LEN] = [&head[..], run].concat().try_into().expect("32 bytes");
        let frame = RunFrame::decode(&whole)?;
        ensure!(frame.data_len == data.len() && frame.id == self.rounds.len() as u64 + 1, "{frame:?}");
        let run = frame.what.run;
        let mut unpacked = Vec::new();
        if frame.kind == Kind::PrecopyLz4 {
            unpacked.resize(usize::try_from(run.pages)? * PAGE_SIZE, 0);
            decompress(data, &mut unpacked)?;
        }
        let data = if unpacked.is_empty() { data } else { &unpacked };
        let areas = self.areas.get(&frame.what.task).context("no areas before")?;
        let inside = |area: &PageRun| area.start <= run.start && run.end() <= area.end();
        ensure!(areas.iter().any(inside), "{frame:?} lies in no area");
        let pages = self.pages.entry(frame.what.task).or_default();
        for number in 0..run.pages {
            let at = usize::try_from(number)? * PAGE_SIZE;
            let page = data.get(at..at + PAGE_SIZE).unwrap_or(&[0; PAGE_SIZE]);
            ensure!(
                data.is_empty() || page.iter().any(|byte| *byte != 0),
                "a page of zeros as another: {frame:?}"
            );
            pages.insert(run.start.add(number).get(), page.into());
        }
        self.most = self.most.max(self.pages.values().map(BTreeMap::len).sum());
        Ok(run.pages)
    }
}
