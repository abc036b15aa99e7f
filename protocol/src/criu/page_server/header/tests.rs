use proptest::prelude::*;

use super::*;

fn run(start: u64, pages: u64) -> PageRun {
    PageRun::new(ImageAddr::aligned(start).unwrap(), pages).unwrap()
}

fn encoded(header: Header, layout: HeaderLayout) -> Vec<u8> {
    let mut buf = [0xee; MAX_HEADER_LEN];
    let len = header.encode(layout, &mut buf).unwrap();
    buf[..len].to_vec()
}

const COMMANDS: [Command; 9] = [
    Command::Add,
    Command::Hole,
    Command::Open,
    Command::Open2,
    Command::Parent,
    Command::AddF,
    Command::Get,
    Command::Close,
    Command::ForceClose,
];

#[test]
fn get_has_the_bytes_of_criu_4_1_1() {
    let bytes = encoded(Header::get(TaskId(0x5478), run(0x7f8b_3260_1000, 6)), HeaderLayout::Compact);
    let expected = [
        &[7, 0, 0, 0, 6, 0, 0, 0][..],
        &[0x00, 0x10, 0x60, 0x32, 0x8b, 0x7f, 0, 0],
        &[0x78, 0x54, 0, 0, 0, 0, 0, 0],
    ];
    assert_eq!(bytes, expected.concat());
}

#[test]
fn reply_has_the_bytes_of_criu_4_2() {
    let bytes = encoded(Header::reply(TaskId(0x5478), run(0x1000, 6)), HeaderLayout::Wide);
    let expected = [
        &[6, 0, 4, 0, 0, 0, 0, 0][..],
        &[6, 0, 0, 0, 0, 0, 0, 0],
        &[0, 0x10, 0, 0, 0, 0, 0, 0],
        &[0x78, 0x54, 0, 0, 0, 0, 0, 0],
    ];
    assert_eq!(bytes, expected.concat());
}

#[test]
fn close_is_a_full_number() {
    let bytes = encoded(Header::close(Command::ForceClose), HeaderLayout::Compact);
    assert_eq!(bytes[..4], 0x1024_u32.to_le_bytes());
    assert_eq!(bytes[4..], [0; 20]);
}

#[test]
fn short_header_is_refused() {
    for layout in [HeaderLayout::Compact, HeaderLayout::Wide] {
        let bytes = encoded(Header::close(Command::Close), layout);
        for found in 0..layout.len() {
            let error = Header::decode(layout, &bytes[..found]).unwrap_err();
            assert_eq!(error, HeaderError::Short { needed: layout.len(), found });
        }
    }
}

#[test]
fn unknown_command_is_refused_with_its_number() {
    for word in [0, 8, 0x1022, 0x1025, 0xffff_ffff] {
        let mut bytes = [0; MAX_HEADER_LEN];
        bytes[..4].copy_from_slice(&u32::to_le_bytes(word));
        let error = Header::decode(HeaderLayout::Wide, &bytes).unwrap_err();
        assert_eq!(error, HeaderError::UnknownCommand(word));
    }
}

#[test]
fn flags_on_another_command_than_add_f_are_refused() {
    let mut bytes = encoded(Header::get(TaskId(1), run(0x1000, 1)), HeaderLayout::Wide);
    bytes[2] = 4;
    let error = Header::decode(HeaderLayout::Wide, &bytes).unwrap_err();
    assert_eq!(error, HeaderError::UnknownCommand(0x4_0007));
}

#[test]
fn unknown_flags_are_refused() {
    let mut bytes = encoded(Header::reply(TaskId(1), run(0x1000, 1)), HeaderLayout::Wide);
    bytes[2] = 8;
    assert_eq!(Header::decode(HeaderLayout::Wide, &bytes), Err(HeaderError::UnknownFlags(8)));
}

/// The first header that Debian's `criu lazy-pages` 4.2.1 sent: page 0x7fba383f0000 of task 555.
#[test]
fn padding_of_a_wide_header_is_not_looked_at() {
    let bytes = [
        &[7, 0, 0, 0, 0x55, 0x55, 0, 0][..],
        &[1, 0, 0, 0, 0, 0, 0, 0],
        &[0, 0, 0x3f, 0x38, 0xba, 0x7f, 0, 0],
        &[0x2b, 2, 0, 0, 0, 0, 0, 0],
    ];
    let header = Header::decode(HeaderLayout::Wide, &bytes.concat());
    assert_eq!(header, Ok(Header::get(TaskId(555), run(0x7fba_383f_0000, 1))));
}

#[test]
fn compact_request_read_as_wide_is_refused() {
    let mut bytes = encoded(Header::get(TaskId(1), run(0x1000, 9)), HeaderLayout::Compact);
    bytes.extend([0; 8]);
    let request = Header::decode(HeaderLayout::Wide, &bytes).unwrap();
    assert_eq!(request.requested(), Err(HeaderError::NotAPid(0)));
}

#[test]
fn page_count_that_does_not_fit_is_refused() {
    let header = Header::get(TaskId(1), run(0, 1 << 32));
    let mut buf = [0; MAX_HEADER_LEN];
    assert_eq!(header.encode(HeaderLayout::Compact, &mut buf), Err(HeaderError::TooManyPages(1 << 32)));
    assert_eq!(header.encode(HeaderLayout::Wide, &mut buf), Ok(32));
}

#[test]
fn requested_gives_task_and_run() {
    let request = Header::get(TaskId(7), run(0x3000, 5));
    assert_eq!(request.requested(), Ok((TaskId(7), run(0x3000, 5))));
}

#[test]
fn requests_for_no_run_are_refused() {
    let request = Header::get(TaskId(7), run(0x3000, 5));
    for (addr, pages) in [(0x3001, 5), (0x3000, 0), (0x3000, u64::MAX), (!0xfff, 1)] {
        let error = Header { addr, pages, ..request }.requested().unwrap_err();
        assert_eq!(error, HeaderError::NotARun { addr, pages });
    }
}

#[test]
fn requests_for_no_pid_are_refused() {
    let request = Header::get(TaskId(7), run(0x3000, 5));
    for dst in [0, u64::from(MAX_PID) + 1, (7 << 32) | 7] {
        assert_eq!(Header { dst, ..request }.requested(), Err(HeaderError::NotAPid(dst)));
    }
}

#[test]
fn only_get_requests_pages() {
    let error = Header::close(Command::Close).requested().unwrap_err();
    assert_eq!(error, HeaderError::NotGet(Command::Close));
}

#[test]
fn a_reply_may_be_shorter() {
    let request = Header::get(TaskId(7), run(0x3000, 5));
    for pages in 1..=5 {
        let reply = Header::reply(TaskId(7), run(0x3000, pages));
        assert_eq!(reply.check_reply_to(&request), Ok(run(0x3000, pages)));
    }
}

#[test]
fn empty_or_longer_reply_is_refused() {
    let request = Header::get(TaskId(7), run(0x3000, 5));
    for found in [0, 6, u64::MAX] {
        let reply = Header { pages: found, ..Header::reply(TaskId(7), run(0x3000, 5)) };
        let error = HeaderError::PageCount { addr: 0x3000, found, wanted: 5 };
        assert_eq!(reply.check_reply_to(&request), Err(error));
    }
}

#[test]
fn reply_to_another_request_is_refused() {
    let request = Header::get(TaskId(7), run(0x3000, 5));
    for reply in [Header::reply(TaskId(8), run(0x3000, 5)), Header::reply(TaskId(7), run(0x4000, 4))] {
        let error = reply.check_reply_to(&request).unwrap_err();
        assert!(matches!(error, HeaderError::OtherRequest { want_addr: 0x3000, want_dst: 7, .. }));
    }
}

#[test]
fn reply_without_data_is_refused() {
    let request = Header::get(TaskId(7), run(0x3000, 5));
    let reply = Header::reply(TaskId(7), run(0x3000, 5));
    for reply in [request, Header { flags: PageFlags::LAZY, ..reply }] {
        assert!(matches!(reply.check_reply_to(&request), Err(HeaderError::NotPages { .. })));
    }
}

fn header() -> impl Strategy<Value = Header> {
    let flags = proptest::sample::select(vec![0, 1, 2, 4, 6]);
    (proptest::sample::select(&COMMANDS[..]), flags, any::<u32>(), any::<u64>(), any::<u64>()).prop_map(
        |(command, bits, pages, addr, dst)| Header {
            command,
            flags: PageFlags::from_bits(if command == Command::AddF { bits } else { 0 }).unwrap(),
            pages: u64::from(pages),
            addr,
            dst,
        },
    )
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(header in header(), wide_pages in any::<u64>()) {
        for layout in [HeaderLayout::Compact, HeaderLayout::Wide] {
            let bytes = encoded(header, layout);
            prop_assert_eq!(bytes.len(), layout.len());
            prop_assert_eq!(Header::decode(layout, &bytes), Ok(header));
        }
        let header = Header { pages: wide_pages, ..header };
        prop_assert_eq!(Header::decode(HeaderLayout::Wide, &encoded(header, HeaderLayout::Wide)), Ok(header));
    }

    #[test]
    fn any_bytes_decode_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
        for layout in [HeaderLayout::Compact, HeaderLayout::Wide] {
            if let Ok(header) = Header::decode(layout, &bytes) {
                let _ = header.requested();
                let _ = header.check_reply_to(&header);
            }
        }
    }
}
