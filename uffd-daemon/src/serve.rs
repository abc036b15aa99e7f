//! Listens for moves: says hello to strangers, opens sessions, and brings their connections to them.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use host::interrupt::Interrupt;
use host::mailbox::{Post, mailbox};
use host::report::Report;
use host::state_dir::StateDir;
use host::waiting;
use protocol::link::{Accepted, ControlChannel, Endpoint, LinkError, Listener, Stream};
use protocol::wire::hello::{Hello, Refusal, Role, SessionId, SessionSecret};

use crate::limits;
use crate::session::{Arrivals, Door, Session, SessionConfig, SessionError, StateConfig, door};
use crate::takeover::{self, Taken};
use crate::tombstone;

/// How a daemon serves.
#[derive(Debug)]
pub struct ServeConfig {
    /// Where it listens.
    pub listen: Endpoint,
    /// What every session has in common.
    pub session: SessionConfig,
    /// End after the first move.
    pub once: bool,
    /// Where the report of each move goes.
    pub json: Option<PathBuf>,
    /// Take no new moves, only those whose daemon has ended.
    pub only_orphans: bool,
}

/// A daemon that could not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// It could not listen.
    #[error("{0}; choose another address or port, or end who listens there")]
    Listen(#[from] LinkError),
    /// A system call failed.
    #[error("cannot serve: {0}")]
    Io(#[from] io::Error),
}

type Registry = Arc<Mutex<Sessions>>;

#[derive(Default)]
struct Sessions {
    /// Those that are open: their secret, and where their connections are wanted.
    open: HashMap<SessionId, Entry>,
    /// Those of which nothing is left here, the latest last: a source that has missed it asks again.
    rolled_back: VecDeque<(SessionId, SessionSecret)>,
    /// Where word of them is left.
    dir: Option<StateDir>,
}

impl Sessions {
    /// Forgets a session that has ended.
    fn end(&mut self, session: SessionId, rolled_back: bool) {
        let Some(Entry { secret, .. }) = self.open.remove(&session) else { return };
        if rolled_back {
            if self.rolled_back.len() >= limits::ROLLED_BACK_MAX {
                let oldest = self.rolled_back.pop_front();
                if let Some((dir, (session, _))) = self.dir.as_ref().zip(oldest) {
                    let _ = tombstone::take_back(dir, session);
                }
            }
            self.rolled_back.push_back((session, secret));
        }
    }

    /// Why a connection cannot be brought to a session that is not open.
    fn refusal(&self, hello: &Hello) -> Refusal {
        let known = self.rolled_back.contains(&(hello.session, hello.secret));
        if known && hello.resumes() { Refusal::RolledBack } else { Refusal::Session }
    }
}

struct Entry {
    secret: SessionSecret,
    door: Door,
}

/// A session that has ended.
struct Finished {
    session: SessionId,
    /// The status of its move; none if there was no move because it was refused.
    status: Option<u8>,
    /// Nothing of it is left here.
    rolled_back: bool,
}

/// Listens. A daemon that was killed has its descriptors until its last thread has ended, and then they are closed one by
/// one, which takes a while on a busy host: who follows it waits for the port.
fn bind(config: &ServeConfig) -> Result<Listener, LinkError> {
    let follows = || {
        let wanted = config.listen.to_string();
        let found = config.session.state.as_ref().and_then(|state| takeover::find(&state.dir).ok());
        found.unwrap_or_default().iter().any(|found| found.description.listen == wanted)
    };
    let deadline = Instant::now() + limits::PORT_PATIENCE;
    loop {
        match Listener::bind(&config.listen) {
            Err(LinkError::Io { source, .. })
                if source.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline && follows() =>
            {
                std::thread::sleep(limits::PORT_LOOK);
            }
            bound => return bound,
        }
    }
}

/// Serves until interrupted, or with `once` until the first move is over; returns the exit status.
///
/// # Errors
/// [`ServeError`].
pub fn serve(mut config: ServeConfig) -> Result<u8, ServeError> {
    let interrupt = Interrupt::install()?;
    let listener = bind(&config)?;
    let endpoint = listener.endpoint()?.to_string();
    if let Some(state) = &mut config.session.state {
        state.listen.clone_from(&endpoint);
    }
    let registry = Registry::default();
    let strangers = Arc::new(AtomicUsize::new(0));
    let (done, finished) = mailbox()?;
    // Closed when the daemon is told to stop: every session sees it.
    let (stop, stopped) = UnixStream::pair()?;
    let mut stop = Some(stop);
    let context = Arc::new(Context {
        session: config.session,
        json: config.json,
        once: config.once,
        stopped: Arc::new(stopped),
        done,
        only_orphans: config.only_orphans,
        registry: registry.clone(),
    });
    // Before anybody can dial: a source that is told that its session is unknown gives up.
    let adopted = context.adopt_orphans(&endpoint);
    context.remember(&endpoint);
    if context.only_orphans && adopted == 0 {
        return Ok(0);
    }
    // Scripts wait for this line.
    println!("listening on {endpoint}");
    let _ = io::Write::flush(&mut io::stdout());
    let mut worst = 0;
    // With `once`: a move is over. Others that are under way by then, taken over or not, need this daemon as well.
    let mut last = false;
    loop {
        let fds = [interrupt.as_fd(), finished.as_fd(), listener.as_fd()];
        let [interrupted, over, connected] = waiting::readable(fds, None)?;
        if interrupted && interrupt.take() {
            // Looked at before anybody is told: a session that ends at once has a status of its own.
            let idle = lock(&registry).open.is_empty();
            stop = None;
            if idle {
                return Ok(0);
            }
            tracing::warn!("moves that have not switched over are rolled back; others finish first");
        }
        if over {
            for Finished { session, status, rolled_back } in finished.empty() {
                // Here, so that whoever finds no session has heard how each of them ended.
                lock(&registry).end(session, rolled_back);
                // A refusal is no move: a daemon that serves one move goes on waiting for it.
                worst = worst.max(status.unwrap_or(0));
                last |= context.once && status.is_some();
                let no_more = last || stop.is_none() || context.only_orphans;
                if no_more && lock(&registry).open.is_empty() {
                    return Ok(if context.only_orphans || context.once {
                        worst
                    } else {
                        status.unwrap_or(0)
                    });
                }
            }
        }
        if connected {
            match listener.accept() {
                Ok(stranger) if strangers.load(Ordering::Relaxed) < limits::STRANGERS_MAX => {
                    strangers.fetch_add(1, Ordering::Relaxed);
                    let (context, strangers) = (context.clone(), strangers.clone());
                    std::thread::spawn(move || {
                        let opened = context.greet(stranger);
                        strangers.fetch_sub(1, Ordering::Relaxed);
                        if let Some((id, session)) = opened {
                            context.run(id, || session.run());
                        }
                    });
                }
                // Too many at once: the connection is dropped, honest peers dial again.
                Ok(stranger) => {
                    tracing::warn!(peer = stranger.peer(), "too many connections without a hello")
                }
                // QUIC listens with more datagrams than those that open connections.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => tracing::warn!("accept failed: {error}"),
            }
        }
    }
}

fn lock(registry: &Registry) -> std::sync::MutexGuard<'_, Sessions> {
    registry.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Context {
    session: SessionConfig,
    json: Option<PathBuf>,
    once: bool,
    only_orphans: bool,
    stopped: Arc<UnixStream>,
    done: Post<Finished>,
    registry: Registry,
}

impl Context {
    /// Reads a stranger's hello: opens a session, or brings a lane to one.
    fn greet(&self, stranger: Accepted) -> Option<(SessionId, Session)> {
        let peer = stranger.peer();
        let (stream, hello) = match stranger.greet() {
            Ok(greeted) => greeted,
            Err(error) => {
                tracing::warn!(peer, "{error}");
                return None;
            }
        };
        let verdict = hello.negotiate().and_then(|version| self.admit(&hello).map(|door| (version, door)));
        let reply = verdict.as_ref().map(|(version, _)| *version).map_err(|refusal| *refusal);
        if let Err(error) = stream.answer(hello.role, reply) {
            tracing::warn!(peer, "hello could not be answered: {error}");
            self.forget(&hello);
            return None;
        }
        match verdict {
            Ok((_, Admitted::Connection(door))) => {
                door.bring(&hello, stream);
                None
            }
            Ok((_, Admitted::Session(arrivals))) => {
                let Ok(control) = ControlChannel::new(stream) else {
                    self.forget(&hello);
                    return None;
                };
                let stopped = self.stopped.clone();
                Some((hello.session, Session::new(self.session.clone(), &hello, control, arrivals, stopped)))
            }
            Err(refusal) => {
                tracing::warn!(peer, "refused: {refusal}");
                None
            }
        }
    }

    fn admit(&self, hello: &Hello) -> Result<Admitted, Refusal> {
        let mut sessions = lock(&self.registry);
        match (sessions.open.get(&hello.session), hello.role) {
            (None, Role::Control) if !hello.resumes() => {
                if sessions.open.len() >= limits::SESSIONS_MAX || self.only_orphans {
                    return Err(Refusal::Busy);
                }
                let (door, arrivals) = door().map_err(|_| Refusal::Busy)?;
                sessions.open.insert(hello.session, Entry { secret: hello.secret, door });
                Ok(Admitted::Session(arrivals))
            }
            (Some(entry), _) if entry.secret == hello.secret => {
                entry.door.admits(hello).map(|()| Admitted::Connection(entry.door.clone()))
            }
            (Some(_), _) => Err(Refusal::Session),
            (None, _) => Err(sessions.refusal(hello)),
        }
    }

    fn forget(&self, hello: &Hello) {
        if hello.role == Role::Control && !hello.resumes() {
            lock(&self.registry).end(hello.session, false);
        }
    }

    /// Learns of which moves whose daemon listened at `endpoint` nothing is here.
    fn remember(&self, endpoint: &str) {
        let Some(StateConfig { dir, .. }) = &self.session.state else { return };
        let mut sessions = lock(&self.registry);
        sessions.dir = Some(dir.clone());
        match tombstone::find(dir, endpoint) {
            Ok(found) => sessions.rolled_back.extend(found),
            Err(error) => tracing::error!("cannot look for moves that never ran: {error}"),
        }
    }

    /// Takes over every move whose daemon listened at `endpoint` and has ended: how many.
    fn adopt_orphans(self: &Arc<Self>, endpoint: &str) -> usize {
        let Some(state) = &self.session.state else { return 0 };
        let found = takeover::find(&state.dir).unwrap_or_else(|error| {
            tracing::error!("cannot look for moves to take over: {error}");
            Vec::new()
        });
        let mut adopted = 0;
        for orphan in found.into_iter().filter(|found| found.description.listen == endpoint) {
            // Nobody else listens here, so its daemon has ended, or is about to.
            let Some(orphan) = orphan.left_alone(limits::PORT_PATIENCE) else { continue };
            let (id, _) = orphan.description.session();
            match orphan.take().map_err(|error| error.to_string()).and_then(|taken| self.adopt(taken)) {
                Ok(()) => adopted += 1,
                Err(error) => tracing::error!(session = %id, "cannot take over: {error}"),
            }
        }
        adopted
    }

    fn adopt(self: &Arc<Self>, taken: Taken) -> Result<(), String> {
        let (id, secret) = taken.description.session();
        let (door, arrivals) = door().map_err(|error| error.to_string())?;
        // What stands for the connections that are lost.
        let (lost, _) = UnixStream::pair().map_err(|error| error.to_string())?;
        let control = ControlChannel::new(Stream::Unix(lost)).map_err(|error| error.to_string())?;
        lock(&self.registry).open.insert(id, Entry { secret, door });
        let hello = Hello::new(Role::Control, id, secret);
        let session = Session::new(self.session.clone(), &hello, control, arrivals, self.stopped.clone());
        let missing = taken.tree.remote_pages();
        tracing::warn!(session = %id, missing, "taken over from a daemon that has ended");
        let context = self.clone();
        std::thread::spawn(move || context.run(id, || session.run_taken_over(taken)));
        Ok(())
    }

    fn run(&self, id: SessionId, session: impl FnOnce() -> (Report, Result<(), SessionError>)) {
        let session = std::panic::AssertUnwindSafe(session);
        let ended = std::panic::catch_unwind(|| { session }.0());
        let Ok((report, result)) = ended else {
            // The panic has been printed; the daemon must not wait for this session for ever.
            self.done.send(Finished { session: id, status: Some(1), rolled_back: false });
            return;
        };
        self.publish(&report, &result);
        let refused = matches!(result, Err(SessionError::Refused(_)));
        let rolled_back = matches!(result, Err(SessionError::RolledBack(_)));
        let status = (!refused).then(|| report.outcome.exit_status());
        self.done.send(Finished { session: id, status, rolled_back });
    }

    fn publish(&self, report: &Report, result: &Result<(), SessionError>) {
        if let Some(path) = &self.json {
            if let Err(error) = report.write_json(path) {
                tracing::error!("cannot write {}: {error}", path.display());
            }
        }
        match result {
            Ok(()) => tracing::info!(session = report.session, "{}", report.in_words()),
            Err(error) => tracing::error!(session = report.session, "{error}"),
        }
    }
}

enum Admitted {
    /// It opens a session.
    Session(Arrivals),
    /// It belongs to one.
    Connection(Door),
}
