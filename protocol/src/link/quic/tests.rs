use nix::poll::PollFlags;

use super::*;
use crate::link::testing::Party;
use crate::link::{LinkKind, Protection};

const LIMIT: Duration = Duration::from_secs(20);

fn deadline() -> Instant {
    Instant::now() + LIMIT
}

fn endpoint(addr: SocketAddr, credentials: Credentials) -> SecureEndpoint {
    let protection = Protection::Authenticated(Arc::new(credentials));
    match crate::link::Endpoint::parse(LinkKind::Quic, &addr.to_string(), &protection).unwrap() {
        crate::link::Endpoint::Quic(endpoint) => endpoint,
        other => panic!("{other}"),
    }
}

/// Waits for somebody who knocks.
fn accept(listener: &QuicListener) -> QuicAccepted {
    let until = deadline();
    loop {
        match listener.accept() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                assert!(Instant::now() < until, "nobody knocks");
                wait(listener.as_fd(), PollFlags::POLLIN, Some(until)).unwrap();
            }
            other => return other.unwrap(),
        }
    }
}

/// What both sides make of each other.
fn meet(client: Credentials, server: Credentials, role: Role) -> [Result<QuicStream, TlsError>; 2] {
    let listener = QuicListener::bind(([127, 0, 0, 1], 0).into(), Arc::new(server)).unwrap();
    let to = endpoint(listener.local_addr().unwrap(), client);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| accept(&listener).establish(deadline()));
        [QuicStream::dial(&to, role, deadline()), server.join().unwrap()]
    })
}

/// Two ends of an established connection; whoever dials says a byte first, as a hello does.
fn pair(role: Role) -> [QuicStream; 2] {
    let (one, other) = (Party::new(), Party::new());
    let [client, server] = meet(one.knowing(&other), other.knowing(&one), role).map(Result::unwrap);
    for end in [&client, &server] {
        end.set_timeout(Some(LIMIT)).unwrap();
    }
    client.send_all(&[b"h"]).unwrap();
    let mut byte = [0];
    assert_eq!(server.receive(&mut byte).unwrap(), 1);
    [client, server].map(|end| end.for_role(role).unwrap())
}

/// As users of lanes do it.
fn stream(end: &QuicStream) -> crate::link::Stream {
    crate::link::Stream::Quic(end.clone())
}

/// Bytes that tell their place.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i ^ (i >> 8) ^ (i >> 16)) & 0xff).unwrap()).collect()
}

#[test]
fn both_directions_at_once() {
    for role in [Role::Control, Role::Push] {
        let [one, other] = pair(role);
        let data = pattern(5 << 20);
        std::thread::scope(|scope| {
            for (from, to) in [(&one, &other), (&other, &one)] {
                let (from, to, data) = (stream(from), stream(to), &data);
                scope.spawn(move || {
                    data.chunks(300_001).for_each(|part| from.send_all(part, false).unwrap());
                });
                scope.spawn(move || {
                    let mut bytes = vec![0; data.len()];
                    bytes.chunks_mut(10_007).for_each(|part| to.receive_all(part).unwrap());
                    assert!(bytes == *data);
                });
            }
        });
    }
}

#[test]
fn questions_are_answered_one_by_one() {
    let [one, other] = pair(Role::Fault);
    let page = pattern(4096);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut question = [0; 32];
            for _ in 0..200 {
                stream(&one).receive_all(&mut question).unwrap();
                one.send_all(&[&question, &page]).unwrap();
            }
        });
        let mut answer = vec![0; 32 + 4096];
        for round in 0..200u8 {
            let mut question = &[round; 32][..];
            while !question.is_empty() {
                question = &question[other.send_some(question).unwrap()..];
            }
            let (mut filled, until) = (0, deadline());
            while filled < answer.len() {
                assert!(Instant::now() < until, "no answer to {round}");
                match other.receive_some(&mut answer[filled..]).unwrap() {
                    Some(got) => filled += got,
                    None => {
                        let due = other.tend().unwrap();
                        wait(other.as_fd(), PollFlags::POLLIN, due.into_iter().chain([until]).min()).unwrap();
                    }
                }
            }
            assert!(answer[..32] == [round; 32] && answer[32..] == page);
        }
    });
}

#[test]
fn sending_does_not_hide_what_has_come() {
    let [one, other] = pair(Role::Fault);
    let readable = || {
        let mut fds = [nix::poll::PollFd::new(other.as_fd(), PollFlags::POLLIN)];
        engine::poll_all(&mut fds, Some(deadline())).unwrap();
        fds[0].any().unwrap()
    };
    one.send_all(&[b"answer"]).unwrap();
    assert!(readable());
    assert_eq!(other.send_some(b"question").unwrap(), 8);
    other.tend().unwrap();
    assert!(readable(), "who polls would wait for ever");
    let mut answer = [0; 6];
    stream(&other).receive_all(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
}

#[test]
fn what_was_sent_before_the_end_arrives() {
    for role in [Role::Control, Role::Push] {
        let [one, other] = pair(role);
        let data = pattern(1 << 20);
        let sending = stream(&one);
        drop(one);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                sending.send_all(&data, false).unwrap();
                drop(sending);
            });
            let mut bytes = vec![0; data.len()];
            stream(&other).receive_all(&mut bytes).unwrap();
            assert!(bytes == data);
            assert_eq!(stream(&other).receive(&mut bytes).unwrap(), 0);
            drop(other);
        });
    }
}

#[test]
fn whoever_waits_wakes_up_when_it_is_shut_down() {
    for role in [Role::Control, Role::Fault] {
        let [one, other] = pair(role);
        std::thread::scope(|scope| {
            let waiting = one.clone();
            let waits = scope.spawn(move || stream(&waiting).receive(&mut [0; 8]));
            one.shutdown();
            assert_eq!(waits.join().unwrap().unwrap(), 0);
            assert_eq!(stream(&other).receive(&mut [0; 8]).unwrap(), 0);
        });
    }
}

#[test]
fn a_key_that_is_not_pinned_is_refused_by_either_side() {
    let (one, other, stranger) = (Party::new(), Party::new(), Party::new());
    let [client, server] = meet(one.knowing(&stranger), other.knowing(&one), Role::Fault);
    assert!(matches!(client, Err(TlsError::NotPinned(seen)) if seen == other.fingerprint()), "{client:?}");
    assert!(matches!(server, Err(TlsError::NotAccepted(_))), "{server:?}");

    let [client, server] = meet(one.knowing(&other), other.knowing(&stranger), Role::Fault);
    assert!(matches!(server, Err(TlsError::NotPinned(seen)) if seen == one.fingerprint()), "{server:?}");
    // It learns so when it listens.
    let client = client.unwrap();
    client.set_timeout(Some(LIMIT)).unwrap();
    let refused = TlsError::of_stream(client.receive(&mut [0; 16]).unwrap_err());
    assert!(matches!(refused, TlsError::NotAccepted(_)), "{refused:?}");
}

#[test]
fn a_port_that_is_taken_is_not_shared() {
    let party = Party::new();
    let bind = |addr| QuicListener::bind(addr, Arc::new(party.knowing(&party)));
    let listener = bind(([127, 0, 0, 1], 0).into()).unwrap();
    let taken = bind(listener.local_addr().unwrap());
    assert_eq!(taken.unwrap_err().kind(), io::ErrorKind::AddrInUse);
}

#[test]
fn nobody_at_the_port_is_found_out_in_time() {
    let party = Party::new();
    let free = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let begun = Instant::now();
    let limit = Duration::from_millis(500);
    let dialled = QuicStream::dial(&endpoint(free, party.knowing(&party)), Role::Control, begun + limit);
    assert!(matches!(dialled, Err(TlsError::Io(_))), "{dialled:?}");
    // One who listens and says nothing.
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let to = endpoint(silent.local_addr().unwrap(), party.knowing(&party));
    let dialled = QuicStream::dial(&to, Role::Control, Instant::now() + limit);
    assert!(matches!(&dialled, Err(TlsError::Io(error)) if error.kind() == io::ErrorKind::TimedOut));
    assert!(begun.elapsed() < limit * 5);
}
