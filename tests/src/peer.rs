//! One side of the session protocol, played by the test: honest as far as it wants to be.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::time::{Duration, Instant};

use protocol::units::TaskId;
use protocol::wire::control::{Control, Dumped, ImageChunk, Offer};
use protocol::wire::frame::{HEADER_LEN, Header, encode_frame};
use protocol::wire::hello::{
    HELLO_LEN, HELLO_REPLY_LEN, Hello, HelloError, Refusal, Role, SessionId, SessionSecret, decode_reply,
    encode_reply,
};
use protocol::wire::limits::VERSION_MAX;

use crate::STEP;

/// A session of its own for each hello.
static SESSIONS: AtomicU8 = AtomicU8::new(1);

/// A connection to one of our programs.
#[derive(Debug)]
pub struct Peer {
    stream: TcpStream,
}

/// A hello that opens a session nobody has had.
#[must_use]
pub fn new_session() -> Hello {
    let id = SESSIONS.fetch_add(1, Relaxed);
    Hello::new(Role::Control, SessionId([id; 16]), SessionSecret([id ^ 0x55; 16]))
}

/// An offer that this host accepts: a task that needs nothing.
#[must_use]
pub fn offer() -> Offer {
    Offer {
        release: "0.1.0".into(),
        criu_version: "4.1".into(),
        machine: host::facts::machine(),
        cpu_flags: String::new(),
        root: TaskId(77_777),
        name: "nobody".into(),
        pids: vec![77_777],
        memory_bytes: 0,
        precopy_pages: 0,
        files: vec![],
        criu_options: vec![],
    }
}

/// A whole image in one piece.
#[must_use]
pub fn image(name: &str, data: &[u8]) -> Control {
    Control::Image(ImageChunk { name: name.into(), size: data.len() as u64, offset: 0, data: data.to_vec() })
}

/// The end of so many images.
#[must_use]
pub const fn dumped(images: u32) -> Control {
    Control::Dumped(Dumped { images, frozen_us: 1000, lazy_pages: 0, clean_pages: 0 })
}

/// The bytes of a message.
#[must_use]
pub fn bytes(message: &Control) -> Vec<u8> {
    let (kind, body) = message.encode();
    encode_frame(kind, 0, &body)
}

impl Peer {
    /// Connects.
    ///
    /// # Panics
    /// If nobody listens.
    #[track_caller]
    #[must_use]
    pub fn connect(address: &str) -> Self {
        Self::over(TcpStream::connect(address).expect("somebody who listens"))
    }

    fn over(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(STEP)).expect("a socket");
        stream.set_nodelay(true).expect("a socket");
        Self { stream }
    }

    /// Connects and says `hello`; the answer to it.
    ///
    /// # Panics
    /// If there is no answer.
    #[track_caller]
    pub fn hello(address: &str, hello: &Hello) -> (Self, Result<u16, HelloError>) {
        let mut peer = Self::connect(address);
        peer.send(&hello.encode());
        let mut reply = [0; HELLO_REPLY_LEN];
        peer.stream.read_exact(&mut reply).expect("an answer to a hello");
        (peer, decode_reply(&reply))
    }

    /// A session whose offer was accepted, with both its lanes.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    #[must_use]
    pub fn accepted(address: &str) -> (Self, [Self; 2]) {
        Self::accepted_with(address, offer())
    }

    /// As [`Peer::accepted`], for another offer.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    #[must_use]
    pub fn accepted_with(address: &str, offer: Offer) -> (Self, [Self; 2]) {
        let hello = new_session();
        let (mut control, answer) = Self::hello(address, &hello);
        answer.expect("an open session");
        control.say(&Control::Offer(offer));
        assert_eq!(control.receive(), Some(Control::Verdict(vec![])));
        let lanes = [Role::Fault, Role::Push].map(|role| {
            let (lane, answer) = Self::hello(address, &Hello { role, ..hello });
            answer.expect("a lane of an open session");
            lane
        });
        (control, lanes)
    }

    /// Sends bytes; a connection that was closed meanwhile takes them as well.
    pub fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// Sends a message.
    pub fn say(&mut self, message: &Control) {
        self.send(&bytes(message));
    }

    /// The next message; `None` if the connection ended.
    ///
    /// # Panics
    /// If nothing comes, or something malformed.
    #[track_caller]
    pub fn receive(&mut self) -> Option<Control> {
        let mut head = [0; HEADER_LEN];
        if let Err(error) = self.stream.read_exact(&mut head) {
            assert_ne!(error.kind(), ErrorKind::WouldBlock, "neither a message nor an end");
            return None;
        }
        let header = Header::decode(&head).expect("a frame of ours");
        let mut body = vec![0; header.body_len];
        self.stream.read_exact(&mut body).ok()?;
        Some(Control::decode(header.kind, &body).expect("a message of ours"))
    }

    /// The next bytes are these.
    ///
    /// # Panics
    /// If other ones come, or none.
    #[track_caller]
    pub fn assert_receives(&mut self, bytes: &[u8]) {
        let mut received = vec![0; bytes.len()];
        self.stream.read_exact(&mut received).expect("bytes");
        assert_eq!(received, bytes);
    }

    /// The next message that is no image.
    ///
    /// # Panics
    /// As [`Peer::receive`].
    #[track_caller]
    pub fn receive_no_image(&mut self) -> Option<Control> {
        loop {
            match self.receive() {
                Some(Control::Image(_)) => {}
                other => return other,
            }
        }
    }

    /// The other side ends the connection within `limit`, whatever it says before.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn assert_ends(&mut self, limit: Duration) {
        let begun = Instant::now();
        self.stream.set_read_timeout(Some(limit)).expect("a socket");
        let mut bytes = [0; 4096];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => return,
                Ok(_) => assert!(begun.elapsed() < limit, "still talking after {limit:?}"),
                Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("still open after {limit:?}"),
                Err(_) => return,
            }
        }
    }

    /// The other side gives the move up for a reason with `word` in it, and says that it is clean.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn assert_gives_up(&mut self, word: &str) {
        let reason = self.receive();
        assert!(matches!(&reason, Some(Control::Abort(why)) if why.contains(word)), "{word:?}: {reason:?}");
        assert_eq!(self.receive(), Some(Control::RolledBack));
        self.assert_ends(STEP);
    }
}

/// A destination that the test plays.
#[derive(Debug)]
pub struct Impostor {
    listener: TcpListener,
}

/// A session of an [`Impostor`].
#[derive(Debug)]
pub struct Session {
    /// The control connection.
    pub control: Peer,
    /// The fault lane.
    pub fault: Peer,
    /// The push lane.
    pub push: Peer,
}

impl Impostor {
    /// Listens.
    ///
    /// # Panics
    /// If there is no port.
    #[must_use]
    pub fn new() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").expect("a port") }
    }

    /// Where the source finds it.
    ///
    /// # Panics
    /// Never: it is bound.
    #[must_use]
    pub fn address(&self) -> String {
        self.listener.local_addr().expect("a bound socket").to_string()
    }

    /// Takes a connection with its hello, and answers with these bytes.
    ///
    /// # Panics
    /// If none comes.
    #[track_caller]
    #[must_use]
    pub fn answer(&self, reply: &[u8]) -> Peer {
        self.greet(reply).1
    }

    /// As [`Impostor::answer`], with the hello.
    #[track_caller]
    fn greet(&self, reply: &[u8]) -> (Hello, Peer) {
        use std::os::fd::AsFd;
        let comes = host::waiting::readable_within(self.listener.as_fd(), STEP).expect("poll");
        assert!(comes, "nobody connects");
        let mut peer = Peer::over(self.listener.accept().expect("a connection").0);
        let mut hello = [0; HELLO_LEN];
        peer.stream.read_exact(&mut hello).expect("a hello");
        peer.send(reply);
        (Hello::decode(&hello).expect("a hello"), peer)
    }

    /// Refuses the first connection.
    ///
    /// # Panics
    /// If none comes.
    #[track_caller]
    pub fn refuse(&self, refusal: Refusal) {
        self.answer(&encode_reply(Err(refusal))).assert_ends(STEP);
    }

    /// Takes a control connection and its offer.
    ///
    /// # Panics
    /// If none comes.
    #[track_caller]
    #[must_use]
    pub fn offered(&self) -> Peer {
        let mut control = self.answer(&encode_reply(Ok(VERSION_MAX)));
        assert!(matches!(control.receive(), Some(Control::Offer(_))));
        control
    }

    /// Accepts an offer and takes the lanes.
    ///
    /// # Panics
    /// If the source does not go that far.
    #[track_caller]
    #[must_use]
    pub fn accept(&self) -> Session {
        let mut control = self.offered();
        control.say(&Control::Verdict(vec![]));
        // In whichever order: they are dialled at once.
        let (first, second) =
            (self.greet(&encode_reply(Ok(VERSION_MAX))), self.greet(&encode_reply(Ok(VERSION_MAX))));
        let [fault, push] = match (first.0.role, second.0.role) {
            (Role::Fault, Role::Push) => [first.1, second.1],
            (Role::Push, Role::Fault) => [second.1, first.1],
            other => panic!("lanes of {other:?}"),
        };
        Session { control, fault, push }
    }
}

impl Default for Impostor {
    fn default() -> Self {
        Self::new()
    }
}

impl Session {
    /// Takes all images.
    ///
    /// # Panics
    /// If they do not come.
    #[track_caller]
    pub fn take_images(&mut self) {
        assert!(matches!(self.control.receive_no_image(), Some(Control::Dumped(_))));
    }

    /// Takes all images, pretends to have restored them, and takes the commit.
    ///
    /// # Panics
    /// If it does not come.
    #[track_caller]
    pub fn take_commit(&mut self) {
        self.take_images();
        self.control.say(&Control::Prepared);
        assert_eq!(self.control.receive(), Some(Control::Commit));
    }
}
