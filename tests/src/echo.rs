//! A server with an established connection, and its client: every request is answered with what was asked, out of
//! the server's memory, on the one connection they have.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use experiments::lab::{Host, Lab};
use experiments::workload;
use protocol::units::PAGE_SIZE;

use crate::{STEP, eventually};

/// Pages that the server answers from.
pub const PAGES: usize = 4096;
const PORT: u16 = 7400;
/// Pause between two requests.
const PAUSE: Duration = Duration::from_millis(1);

/// Serves until it is killed: reads a number, answers with it and with what its page of that number holds.
///
/// # Errors
/// If it cannot listen.
pub fn serve(address: SocketAddr) -> anyhow::Result<()> {
    workload::detach()?;
    let mut pages = vec![0_u8; PAGES * PAGE_SIZE];
    for (number, page) in (1_u64..).zip(pages.chunks_exact_mut(PAGE_SIZE)) {
        page[..8].copy_from_slice(&number.to_le_bytes());
        page[PAGE_SIZE - 8..].copy_from_slice(&number.to_le_bytes());
    }
    let pages = Arc::new(pages);
    let listener = TcpListener::bind(address)?;
    loop {
        let (mut stream, _) = listener.accept()?;
        let pages = pages.clone();
        std::thread::spawn(move || {
            let mut request = [0; 8];
            while stream.read_exact(&mut request).is_ok() {
                let number = usize::try_from(u64::from_le_bytes(request)).unwrap_or(0);
                let page = &pages[number % PAGES * PAGE_SIZE..][..PAGE_SIZE];
                let answer = [&request[..], &page[..8], &page[PAGE_SIZE - 8..]].concat();
                if stream.write_all(&answer).is_err() {
                    return;
                }
            }
        });
    }
}

/// The server as a process of a lab's source. Dropping it kills it where it was started.
#[derive(Debug)]
pub struct Server {
    child: Child,
    address: SocketAddr,
}

impl Server {
    /// Starts `program`, which calls [`serve`].
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    #[must_use]
    pub fn start(lab: &Lab, program: &Path, address: Ipv4Addr) -> Self {
        let address = SocketAddr::from((address, PORT));
        let mut command: Command = lab.run_in(Host::Source, program);
        command.arg(address.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self { child: command.spawn().expect("nsenter"), address }
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client that goes on asking over the connection it has.
#[derive(Debug)]
pub struct Client {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<Duration, String>>>,
}

impl Client {
    /// Connects from a lab's client as soon as the server listens, and starts to ask.
    ///
    /// # Panics
    /// If nobody listens.
    #[track_caller]
    #[must_use]
    pub fn connect(lab: &Lab, address: SocketAddr) -> Self {
        let stream = eventually("a server that listens", STEP, || {
            lab.inside(Host::Client, || TcpStream::connect_timeout(&address, STEP)).expect("a lab").ok()
        });
        let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (told, count) = (stop.clone(), answers.clone());
        let thread =
            std::thread::spawn(move || ask(stream, &told, &count).map_err(|error| error.to_string()));
        Self { stop, answers, thread: Some(thread) }
    }

    /// Waits for `more` answers from now on.
    ///
    /// # Panics
    /// If the connection is broken or an answer was wrong.
    #[track_caller]
    pub fn wait_answers(&mut self, more: u64) {
        let due = self.answers.load(SeqCst) + more;
        let came = eventually("answers on the same connection", STEP, || {
            let ended = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
            (ended || self.answers.load(SeqCst) >= due).then_some(!ended)
        });
        assert!(came, "the client ended: {:?}", self.end());
    }

    /// Ends it; returns the longest time that it waited for an answer.
    ///
    /// # Panics
    /// If its connection broke or an answer was wrong.
    #[track_caller]
    pub fn finish(mut self) -> Duration {
        self.end().unwrap_or_else(|error| panic!("the client: {error}"))
    }

    fn end(&mut self) -> Result<Duration, String> {
        self.stop.store(true, SeqCst);
        let thread = self.thread.take().ok_or("ended before")?;
        thread.join().map_err(|_| "it panicked")?
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
    }
}

fn ask(mut stream: TcpStream, stop: &AtomicBool, answers: &AtomicU64) -> anyhow::Result<Duration> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(STEP))?;
    let mut longest = Duration::ZERO;
    let mut number = 0_u64;
    while !stop.load(SeqCst) {
        // Strides over all pages: after a move most requests meet one that has not arrived.
        number += 1237;
        let asked = Instant::now();
        stream.write_all(&number.to_le_bytes())?;
        let mut answer = [0; 24];
        stream.read_exact(&mut answer)?;
        longest = longest.max(asked.elapsed());
        let stamp = (number % u64::try_from(PAGES)? + 1).to_le_bytes();
        let due = [number.to_le_bytes(), stamp, stamp].concat();
        anyhow::ensure!(answer[..] == due[..], "{number} was answered with {answer:?}");
        answers.fetch_add(1, SeqCst);
        std::thread::sleep(PAUSE);
    }
    Ok(longest)
}
