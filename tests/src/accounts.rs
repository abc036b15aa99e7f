//! What two reports of one move must agree on, and what must add up in each.

use experiments::report::MoveReport;
use protocol::units::PAGE_BYTES;

/// Bytes in front of the pages of a frame.
const HEAD_BYTES: u64 = protocol::wire::frame::RUN_HEADER_LEN as u64;
/// Most pages that the source pushes in one frame.
const PUSH_FRAME_PAGES_MAX: u64 = 256;

/// What the moved tree did with its memory while it arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Every page stayed where it was, and mapped: each arrives exactly once or is a counted duplicate.
    Steady,
    /// Mappings changed, or the tree forked: pages go, and arrive in several address spaces.
    Changing,
}

/// Judges the two reports of a move that was released.
///
/// # Panics
/// If they do not add up or do not agree.
#[track_caller]
pub fn check(source: &MoveReport, destination: &MoveReport, memory: Memory) {
    assert_eq!((source.role.as_str(), destination.role.as_str()), ("source", "destination"));
    assert_eq!(source.session, destination.session);
    for report in [source, destination] {
        let (pages, tasks) = (report.pages, &report.tasks);
        assert!(pages.adds_up(), "{report}");
        assert_eq!(tasks.iter().map(|task| task.lazy_pages).sum::<u64>(), pages.lazy, "{report}");
        if !is_hybrid(report) {
            assert_eq!(
                (pages.precopied, report.bytes.precopy),
                (0, 0),
                "nothing was copied before: {report}"
            );
        }
        assert!(report.error.is_none(), "{report}");
        assert!(report.blackout_ms > 0.0 && report.blackout_ms < report.total_ms, "{report}");
        assert!(report.brownout_ms > 0.0 && report.brownout_ms < report.total_ms, "{report}");
        check_phases(report);
    }
    assert_eq!(source.pages, destination.pages, "{source}{destination}");
    assert_eq!(source.fault_latency_us, destination.fault_latency_us, "{source}{destination}");
    let tasks = |report: &MoveReport| {
        let mut tasks: Vec<_> = report.tasks.iter().map(|task| (task.pid, task.lazy_pages)).collect();
        tasks.sort_unstable();
        tasks
    };
    assert_eq!(tasks(source), tasks(destination), "{source}{destination}");
    assert_eq!(source.bytes.fault_lane, destination.bytes.fault_lane, "{source}{destination}");
    assert_eq!(source.bytes.precopy, destination.bytes.precopy, "{source}{destination}");
    // What was pushed and asked for as well may still be on its way when everything has arrived.
    assert!(source.bytes.push_lane >= destination.bytes.push_lane, "{source}{destination}");
    // Each side measures by itself: the destination from the freeze as the source dates it. On a busy host
    // messages wait to be read.
    let apart = (source.blackout_ms - destination.blackout_ms).abs();
    assert!(apart < 0.5 * source.blackout_ms + 100.0, "{source}{destination}");
    check_lanes(destination, memory);
}

/// Whether memory was copied before the freeze.
fn is_hybrid(report: &MoveReport) -> bool {
    report.phases.iter().any(|phase| phase.name == "precopy")
}

/// Phases follow each other without gaps and within the whole.
#[track_caller]
fn check_phases(report: &MoveReport) {
    let mut due = 0.0;
    for phase in &report.phases {
        assert!((phase.start_ms - due).abs() < 1.0, "{} does not follow: {report}", phase.name);
        due = phase.start_ms + phase.ms;
    }
    assert!((due - report.total_ms).abs() < 1.0, "the phases do not fill the whole: {report}");
    let names: Vec<&str> = report.phases.iter().map(|phase| phase.name.as_str()).collect();
    let behind: &[&str] = match report.role.as_str() {
        "source" => &["freeze", "dump", "ship", "restore", "push", "release"],
        _ => &["ship", "restore", "push", "release"],
    };
    let ahead: &[&str] = if is_hybrid(report) { &["preflight", "precopy"] } else { &["preflight"] };
    assert_eq!(names, [ahead, behind].concat(), "{report}");
}

/// What the lanes carried is what the pages say.
#[track_caller]
fn check_lanes(report: &MoveReport, memory: Memory) {
    let (pages, bytes, faults) = (report.pages, report.bytes, report.fault_latency_us.count);
    let answer = PAGE_BYTES + HEAD_BYTES;
    assert!(bytes.fault_lane >= faults * answer, "faults without an answer: {report}");
    // Asked ahead, pages travel together; an answer without data says that they were settled or are pushed.
    assert!(bytes.fault_lane >= pages.demand * PAGE_BYTES, "{report}");
    assert_eq!((bytes.fault_lane - faults * answer) % HEAD_BYTES, 0, "{report}");
    assert!(bytes.push_lane >= pages.push * PAGE_BYTES, "{report}");
    if memory == Memory::Changing {
        return;
    }
    assert_eq!(pages.gone, 0, "no page went away: {report}");
    assert!(pages.zero == 0 || is_hybrid(report), "{report}");
    // Every page that came was the first or redundant.
    let came = pages.demand + pages.push + pages.redundant;
    let heads = (bytes.fault_lane + bytes.push_lane).checked_sub(came * PAGE_BYTES);
    let heads = heads.unwrap_or_else(|| panic!("fewer bytes than the {came} pages that came: {report}"));
    let frames = heads / HEAD_BYTES;
    assert_eq!(heads % HEAD_BYTES, 0, "{came} pages: {report}");
    // A frame has a page at least, and each that was asked for may have been refused once.
    assert!(frames >= came.div_ceil(PUSH_FRAME_PAGES_MAX) && frames <= 2 * came, "{came} pages: {report}");
}
