//! Connections: bytes in order, late, in pieces of any size; a cut keeps any beginning of what is on its way.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::wire::control::Control;
use protocol::wire::frame::{HEADER_LEN, Header, encode_frame};

use super::chance::{Chance, MS, SECOND, Us};

/// One direction of a connection.
#[derive(Debug, Default)]
struct Direction {
    flight: VecDeque<(Us, Vec<u8>)>,
    /// When the last of it arrives.
    last: Us,
    arrived: Vec<u8>,
    /// Nothing that is sent from now on arrives.
    cut: bool,
    /// When its reader learns that there is no more.
    ends_at: Option<Us>,
}

/// One end of a connection.
#[derive(Clone, Debug)]
pub struct Socket {
    chance: Chance,
    latency: Us,
    out: Arc<Mutex<Direction>>,
    inn: Arc<Mutex<Direction>>,
}

/// The peer has closed the connection, or it is lost.
#[derive(Clone, Copy, Debug)]
pub struct Ended;

fn lock(direction: &Mutex<Direction>) -> MutexGuard<'_, Direction> {
    direction.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Both ends of a connection whose bytes take at least `latency`.
#[must_use]
pub fn connect(chance: &Chance, latency: Us) -> (Socket, Socket) {
    let (forth, back) = (Arc::<Mutex<Direction>>::default(), Arc::<Mutex<Direction>>::default());
    let end = |out: &Arc<_>, inn: &Arc<_>| Socket {
        chance: chance.clone(),
        latency,
        out: Arc::clone(out),
        inn: Arc::clone(inn),
    };
    (end(&forth, &back), end(&back, &forth))
}

impl Socket {
    /// Hands bytes to the connection.
    pub fn send(&self, bytes: &[u8]) {
        let mut out = lock(&self.out);
        if out.cut {
            return;
        }
        // Now and then a packet is lost, and what follows waits for it.
        let late = if self.chance.once_in(50) { self.chance.between(1, 20) * MS } else { 0 };
        let at = self.chance.now() + self.latency + self.chance.between(0, self.latency) + late;
        out.last = out.last.max(at);
        let at = out.last;
        out.flight.push_back((at, bytes.to_vec()));
    }

    /// Bytes on their way out.
    #[must_use]
    pub fn unsent(&self) -> usize {
        lock(&self.out).flight.iter().map(|(_, bytes)| bytes.len()).sum()
    }

    /// Takes some of what has arrived, at most `most` bytes: perhaps nothing.
    ///
    /// # Errors
    /// [`Ended`] once all of it was taken.
    pub fn receive(&self, most: usize) -> Result<Vec<u8>, Ended> {
        let (mut inn, now) = (lock(&self.inn), self.chance.now());
        while inn.flight.front().is_some_and(|(at, _)| *at <= now) {
            let Some((_, bytes)) = inn.flight.pop_front() else { break };
            inn.arrived.extend(bytes);
        }
        if inn.arrived.is_empty() {
            let ended = inn.flight.is_empty() && inn.ends_at.is_some_and(|at| at <= now);
            return if ended { Err(Ended) } else { Ok(Vec::new()) };
        }
        // A frame may come in any pieces.
        let there = inn.arrived.len().min(most);
        let taken = if self.chance.once_in(4) { self.chance.below(there + 1) } else { there };
        Ok(inn.arrived.drain(..taken).collect())
    }

    /// Something can be received, or the end of it.
    #[must_use]
    pub fn is_readable(&self) -> bool {
        let (inn, now) = (lock(&self.inn), self.chance.now());
        let ended = inn.flight.is_empty() && inn.ends_at.is_some_and(|at| at <= now);
        !inn.arrived.is_empty() || inn.flight.front().is_some_and(|(at, _)| *at <= now) || ended
    }

    /// This end is closed: the peer gets what was sent, then the end.
    pub fn shutdown(&self) {
        let mut out = lock(&self.out);
        out.cut = true;
        let at = out.last.max(self.chance.now() + self.latency);
        out.ends_at = out.ends_at.or(Some(at));
        drop(out);
        let mut inn = lock(&self.inn);
        (inn.cut, inn.ends_at) = (true, Some(0));
        inn.flight.clear();
        inn.arrived.clear();
    }

    /// The connection is lost: of what is on its way any beginning arrives, and both sides learn of it some time.
    pub fn cut(&self) {
        // With a reset at once, else when a time limit has passed.
        let silent = self.chance.once_in(3);
        for direction in [&self.out, &self.inn] {
            let notice = if silent {
                self.chance.between(SECOND, 10 * SECOND)
            } else {
                self.chance.between(10, 5 * MS)
            };
            let mut direction = lock(direction);
            if direction.cut {
                continue;
            }
            direction.cut = true;
            let kept = self.chance.below(direction.flight.len() + 1);
            direction.flight.truncate(kept);
            if let Some((_, last)) = direction.flight.back_mut() {
                last.truncate(self.chance.below(last.len() + 1));
            }
            direction.ends_at = Some(direction.last.max(self.chance.now()) + notice);
        }
    }
}

/// A control connection: whole messages, in order.
#[derive(Debug)]
pub struct ControlEnd {
    socket: Socket,
    bytes: Vec<u8>,
    sent: u64,
}

impl ControlEnd {
    /// Over a connection.
    #[must_use]
    pub const fn new(socket: Socket) -> Self {
        Self { socket, bytes: Vec::new(), sent: 0 }
    }

    /// Sends one message.
    pub fn send(&mut self, message: &Control) {
        let (kind, body) = message.encode();
        self.socket.send(&encode_frame(kind, self.sent, &body));
        self.sent += 1;
    }

    /// The next message, if one is there.
    ///
    /// # Errors
    /// [`Ended`].
    ///
    /// # Panics
    /// If what arrives is no message: what was sent was one.
    pub fn receive(&mut self) -> Result<Option<Control>, Ended> {
        loop {
            if let Some(head) = self.bytes.first_chunk::<HEADER_LEN>() {
                let header = Header::decode(head).expect("our own header");
                if let Some(body) = self.bytes.get(HEADER_LEN..HEADER_LEN + header.body_len) {
                    let message = Control::decode(header.kind, body).expect("our own message");
                    self.bytes.drain(..HEADER_LEN + header.body_len);
                    return Ok(Some(message));
                }
            }
            let more = self.socket.receive(usize::MAX)?;
            if more.is_empty() {
                return Ok(None);
            }
            self.bytes.extend(more);
        }
    }

    /// Closes it.
    pub fn shutdown(&self) {
        self.socket.shutdown();
    }
}

/// The three connections of an attempt, one end of each.
#[derive(Clone, Debug)]
pub struct Connections {
    /// Messages.
    pub control: Socket,
    /// Faults and answers.
    pub fault: Socket,
    /// Pushed pages and acknowledgements.
    pub push: Socket,
}

impl Connections {
    /// Both ends of three connections; each has a latency of its own.
    #[must_use]
    pub fn make(chance: &Chance) -> (Self, Self) {
        let usual = chance.between(20, 1000);
        let one = || connect(chance, usual + chance.between(0, usual));
        let ((control, control_there), (fault, fault_there), (push, push_there)) = (one(), one(), one());
        (Self { control, fault, push }, Self { control: control_there, fault: fault_there, push: push_there })
    }

    /// All three.
    #[must_use]
    pub const fn all(&self) -> [&Socket; 3] {
        [&self.control, &self.fault, &self.push]
    }

    /// Closes this end of all.
    pub fn shutdown(&self) {
        self.all().into_iter().for_each(Socket::shutdown);
    }
}
