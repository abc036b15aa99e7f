//! A link between the sides that the test can cut.
//!
//! ```text
//!   source ──▶ Proxy ──▶ destination      each connection: two threads, one for each direction
//! ```
//!
//! A cut link resets every connection on both sides at once, as a router does that has forgotten them; bytes that
//! are on their way are lost. One for datagrams passes nothing on any more, and nobody is told.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

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
    cut: AtomicBool,
    /// What may still pass on the first connection towards the destination: the control connection.
    control: AtomicU64,
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
        let line = Arc::new(Line { cut: AtomicBool::new(false), control: AtomicU64::new(u64::MAX) });
        let (shared, destination) = (line.clone(), destination.to_owned());
        std::thread::spawn(move || {
            let mut first = true;
            while let Ok((near, _)) = listener.accept() {
                if shared.cut.load(SeqCst) {
                    return;
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
        let line = Arc::new(Line { cut: AtomicBool::new(false), control: AtomicU64::new(u64::MAX) });
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

    /// Cuts the link once `bytes` more bytes of the control connection have passed to the destination; with 0, at
    /// the next one that should.
    pub fn cut_control_after(&self, bytes: u64) {
        self.line.control.store(bytes, SeqCst);
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
        for (from, to, limited) in [(near.clone(), far.clone(), is_control), (far, near, false)] {
            let line = self.clone();
            std::thread::spawn(move || {
                line.pass(&from, &to, limited);
                if line.cut.load(SeqCst) {
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

    fn pass(&self, mut from: &TcpStream, mut to: &TcpStream, limited: bool) {
        let mut buffer = vec![0; 256 << 10];
        while !self.cut.load(SeqCst) {
            let got = match from.read(&mut buffer) {
                Ok(0) => return,
                Ok(got) => got,
                Err(error) if is_look(&error) => continue,
                Err(_) => return,
            };
            let mut left = &buffer[..got];
            let mut last = false;
            if limited {
                let may_pass = self.control.load(SeqCst);
                left = &left[..got.min(usize::try_from(may_pass).unwrap_or(got))];
                let rest = may_pass - left.len() as u64;
                last = rest == 0;
                if may_pass != u64::MAX {
                    self.control.store(rest, SeqCst);
                }
            }
            if last {
                // First of all nothing may come back. What is written below arrives before the reset.
                self.cut.store(true, SeqCst);
            } else if self.cut.load(SeqCst) {
                return;
            }
            while !left.is_empty() {
                match to.write(left) {
                    Ok(written) => left = &left[written..],
                    Err(error) if is_look(&error) && (last || !self.cut.load(SeqCst)) => {}
                    Err(_) => return,
                }
            }
        }
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
