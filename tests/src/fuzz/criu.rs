//! What CRIU's sockets and programs say.

use protocol::criu::handover::{Event, Expect, Handover, HandoverError};
use protocol::criu::limits::MEMORY_PER_BYTE;
use protocol::criu::page_server::{Header, HeaderBuf, HeaderError, HeaderLayout, MAX_HEADER_LEN};
use protocol::criu::version::{CriuVersion, header_layout};
use protocol::units::TaskId;

use super::bounded;

/// Headers of the page server in a layout that is known, or detected: however they are split, they are the same.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_page_server(data: &[u8]) {
    let Some((how, stream)) = data.split_first() else { return };
    let layout = [None, Some(HeaderLayout::Compact), Some(HeaderLayout::Wide)][usize::from(how % 3)];
    let step = usize::from(how / 3) + 1;
    let whole = bounded(stream.len(), MEMORY_PER_BYTE, || headers(layout, stream, stream.len().max(1)));
    assert_eq!(headers(layout, stream, step), whole);
    for header in whole.iter().flatten() {
        check_header(header);
    }
    for pair in whole.windows(2) {
        if let [Ok(request), Ok(reply)] = pair {
            if let Ok(run) = reply.check_reply_to(request) {
                assert!(run.pages <= request.pages && run.start.get() == request.addr);
            }
        }
    }
    for layout in [HeaderLayout::Compact, HeaderLayout::Wide] {
        let decoded = Header::decode(layout, stream);
        assert_eq!(stream.len() < layout.len(), matches!(decoded, Err(HeaderError::Short { .. })));
    }
}

fn headers(layout: Option<HeaderLayout>, stream: &[u8], step: usize) -> Vec<Result<Header, HeaderError>> {
    let mut buffer = layout.map_or_else(HeaderBuf::detecting, HeaderBuf::new);
    let mut headers = Vec::new();
    for mut piece in stream.chunks(step) {
        while !piece.is_empty() {
            let before = piece.len();
            let Some(header) = buffer.push(&mut piece) else {
                assert!(piece.is_empty());
                break;
            };
            assert!(piece.len() <= before && buffer.pending() == 0);
            let failed = header.is_err();
            headers.push(header);
            if failed {
                return headers;
            }
        }
        assert!(buffer.missing() > 0 && buffer.pending() < MAX_HEADER_LEN);
    }
    headers
}

fn check_header(header: &Header) {
    let mut bytes = [0; MAX_HEADER_LEN];
    for layout in [HeaderLayout::Compact, HeaderLayout::Wide] {
        match header.encode(layout, &mut bytes) {
            Ok(len) => assert_eq!(Header::decode(layout, &bytes[..len]).as_ref(), Ok(header)),
            Err(_) => assert!(layout == HeaderLayout::Compact && u32::try_from(header.pages).is_err()),
        }
    }
    if let Ok((task, run)) = header.requested() {
        assert_eq!(Header::get(task, run), *header);
        assert!(run.start < run.end() && run.pages > 0);
    }
}

/// The stream of a restore that hands over. First the tasks that are expected (a count and as many pids), then messages:
/// length and descriptors in a byte, and the bytes.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_handover(data: &[u8]) {
    let Some((count, mut rest)) = data.split_first() else { return };
    let mut tasks = Vec::new();
    for _ in 0..count % 8 {
        let Some((pid, behind)) = rest.split_first_chunk() else { return };
        tasks.push(TaskId(u32::from_le_bytes(*pid)));
        rest = behind;
    }
    let Ok(mut handover) = Handover::new(tasks.iter().copied()) else { return };
    let mut handed = Vec::new();
    let mut finished = false;
    while let Some((head, behind)) = rest.split_first() {
        let (bytes, behind) = behind.split_at(usize::from(head % 8).min(behind.len()));
        rest = behind;
        let (expected, missing) = (handover.expect(), handover.missing());
        let fds = usize::from(head / 8 % 3);
        match bounded(bytes.len(), MEMORY_PER_BYTE, || handover.feed(bytes, fds)) {
            Ok(Some(Event::Task { id })) => {
                assert!(fds == 1 && expected == Expect::Fd);
                handed.push(id);
            }
            Ok(Some(Event::Zombie { id })) => handed.push(id),
            Ok(Some(Event::Finished)) => finished = true,
            Ok(None) => {}
            Err(error) => {
                assert_eq!((handover.expect(), handover.missing()), (expected, missing), "{error}");
            }
        }
        assert_eq!(handover.missing(), tasks.len() - handed.len());
        assert!((1..=4).contains(&handover.expect().bytes()));
        assert_eq!(finished, handover.expect() == Expect::End);
    }
    assert!(handed.iter().all(|id| tasks.contains(id)));
    handed.sort_unstable();
    handed.dedup();
    match handover.end() {
        Ok(()) => assert!(finished && handed.len() == tasks.len()),
        Err(HandoverError::EarlyEnd { missing }) => assert_eq!(missing, tasks.len() - handed.len()),
        Err(other) => panic!("{other}"),
    }
}

/// What `criu --version` printed, here or on the other host.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_criu_version(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let parsed = bounded(text.len(), MEMORY_PER_BYTE, || CriuVersion::parse(&text));
    let _ = header_layout(&text);
    if let Ok(version) = parsed {
        assert_eq!(CriuVersion::parse(&format!("Version: {version}")), Ok(version));
    }
}
