use std::io::Write;
use std::net::TcpListener;
use std::time::Duration;

use super::*;
use crate::link::Trust;
use crate::link::testing::Party;

const LIMIT: Duration = Duration::from_secs(20);

fn deadline() -> Instant {
    Instant::now() + LIMIT
}

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (dialled, listener.accept().unwrap().0)
}

fn name() -> ServerName<'static> {
    "peer".try_into().unwrap()
}

/// What both sides make of each other.
fn meet(client: &Credentials, server: &Credentials) -> [Result<TlsStream, TlsError>; 2] {
    let (dialled, accepted) = sockets();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| TlsStream::accept(accepted, server, deadline()));
        let client = TlsStream::dial(dialled, name(), client, deadline());
        [client, server.join().unwrap()]
    })
}

/// Two ends that change their keys after so many records.
fn pair(records_per_key: u64) -> [TlsStream; 2] {
    let (one, other) = (Party::new(), Party::new());
    let (client, server) = (one.knowing(&other), other.knowing(&one));
    let (dialled, accepted) = sockets();
    let done = std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let connection = UnbufferedServerConnection::new(server.server.clone()).unwrap();
            handshake::shake(&accepted, connection, deadline()).unwrap()
        });
        let connection = UnbufferedClientConnection::new(client.client.clone(), name()).unwrap();
        [handshake::shake(&dialled, connection, deadline()).unwrap(), server.join().unwrap()]
    });
    let ends = [dialled, accepted].into_iter().zip(done);
    let mut ends = ends.map(|(socket, done)| {
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        socket.set_write_timeout(Some(LIMIT)).unwrap();
        TlsStream::new(socket, done, records_per_key).unwrap()
    });
    [ends.next().unwrap(), ends.next().unwrap()]
}

/// Bytes that tell their place.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i ^ (i >> 8) ^ (i >> 16)) & 0xff).unwrap()).collect()
}

fn receive_all(stream: &TlsStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut filled = 0;
    while filled < len {
        // Odd sizes: what is handed out begins and ends anywhere in a record.
        let end = len.min(filled + 10_007);
        let got = stream.receive(&mut bytes[filled..end]).unwrap();
        assert_ne!(got, 0, "the end after {filled} bytes");
        filled += got;
    }
    bytes
}

#[test]
fn both_directions_at_once_and_over_many_keys() {
    for records_per_key in [RECORDS_PER_KEY, 3] {
        let [one, other] = pair(records_per_key);
        let data = pattern(9 << 20);
        std::thread::scope(|scope| {
            for (from, to) in [(&one, &other), (&other, &one)] {
                let (from, data) = (from.clone(), &data);
                scope.spawn(move || {
                    for part in data.chunks(300_001) {
                        let (head, body) = part.split_at(32.min(part.len()));
                        from.send_all(&[head, body]).unwrap();
                    }
                });
                let to = to.clone();
                scope.spawn(move || assert!(receive_all(&to, data.len()) == *data));
            }
        });
    }
}

#[test]
fn a_peer_that_asks_for_a_new_key_gets_one() {
    let [one, other] = pair(RECORDS_PER_KEY);
    other.0.update_asked.store(true, Ordering::Relaxed);
    for round in 0..3u8 {
        other.send_all(&[&[round; 100]]).unwrap();
        assert_eq!(receive_all(&one, 100), [round; 100]);
    }
    assert!(!other.0.update_asked.load(Ordering::Relaxed));
}

#[test]
fn what_is_opened_and_not_handed_out_is_announced() {
    let [one, other] = pair(RECORDS_PER_KEY);
    one.send_all(&[&[1; 100]]).unwrap();
    one.send_all(&[&[2; 100]]).unwrap();
    let mut bytes = [0; 300];
    assert_eq!(other.receive(&mut bytes[..50]).unwrap(), 50);
    assert!(other.has_buffered());
    // Nothing is left behind by a receive that does not fill its buffer.
    let mut filled = 50;
    while filled < 200 {
        filled += other.receive_some(&mut bytes[filled..]).unwrap().unwrap_or(0);
    }
    assert!(bytes[..100] == [1; 100] && bytes[100..200] == [2; 100]);
    assert!(!other.has_buffered());
    assert_eq!(other.receive_some(&mut bytes).unwrap(), None);
    one.shutdown();
    assert_eq!(other.receive(&mut bytes).unwrap(), 0);
    assert!(other.has_buffered());
}

#[test]
fn what_the_kernel_did_not_take_goes_out_once() {
    let [one, other] = pair(RECORDS_PER_KEY);
    let data = pattern(64 << 20);
    let mut sent = 0;
    // Until the socket is full.
    while sent < data.len() {
        match one.send_some(&data[sent..]).unwrap() {
            0 => break,
            more => sent += more,
        }
    }
    assert!(sent < data.len(), "a socket that takes everything");
    assert!(receive_all(&other, sent) == data[..sent]);
    let end = sent + 100_000;
    while sent < end {
        sent += one.send_some(&data[sent..end]).unwrap();
    }
    let from = end - 100_000;
    assert!(receive_all(&other, 100_000) == data[from..end]);
}

#[test]
fn an_end_without_a_farewell_is_an_error() {
    let mut bytes = [0; 16];
    let [one, other] = pair(RECORDS_PER_KEY);
    one.send_all(&[&[7; 8]]).unwrap();
    one.socket().shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(other.receive(&mut bytes).unwrap(), 8);
    for _ in 0..2 {
        assert_eq!(other.receive(&mut bytes).unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        assert_eq!(other.receive_some(&mut bytes).unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    }

    let [one, other] = pair(RECORDS_PER_KEY);
    drop(one);
    assert_eq!(other.receive(&mut bytes).unwrap(), 0);
    assert_eq!(other.receive_some(&mut bytes).unwrap(), Some(0));
}

#[test]
fn what_was_not_sealed_by_the_peer_is_refused() {
    let mut bytes = [0; 16];
    for forged in [
        &[&[23, 3, 3, 0, 32][..], &[9; 32]].concat()[..],
        &[21, 3, 3, 0, 2, 1, 0],
        &[23, 3, 3, 0xff, 0xff],
        &[23, 3, 3, 0, 0],
    ] {
        let [one, other] = pair(RECORDS_PER_KEY);
        one.send_all(&[&[7; 8]]).unwrap();
        one.socket().write_all(forged).unwrap();
        assert_eq!(other.receive(&mut bytes[..8]).unwrap(), 8);
        let refused = other.receive(&mut bytes).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData, "{forged:?}: {refused}");
        assert!(one.send_all(&[&[8; 8]]).is_ok());
        assert!(other.receive(&mut bytes).is_err(), "goes on behind it");
    }
}

#[test]
fn a_key_that_is_not_pinned_is_refused_by_either_side() {
    let (one, other, stranger) = (Party::new(), Party::new(), Party::new());
    let [client, server] = meet(&one.knowing(&stranger), &other.knowing(&one));
    assert!(matches!(client, Err(TlsError::NotPinned(seen)) if seen == other.fingerprint()));
    assert!(matches!(server, Err(TlsError::NotAccepted(_))), "{server:?}");

    let [client, server] = meet(&one.knowing(&other), &other.knowing(&stranger));
    assert!(matches!(server, Err(TlsError::NotPinned(seen)) if seen == one.fingerprint()));
    // It learns so when it listens.
    let client = client.unwrap();
    client.socket().set_read_timeout(Some(LIMIT)).unwrap();
    let refused = TlsError::of_stream(client.receive(&mut [0; 16]).unwrap_err());
    assert!(matches!(refused, TlsError::NotAccepted(_)), "{refused:?}");

    let [client, server] = meet(&one.knowing(&other), &other.knowing(&one));
    assert!(client.is_ok() && server.is_ok());
}

#[test]
fn who_shows_no_certificate_or_one_of_another_is_refused() {
    let (one, other) = (Party::new(), Party::new());
    let server = other.knowing(&one);
    let anonymous = |build: &dyn Fn() -> rustls::ClientConfig| {
        let mut credentials = one.knowing(&other);
        let mut client = build();
        client.alpn_protocols.clone_from(&credentials.client.alpn_protocols);
        client.enable_secret_extraction = true;
        credentials.client = Arc::new(client);
        credentials
    };
    let builder = || {
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(other.knowing(&other).servers)
    };
    let nobody = anonymous(&|| builder().with_no_client_auth());
    let [_, refused] = meet(&nobody, &server);
    let without = rustls::Error::NoCertificatesPresented;
    assert!(matches!(refused, Err(TlsError::Library(error)) if error == without));

    // The certificate of a pinned peer, signed for with another key.
    let thief = Party::new();
    let resolver = Stolen { chain: one.chain.clone(), key: thief.key() };
    let stolen = anonymous(&|| builder().with_client_cert_resolver(Arc::new(resolver.clone())));
    let [_, refused] = meet(&stolen, &server);
    assert!(
        matches!(
            refused,
            Err(TlsError::Library(rustls::Error::InvalidCertificate(rustls::CertificateError::BadSignature)))
        ),
        "{refused:?}"
    );
}

#[derive(Debug)]
struct Stolen {
    chain: Vec<rustls::pki_types::CertificateDer<'static>>,
    key: rustls::pki_types::PrivateKeyDer<'static>,
}

impl Clone for Stolen {
    fn clone(&self) -> Self {
        Self { chain: self.chain.clone(), key: self.key.clone_key() }
    }
}

impl rustls::client::ResolvesClientCert for Stolen {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&self.key).unwrap();
        Some(Arc::new(rustls::sign::CertifiedKey::new(self.chain.clone(), key)))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[test]
fn an_authority_vouches_for_both_sides_by_name() {
    let (parties, authority) = Party::vouched(&["peer", "elsewhere"]);
    let [here, elsewhere] = &parties[..] else { panic!() };
    let trusting = |party: &Party| party.trusting(Trust::Authority(vec![authority.clone()]));
    let [client, server] = meet(&trusting(elsewhere), &trusting(here));
    assert!(client.is_ok() && server.is_ok(), "{client:?} {server:?}");
    // The one that is dialled must be who it was dialled as.
    let [client, server] = meet(&trusting(here), &trusting(elsewhere));
    assert!(matches!(client, Err(TlsError::Library(rustls::Error::InvalidCertificate(_)))), "{client:?}");
    assert!(matches!(server, Err(TlsError::NotAccepted(_))), "{server:?}");
    let stranger = Party::new();
    let [_, server] = meet(&stranger.knowing(here), &trusting(here));
    assert!(matches!(server, Err(TlsError::Library(rustls::Error::InvalidCertificate(_)))), "{server:?}");
}

#[test]
fn a_handshake_has_a_time_limit_however_it_is_dragged_out() {
    let party = Party::new();
    let (dialled, accepted) = sockets();
    let begun = Instant::now();
    let limit = Duration::from_millis(300);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // A byte now and then, as long as somebody listens.
            let record = [22, 3, 1, 2, 0].into_iter().chain(std::iter::repeat(1));
            for byte in record.take(500) {
                std::thread::sleep(Duration::from_millis(10));
                if (&dialled).write_all(&[byte]).is_err() {
                    break;
                }
            }
        });
        let refused = TlsStream::accept(accepted, &party.knowing(&party), begun + limit);
        assert!(matches!(&refused, Err(TlsError::Io(error)) if error.kind() == io::ErrorKind::TimedOut));
        assert!(begun.elapsed() < limit * 5, "{:?}", begun.elapsed());
        drop(refused);
    });
}
