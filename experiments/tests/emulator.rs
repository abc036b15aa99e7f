//! The link emulator between two hosts. These need root, and one at a time, as they look for what is left behind:
//! `cargo test -p experiments --test emulator -- --ignored --test-threads=1`.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use experiments::emulator::Model;
use experiments::lab::{Host, Lab, Wire};

const LONG: Duration = Duration::from_secs(10);
/// How often the most that passes is looked for.
const OPEN_TRIES: usize = 5;

/// A socket of the source and one of the destination that answers it.
fn sockets(lab: &Lab) -> (UdpSocket, UdpSocket) {
    let bind = |host, address| lab.inside(host, || UdpSocket::bind((address, 7000)).unwrap()).unwrap();
    let (ours, theirs) =
        (bind(Host::Source, [0, 0, 0, 0].into()), bind(Host::Destination, lab.destination_address()));
    ours.connect(theirs.local_addr().unwrap()).unwrap();
    ours.set_read_timeout(Some(LONG)).unwrap();
    theirs.set_read_timeout(Some(LONG)).unwrap();
    (ours, theirs)
}

fn round_trip(ours: &UdpSocket, theirs: &UdpSocket) -> Duration {
    let mut buffer = [0; 64];
    let begun = Instant::now();
    ours.send(b"ping").unwrap();
    let (len, from) = theirs.recv_from(&mut buffer).unwrap();
    theirs.send_to(&buffer[..len], from).unwrap();
    assert_eq!(ours.recv(&mut buffer).unwrap(), 4);
    begun.elapsed()
}

#[test]
#[ignore = "needs root: makes network namespaces and TUN devices"]
fn a_round_trip_takes_the_delay_twice_and_little_more_and_nothing_is_left() {
    for delay in [Duration::from_micros(100), Duration::from_millis(10)] {
        let lab = Lab::joined_by(Wire::Emulated(Model { delay, ..Model::default() })).unwrap();
        let (ours, theirs) = sockets(&lab);
        let mut trips: Vec<Duration> = (0..50).map(|_| round_trip(&ours, &theirs)).collect();
        trips.sort_unstable();
        println!("{delay:?}: round trip median {:?}, largest {:?}", trips[25], trips[49]);
        assert!(trips[0] >= delay * 2, "{trips:?}");
        // Each way wakes two threads; on a busy machine that takes a while, but not always.
        assert!(trips[5] < delay * 2 + Duration::from_millis(1), "{trips:?}");
        let traffic = lab.traffic().unwrap();
        // A packet is counted behind its arrival: the last one perhaps not yet.
        assert!(
            traffic.iter().all(|way| way.packets >= 49 && way.lost == 0 && way.dropped == 0),
            "{traffic:?}"
        );
        let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
        let before = threads();
        let path = lab.path(Host::Source);
        drop(lab);
        assert_eq!(threads(), before - 2);
        assert!(!path.exists());
    }
    assert_eq!(Lab::leftovers(std::process::id()), Vec::<String>::new());
}

#[test]
#[ignore = "needs root: makes network namespaces and TUN devices"]
fn a_lossy_link_loses_datagrams_and_tcp_still_arrives_whole() {
    let lab = Lab::joined_by(Wire::Emulated(Model { loss: 0.1, ..Model::default() })).unwrap();
    let (ours, theirs) = sockets(&lab);
    // So few at a time that a socket's buffer holds them.
    let (mut buffer, mut arrived) = ([0; 128], 0);
    for round in 1..=10 {
        (0..100).for_each(|_| assert_eq!(ours.send(&[7; 100]).unwrap(), 100));
        // One after the other through one line: when all have passed or were lost, none can come any more.
        let begun = Instant::now();
        let passed = loop {
            let [out, _] = lab.traffic().unwrap();
            assert_eq!(out.dropped, 0, "the queue is longer than what was sent");
            if out.packets + out.lost >= round * 100 {
                break out;
            }
            assert!(begun.elapsed() < LONG, "{out:?}");
            std::thread::yield_now();
        };
        while arrived < passed.packets {
            assert_eq!((theirs.recv(&mut buffer).unwrap(), buffer[0]), (100, 7));
            arrived += 1;
        }
    }
    // 100 expected, standard deviation 9.5.
    let lost = lab.traffic().unwrap()[0].lost;
    assert!((50..=150).contains(&lost), "{lost} of 1000");
    assert_eq!(lost + arrived, 1000);
    let listener = lab
        .inside(Host::Destination, || TcpListener::bind((lab.destination_address(), 7001)).unwrap())
        .unwrap();
    let mut client =
        lab.inside(Host::Source, || TcpStream::connect(listener.local_addr().unwrap()).unwrap()).unwrap();
    let mut server = listener.accept().unwrap().0;
    let sent: Vec<u8> = (0..1_000_000_u32).map(|i| (i % 251) as u8).collect();
    let mut got = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            client.write_all(&sent).unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
        });
        server.set_read_timeout(Some(LONG)).unwrap();
        server.read_to_end(&mut got).unwrap();
    });
    assert!(got == sent, "{} bytes of {}", got.len(), sent.len());
}

#[test]
#[ignore = "needs root: makes network namespaces and TUN devices"]
fn bulk_tcp_passes_at_a_gigabit_and_a_limit_holds() {
    let transfer = |model: Model, bytes: usize| {
        let lab = Lab::joined_by(Wire::Emulated(model)).unwrap();
        let listener = lab
            .inside(Host::Destination, || TcpListener::bind((lab.destination_address(), 7001)).unwrap())
            .unwrap();
        let mut client =
            lab.inside(Host::Source, || TcpStream::connect(listener.local_addr().unwrap()).unwrap()).unwrap();
        let mut server = listener.accept().unwrap().0;
        let begun = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| client.write_all(&vec![1; bytes]).unwrap());
            server.read_exact(&mut vec![0; bytes]).unwrap();
        });
        let mbit = bytes as f64 * 8e-6 / begun.elapsed().as_secs_f64();
        println!("{mbit:.0} Mbit/s, {:?}", lab.traffic());
        mbit
    };
    let limited = transfer(Model { rate_bit: Some(100_000_000), ..Model::default() }, 10 << 20);
    assert!((50.0..100.0).contains(&limited), "{limited} Mbit/s");
    // Whatever else is on the host only makes it slower.
    let open = (0..OPEN_TRIES).map(|_| transfer(Model::default(), 256 << 20)).find(|mbit| *mbit > 1000.0);
    assert!(open.is_some(), "not once in {OPEN_TRIES} transfers; what each came to is printed");
}
