//! A link between the sides that the test can cut.
//!
//! ```text
//!   source ──▶ Proxy ──▶ destination      each connection: two threads, one for each direction
//! ```
//!
//! A cut link resets every connection on both sides at once, as a router does that has forgotten them; bytes that
//! are on their way are lost. A link can also hold what comes behind a byte of a lane until the test lets it go, so that
//! something happens exactly there. It stays cut, or takes new connections at once or after a while. One for datagrams passes
//! nothing on any more, and nobody is told.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::wire::hello::Role;

use socket2::SockRef;

/// How often a thread that waits for its socket looks whether the link was cut.
const LOOK: Duration = Duration::from_millis(10);

/// A link through this process.
#[derive(Debug)]
pub struct Proxy {
    address: String,
    line: Arc<Line>,
}

#[derive(Debug)]
struct Line {
    /// Nothing passes ever again.
    cut: AtomicBool,
    /// New connections are reset at once.
    down: AtomicBool,
    /// Connections of an earlier one were reset.
    generation: AtomicU64,
    /// What may still pass on the first connection, the control connection, towards the destination and back.
    control: [AtomicU64; 2],
    /// What happens behind that.
    then: Mutex<Then>,
    /// Where the link holds what comes.
    hold: Mutex<Hold>,
}

/// Where a link in clear holds what comes behind a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    Nowhere,
    /// Behind so many more bytes of a lane in a direction.
    Behind(Role, Towards, u64),
    /// There is something behind them, and it waits.
    Reached(Role, Towards),
}

impl Default for Line {
    /// Everything passes.
    fn default() -> Self {
        Self {
            cut: AtomicBool::new(false),
            down: AtomicBool::new(false),
            generation: AtomicU64::new(0),
            control: [AtomicU64::new(u64::MAX), AtomicU64::new(u64::MAX)],
            then: Mutex::new(Then::Cut),
            hold: Mutex::new(Hold::Nowhere),
        }
    }
}

/// What happens to a link behind the last byte that may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    Cut,
    Reset,
}

/// A direction of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Towards {
    /// What the source sends.
    Destination,
    /// What the destination sends.
    Source,
}

impl Proxy {
    /// A link to whoever listens at `destination`.
    ///
    /// # Panics
    /// If there is no port for it.
    #[must_use]
    pub fn to(destination: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("a bound socket").to_string();
        let line = Arc::new(Line::default());
        let (shared, destination) = (line.clone(), destination.to_owned());
        std::thread::spawn(move || {
            let mut first = true;
            while let Ok((near, _)) = listener.accept() {
                if shared.cut.load(SeqCst) {
                    return;
                }
                if shared.down.load(SeqCst) {
                    let _ = SockRef::from(&near).set_linger(Some(Duration::ZERO));
                    continue;
                }
                let Ok(far) = TcpStream::connect(&destination) else { continue };
                shared.connect(near, far, std::mem::take(&mut first));
            }
        });
        Self { address, line }
    }

    /// A link for datagrams to whoever is bound to `destination`.
    ///
    /// # Panics
    /// If there is no port for it.
    #[must_use]
    pub fn of_datagrams_to(destination: &str) -> Self {
        let near = UdpSocket::bind("127.0.0.1:0").expect("a port");
        let address = near.local_addr().expect("a bound socket").to_string();
        let line = Arc::new(Line::default());
        let (shared, destination) = (line.clone(), destination.to_owned());
        std::thread::spawn(move || shared.pass_datagrams(&Arc::new(near), &destination));
        Self { address, line }
    }

    /// Where the source finds it.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Cuts the link.
    pub fn cut(&self) {
        self.line.cut.store(true, SeqCst);
    }

    /// Resets every connection; new ones pass.
    pub fn reset(&self) {
        self.line.generation.fetch_add(1, SeqCst);
    }

    /// Whether new connections are reset at once, as those that stand.
    pub fn set_down(&self, down: bool) {
        self.line.down.store(down, SeqCst);
        if down {
            self.reset();
        }
    }

    /// Cuts the link once `bytes` more bytes of the control connection have passed to the destination; with 0, at
    /// the next one that should.
    pub fn cut_control_after(&self, bytes: u64) {
        self.limit(Towards::Destination, bytes, Then::Cut);
    }

    /// Resets every connection once `bytes` more bytes of the control connection have passed; new ones pass.
    pub fn reset_control_after(&self, towards: Towards, bytes: u64) {
        self.limit(towards, bytes, Then::Reset);
    }

    /// Holds what comes behind `bytes` more bytes on the lane of that role, hellos included, until it is let go. Whoever sends
    /// it sees nothing of that. Only on a link in clear.
    pub fn hold_behind(&self, role: Role, towards: Towards, bytes: u64) {
        *self.line.held() = Hold::Behind(role, towards, bytes);
    }

    /// Whether something has come behind those bytes, and is held.
    #[must_use]
    pub fn is_holding(&self) -> bool {
        matches!(*self.line.held(), Hold::Reached(..))
    }

    /// Lets go of what is held, and holds nothing more.
    pub fn let_go(&self) {
        *self.line.held() = Hold::Nowhere;
    }

    fn limit(&self, towards: Towards, bytes: u64, then: Then) {
        *self.line.then.lock().unwrap_or_else(PoisonError::into_inner) = then;
        self.line.control[towards as usize].store(bytes, SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.cut();
        let _ = TcpStream::connect(&self.address); // wakes the thread that listens
    }
}

impl Line {
    fn connect(self: &Arc<Self>, near: TcpStream, far: TcpStream, is_control: bool) {
        for socket in [&near, &far] {
            let _ = socket.set_nodelay(true);
            let _ = socket.set_read_timeout(Some(LOOK));
            let _ = socket.set_write_timeout(Some(LOOK));
        }
        let (near, far) = (Arc::new(near), Arc::new(far));
        let generation = self.generation.load(SeqCst);
        // The source's hello says it, which is the first thing that passes.
        let role = Arc::new(AtomicU8::new(0));
        let directions = [(near.clone(), far.clone(), Towards::Destination), (far, near, Towards::Source)];
        for (from, to, towards) in directions {
            let (line, role) = (self.clone(), role.clone());
            std::thread::spawn(move || {
                line.pass(&from, &to, &Direction { towards, is_control, role }, generation);
                if line.is_over(generation) {
                    // Whoever of the two threads is last closes the sockets, which then resets.
                    let _ = SockRef::from(&*from).set_linger(Some(Duration::ZERO));
                    let _ = SockRef::from(&*to).set_linger(Some(Duration::ZERO));
                } else {
                    let _ = to.shutdown(Shutdown::Write);
                }
            });
        }
    }

    /// From each peer through a socket of its own, so that the answers find back.
    fn pass_datagrams(self: &Arc<Self>, near: &Arc<UdpSocket>, destination: &str) {
        let mut peers: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
        let mut datagram = vec![0; 64 << 10];
        let _ = near.set_read_timeout(Some(LOOK));
        while !self.cut.load(SeqCst) {
            let Ok((got, peer)) = near.recv_from(&mut datagram) else { continue };
            let far = peers.entry(peer).or_insert_with(|| {
                let far = Arc::new(UdpSocket::bind("127.0.0.1:0").expect("a port"));
                far.connect(destination).expect("an address of this host");
                let (line, near, back) = (self.clone(), near.clone(), far.clone());
                std::thread::spawn(move || line.pass_datagrams_back(&back, &near, peer));
                far
            });
            if !self.cut.load(SeqCst) {
                let _ = far.send(&datagram[..got]);
            }
        }
    }

    fn pass_datagrams_back(&self, far: &UdpSocket, near: &UdpSocket, peer: SocketAddr) {
        let mut datagram = vec![0; 64 << 10];
        let _ = far.set_read_timeout(Some(LOOK));
        while !self.cut.load(SeqCst) {
            let Ok(got) = far.recv(&mut datagram) else { continue };
            if !self.cut.load(SeqCst) {
                let _ = near.send_to(&datagram[..got], peer);
            }
        }
    }

    fn is_over(&self, generation: u64) -> bool {
        self.cut.load(SeqCst) || self.generation.load(SeqCst) != generation
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Hold> {
        self.hold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many of `got` bytes may pass before the rest is held; all, if nothing is to be held there.
    fn may_pass(&self, direction: &Direction, got: usize) -> usize {
        let mut hold = self.held();
        match *hold {
            Hold::Behind(role, towards, left) if direction.is(role, towards) => {
                let pass = got.min(usize::try_from(left).unwrap_or(got));
                *hold = if pass < got {
                    Hold::Reached(role, towards)
                } else {
                    Hold::Behind(role, towards, left - pass as u64)
                };
                pass
            }
            Hold::Reached(role, towards) if direction.is(role, towards) => 0,
            _ => got,
        }
    }

    /// Waits until what is held may pass, or never will.
    fn wait_let_go(&self, direction: &Direction, generation: u64) {
        let held = || matches!(*self.held(), Hold::Reached(role, towards) if direction.is(role, towards));
        while held() && !self.is_over(generation) {
            std::thread::sleep(LOOK / 10);
        }
    }

    fn pass(&self, mut from: &TcpStream, mut to: &TcpStream, direction: &Direction, generation: u64) {
        let limited = direction.is_control.then_some(direction.towards);
        let mut begins = direction.towards == Towards::Destination;
        let mut buffer = vec![0; 256 << 10];
        while !self.is_over(generation) {
            let got = match from.read(&mut buffer) {
                Ok(0) => return,
                Ok(got) => got,
                Err(error) if is_look(&error) => continue,
                Err(_) => return,
            };
            if std::mem::take(&mut begins) {
                direction.role.store(buffer[..got].get(ROLE_AT).copied().unwrap_or(0), SeqCst);
            }
            let mut left = &buffer[..got];
            let mut last = false;
            if let Some(towards) = limited {
                let control = &self.control[towards as usize];
                let may_pass = control.load(SeqCst);
                left = &left[..got.min(usize::try_from(may_pass).unwrap_or(got))];
                let rest = may_pass.saturating_sub(left.len() as u64);
                last = rest == 0;
                if may_pass != u64::MAX {
                    control.store(if last { u64::MAX } else { rest }, SeqCst);
                }
            }
            if last {
                // First of all nothing may come back. What is written below arrives before the reset.
                match *self.then.lock().unwrap_or_else(PoisonError::into_inner) {
                    Then::Cut => self.cut.store(true, SeqCst),
                    Then::Reset => drop(self.generation.fetch_add(1, SeqCst)),
                }
            } else if self.is_over(generation) {
                return;
            }
            let mut free = self.may_pass(direction, left.len());
            while !left.is_empty() {
                if free == 0 {
                    self.wait_let_go(direction, generation);
                    free = left.len();
                }
                match to.write(&left[..free]) {
                    Ok(written) => (left, free) = (&left[written..], free - written),
                    Err(error) if is_look(&error) && (last || !self.is_over(generation)) => {}
                    Err(_) => return,
                }
            }
        }
    }
}

/// Where a hello has its role.
const ROLE_AT: usize = 8;

/// One direction of one connection.
struct Direction {
    towards: Towards,
    /// Whether it is the first connection.
    is_control: bool,
    /// The number of its role as the hello has it; 0 before.
    role: Arc<AtomicU8>,
}

impl Direction {
    fn is(&self, role: Role, towards: Towards) -> bool {
        let number = match role {
            Role::Control => 1,
            Role::Fault => 2,
            Role::Push => 3,
        };
        self.towards == towards && self.role.load(SeqCst) == number
    }
}

fn is_look(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    fn pair(proxy: &Proxy, listener: &TcpListener) -> (TcpStream, TcpStream) {
        let near = TcpStream::connect(proxy.address()).unwrap();
        let far = listener.accept().unwrap().0;
        for socket in [&near, &far] {
            socket.set_read_timeout(Some(LONG)).unwrap();
        }
        (near, far)
    }

    #[test]
    fn passes_both_ways_until_it_is_cut() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Proxy::to(&listener.local_addr().unwrap().to_string());
        let (mut near, mut far) = pair(&proxy, &listener);
        let mut bytes = [0; 4];
        near.write_all(b"ping").unwrap();
        far.read_exact(&mut bytes).unwrap();
        far.write_all(b"pong").unwrap();
        near.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"pong");
        proxy.cut();
        assert_eq!(near.read(&mut bytes).unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(far.read(&mut bytes).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }

    #[test]
    fn takes_new_connections_after_a_reset_and_not_while_it_is_down() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Proxy::to(&listener.local_addr().unwrap().to_string());
        let mut bytes = [0; 4];
        for down in [false, true] {
            let (mut near, mut far) = pair(&proxy, &listener);
            near.write_all(b"ping").unwrap();
            far.read_exact(&mut bytes).unwrap();
            if down {
                proxy.set_down(true)
            } else {
                proxy.reset()
            }
            assert_eq!(near.read(&mut bytes).unwrap_err().kind(), ErrorKind::ConnectionReset);
            assert_eq!(far.read(&mut bytes).unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
        let mut refused = TcpStream::connect(proxy.address()).unwrap();
        assert!(refused.read(&mut bytes).is_err());
        proxy.set_down(false);
        drop(pair(&proxy, &listener));
    }

    #[test]
    fn passes_datagrams_both_ways_until_it_is_cut() {
        let far = UdpSocket::bind("127.0.0.1:0").unwrap();
        let proxy = Proxy::of_datagrams_to(&far.local_addr().unwrap().to_string());
        let near = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let mut bytes = [0; 8];
        for (socket, word) in near.iter().zip([b"one", b"two"]) {
            socket.set_read_timeout(Some(LONG)).unwrap();
            socket.connect(proxy.address()).unwrap();
            socket.send(word).unwrap();
            let (got, from) = far.recv_from(&mut bytes).unwrap();
            assert_eq!(&bytes[..got], word);
            far.send_to(&bytes[..got], from).unwrap();
            let got = socket.recv(&mut bytes).unwrap();
            assert_eq!(&bytes[..got], word);
        }
        proxy.cut();
        near[0].send(b"late").unwrap();
        far.set_read_timeout(Some(10 * LOOK)).unwrap();
        assert!(far.recv(&mut bytes).is_err());
    }

    #[test]
    fn holds_what_comes_behind_a_byte_of_a_lane_until_it_is_let_go() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Proxy::to(&listener.local_addr().unwrap().to_string());
        proxy.hold_behind(Role::Push, Towards::Destination, 12);
        let mut lanes = [2, 3].map(|role| {
            let (mut near, mut far) = pair(&proxy, &listener);
            near.write_all(&[0, 0, 0, 0, 0, 0, 0, 0, role, 0]).unwrap();
            far.read_exact(&mut [0; 10]).unwrap();
            (near, far)
        });
        for (near, _) in &mut lanes {
            near.write_all(b"12345").unwrap();
        }
        let [(_, fault), (_, push)] = &mut lanes;
        fault.read_exact(&mut [0; 5]).unwrap();
        crate::eventually("what is to be held", LONG, || proxy.is_holding().then_some(()));
        push.read_exact(&mut [0; 2]).unwrap();
        push.set_read_timeout(Some(10 * LOOK)).unwrap();
        assert!(push.read(&mut [0; 1]).is_err(), "it was not held");
        proxy.let_go();
        push.set_read_timeout(Some(LONG)).unwrap();
        let mut rest = [0; 3];
        push.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"345");
    }

    #[test]
    fn lets_so_many_bytes_of_the_first_connection_pass() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Proxy::to(&listener.local_addr().unwrap().to_string());
        let (mut control, mut far_control) = pair(&proxy, &listener);
        let (mut other, mut far_other) = pair(&proxy, &listener);
        proxy.cut_control_after(3);
        other.write_all(b"12345").unwrap();
        far_other.read_exact(&mut [0; 5]).unwrap();
        control.write_all(b"12345").unwrap();
        let mut bytes = [0; 3];
        far_control.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"123");
        assert!(far_control.read(&mut bytes).is_err() && far_other.read(&mut bytes).is_err());
    }
}
