//! The lab against the real kernel. These need root: `cargo test -p experiments --test lab -- --ignored`.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use experiments::lab::{Host, Lab, Rate, SERVICE};

const PORT: u16 = 7000;
const SHORT: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(10);

fn listen(lab: &Lab, host: Host, address: std::net::Ipv4Addr) -> TcpListener {
    lab.inside(host, || TcpListener::bind((address, PORT)).unwrap()).unwrap()
}

fn connect(lab: &Lab, address: std::net::Ipv4Addr, limit: Duration) -> std::io::Result<TcpStream> {
    let address = SocketAddr::from((address, PORT));
    lab.inside(Host::Client, || TcpStream::connect_timeout(&address, limit)).unwrap()
}

fn exchange(from: &mut TcpStream, to: &mut TcpStream, limit: Duration) -> std::io::Result<u8> {
    let mut byte = [0];
    from.write_all(&[7])?;
    to.set_read_timeout(Some(limit))?;
    to.read_exact(&mut byte)?;
    Ok(byte[0])
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn hosts_reach_each_other_and_nothing_is_left() {
    let labs = [Lab::new().unwrap(), Lab::new().unwrap()];
    for lab in &labs {
        for host in [Host::Source, Host::Destination] {
            let listener = listen(lab, host, host.address());
            let mut client = connect(lab, host.address(), LONG).unwrap();
            let mut server = listener.accept().unwrap().0;
            assert_eq!(exchange(&mut client, &mut server, LONG).unwrap(), 7);
        }
    }
    let mut sleeper = labs[0].run_in(Host::Source, "sleep").arg("60").spawn().unwrap();
    // nsenter becomes the program: it is in the host by the time it does.
    let begun = Instant::now();
    while labs[0].pids_in(Host::Source) != [sleeper.id()] {
        assert!(begun.elapsed() < LONG, "{:?}", labs[0].pids_in(Host::Source));
        std::thread::sleep(Duration::from_millis(2));
    }
    let names = labs.each_ref().map(|lab| lab.namespace(Host::Client));
    let left = Lab::leftovers(std::process::id());
    assert!(names.iter().all(|name| left.contains(name)), "{left:?}");
    drop(labs);
    assert!(!sleeper.wait().unwrap().success());
    let left = Lab::leftovers(std::process::id());
    assert!(!left.iter().any(|name| names.contains(name)), "{left:?}");
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_cut_link_passes_nothing_and_a_restored_one_goes_on() {
    let lab = Lab::new().unwrap();
    let listener = listen(&lab, Host::Source, Host::Source.address());
    let mut client = connect(&lab, Host::Source.address(), LONG).unwrap();
    let mut server = listener.accept().unwrap().0;
    lab.cut(Host::Source).unwrap();
    assert!(exchange(&mut client, &mut server, SHORT).is_err());
    lab.restore(Host::Source).unwrap();
    // What was sent while it was cut arrives now, sent again by TCP.
    let mut byte = [0];
    server.set_read_timeout(Some(LONG)).unwrap();
    server.read_exact(&mut byte).unwrap();
    assert_eq!(exchange(&mut client, &mut server, LONG).unwrap(), 7);
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_service_address_moves_and_is_found_at_once() {
    let lab = Lab::new().unwrap();
    lab.add_address(Host::Source, SERVICE).unwrap();
    let at_source = listen(&lab, Host::Source, SERVICE);
    connect(&lab, SERVICE, LONG).unwrap();
    at_source.accept().unwrap();
    lab.move_address(SERVICE, Host::Source, Host::Destination).unwrap();
    let at_destination = listen(&lab, Host::Destination, SERVICE);
    connect(&lab, SERVICE, LONG).unwrap();
    at_destination.accept().unwrap();
    // The same by the commands that hooks run.
    for (host, command) in [
        (Host::Destination, lab.remove_address_command(SERVICE)),
        (Host::Source, lab.add_address_command(SERVICE)),
        (Host::Source, lab.announce_command(SERVICE)),
    ] {
        assert!(lab.run_in(host, "sh").args(["-c", &command]).status().unwrap().success());
    }
    connect(&lab, SERVICE, LONG).unwrap();
    at_source.accept().unwrap();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_shaped_link_is_as_slow_as_it_is_told_to_be() {
    let lab = Lab::new().unwrap();
    let listener = listen(&lab, Host::Source, Host::Source.address());
    let mut client = connect(&lab, Host::Source.address(), LONG).unwrap();
    let mut server = listener.accept().unwrap().0;
    let mut transfer = |bytes: usize| {
        let begun = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| server.write_all(&vec![1; bytes]).unwrap());
            client.read_exact(&mut vec![0; bytes]).unwrap();
        });
        begun.elapsed()
    };
    lab.shape(Host::Source, Some(Rate { mbit: 80 })).unwrap();
    let slow = transfer(10 << 20); // 1.05 s at 10 MB/s
    lab.shape(Host::Source, None).unwrap();
    let fast = transfer(10 << 20);
    assert!(slow > Duration::from_millis(900) && fast < slow / 4, "{slow:?} {fast:?}");
}
