//! Answers on the streams that the destination asks for pages on, over a socket.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use protocol::criu::page_server::HeaderLayout;
use protocol::link::Stream;
use protocol::units::{ImageAddr, PAGE_SIZE, PageRun, TaskId};
use protocol::wire::limits::PAGES_PER_FRAME_MAX;
use uffd_daemon::inflight::Purpose;
use uffd_daemon::upstream::{FaultLane, PageServer, Upstream, UpstreamError};

/// Longest stream that is tried; a socket holds it.
const STREAM_MAX: usize = 64 << 10;

/// A socket with `data` in it, and its end.
fn filled(data: &[u8]) -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    (&theirs).write_all(&data[..data.len().min(STREAM_MAX)]).expect("a socket holds it");
    theirs.shutdown(std::net::Shutdown::Write).expect("shut down a socket");
    (ours, theirs)
}

/// What a source answers on the fault lane.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_fault_lane(data: &[u8]) {
    let (ours, _theirs) = filled(data);
    let mut lane = FaultLane::new(Stream::Unix(ours), Arc::default());
    let mut bytes = 0;
    let error = loop {
        let answers = lane.answers(&mut |answer| {
            assert!(answer.data.len() <= PAGES_PER_FRAME_MAX as usize * PAGE_SIZE);
            assert_eq!(answer.data.len() % PAGE_SIZE, 0);
            bytes += answer.data.len();
        });
        if let Err(error) = answers {
            break error;
        }
    };
    assert!(bytes <= data.len());
    assert!(matches!(error, UpstreamError::Closed | UpstreamError::Protocol(_)), "{error}");
}

/// What a page server answers. First the layout and how many questions there are, then for each its page and how many
/// follow, then the answers.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_page_server_answers(data: &[u8]) {
    let Some((how, mut rest)) = data.split_first() else { return };
    let layout = if how % 2 == 0 { HeaderLayout::Compact } else { HeaderLayout::Wide };
    let mut questions = Vec::new();
    for _ in 0..how / 2 % 8 {
        let Some(([page, pages], behind)) = rest.split_first_chunk::<2>() else { return };
        let start = ImageAddr::containing(u64::from(*page) << 12);
        questions.extend(PageRun::new(start, u64::from(*pages)));
        rest = behind;
    }
    let (ours, _theirs) = filled(rest);
    let mut server = PageServer::over(OwnedFd::from(ours), layout, true).expect("a stream socket");
    for (id, run) in (0..).zip(&questions) {
        server.ask(id, Purpose::Background, TaskId(1), *run).expect("a question");
    }
    let mut answered = 0;
    let error = loop {
        let answers = server.answers(&mut |answer| {
            assert_eq!(answer.id, answered, "answers come in order");
            let most = questions[usize::try_from(answered).expect("few")].pages;
            let pages = (answer.data.len() / PAGE_SIZE) as u64;
            assert!(answer.data.len() % PAGE_SIZE == 0 && (1..=most).contains(&pages));
            answered += 1;
        });
        if let Err(error) = answers {
            break error;
        }
    };
    assert!(matches!(error, UpstreamError::Closed | UpstreamError::Protocol(_)), "{error}");
}
