//! Our own frames.

use protocol::units::PAGE_SIZE;
use protocol::wire::control::Control;
use protocol::wire::frame::{
    HEADER_LEN, Header, Kind, RUN_HEADER_LEN, RunFrame, TaskRun, decode_ack, encode_ack,
};
use protocol::wire::hello::{
    HELLO_LEN, HELLO_REPLY_LEN, Hello, HelloError, decode_reply, encode_reply, is_ours,
};
use protocol::wire::limits::{self, MEMORY_PER_BYTE};
use protocol::wire::lz4::{Compressor, decompress};
use protocol::wire::precopy::{Areas, Round};

use super::bounded;

/// The first bytes of a connection, and the answer to them.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_hello(data: &[u8]) {
    if let Some(bytes) = data.first_chunk::<HELLO_LEN>() {
        match bounded(bytes.len(), MEMORY_PER_BYTE, || Hello::decode(bytes)) {
            Ok(hello) => {
                assert!(is_ours(bytes));
                assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
                let version = hello.negotiate();
                let spoken = hello.versions.0..=hello.versions.1;
                assert!(version.is_err() || version.is_ok_and(|version| spoken.contains(&version)));
            }
            Err(error) => assert!(!is_ours(bytes) || matches!(error, HelloError::Malformed(_)), "{error:?}"),
        }
    }
    if let Some(bytes) = data.first_chunk::<HELLO_REPLY_LEN>() {
        match bounded(bytes.len(), MEMORY_PER_BYTE, || decode_reply(bytes)) {
            Ok(version) => assert_eq!(decode_reply(&encode_reply(Ok(version))), Ok(version)),
            Err(HelloError::Refused(refusal)) => {
                let again = decode_reply(&encode_reply(Err(refusal)));
                assert_eq!(again, Err(HelloError::Refused(refusal)));
            }
            Err(_) => {}
        }
    }
}

/// Headers, and the headers of lanes, one behind the other.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_frames(data: &[u8]) {
    let mut rest = data;
    while let Some((bytes, behind)) = rest.split_first_chunk::<HEADER_LEN>() {
        if let Ok(header) = bounded(bytes.len(), MEMORY_PER_BYTE, || Header::decode(bytes)) {
            assert_eq!(header.encode(), *bytes);
            let page_frame = RUN_HEADER_LEN - HEADER_LEN + limits::PAGES_PER_FRAME_MAX as usize * 4096;
            assert!(header.body_len <= limits::CONTROL_BODY_MAX.max(page_frame));
        }
        if let Some(bytes) = rest.first_chunk::<RUN_HEADER_LEN>() {
            if let Ok(frame) = bounded(bytes.len(), MEMORY_PER_BYTE, || RunFrame::decode(bytes)) {
                assert_eq!(frame.what.frame(frame.kind, frame.id, frame.data_len), *bytes);
                check_run(&frame.what, u64::from(limits::PAGES_PER_FRAME_MAX));
            }
        }
        rest = behind;
    }
}

fn check_run(what: &TaskRun, pages_max: u64) {
    let run = what.run;
    assert!((1..=pages_max).contains(&run.pages));
    assert!(run.start < run.end() && run.end().pages_since(run.start) == run.pages, "{run:?}");
}

/// The body of an acknowledgement.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_acknowledgement(data: &[u8]) {
    let Ok(runs) = bounded(data.len(), MEMORY_PER_BYTE, || decode_ack(data)) else { return };
    runs.iter().for_each(|what| check_run(what, u64::from(u32::MAX)));
    assert_eq!(&encode_ack(&runs)[HEADER_LEN..], data);
}

/// A control message: its kind, and its body.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_control(data: &[u8]) {
    let Some((kind, body)) = data.split_first() else { return };
    let mut head = [0; HEADER_LEN];
    head[4] = *kind;
    let Ok(Header { kind, .. }) = Header::decode(&head) else { return };
    let decoded = bounded(body.len(), MEMORY_PER_BYTE, || Control::decode(kind, body));
    let Ok(message) = decoded else { return };
    assert!(!matches!(kind, Kind::Demand | Kind::Pages | Kind::Settled | Kind::Ack));
    if let Control::Image(chunk) = &message {
        assert!(!chunk.name.contains('/') && !chunk.name.starts_with('.') && !chunk.name.is_empty());
        assert!(chunk.data.len() as u64 <= chunk.size && chunk.size <= limits::IMAGE_SIZE_MAX);
        assert!(chunk.offset <= chunk.size - chunk.data.len() as u64);
    }
    let (again, encoded) = message.encode();
    assert_eq!(again, kind);
    assert_eq!(Control::decode(kind, &encoded).as_ref(), Ok(&message));
    // Only text that was not UTF-8 is encoded otherwise.
    assert!(encoded == body || format!("{message:?}").contains('\u{fffd}'));
}

/// The bodies of pre-copy: where a task has memory, the end of a round, and a compressed page.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_precopy(data: &[u8]) {
    if let Ok(areas) = bounded(data.len(), MEMORY_PER_BYTE, || Areas::decode(data)) {
        assert!(areas.areas.is_sorted_by(|before, next| before.end() <= next.start));
        assert_eq!(&areas.encode()[HEADER_LEN..], data);
    }
    if let Ok(round) = bounded(data.len(), MEMORY_PER_BYTE, || Round::decode(data)) {
        assert_eq!(&round.encode()[HEADER_LEN..], data);
    }
    let mut page = [0; PAGE_SIZE];
    if bounded(data.len(), MEMORY_PER_BYTE, || decompress(data, &mut page)).is_ok() {
        if let Some(block) = Compressor::default().compress(&page) {
            let mut again = [1; PAGE_SIZE];
            assert!(decompress(block, &mut again).is_ok() && again == page);
        }
    }
}
