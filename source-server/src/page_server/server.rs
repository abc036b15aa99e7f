//! The listener, the clients' threads, and when the server ends.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread::{self, Scope};
use std::time::Instant;

use host::interrupt::Interrupt;
use host::mailbox::{Mailbox, Post, mailbox};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use protocol::criu::page_server::HeaderLayout;
use protocol::link::{Endpoint, Listener, Stream};

use super::connection::{Connection, ConnectionError, Ending, end_by_reset, end_cleanly, tune};
use super::error::PageServerError;
use super::limits;
use super::pages::Pages;

/// Serves `pages` at `endpoint` until a client has closed its session and none is left, or a signal comes. Takes
/// over the process's signals, and says `listening on ADDR:PORT` on standard output when clients may connect.
/// The header layout is told from each client's first request if it is not given.
///
/// # Errors
/// [`PageServerError`] if nobody can connect, if the pages change meanwhile, or if clients are left behind.
pub fn serve(
    pages: &Pages,
    endpoint: &Endpoint,
    layout: Option<HeaderLayout>,
) -> Result<(), PageServerError> {
    let listener = Listener::bind(endpoint).map_err(PageServerError::Listen)?;
    let interrupt = Interrupt::install().map_err(PageServerError::io("take over signals"))?;
    let server = Server::new(pages, listener, layout)?;
    server.announce();
    server.run(interrupt.as_fd())
}

struct Server<'a> {
    pages: &'a Pages,
    listener: Listener,
    layout: Option<HeaderLayout>,
    /// How each client's session ended; `None` if it broke.
    endings: Mailbox<Option<Ending>>,
    post: Post<Option<Ending>>,
    /// Shut down to let every client's thread end.
    stop: UnixStream,
    stopped: UnixStream,
    /// When the pages were last known to be what they were.
    checked: Instant,
}

#[derive(Debug, Default)]
struct Clients {
    open: usize,
    some_closed: bool,
}

#[derive(Debug)]
struct Ready {
    interrupt: bool,
    listener: bool,
}

impl<'a> Server<'a> {
    fn new(
        pages: &'a Pages,
        listener: Listener,
        layout: Option<HeaderLayout>,
    ) -> Result<Self, PageServerError> {
        let failed = PageServerError::io("prepare its sockets");
        // A client that is gone before it is accepted must not make accept wait for the next.
        listener.set_nonblocking(true).map_err(&failed)?;
        let (post, endings) = mailbox().map_err(&failed)?;
        let (stop, stopped) = UnixStream::pair().map_err(&failed)?;
        Ok(Self { pages, listener, layout, endings, post, stop, stopped, checked: Instant::now() })
    }

    /// Tells whoever waits for it, on standard output, where clients may connect.
    fn announce(&self) {
        let told = self.listener.endpoint().and_then(|endpoint| {
            let mut out = io::stdout().lock();
            writeln!(out, "listening on {endpoint}")?;
            out.flush()
        });
        if let Err(error) = told {
            tracing::warn!("cannot write the address to standard output: {error}");
        }
    }

    fn run(mut self, interrupt: BorrowedFd<'_>) -> Result<(), PageServerError> {
        let stopped = self.stopped.try_clone().map_err(PageServerError::io("prepare its sockets"))?;
        thread::scope(|scope| {
            let result = self.run_in(scope, stopped.as_fd(), interrupt);
            // Every client's thread sees it, and the scope waits for them.
            let _ = self.stop.shutdown(std::net::Shutdown::Both);
            result
        })
    }

    fn run_in<'scope>(
        &mut self,
        scope: &'scope Scope<'scope, '_>,
        stopped: BorrowedFd<'scope>,
        interrupt: BorrowedFd<'_>,
    ) -> Result<(), PageServerError>
    where
        'a: 'scope,
    {
        let mut clients = Clients::default();
        while !(clients.some_closed && clients.open == 0) {
            let ready =
                self.wait(interrupt, clients.open).map_err(PageServerError::io("wait for clients"))?;
            if ready.interrupt {
                return match clients.open {
                    0 => Ok(()),
                    open => Err(PageServerError::Interrupted(open)),
                };
            }
            if self.pages.may_change() && self.checked.elapsed() >= limits::STILL_INTERVAL {
                self.pages.check_still()?;
                self.checked = Instant::now();
            }
            // Before the endings: a client that waits at the door keeps the server up.
            if ready.listener && self.accept(scope, stopped) {
                clients.open += 1;
            }
            for ending in self.endings.empty() {
                clients.open -= 1;
                clients.some_closed |= ending == Some(Ending::Closed);
            }
        }
        tracing::info!("a client has closed its session and none is left: done");
        Ok(())
    }

    fn wait(&self, interrupt: BorrowedFd<'_>, open: usize) -> io::Result<Ready> {
        let mut fds = vec![
            PollFd::new(interrupt, PollFlags::POLLIN),
            PollFd::new(self.endings.as_fd(), PollFlags::POLLIN),
        ];
        if open < limits::CLIENTS_MAX {
            fds.push(PollFd::new(self.listener.as_fd(), PollFlags::POLLIN));
        }
        let timeout = if self.pages.may_change() {
            PollTimeout::try_from(limits::STILL_INTERVAL).unwrap_or(PollTimeout::MAX)
        } else {
            PollTimeout::NONE
        };
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(nix::Error::EINTR) => return Ok(Ready { interrupt: false, listener: false }),
            Err(error) => return Err(error.into()),
        }
        let ready = |position: usize| fds.get(position).is_some_and(|fd| fd.any().unwrap_or(true));
        Ok(Ready { interrupt: ready(0), listener: ready(2) })
    }

    /// Lets one client in; false if there is none, or it cannot be served.
    fn accept<'scope>(&self, scope: &'scope Scope<'scope, '_>, stopped: BorrowedFd<'scope>) -> bool
    where
        'a: 'scope,
    {
        let (pages, layout) = (self.pages, self.layout);
        let let_in = || {
            let stream = self.listener.accept()?.into_plain()?;
            end_by_reset(&stream);
            let post = self.post.clone();
            thread::Builder::new().name("client".into()).spawn_scoped(scope, move || {
                let mut notice = Notice { post, ending: None };
                notice.ending = attend(pages, stream, stopped, layout);
            })
        };
        match let_in() {
            Ok(_) => true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(error) => {
                tracing::warn!("cannot let a client in: {error}");
                thread::sleep(limits::ACCEPT_PAUSE);
                false
            }
        }
    }
}

/// Reports the end of a client's thread, however it ends.
struct Notice {
    post: Post<Option<Ending>>,
    ending: Option<Ending>,
}

impl Drop for Notice {
    fn drop(&mut self) {
        self.post.send(self.ending);
    }
}

/// Serves one client; its connection is closed when this returns, with a reset unless its session ended well: a
/// clean end would tell it that it has everything.
fn attend(
    pages: &Pages,
    stream: Stream,
    stopped: BorrowedFd<'_>,
    layout: Option<HeaderLayout>,
) -> Option<Ending> {
    let span = tracing::info_span!("client", peer = stream.peer());
    let _entered = span.enter();
    tune(&stream);
    tracing::info!("connected");
    let mut connection = Connection::new(pages, &stream, stopped, layout);
    let result = connection.serve();
    let served = connection.served();
    let (requests, pages) = (served.requests, served.pages);
    if result.is_ok() {
        end_cleanly(&stream);
    }
    match result {
        Ok(Ending::Closed) => {
            tracing::info!(requests, pages, "session closed");
            Some(Ending::Closed)
        }
        Ok(Ending::Left) => {
            tracing::warn!(requests, pages, "client left without closing its session, it may come back");
            Some(Ending::Left)
        }
        Err(error) => {
            match error {
                ConnectionError::Stopped => tracing::warn!(requests, pages, "client cut off: {error}"),
                _ => tracing::error!(requests, pages, "client cut off: {error}"),
            }
            None
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Read;
    use std::net::{SocketAddr, TcpStream};
    use std::thread::JoinHandle;
    use std::time::Duration;

    use protocol::criu::checkpoint::{Checkpoint, TaskImages};
    use protocol::criu::images::{Inventory, PageFlags, PagemapEntry, Vma, vma_status};
    use protocol::criu::page_server::{Command, Header, MAX_HEADER_LEN};
    use protocol::units::{ImageAddr, PAGE_SIZE, PageRun, TaskId};
    use tempfile::TempDir;

    use super::*;

    const TASK: TaskId = TaskId(5);
    const LAYOUTS: [HeaderLayout; 2] = [HeaderLayout::Compact, HeaderLayout::Wide];

    fn run(start: u64, pages: u64) -> PageRun {
        PageRun::new(ImageAddr::aligned(start << 12).unwrap(), pages).unwrap()
    }

    /// Images of one task. Each of its present pages holds its own number, cut to a byte.
    pub(in super::super) fn images(entries: &[(u64, u64, PageFlags)]) -> TempDir {
        let vma = Vma {
            start: ImageAddr::aligned(16 << 12).unwrap(),
            end: ImageAddr::aligned(1 << 32).unwrap(),
            pgoff: 0,
            shmid: 0,
            prot: 3,
            flags: 0x22,
            status: vma_status::REGULAR | vma_status::ANON_PRIVATE,
            madv: 0,
        };
        let entry = |&(start, pages, flags)| PagemapEntry { run: run(start, pages), flags, wide: true };
        let task = TaskImages {
            id: TASK,
            ppid: 0,
            pgid: 5,
            sid: 5,
            threads: vec![5],
            comm: "task".into(),
            alive: true,
            vmas: vec![vma],
            pagemap: entries.iter().map(entry).collect(),
            pages_id: 1,
        };
        let present = entries.iter().filter(|(.., flags)| flags.present);
        let numbers = present.flat_map(|(start, pages, _)| *start..start + pages);
        let data: Vec<u8> = numbers.flat_map(|number| [number.to_le_bytes()[0]; PAGE_SIZE]).collect();
        let dir = TempDir::new().unwrap();
        Checkpoint { inventory: Inventory::default(), tasks: vec![task] }.write(dir.path()).unwrap();
        std::fs::write(dir.path().join("pages-1.img"), data).unwrap();
        dir
    }

    /// A server over pages 16 to 2063 of task 5.
    struct Rig {
        addr: SocketAddr,
        interrupt: UnixStream,
        server: JoinHandle<Result<(), PageServerError>>,
    }

    impl Rig {
        fn start(layout: Option<HeaderLayout>) -> Self {
            let dir = images(&[(16, 2048, PageFlags::LAZY_PRESENT)]);
            let pages = Pages::of_images(dir.path()).unwrap();
            let listener = Listener::bind(&Endpoint::Tcp(([127, 0, 0, 1], 0).into())).unwrap();
            let Endpoint::Tcp(addr) = listener.endpoint().unwrap() else { panic!() };
            let (interrupt, interrupted) = UnixStream::pair().unwrap();
            let server =
                thread::spawn(move || Server::new(&pages, listener, layout)?.run(interrupted.as_fd()));
            Self { addr, interrupt, server }
        }

        fn client(&self, layout: HeaderLayout) -> Client {
            let stream = TcpStream::connect(self.addr).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            Client { stream, layout }
        }

        fn interrupt(mut self) -> Result<(), PageServerError> {
            self.interrupt.write_all(&[1]).unwrap();
            self.server.join().unwrap()
        }

        /// Ends the server as a client does. It is up until then.
        fn close(self) {
            let client = self.client(HeaderLayout::Wide);
            client.get(16, 1);
            assert_eq!(client.pages(16, 1), [16]);
            client.close(Command::Close);
            self.server.join().unwrap().unwrap();
        }
    }

    struct Client {
        stream: TcpStream,
        layout: HeaderLayout,
    }

    impl Client {
        fn send(&self, header: &Header) {
            let mut bytes = [0; MAX_HEADER_LEN];
            let len = header.encode(self.layout, &mut bytes).unwrap();
            (&self.stream).write_all(&bytes[..len]).unwrap();
        }

        fn get(&self, page: u64, pages: u64) {
            self.send(&Header::get(TASK, run(page, pages)));
        }

        /// The answer to a request: what is in each page.
        fn pages(&self, page: u64, asked: u64) -> Vec<u8> {
            let mut bytes = vec![0; self.layout.len()];
            (&self.stream).read_exact(&mut bytes).unwrap();
            let header = Header::decode(self.layout, &bytes).unwrap();
            let run = header.check_reply_to(&Header::get(TASK, run(page, asked))).unwrap();
            let mut data = vec![0; usize::try_from(run.pages).unwrap() * PAGE_SIZE];
            (&self.stream).read_exact(&mut data).unwrap();
            data.chunks(PAGE_SIZE)
                .map(|page| {
                    assert!(page.iter().all(|byte| *byte == page[0]));
                    page[0]
                })
                .collect()
        }

        fn close(self, command: Command) {
            self.send(&Header::close(command));
            let mut status = [0xff; 4];
            (&self.stream).read_exact(&mut status).unwrap();
            assert_eq!(status, [0; 4]);
        }

        /// The server cuts this client off with an error, not with an end.
        fn is_reset(&self) -> bool {
            let mut sink = vec![0; 1 << 20];
            loop {
                match (&self.stream).read(&mut sink) {
                    Ok(0) => return false,
                    Ok(_) => {}
                    Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
                }
            }
        }
    }

    #[test]
    fn requests_are_answered_in_order_in_both_layouts() {
        for layout in LAYOUTS {
            for given in [None, Some(layout)] {
                let rig = Rig::start(given);
                let client = rig.client(layout);
                client.get(18, 3);
                client.get(17, 1);
                client.get(18, 1);
                assert_eq!(client.pages(18, 3), [18, 19, 20]);
                assert_eq!(client.pages(17, 1), [17]);
                assert_eq!(client.pages(18, 1), [18]);
                client.close(Command::Close);
                rig.server.join().unwrap().unwrap();
            }
        }
    }

    #[test]
    fn a_request_split_anywhere_is_one() {
        let rig = Rig::start(None);
        let client = rig.client(HeaderLayout::Wide);
        client.stream.set_nodelay(true).unwrap();
        let mut bytes = [0; MAX_HEADER_LEN];
        Header::get(TASK, run(30, 2)).encode(HeaderLayout::Wide, &mut bytes).unwrap();
        for byte in bytes {
            (&client.stream).write_all(&[byte]).unwrap();
        }
        assert_eq!(client.pages(30, 2), [30, 31]);
        client.close(Command::ForceClose);
        rig.server.join().unwrap().unwrap();
    }

    #[test]
    fn an_answer_has_what_there_is_but_never_too_much() {
        let rig = Rig::start(Some(HeaderLayout::Wide));
        let client = rig.client(HeaderLayout::Wide);
        client.get(2060, 1 << 30);
        assert_eq!(client.pages(2060, 1 << 30), [12, 13, 14, 15]);
        client.get(16, 1 << 30);
        assert_eq!(client.pages(16, 1 << 30).len(), 1024);
        client.close(Command::Close);
        rig.server.join().unwrap().unwrap();
    }

    #[test]
    fn who_asks_for_what_is_not_there_is_reset_and_others_are_served() {
        let rig = Rig::start(None);
        let other = rig.client(HeaderLayout::Compact);
        for (task, page) in [(5, 15), (5, 2064), (6, 16)] {
            let client = rig.client(HeaderLayout::Wide);
            client.send(&Header::get(TaskId(task), run(page, 1)));
            assert!(client.is_reset(), "task {task} page {page}");
        }
        other.get(16, 1);
        assert_eq!(other.pages(16, 1), [16]);
        other.close(Command::Close);
        rig.server.join().unwrap().unwrap();
    }

    #[test]
    fn malformed_requests_are_cut_off() {
        let rig = Rig::start(None);
        let wide = |header: Header| {
            let mut bytes = [0; MAX_HEADER_LEN];
            header.encode(HeaderLayout::Wide, &mut bytes).unwrap();
            bytes.to_vec()
        };
        let get = Header::get(TASK, run(16, 1));
        for (bytes, what) in [
            (b"GET / HTTP/1.1\r\nHost: example\r\n\r\n".to_vec(), "another protocol"),
            (wide(Header { pages: 0, ..get }), "no pages"),
            (wide(Header { pages: u64::MAX, ..get }), "more pages than there are addresses"),
            (wide(Header { addr: 0x10_001, ..get }), "an address inside a page"),
            (wide(Header { dst: 0, ..get }), "no pid"),
            (wide(Header { dst: u64::MAX, ..get }), "too large a pid"),
            (wide(Header::reply(TASK, run(16, 1))), "an answer"),
            (wide(Header { command: Command::Open2, ..get }), "a dump"),
        ] {
            let client = rig.client(HeaderLayout::Wide);
            (&client.stream).write_all(&bytes).unwrap();
            assert!(client.is_reset(), "{what}");
        }
        let client = rig.client(HeaderLayout::Wide);
        (&client.stream).write_all(&wide(get)[..31]).unwrap();
        client.stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(client.is_reset(), "half a request");
        rig.close();
    }

    #[test]
    fn a_client_that_leaves_without_closing_may_come_back() {
        let rig = Rig::start(None);
        drop(rig.client(HeaderLayout::Wide));
        let client = rig.client(HeaderLayout::Wide);
        client.get(16, 1);
        assert_eq!(client.pages(16, 1), [16]);
        drop(client);
        rig.close();
    }

    #[test]
    fn a_first_close_ends_it_in_both_layouts() {
        for layout in LAYOUTS {
            let rig = Rig::start(None);
            rig.client(layout).close(Command::Close);
            rig.server.join().unwrap().unwrap();
        }
    }

    #[test]
    fn more_behind_a_close_is_an_error() {
        let rig = Rig::start(None);
        let client = rig.client(HeaderLayout::Compact);
        client.send(&Header::close(Command::Close));
        client.get(16, 1);
        assert!(client.is_reset());
        rig.close();
    }

    #[test]
    fn it_ends_only_when_the_last_client_is_gone() {
        let rig = Rig::start(None);
        let stays = rig.client(HeaderLayout::Wide);
        stays.get(16, 1);
        assert_eq!(stays.pages(16, 1), [16]);
        rig.client(HeaderLayout::Compact).close(Command::Close);
        // The other's end is noticed before a later client is accepted, so the server has lived through it.
        drop(rig.client(HeaderLayout::Wide));
        stays.get(20, 2);
        assert_eq!(stays.pages(20, 2), [20, 21]);
        drop(stays);
        rig.server.join().unwrap().unwrap();
    }

    #[test]
    fn an_interrupt_cuts_off_even_who_does_not_read() {
        let rig = Rig::start(None);
        let client = rig.client(HeaderLayout::Wide);
        for _ in 0..16 {
            client.get(16, 1024);
        }
        assert_eq!(client.pages(16, 1024).len(), 1024);
        let error = rig.interrupt().unwrap_err();
        assert!(matches!(error, PageServerError::Interrupted(1)), "{error}");
        assert!(client.is_reset());
    }

    #[test]
    fn an_interrupt_without_clients_is_an_end() {
        Rig::start(None).interrupt().unwrap();
    }

    #[test]
    fn an_address_in_use_is_refused() {
        let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let dir = images(&[]);
        let pages = Pages::of_images(dir.path()).unwrap();
        let error = serve(&pages, &Endpoint::Tcp(holder.local_addr().unwrap()), None).unwrap_err();
        assert!(matches!(error, PageServerError::Listen(_)), "{error}");
        assert_eq!(error.exit_status(), 2);
    }
}
