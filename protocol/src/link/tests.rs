//! Dialling and being dialled, over every link.

use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;

use super::testing::Party;
use super::*;
use crate::wire::hello::{Hello, Refusal, Role, SessionId, SessionSecret};

fn hello() -> Hello {
    Hello::new(Role::Fault, SessionId([7; 16]), SessionSecret([9; 16]))
}

fn tls(credentials: Credentials) -> Protection {
    Protection::Authenticated(Arc::new(credentials))
}

/// What the two sides make of each other, each by its own link.
fn meet(
    (their_link, their_protection): (LinkKind, &Protection),
    (link, protection): (LinkKind, &Protection),
) -> (Result<Stream, LinkError>, Result<(Stream, Hello), GreetError>) {
    let listener =
        Listener::bind(&Endpoint::parse(their_link, "127.0.0.1:0", their_protection).unwrap()).unwrap();
    let address = listener.endpoint().unwrap().to_string();
    let endpoint = Endpoint::parse(link, &address, protection).unwrap();
    std::thread::scope(|scope| {
        let greeted = scope.spawn(|| {
            let greeted = listener.accept().unwrap().greet();
            if let Ok((stream, hello)) = &greeted {
                stream.answer(hello.role, hello.negotiate()).unwrap();
            }
            greeted
        });
        (Stream::dial(&endpoint, &hello()), greeted.join().unwrap())
    })
}

#[test]
fn each_link_carries_a_hello_and_what_follows() {
    let (one, other) = (Party::new(), Party::new());
    let plain = Protection::Loopback;
    let (ours, theirs) = (tls(one.knowing(&other)), tls(other.knowing(&one)));
    for (link, ours, theirs) in [(LinkKind::Tcp, &plain, &plain), (LinkKind::Tls, &ours, &theirs)] {
        let (dialled, greeted) = meet((link, theirs), (link, ours));
        let (dialled, (accepted, said)) = (dialled.unwrap(), greeted.unwrap());
        assert_eq!(said, hello());
        let second = dialled.try_clone().unwrap();
        second.send_both(b"head", b"body", false).unwrap();
        let mut bytes = [0; 8];
        accepted.receive_all(&mut bytes).unwrap();
        assert_eq!(&bytes, b"headbody");
        dialled.shutdown();
        assert_eq!(accepted.receive(&mut bytes).unwrap(), 0);
    }
}

#[test]
fn each_side_is_told_when_the_other_has_another_link() {
    let (one, other) = (Party::new(), Party::new());
    let plain = Protection::Loopback;
    let (ours, theirs) = (tls(one.knowing(&other)), tls(other.knowing(&one)));
    let (dialled, greeted) = meet((LinkKind::Tls, &theirs), (LinkKind::Tcp, &plain));
    assert!(
        matches!(dialled, Err(LinkError::Hello { source: HelloError::Refused(Refusal::Link), .. })),
        "{dialled:?}"
    );
    let said = greeted.unwrap_err().to_string();
    assert!(said.contains("plain tcp") && said.contains("--link"), "{said}");

    let (dialled, greeted) = meet((LinkKind::Tcp, &plain), (LinkKind::Tls, &ours));
    assert!(matches!(dialled, Err(LinkError::Tls { source: TlsError::Plain, .. })), "{dialled:?}");
    let said = greeted.unwrap_err().to_string();
    assert!(said.contains("speaks tls") && said.contains("--link"), "{said}");
}

#[test]
fn each_side_is_told_whose_key_was_refused() {
    let (one, other, stranger) = (Party::new(), Party::new(), Party::new());
    let (ours, theirs) = (tls(one.knowing(&other)), tls(other.knowing(&stranger)));
    let (dialled, greeted) = meet((LinkKind::Tls, &theirs), (LinkKind::Tls, &ours));
    let Err(LinkError::Tls { own, source: TlsError::NotAccepted(_), .. }) = dialled else {
        panic!("{dialled:?}")
    };
    assert_eq!(own, one.fingerprint());
    let said = greeted.unwrap_err().to_string();
    assert!(said.contains(&format!("--peer {}", one.fingerprint())), "{said}");
}

#[test]
fn what_needs_a_key_is_not_opened_without_one() {
    for protection in [Protection::Loopback, Protection::Insecure] {
        assert!(Endpoint::parse(LinkKind::Tls, "127.0.0.1:0", &protection).is_err());
    }
    assert!(Endpoint::parse(LinkKind::Tcp, "192.0.2.1:7000", &Protection::Loopback).is_err());
    assert!(Endpoint::parse(LinkKind::Tcp, "192.0.2.1:7000", &Protection::Insecure).is_ok());
    let party = Party::new();
    let tls = tls(party.knowing(&party));
    assert!(Endpoint::parse(LinkKind::Tls, "192.0.2.1:7000", &tls).is_ok());
}

#[test]
fn a_unix_socket_is_made_where_it_is_told() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("socket");
    let endpoint =
        Endpoint::parse(LinkKind::Unix, &format!("unix:{}", path.display()), &Protection::Loopback);
    let _listener = Listener::bind(&endpoint.unwrap()).unwrap();
    assert!(std::fs::metadata(&path).unwrap().file_type().is_socket());
}

#[test]
fn the_socket_of_a_listener_that_has_ended_is_in_nobodys_way() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let endpoint = Endpoint::Unix(path.clone());
    let first = Listener::bind(&endpoint).unwrap();
    assert!(Listener::bind(&endpoint).is_err(), "somebody listens there");
    drop(first);
    Listener::bind(&endpoint).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    assert!(Listener::bind(&endpoint).is_err(), "this is no socket");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}
