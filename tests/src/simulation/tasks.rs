//! What the tasks do at the destination: threads that read, write, drop, unmap, move, fork and end.

use std::ops::Range;

use super::chance::Chance;
use super::kernel::{Mm, State, Waits};
use super::pages::{Memory, ZEROS};

/// Where fresh memory and moved areas may go.
const ROOM: Range<u64> = 16..720;
/// Address spaces of a move at most.
const SPACES_MAX: usize = 8;

#[derive(Clone, Debug)]
enum Doing {
    Nothing,
    Touch { page: u64, write: Option<u64> },
    Drop { pages: Range<u64>, told: bool },
    Unmap,
    Remap { from: Range<u64>, to: u64, once_more: bool },
    Fork { child: Mm },
}

/// A thread of a task.
#[derive(Debug)]
pub struct Thread {
    mm: Mm,
    number: usize,
    doing: Doing,
    /// Where it reads on, if it does.
    stream: Option<(u64, i64)>,
}

/// A tree at the destination.
#[derive(Debug, Default)]
pub struct Tasks {
    /// Its address spaces, in the order of their birth.
    pub spaces: Vec<Mm>,
    /// Their threads.
    pub threads: Vec<Thread>,
    /// They run.
    pub running: bool,
}

impl Tasks {
    /// A restored one.
    pub fn add(&mut self, mm: Mm, threads: usize) {
        self.threads.extend((0..threads).map(|number| Thread::new(mm.clone(), number)));
        self.spaces.push(mm);
    }

    /// Whether a copy runs here.
    #[must_use]
    pub fn run(&self) -> bool {
        self.running && self.spaces.iter().any(|mm| !mm.state().is_gone())
    }

    /// All of them are killed.
    pub fn kill(&mut self) {
        self.running = false;
        self.spaces.iter().for_each(|mm| mm.state().exit());
    }

    /// One thread takes a step; false if it has to wait, or has nothing to do and shall not `begin` anything.
    pub fn step(&mut self, number: usize, chance: &Chance, memory: &mut Memory, begin: bool) -> bool {
        let others: usize = self.spaces.len();
        let Some(thread) = self.threads.get_mut(number) else { return false };
        if !begin && matches!(thread.doing, Doing::Nothing) {
            return false;
        }
        let (moved, born) = thread.step(chance, memory, others);
        if let Some(child) = born {
            self.add(child, 1);
        }
        moved
    }
}

impl Thread {
    const fn new(mm: Mm, number: usize) -> Self {
        Self { mm, number, doing: Doing::Nothing, stream: None }
    }

    fn step(&mut self, chance: &Chance, memory: &mut Memory, spaces: usize) -> (bool, Option<Mm>) {
        let mm = self.mm.clone();
        let mut state = mm.state();
        if !state.is_gone() && state.queue(self.number) {
            return (true, None);
        }
        if state.is_gone() || state.waits(self.number) != Waits::No {
            return (false, None);
        }
        let mut born = None;
        self.doing = match std::mem::replace(&mut self.doing, Doing::Nothing) {
            Doing::Nothing => self.begin(&mut state, chance, memory, spaces),
            Doing::Touch { page, write } => self.touch(&mut state, page, write),
            Doing::Drop { pages, told: false } => {
                state.go_on();
                Doing::Drop { pages, told: true }
            }
            Doing::Drop { pages, told: true } => {
                state.drop_content(&pages);
                Doing::Nothing
            }
            Doing::Unmap => {
                state.go_on();
                Doing::Nothing
            }
            Doing::Remap { from, to, once_more } => {
                state.go_on();
                if once_more {
                    state.announce_move(self.number, &from, to);
                    Doing::Remap { from, to, once_more: false }
                } else {
                    state.has_arrived(self.number);
                    Doing::Nothing
                }
            }
            Doing::Fork { child } => {
                state.go_on();
                born = Some(child);
                Doing::Nothing
            }
        };
        (true, born)
    }

    fn touch(&self, state: &mut State, page: u64, write: Option<u64>) -> Doing {
        if state.touch(self.number, page, write) { Doing::Nothing } else { Doing::Touch { page, write } }
    }

    fn begin(&mut self, state: &mut State, chance: &Chance, memory: &mut Memory, spaces: usize) -> Doing {
        let mapped = state.mapped.len();
        let Some(page) = state.mapped.keys().copied().nth(chance.below(mapped)) else {
            return Doing::Nothing;
        };
        let pages = page..page + chance.between(1, 12);
        let quiet = !state.is_dropping();
        match chance.between(0, 99) {
            0..35 => {
                // Reading on, one way or the other, or far away.
                let (at, stride) = self.stream.unwrap_or((page, [1, 1, 2, -1][chance.below(4)]));
                let next = at.checked_add_signed(stride).filter(|next| state.mapped.contains_key(next));
                self.stream = next.filter(|_| !chance.once_in(20)).map(|next| (next, stride));
                self.touch(state, next.unwrap_or(page), None)
            }
            35..60 => self.touch(state, page, None),
            60..80 => {
                let stamp = if chance.once_in(10) { ZEROS } else { memory.new_stamp() };
                self.touch(state, page, Some(stamp))
            }
            80..86 if quiet => {
                let last = self.within_area(state, &pages);
                // What is not registered is dropped at once.
                if last.clone().all(|page| state.mapped[&page].registered) && !state.is_arriving(&last) {
                    state.begin_drop(self.number, &last);
                    return Doing::Drop { pages: last, told: false };
                }
                Doing::Nothing
            }
            86..89 if quiet => {
                let before = state.waits(self.number);
                state.unmap(self.number, &pages);
                if state.waits(self.number) == before { Doing::Nothing } else { Doing::Unmap }
            }
            89..92 if quiet => {
                let from = self.within_area(state, &pages);
                let to = chance.between(ROOM.start, ROOM.end - 16);
                // Not onto itself, nor over more than the kernel moves at once; nor to where another thread has moved something and
                // not heard so: nothing tells what is there then.
                let length = from.end - from.start;
                if to.abs_diff(from.start) < length || state.is_arriving(&(to..to + length)) {
                    return Doing::Nothing;
                }
                let once_more = state.remap(self.number, &from, to);
                if state.waits(self.number) == Waits::No {
                    state.has_arrived(self.number);
                    return Doing::Nothing;
                }
                // Without a second event the first may have been either.
                Doing::Remap { from, to, once_more }
            }
            92..94 => {
                let at = chance.between(ROOM.start, ROOM.end - 16);
                let fresh = at..at + chance.between(1, 8);
                if state.mapped.range(fresh.clone()).next().is_none() {
                    state.map(&fresh);
                }
                Doing::Nothing
            }
            94..97 => {
                let own = self.within_area(state, &pages);
                state.split(&own);
                Doing::Nothing
            }
            97 | 98 if quiet && spaces < SPACES_MAX => {
                let name = format!("{}.{spaces}", state.name);
                Doing::Fork { child: state.fork(self.number, name) }
            }
            99 if chance.once_in(6) => {
                state.exit();
                Doing::Nothing
            }
            _ => Doing::Nothing,
        }
    }

    /// As much of `pages` as lies in the area of its first page.
    fn within_area(&self, state: &State, pages: &Range<u64>) -> Range<u64> {
        let area = |page: u64| state.mapped.get(&page).map(|mapping| mapping.area);
        let end = (pages.start..pages.end).find(|page| area(*page) != area(pages.start));
        pages.start..end.unwrap_or(pages.end)
    }
}
