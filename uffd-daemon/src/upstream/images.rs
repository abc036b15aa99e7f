//! A local image directory: pages are read when they are asked for, nothing has to travel.

use std::collections::{HashMap, VecDeque};
use std::error::Error;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use protocol::criu::pages::{Location, PageReader, PagesError};
use protocol::units::{PAGE_SIZE, PageRun, TaskId};

use super::{Answer, AskId, Upstream, UpstreamError};
use crate::inflight::Purpose;
use crate::limits;

/// Pages of one answer: 256 KiB are read and installed in about 100 us, then faults are looked for again.
const ANSWER_PAGES: usize = 64;

/// The pages of an image directory and its parents.
#[derive(Debug)]
pub struct Images {
    readers: HashMap<TaskId, PageReader>,
    /// Single pages: faults, mostly. All of them go before the next of the others.
    single: VecDeque<Question>,
    runs: VecDeque<Question>,
    buffer: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
struct Question {
    id: AskId,
    task: TaskId,
    run: PageRun,
}

impl Images {
    /// The pages of `tasks` in `dir`.
    ///
    /// # Errors
    /// [`PagesError`] if images of a task are missing, damaged or cut short.
    pub fn open(dir: &Path, tasks: &[TaskId]) -> Result<Self, PagesError> {
        let open = |&task: &TaskId| Ok::<_, PagesError>((task, PageReader::open(dir, task)?));
        let readers = tasks.iter().map(open).collect::<Result<_, _>>()?;
        let buffer = vec![0; ANSWER_PAGES * PAGE_SIZE];
        Ok(Self { readers, single: VecDeque::new(), runs: VecDeque::new(), buffer })
    }

    fn answer(&mut self, question: Question, each: &mut dyn FnMut(Answer<'_>)) -> Result<(), UpstreamError> {
        let Question { id, task, run } = question;
        let reader = self.readers.get(&task).ok_or_else(|| {
            UpstreamError::Io(io::Error::other(format!("task {task} is not in the images")))
        })?;
        let wanted = usize::try_from(run.pages).unwrap_or(usize::MAX).saturating_mul(PAGE_SIZE);
        let len = wanted.min(self.buffer.len());
        let pages =
            reader.read(run.start, &mut self.buffer[..len]).map_err(|error| unreadable(task, &error))?;
        each(Answer { id, data: &self.buffer[..pages * PAGE_SIZE] });
        Ok(())
    }
}

fn unreadable(task: TaskId, error: &PagesError) -> UpstreamError {
    let mut text = format!("task {task}: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    if matches!(error, PagesError::NotInImages { location: Location::LazyElsewhere { .. }, .. }) {
        text.push_str("; these are images of a lazy dump, give --page-server");
    }
    UpstreamError::Io(io::Error::other(text))
}

impl Upstream for Images {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn ask(&mut self, id: AskId, purpose: Purpose, task: TaskId, run: PageRun) -> Result<(), UpstreamError> {
        let queue = if purpose == Purpose::Demand { &mut self.single } else { &mut self.runs };
        queue.push_back(Question { id, task, run });
        Ok(())
    }

    fn flush(&mut self) -> Result<(), UpstreamError> {
        Ok(())
    }

    fn wants_write(&self) -> bool {
        false
    }

    /// Answers every fault, and one question of the background. Faults must not be left for the next call: before
    /// the tasks run there is no background that keeps the loop from sleeping.
    fn answers(&mut self, each: &mut dyn FnMut(Answer<'_>)) -> Result<(), UpstreamError> {
        while let Some(question) = self.single.pop_front() {
            self.answer(question, each)?;
        }
        match self.runs.pop_front() {
            Some(question) => self.answer(question, each),
            None => Ok(()),
        }
    }

    /// One question at a time: there is no round trip to hide.
    fn background(&self) -> Option<(u64, u64)> {
        Some((limits::BACKGROUND_REQUEST_PAGES, limits::BACKGROUND_REQUEST_PAGES))
    }

    fn finish(&mut self) -> Result<(), UpstreamError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use protocol::criu::images::{PageFlags, Pagemap, PagemapEntry, PagemapHead, write_pagemap};
    use protocol::units::ImageAddr;
    use tempfile::TempDir;

    use super::*;

    const TASK: TaskId = TaskId(5);

    fn run(start: u64, pages: u64) -> PageRun {
        PageRun::new(ImageAddr::aligned(start << 12).unwrap(), pages).unwrap()
    }

    /// Pages 16 to 215 in the images, each full of its number; 300 left on the source.
    fn images() -> (TempDir, Images) {
        let dir = TempDir::new().unwrap();
        let entry = |run, flags| PagemapEntry { run, flags, wide: true };
        let entries = vec![entry(run(16, 200), PageFlags::LAZY_PRESENT), entry(run(300, 1), PageFlags::LAZY)];
        let pagemap = Pagemap { head: PagemapHead { pages_id: 1 }, entries };
        std::fs::write(dir.path().join("pagemap-5.img"), write_pagemap(&pagemap)).unwrap();
        let data: Vec<u8> = (16..216_u8).flat_map(|number| [number; PAGE_SIZE]).collect();
        std::fs::write(dir.path().join("pages-1.img"), data).unwrap();
        let images = Images::open(dir.path(), &[TASK]).unwrap();
        (dir, images)
    }

    /// Who was answered by one call: id, number of pages, what is in the first.
    fn answers(images: &mut Images) -> Vec<(AskId, usize, u8)> {
        let mut seen = Vec::new();
        images.answers(&mut |a| seen.push((a.id, a.data.len() / PAGE_SIZE, a.data[0]))).unwrap();
        seen
    }

    #[test]
    fn faults_go_before_the_background() {
        let (_dir, mut images) = images();
        images.ask(1, Purpose::Background, TASK, run(16, 64)).unwrap();
        images.ask(2, Purpose::Background, TASK, run(80, 64)).unwrap();
        images.ask(3, Purpose::Demand, TASK, run(200, 1)).unwrap();
        images.ask(4, Purpose::Demand, TASK, run(201, 1)).unwrap();
        assert!(images.fd().is_none() && !images.wants_write());
        assert_eq!(answers(&mut images), [(3, 1, 200), (4, 1, 201), (1, 64, 16)]);
        assert_eq!(answers(&mut images), [(2, 64, 80)]);
        assert_eq!(answers(&mut images), []);
    }

    #[test]
    fn an_answer_is_bounded() {
        let (_dir, mut images) = images();
        images.ask(1, Purpose::Background, TASK, run(20, 190)).unwrap();
        images.ask(2, Purpose::Background, TASK, run(214, 50)).unwrap();
        assert_eq!(answers(&mut images), [(1, 64, 20)]);
        assert_eq!(answers(&mut images), [(2, 2, 214)]);
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        let (dir, mut images) = images();
        let mut refused = |task, run, told: &str| {
            images.ask(1, Purpose::Background, task, run).unwrap();
            let error = images.answers(&mut |_| panic!("answered")).unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
        };
        refused(TASK, run(216, 1), "never dumped");
        refused(TASK, run(300, 1), "--page-server");
        refused(TaskId(6), run(16, 1), "task 6 is not in the images");
        std::fs::File::options()
            .write(true)
            .open(dir.path().join("pages-1.img"))
            .unwrap()
            .set_len(0)
            .unwrap();
        refused(TASK, run(16, 1), "pages-1.img");
        assert!(Images::open(dir.path(), &[TASK]).is_err());
    }
}
