//! The fault loop: one thread that reads every userfaultfd of a move, asks for pages, and installs the
//! answers. Nothing is handed to another thread between a fault and its wake.
//!
//! A session with several fault lanes has a loop for each. All serve the same address spaces; the first reads always, the
//! others assist: they read as long as many threads wait at once, which the first one tells them. Who reads a fault asks
//! for its page and installs it. Events are read and taken in under the family's lock, so they have one order
//! whoever reads them; they are applied once their space is at rest.
//!
//! ```text
//!   poll ─▶ uffd readable ─▶ lock family, read events, decide ─▶ zero page | kept here: install, wake | ask
//!      └──▶ answer there ──▶ lock family, install, wake
//! ```
//!
//! The loop also keeps the event queues empty: `madvise`, `munmap`, `mremap` and `fork` in the task wait
//! until their event was read. When the page source is lost the loop goes on reading; faults then wait, and what was
//! asked is asked again of the one that takes its place.

mod assistance;
mod thread;

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use host::mailbox::{Mailbox, Post};
use kernel::poll::PollSet;
use kernel::uffd::{Event, EventBuffer, Install, Uffd};
use protocol::units::{PAGE_BYTES, PAGE_SIZE, PageRun, TaskAddr, pages_to_bytes};

use crate::awake::Awake;
use crate::inflight::{Asked, InFlight, Purpose, Waiter};
use crate::keeper::{KeeperHandle, Owner};
use crate::limits;
use crate::pages::{AddressSpace, Arrival, Blocked, Family, Resolution, SpaceId, What};
use crate::takeover::ServedSpace;
use crate::tree::Tree;
use crate::upstream::{Upstream, UpstreamError};

/// Latency of faults that needed the source, in nanoseconds; shared with whoever reports.
pub type LatencyHistogram = Arc<Mutex<Histogram<u64>>>;

/// An empty latency histogram: 100 ns to 100 s, three digits.
///
/// # Panics
/// Never: the bounds are constants that the library accepts.
#[must_use]
pub fn latency_histogram() -> LatencyHistogram {
    let histogram = Histogram::new_with_bounds(100, 100_000_000_000, 3).expect("constant bounds");
    Arc::new(Mutex::new(histogram))
}

/// Gives an address space to whoever keeps it from a daemon that dies.
pub type Keep<I> = Box<dyn Fn(Owner, &I) + Send>;

/// Has a keeper hold them.
#[must_use]
pub fn held_by(keeper: KeeperHandle) -> Keep<Arc<Uffd>> {
    Box::new(move |owner, uffd| keeper.hold(owner, uffd.as_fd()))
}

/// What the loop is told while it runs.
#[derive(Debug)]
pub enum Command<U, I = Arc<Uffd>> {
    /// A restored task handed its userfaultfd over.
    Serve {
        /// Position of its family.
        family: usize,
        /// Its userfaultfd.
        uffd: I,
    },
    /// A space that another daemon served before.
    Adopt(ServedSpace<I>),
    /// Another loop assists this one, the first: it is told of every space.
    Join(Post<Command<U, I>>),
    /// Many threads wait: assist.
    Assist,
    /// All tasks run: the background may begin.
    Running,
    /// Let go of the page source, and say so.
    Detach,
    /// Here is another one: whatever was asked is asked again.
    Attach(U),
    /// End.
    Stop,
}

/// What the loop reports.
#[derive(Debug)]
pub enum Notice {
    /// Nothing is remote any more.
    Settled,
    /// The page source is lost; faults wait.
    UpstreamLost(String),
    /// It was let go of, as commanded: nothing that was said before is about the next one.
    Detached,
    /// The kernel refused what must not fail.
    Broken(String),
}

/// Where in the polled set the commands are.
const COMMANDS: usize = 0;

/// Pages that could not be installed yet.
struct Deferred {
    asked: Asked,
    data: Vec<u8>,
    since: Instant,
}

impl Deferred {
    /// What is left when `pages` of it are settled.
    fn without(mut self, pages: u64) -> Self {
        self.asked.first += pages;
        self.asked.pages -= pages;
        self.data.drain(..usize::try_from(pages_to_bytes(pages)).unwrap_or(0));
        self
    }
}

/// The fault loop of one move.
pub struct FaultLoop<U, I = Arc<Uffd>> {
    tree: Arc<Tree<I>>,
    upstream: Option<U>,
    served: Vec<ServedSpace<I>>,
    /// Which loop of the session it is; the first is number 0.
    number: usize,
    /// Those that assist the first loop; of one of them, the first.
    others: Vec<Post<Command<U, I>>>,
    /// Until when it reads, if it assists; when the others were last told to, if it is the first.
    assists_until: Instant,
    in_flight: InFlight,
    /// How many of its faults count in what the push lets pass.
    published: u32,
    /// Faults that it asked for, ever.
    demands: u64,
    deferred: Vec<Deferred>,
    /// Faults that need nothing of the source, or perhaps nothing, whose address space is changing: who was served, and where.
    unresolved: Vec<(usize, TaskAddr)>,
    /// Spaces with changes that this loop has read and that are perhaps under way, by family.
    changing: Vec<(usize, SpaceId)>,
    /// When it read the last of them.
    changed: Instant,
    /// While it runs as a thread.
    awake: Option<Awake>,
    polled: PollSet,
    events: EventBuffer,
    commands: Mailbox<Command<U, I>>,
    notices: Post<Notice>,
    keeper: Option<Keep<I>>,
    latency: LatencyHistogram,
    running: bool,
    cursor: (usize, u64),
    background_pages: u64,
    told_settled: bool,
    /// Something happened that may have settled the last page.
    maybe_settled: bool,
    checked: Instant,
    /// When this turn began.
    now: Instant,
}

impl<U: Upstream, I: AddressSpace> FaultLoop<U, I> {
    /// A loop that obeys `commands`; without a page source it waits for one.
    #[must_use]
    pub fn new(
        tree: Arc<Tree<I>>,
        upstream: Option<U>,
        commands: Mailbox<Command<U, I>>,
        notices: Post<Notice>,
        keeper: Option<Keep<I>>,
        latency: LatencyHistogram,
    ) -> Self {
        let now = Instant::now();
        Self {
            tree,
            upstream,
            served: Vec::new(),
            number: 0,
            others: Vec::new(),
            assists_until: now,
            in_flight: InFlight::default(),
            published: 0,
            demands: 0,
            deferred: Vec::new(),
            unresolved: Vec::new(),
            changing: Vec::new(),
            changed: now,
            awake: None,
            polled: PollSet::default(),
            events: EventBuffer::default(),
            commands,
            notices,
            keeper,
            latency,
            running: false,
            cursor: (0, 0),
            background_pages: 0,
            told_settled: false,
            maybe_settled: true,
            checked: now,
            now,
        }
    }

    /// Makes it number `number` of its session, which assists the `first`.
    #[must_use]
    pub fn assisting(mut self, number: usize, first: Post<Command<U, I>>) -> Self {
        (self.number, self.others) = (number, vec![first]);
        self
    }

    /// What is served, by position.
    #[must_use]
    pub fn served(&self) -> &[ServedSpace<I>] {
        &self.served
    }

    /// Deals with what is ready at `now`; true once it was told to stop.
    pub fn turn(&mut self, ready: Ready, has_events: impl Fn(usize) -> bool, now: Instant) -> bool {
        self.now = now;
        if ready.command && self.obey() {
            return true;
        }
        for position in (0..ready.served).filter(|position| has_events(*position)) {
            if let Err(error) = self.read_events(position) {
                self.notify(Notice::Broken(format!("read from a userfaultfd failed: {error}")));
            }
        }
        if let Err(error) = self.exchange(ready.upstream) {
            self.lose_upstream(&error);
        }
        self.retry_deferred();
        self.look_after();
        false
    }

    fn notify(&self, notice: Notice) {
        self.notices.send(notice);
    }

    /// Obeys commands; true for the last.
    fn obey(&mut self) -> bool {
        for command in self.commands.empty() {
            match command {
                Command::Serve { family, uffd } => {
                    let space = self.tree.lock(family).restored(uffd.clone());
                    self.serve(ServedSpace { family, space, uffd });
                }
                Command::Adopt(space) => self.adopt(space),
                Command::Join(other) => {
                    self.served.iter().cloned().for_each(|space| other.send(Command::Adopt(space)));
                    self.others.push(other);
                }
                Command::Assist => self.assists_until = self.now + limits::ASSISTANCE,
                Command::Running => (self.running, self.maybe_settled) = (true, true),
                Command::Detach => {
                    self.upstream = None;
                    self.publish_demand();
                    self.notify(Notice::Detached);
                }
                Command::Attach(upstream) => self.attach(upstream),
                Command::Stop => return true,
            }
        }
        false
    }

    fn read_events(&mut self, position: usize) -> io::Result<()> {
        let Some(ServedSpace { family, space, uffd }) = self.served.get(position) else { return Ok(()) };
        let (family, space, uffd) = (*family, *space, uffd.clone());
        let tree = self.tree.clone();
        // The wait for the family is part of a fault's latency.
        let now = Instant::now();
        let mut guard = tree.lock(family);
        let mut asks: [Option<(u64, TaskAddr)>; kernel::uffd::EVENTS_PER_READ] = [None; _];
        let mut asked = 0;
        let mut waited: [Option<u64>; kernel::uffd::EVENTS_PER_READ] = [None; _];
        let mut waits = 0;
        let mut children = Vec::new();
        let mut zeroes: [TaskAddr; kernel::uffd::EVENTS_PER_READ] = [TaskAddr::default(); _];
        let mut zeroed = 0;
        let mut kept: [Option<(u64, TaskAddr)>; kernel::uffd::EVENTS_PER_READ] = [None; _];
        let mut local = 0;
        let mut unknown = None;
        // What was under way and is over has come before what is read now.
        tree.rest(family, &mut guard, space)?;
        if let Some(journal) = tree.journal() {
            journal.reads(self.number, family);
        }
        uffd.read(&mut self.events, |event| match event {
            Event::Fault { address } => {
                let at = TaskAddr::containing(address);
                let resolution = guard.fault(space, at);
                if let Resolution::Ask(index) | Resolution::Asked(index) = resolution {
                    waited[waits] = Some(index);
                    waits += 1;
                }
                match resolution {
                    Resolution::Ask(index) => {
                        asks[asked] = Some((index, at));
                        asked += 1;
                    }
                    Resolution::Asked(_) => {}
                    Resolution::Kept(index) => {
                        kept[local] = Some((index, at));
                        local += 1;
                    }
                    Resolution::Zero => {
                        zeroes[zeroed] = at;
                        zeroed += 1;
                    }
                    Resolution::Unknown => self.unresolved.push((position, at)),
                }
            }
            Event::Fork { child: uffd } => {
                if let Some(child) = tree.forked(family, &mut guard, space, uffd.clone()) {
                    if let Some(keep) = &self.keeper {
                        keep(Owner::new(family, child.number()), &uffd);
                    }
                    children.push(ServedSpace { family, space: child, uffd });
                }
            }
            Event::Remap { .. } | Event::Remove { .. } | Event::Unmap { .. } => {
                let Some(what) = What::of(&event) else { return };
                tree.changed(family, &mut guard, space, what);
                if let Some((start, end)) = what.leaves() {
                    wake(&uffd, start, end.get() - start.get());
                }
            }
            Event::Unknown(kind) => unknown = Some(kind),
        })?;
        self.maybe_settled |= guard.remote_pages() == 0;
        children.into_iter().for_each(|child| self.serve(child));
        if let Some(journal) = tree.journal() {
            journal.has_read(self.number);
        }
        if guard.is_changing(space) {
            self.awaits_rest(family, space);
        }
        for at in &zeroes[..zeroed] {
            // A page of a fork's copy or one that changed hands within this batch is looked at again.
            self.zero(&mut guard, position, space, *at)?;
        }
        for (index, at) in kept.iter().flatten() {
            self.install_kept(&mut guard, position, *index, *at)?;
        }
        tree.local_faults.fetch_add(local as u64, Ordering::Relaxed);
        let task = guard.task();
        tree.demands.fetch_add(asked as u64, Ordering::Relaxed);
        self.demands += asked as u64;
        for (index, at) in asks.iter().flatten() {
            let Some((addr, _)) = guard.map().locate(guard.map().first + index) else { continue };
            let Some(run) = PageRun::new(addr, 1) else { continue };
            let waiter = Some(Waiter { space, at: *at });
            let asked = Asked { family, first: *index, pages: 1, purpose: Purpose::Demand, waiter, at: now };
            let id = self.in_flight.insert(asked);
            if let Some(upstream) = self.upstream.as_mut() {
                if let Err(error) = upstream.ask(id, Purpose::Demand, task, run) {
                    drop(guard);
                    self.lose_upstream(&error);
                    return Ok(());
                }
            }
        }
        let ahead = waited.iter().flatten().try_for_each(|index| self.prefetch(&mut guard, family, *index));
        drop(guard);
        if let Err(error) = ahead {
            self.lose_upstream(&error);
            return Ok(());
        }
        self.publish_demand();
        if asked > 0 {
            self.seek_assistance();
        }
        if asked > 0 && self.upstream.as_ref().is_some_and(|upstream| upstream.background().is_none()) {
            let waiting = self.in_flight.demands();
            if let Some(awake) = &mut self.awake {
                awake.fault(waiting, now, tree.pushed_bytes.load(Ordering::Relaxed));
            }
        }
        if let Some(kind) = unknown {
            self.notify(Notice::Broken(format!("the kernel sent an unknown userfaultfd event {kind:#x}")));
        }
        Ok(())
    }

    /// Asks for what the thread that waits for page `index` will need next; where nobody pushes, the background
    /// does without: it shares its connection with the faults.
    fn prefetch(&mut self, family: &mut Family<I>, position: usize, index: u64) -> Result<(), UpstreamError> {
        let Some(upstream) = self.upstream.as_mut().filter(|upstream| upstream.background().is_none()) else {
            return Ok(());
        };
        let Some(ahead) = family.expects(index) else { return Ok(()) };
        let (task, in_flight, at) = (family.task(), &mut self.in_flight, self.now);
        let mut result = Ok(());
        family.ask_ahead(ahead, |first, run| {
            let purpose = Purpose::Prefetch;
            let asked = Asked { family: position, first, pages: run.pages, purpose, waiter: None, at };
            if result.is_ok() {
                result = upstream.ask(in_flight.insert(asked), purpose, task, run);
            }
        });
        result
    }

    /// What the push lets pass: nothing, while nobody can answer.
    fn publish_demand(&mut self) {
        let demands = if self.upstream.is_some() { self.in_flight.demands() } else { 0 };
        let before = std::mem::replace(&mut self.published, demands);
        if demands != before {
            self.tree.demand_outstanding.fetch_add(demands.wrapping_sub(before), Ordering::Relaxed);
        }
    }

    /// Asks another page source everything that has not been answered.
    fn attach(&mut self, mut upstream: U) {
        let tree = self.tree.clone();
        let asked = self.in_flight.open().try_for_each(|(id, asked)| {
            let family = tree.lock(asked.family);
            let found = family.map().locate(family.map().first + asked.first);
            let Some(run) = found.and_then(|(addr, _)| PageRun::new(addr, asked.pages)) else {
                return Ok(());
            };
            upstream.ask(id, asked.purpose, family.task(), run)
        });
        self.upstream = Some(upstream);
        self.publish_demand();
        if let Err(error) = asked {
            self.lose_upstream(&error);
        }
    }

    /// Resolves a fault that needs no content.
    fn zero(
        &mut self,
        family: &mut Family<I>,
        position: usize,
        space: SpaceId,
        at: TaskAddr,
    ) -> io::Result<()> {
        let uffd = &self.served[position].uffd;
        if family.space(space).is_some_and(|space| space.remote_at(at).is_some()) {
            // A later event of the same batch moved content here: the thread reports again.
            return uffd.wake(at, PAGE_BYTES);
        }
        if family.is_in_doubt(space, at) {
            self.unresolved.push((position, at));
            return Ok(());
        }
        match uffd.zero(at, PAGE_BYTES)? {
            Install::Done { .. } => {}
            // Installed meanwhile, or no longer an area of ours: the thread looks again.
            Install::Present | Install::Unregistered => uffd.wake(at, PAGE_BYTES)?,
            Install::Deferred => self.unresolved.push((position, at)),
            Install::TaskGone => drop(family.exited(space)),
        }
        Ok(())
    }

    /// Resolves a fault on a page that is kept here, and then installs those behind it.
    fn install_kept(
        &mut self,
        family: &mut Family<I>,
        position: usize,
        index: u64,
        at: TaskAddr,
    ) -> io::Result<()> {
        if let Arrival::Blocked(_) = family.arrived_kept(index, index + 1)? {
            self.unresolved.push((position, at));
            return Ok(());
        }
        // Nobody waits for these: what cannot be installed now is installed later.
        family.arrived_kept(index + 1, index + limits::LOCAL_FAULT_PAGES)?;
        self.maybe_settled |= family.remote_pages() == 0;
        Ok(())
    }

    fn exchange(&mut self, readable: bool) -> Result<(), UpstreamError> {
        let Some(mut upstream) = self.upstream.take() else { return Ok(()) };
        let result = self.exchange_with(&mut upstream, readable);
        self.upstream = Some(upstream);
        result
    }

    fn exchange_with(&mut self, upstream: &mut U, readable: bool) -> Result<(), UpstreamError> {
        upstream.flush()?;
        if readable {
            let mut result = Ok(());
            upstream.answers(&mut |answer| {
                if result.is_ok() {
                    result = self.answered(answer.id, answer.data);
                }
            })?;
            result?;
        }
        self.ask_background(upstream)?;
        upstream.flush()
    }

    /// Keeps the background going where nobody pushes.
    fn ask_background(&mut self, upstream: &mut U) -> Result<(), UpstreamError> {
        let Some((most, window)) = upstream.background() else { return Ok(()) };
        if !self.running {
            return Ok(());
        }
        let tree = self.tree.clone();
        while self.background_pages < window && self.cursor.0 < tree.len() {
            let (position, from) = self.cursor;
            let mut family = tree.lock(position);
            let Some((first, run)) = family.next_to_fetch(from, most) else {
                self.cursor = (position + 1, 0);
                continue;
            };
            let task = family.task();
            drop(family);
            self.cursor.1 = first + run.pages;
            self.background_pages += run.pages;
            let asked = Asked {
                family: position,
                first,
                pages: run.pages,
                purpose: Purpose::Background,
                waiter: None,
                at: self.now,
            };
            let id = self.in_flight.insert(asked);
            upstream.ask(id, Purpose::Background, task, run)?;
        }
        Ok(())
    }

    fn answered(&mut self, id: u64, data: &[u8]) -> Result<(), UpstreamError> {
        let unasked = || UpstreamError::Protocol(format!("answer {id:#x} was not asked for"));
        let asked = self.in_flight.remove(id).ok_or_else(unasked)?;
        if asked.purpose == Purpose::Background {
            self.background_pages -= asked.pages;
        }
        let pages = (data.len() / PAGE_SIZE) as u64;
        if pages > asked.pages {
            return Err(UpstreamError::Protocol(format!("{pages} pages for a question of {}", asked.pages)));
        }
        if pages < asked.pages {
            self.not_delivered(&asked, pages)?;
        }
        if pages > 0 {
            let asked = Asked { pages, ..asked };
            let tree = self.tree.clone();
            let family = tree.lock(asked.family);
            if let Err((blocked, done)) = self.install(family, &asked, data) {
                tracing::debug!(?blocked, "install deferred");
                let deferred = Deferred { asked, data: data.to_vec(), since: self.now };
                self.deferred.push(deferred.without(done));
            }
        }
        self.publish_demand();
        Ok(())
    }

    /// Pages of a question that its answer left out: the source holds them as settled, or cut its answer.
    fn not_delivered(&mut self, asked: &Asked, delivered: u64) -> Result<(), UpstreamError> {
        let mut family = self.tree.lock(asked.family);
        let (from, end) = (asked.first + delivered, asked.first + asked.pages);
        family.not_asked(from, end);
        if asked.purpose == Purpose::Background {
            self.cursor = self.cursor.min((asked.family, from));
            return Ok(());
        }
        if asked.purpose == Purpose::Prefetch {
            // They come by the push. A thread that waits meanwhile reports again, and its fault is asked for.
            if let Err(error) = family.wake_missing(from, end) {
                drop(family);
                self.notify(Notice::Broken(format!("wake failed: {error}")));
            }
            return Ok(());
        }
        if family.is_missing(from, end) {
            let what = format!("page {from} of task {} was refused but is missing", family.task());
            return Err(UpstreamError::Protocol(what));
        }
        drop(family);
        self.maybe_settled = true;
        if let Some(waiter) = asked.waiter {
            self.wake_waiter(asked.family, waiter);
        }
        Ok(())
    }

    fn wake_waiter(&self, family: usize, waiter: Waiter) {
        let served = self.served.iter().find(|s| s.family == family && s.space == waiter.space);
        if let Some(served) = served {
            wake(&served.uffd, waiter.at, PAGE_BYTES);
        }
    }

    /// Installs an answer; `Err` if the address space cannot take it now, with how many pages were settled before.
    fn install(
        &mut self,
        mut family: MutexGuard<'_, Family<I>>,
        asked: &Asked,
        data: &[u8],
    ) -> Result<(), (Blocked, u64)> {
        // If the waiter's page is not remote where it waits (dropped or moved meanwhile), no copy wakes it.
        let unreached = asked.waiter.filter(|waiter| {
            family.space(waiter.space).and_then(|space| space.remote_at(waiter.at)) != Some(asked.first)
        });
        let slice = limits::INSTALL_SLICE_PAGES * PAGE_SIZE;
        for (i, part) in data.chunks(slice).enumerate() {
            let done = (i * limits::INSTALL_SLICE_PAGES) as u64;
            match family.arrived(asked.first + done, part, asked.purpose.origin()) {
                Ok(Arrival::Settled) => {}
                Ok(Arrival::Blocked(why)) => return Err((why, done)),
                Err(error) => {
                    drop(family);
                    self.notify(Notice::Broken(format!("install failed: {error}")));
                    return Ok(());
                }
            }
        }
        let complete = family.remote_pages() == 0;
        drop(family);
        if asked.purpose == Purpose::Demand {
            self.record(asked.at.elapsed());
        }
        self.maybe_settled |= complete;
        if let Some(waiter) = unreached {
            self.wake_waiter(asked.family, waiter);
        }
        Ok(())
    }

    fn record(&self, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        let mut histogram = self.latency.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        histogram.saturating_record(ns);
    }

    /// A space is looked at until what is under way there is over.
    pub(super) fn awaits_rest(&mut self, family: usize, space: SpaceId) {
        self.changed = self.now;
        if !self.changing.contains(&(family, space)) {
            self.changing.push((family, space));
        }
    }

    /// Applies what was under way and is over.
    fn settle_changes(&mut self) {
        let (tree, mut changing) = (self.tree.clone(), std::mem::take(&mut self.changing));
        changing.retain(|(position, space)| {
            let mut family = tree.lock(*position);
            let rests = tree.rest(*position, &mut family, *space);
            self.maybe_settled |= family.remote_pages() == 0;
            drop(family);
            if let Err(error) = &rests {
                self.notify(Notice::Broken(format!("probe failed: {error}")));
            }
            matches!(rests, Ok(false))
        });
        self.changing = changing;
    }

    fn retry_deferred(&mut self) {
        self.settle_changes();
        for deferred in std::mem::take(&mut self.deferred) {
            let tree = self.tree.clone();
            let asked = &deferred.asked;
            match self.install(tree.lock(asked.family), asked, &deferred.data) {
                Ok(()) => {}
                Err((Blocked::Unregistered, _))
                    if self.now.saturating_duration_since(deferred.since) > limits::UNREGISTERED_PATIENCE =>
                {
                    let mut family = self.tree.lock(asked.family);
                    tracing::error!(task = %family.task(), first = asked.first, "area lost without an event");
                    family.give_up(asked.first, asked.first + asked.pages);
                }
                Err((_, done)) => self.deferred.push(deferred.without(done)),
            }
        }
        for (position, at) in std::mem::take(&mut self.unresolved) {
            let Some(served) = self.served.get(position) else { continue };
            let (family, space) = (served.family, served.space);
            let tree = self.tree.clone();
            let mut family = tree.lock(family);
            // The event that was in the way may have moved content here.
            let result = match family.fault(space, at) {
                Resolution::Zero => self.zero(&mut family, position, space, at),
                Resolution::Asked(_) => Ok(()),
                Resolution::Unknown => {
                    self.unresolved.push((position, at));
                    Ok(())
                }
                Resolution::Kept(index) => self.install_kept(&mut family, position, index, at),
                Resolution::Ask(index) => {
                    family.not_asked(index, index + 1);
                    self.served[position].uffd.wake(at, PAGE_BYTES)
                }
            };
            if let Err(error) = result {
                self.notify(Notice::Broken(format!("install failed: {error}")));
            }
        }
    }

    /// Notices the end of tasks and of the move.
    fn look_after(&mut self) {
        if self.now.saturating_duration_since(self.checked) >= limits::LIVENESS_INTERVAL {
            self.checked = self.now;
            self.drop_exited();
        }
        let answered = self.in_flight.is_empty() || self.upstream.is_none();
        if self.running && !self.told_settled && self.maybe_settled && answered {
            self.maybe_settled = false;
            if self.tree.check_settled() {
                self.told_settled = true;
                self.notify(Notice::Settled);
            }
        }
    }

    fn drop_exited(&mut self) {
        self.maybe_settled = true;
        if !self.running || !self.unresolved.is_empty() {
            // Positions in `unresolved` must stay valid.
            return;
        }
        let tree = self.tree.clone();
        self.served.retain(|served| {
            let mut family = tree.lock(served.family);
            let there = family.space(served.space).is_some() && !served.uffd.is_orphaned();
            if there || family.is_changing(served.space) {
                return true;
            }
            drop(family.exited(served.space));
            false
        });
    }

    /// What was asked stays open: another source may answer.
    fn lose_upstream(&mut self, error: &UpstreamError) {
        let had_one = self.upstream.take().is_some();
        self.publish_demand();
        if had_one && !self.told_settled {
            self.notify(match error {
                UpstreamError::Protocol(_) => Notice::Broken(error.to_string()),
                _ => Notice::UpstreamLost(error.to_string()),
            });
        }
    }
}

/// Wakes a range; the only failures are an empty range and an address space that is gone.
fn wake(space: &impl AddressSpace, at: TaskAddr, bytes: u64) {
    let _ = space.wake(at, bytes);
}

/// What there is to do.
#[derive(Clone, Copy, Debug)]
pub struct Ready {
    /// A command is there.
    pub command: bool,
    /// The page source can be read.
    pub upstream: bool,
    /// How many address spaces were looked at: the first ones that are [served](FaultLoop::served).
    pub served: usize,
}
