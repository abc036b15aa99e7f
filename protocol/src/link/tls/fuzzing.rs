//! Test support: records of a hostile peer, for the fuzz targets. No program of ours calls this.

use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384;
use rustls::crypto::cipher::{AeadKey, Iv, OutboundChunks, Tls13AeadAlgorithm};
use rustls::{AlertDescription, ConnectionTrafficSecrets, ContentType};

use super::record::{Opened, Opener, RECORD_MAX, Sealer};

/// Longest payload of a record that is sealed here.
const PAYLOAD_MAX: usize = 512;

fn algorithm() -> &'static dyn Tls13AeadAlgorithm {
    TLS13_AES_256_GCM_SHA384.tls13().expect("a suite of TLS 1.3").aead_alg
}

fn secrets() -> (u64, ConnectionTrafficSecrets) {
    let (key, iv) = (AeadKey::from([7; 32]), Iv::from([9; 12]));
    (0, ConnectionTrafficSecrets::Aes256Gcm { key, iv })
}

/// A stream of records. If the first byte is even, what follows comes from somebody without the key: nothing of it may
/// be believed. If it is odd, the peer itself seals what follows (type, u8 length, bytes, again and again), and a byte
/// of the stream is changed on its way if the first byte is 3 modulo 4 (at the u16 that comes next).
///
/// # Panics
/// If something is believed that was not sent, or sent and not taken for what it is.
pub fn fuzz_tls_records(data: &[u8]) {
    let Some((how, rest)) = data.split_first() else { return };
    if how % 2 == 0 {
        let opened = open(rest);
        assert!(opened.is_empty(), "{opened:?} without the key");
        return;
    }
    let (changed, rest) = match rest.split_first_chunk() {
        Some((at, rest)) if how % 4 == 3 => (Some(usize::from(u16::from_le_bytes(*at))), rest),
        _ => (None, rest),
    };
    let (mut stream, sent) = seal(rest);
    let length = stream.len();
    let changed = changed.filter(|_| length > 0).map(|at| at % length);
    if let Some(byte) = changed.and_then(|at| stream.get_mut(at)) {
        *byte ^= 1;
    }
    let opened = open(&stream);
    for (position, (behind, sent)) in sent.iter().enumerate() {
        match opened.get(position) {
            // The third byte of a header, the minor version, may be anything (RFC 8446, 5.1), so a change there is none.
            Some(opened) => assert_eq!(opened, sent, "record {position}"),
            None if *sent == Taken::Refused => {}
            None => assert!(changed.is_some_and(|at| at < *behind), "record {position} was lost"),
        }
        if *sent == Taken::Refused {
            return;
        }
    }
    assert!(opened.len() <= sent.len());
}

/// What a record was taken for.
#[derive(Debug, PartialEq, Eq)]
enum Taken {
    Data(Vec<u8>),
    KeyUpdate(bool),
    Farewell,
    /// Authentic, and with no place here.
    Refused,
}

/// The stream of these records; what each is, and where it ends.
fn seal(mut rest: &[u8]) -> (Vec<u8>, Vec<(usize, Taken)>) {
    let mut sealer = Sealer::new(algorithm(), secrets()).expect("a key");
    let (mut stream, mut sent) = (Vec::new(), Vec::new());
    while let Some(([kind, length], behind)) = rest.split_first_chunk::<2>() {
        let (payload, behind) = behind.split_at(usize::from(*length).min(behind.len()).min(PAYLOAD_MAX));
        rest = behind;
        let payload_of = OutboundChunks::Single(payload);
        stream.extend(sealer.seal_as(ContentType::from(*kind), payload_of).expect("a small record"));
        sent.push((stream.len(), meaning(*kind, payload)));
    }
    (stream, sent)
}

/// What a record means: the last byte that is not zero is its type, the zeros behind it are padding.
fn meaning(kind: u8, payload: &[u8]) -> Taken {
    let inner = [payload, &[kind]].concat();
    let Some(end) = inner.iter().rposition(|byte| *byte != 0) else { return Taken::Refused };
    match (ContentType::from(inner[end]), &inner[..end]) {
        (ContentType::ApplicationData, data) => Taken::Data(data.to_vec()),
        (ContentType::Alert, [_, alert]) if *alert == u8::from(AlertDescription::CloseNotify) => {
            Taken::Farewell
        }
        (ContentType::Handshake, [24, 0, 0, 1, requested @ (0 | 1)]) => Taken::KeyUpdate(*requested == 1),
        _ => Taken::Refused,
    }
}

/// What is made of a stream, up to the first record that is refused; that one only if it is authentic.
fn open(stream: &[u8]) -> Vec<Taken> {
    let mut opener = Opener::new(algorithm(), secrets()).expect("a key");
    let (mut buffer, mut start, mut taken) = (stream.to_vec(), 0, Vec::new());
    while let Ok(Some(length)) = Opener::whole(&buffer[start..]) {
        assert!(length <= buffer.len() - start && length <= RECORD_MAX + 256 + 5);
        let at = start..start + length;
        start = at.end;
        match opener.open(&mut buffer, at.clone()) {
            Ok(Opened::Data(data)) => {
                assert!(at.start <= data.start && data.end <= at.end);
                taken.push(Taken::Data(buffer[data].to_vec()));
            }
            Ok(Opened::KeyUpdate { requested }) => taken.push(Taken::KeyUpdate(requested)),
            Ok(Opened::Farewell) => taken.push(Taken::Farewell),
            Err(error) => {
                let forged = error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>());
                if !forged {
                    taken.push(Taken::Refused);
                }
                break;
            }
        }
    }
    taken
}
