use proptest::prelude::*;

use super::*;

/// One message of a fake restorer: bytes, and how many file descriptors go with them.
type Message = (Vec<u8>, usize);

fn handover(tasks: &[u32]) -> Handover {
    Handover::new(tasks.iter().copied().map(TaskId)).unwrap()
}

fn task(id: u32) -> [Message; 2] {
    [(send::task(TaskId(id)).unwrap().to_vec(), 0), (FD_BYTE.to_vec(), 1)]
}

fn zombie(id: u32) -> Message {
    (send::zombie(TaskId(id)).unwrap().to_vec(), 0)
}

fn finish() -> Message {
    (send::finish().to_vec(), 0)
}

/// Sends `messages` over a stream and reads it as told, at most `step` bytes at a time.
fn exchange(
    handover: &mut Handover,
    messages: &[Message],
    steps: &mut dyn Iterator<Item = usize>,
) -> Result<Vec<Event>, HandoverError> {
    let mut stream: Vec<(u8, usize)> = Vec::new();
    for (bytes, fds) in messages {
        // The kernel hands out the descriptors with the first byte of their message.
        stream.extend(bytes.iter().enumerate().map(|(at, byte)| (*byte, if at == 0 { *fds } else { 0 })));
    }
    let (mut rest, mut events) = (&stream[..], Vec::new());
    while !rest.is_empty() {
        let step = steps.next().unwrap_or(usize::MAX).max(1);
        let (read, tail) = rest.split_at(handover.expect().bytes().min(step).min(rest.len()));
        rest = tail;
        let bytes: Vec<u8> = read.iter().map(|(byte, _)| *byte).collect();
        events.extend(handover.feed(&bytes, read.iter().map(|(_, fds)| fds).sum())?);
    }
    Ok(events)
}

fn run(tasks: &[u32], messages: &[Message]) -> Result<Vec<Event>, HandoverError> {
    exchange(&mut handover(tasks), messages, &mut std::iter::empty())
}

/// The messages of a real restore: a zombie and a live task, in any order, and the finish word.
#[test]
fn messages_of_a_restore_are_read() {
    let (mut handover, mut whole) = (handover(&[21624, 21625]), std::iter::empty());
    let captured = [
        (vec![0x87, 0xab, 0xff, 0xff], 0),
        (vec![0x78, 0x54, 0, 0], 0),
        (vec![0], 1),
        (vec![0x46, 0x54, 0x53, 0x52], 0),
    ];
    assert_eq!((handover.expect(), handover.missing()), (Expect::Word(4), 2));
    assert_eq!(
        exchange(&mut handover, &captured, &mut whole),
        Ok(vec![Event::Zombie { id: TaskId(21625) }, Event::Task { id: TaskId(21624) }, Event::Finished])
    );
    assert_eq!((handover.expect(), handover.missing()), (Expect::End, 0));
    assert_eq!(handover.end(), Ok(()));
}

#[test]
fn a_task_is_there_only_with_its_fd() {
    let mut handover = handover(&[7]);
    assert_eq!(handover.feed(&send::task(TaskId(7)).unwrap(), 0), Ok(None));
    assert_eq!((handover.expect(), handover.missing()), (Expect::Fd, 1));
    assert_eq!(handover.feed(&FD_BYTE, 1), Ok(Some(Event::Task { id: TaskId(7) })));
    assert_eq!((handover.expect(), handover.missing()), (Expect::Word(4), 0));
}

#[test]
fn a_word_may_come_in_pieces() {
    let mut handover = handover(&[7]);
    assert_eq!(handover.feed(&[0xf9], 0), Ok(None));
    assert_eq!(handover.expect(), Expect::Word(3));
    assert_eq!(handover.feed(&[], 0), Ok(None));
    assert_eq!(handover.feed(&[0xff, 0xff], 0), Ok(None));
    assert_eq!(handover.feed(&[0xff], 0), Ok(Some(Event::Zombie { id: TaskId(7) })));
}

#[test]
fn unknown_task_is_refused() {
    for pid in [8_i32, -8, 0, i32::MIN, i32::MAX] {
        let messages = [(pid.to_le_bytes().to_vec(), 0)];
        assert_eq!(run(&[7], &messages), Err(HandoverError::UnknownTask(pid)));
    }
}

#[test]
fn task_handed_over_twice_is_refused() {
    let duplicate = Err(HandoverError::DuplicateTask(TaskId(7)));
    assert_eq!(run(&[7, 8], &[task(7), task(7)].concat()), duplicate);
    assert_eq!(run(&[7, 8], &[zombie(7), zombie(7)]), duplicate);
    assert_eq!(run(&[7, 8], &[&[zombie(7)][..], &task(7)].concat()), duplicate);
}

#[test]
fn finish_before_all_tasks_is_refused() {
    let messages = [&task(8)[..], &[finish()]].concat();
    let error = HandoverError::EarlyFinish { missing: 2, first: TaskId(7) };
    assert_eq!(run(&[9, 8, 7], &messages), Err(error));
}

#[test]
fn finish_in_place_of_an_fd_is_refused() {
    let messages = [task(7)[0].clone(), finish()];
    assert_eq!(run(&[7], &messages), Err(HandoverError::FdCount { task: TaskId(7), found: 0 }));
}

#[test]
fn too_many_fds_are_refused() {
    let messages = [task(7)[0].clone(), (FD_BYTE.to_vec(), 2)];
    assert_eq!(run(&[7], &messages), Err(HandoverError::FdCount { task: TaskId(7), found: 2 }));
}

#[test]
fn fd_with_a_word_is_refused() {
    let messages = [(task(7)[0].0.clone(), 1)];
    assert_eq!(run(&[7], &messages), Err(HandoverError::UnexpectedFds(1)));
}

#[test]
fn reading_too_much_is_refused() {
    let mut handover = handover(&[7]);
    assert_eq!(handover.feed(&[0; 5], 0), Err(HandoverError::OverRead { wanted: 4, found: 5 }));
    handover.feed(&send::task(TaskId(7)).unwrap(), 0).unwrap();
    assert_eq!(handover.feed(&[0; 2], 1), Err(HandoverError::OverRead { wanted: 1, found: 2 }));
}

#[test]
fn anything_after_the_finish_word_is_refused() {
    let messages = [&[zombie(7), finish()][..], &task(7)].concat();
    assert_eq!(run(&[7], &messages), Err(HandoverError::AfterFinish(1)));
}

#[test]
fn end_before_the_finish_word_is_refused() {
    let mut handover = handover(&[7]);
    assert_eq!(handover.end(), Err(HandoverError::EarlyEnd { missing: 1 }));
    exchange(&mut handover, &task(7), &mut std::iter::empty()).unwrap();
    assert_eq!(handover.end(), Err(HandoverError::EarlyEnd { missing: 0 }));
}

#[test]
fn tasks_that_cannot_be_expected_are_refused() {
    let new = |tasks: &[u32]| Handover::new(tasks.iter().copied().map(TaskId)).unwrap_err();
    assert_eq!(new(&[1, 0]), HandoverError::NotAPid(TaskId(0)));
    assert_eq!(new(&[MAX_PID + 1]), HandoverError::NotAPid(TaskId(MAX_PID + 1)));
    assert_eq!(new(&[1, 2, 1]), HandoverError::ListedTwice(TaskId(1)));
    let tasks: Vec<u32> = (1..).take(MAX_TASKS + 1).collect();
    assert_eq!(new(&tasks), HandoverError::TooManyTasks);
    handover(&tasks[..MAX_TASKS]);
}

#[test]
fn only_pids_are_sent() {
    for id in [0, MAX_PID + 1, u32::MAX] {
        assert_eq!(send::task(TaskId(id)), Err(HandoverError::NotAPid(TaskId(id))));
        assert_eq!(send::zombie(TaskId(id)), Err(HandoverError::NotAPid(TaskId(id))));
    }
}

proptest! {
    #[test]
    fn a_stream_read_in_any_steps_gives_the_same_events(
        tasks in proptest::collection::btree_map(1..MAX_PID, any::<bool>(), 0..20),
        steps in proptest::collection::vec(1_usize..6, 0..100),
    ) {
        let (mut messages, mut expected) = (Vec::new(), Vec::new());
        for (&id, &alive) in &tasks {
            if alive {
                messages.extend(task(id));
                expected.push(Event::Task { id: TaskId(id) });
            } else {
                messages.push(zombie(id));
                expected.push(Event::Zombie { id: TaskId(id) });
            }
        }
        messages.push(finish());
        expected.push(Event::Finished);
        let mut handover = Handover::new(tasks.keys().rev().copied().map(TaskId)).unwrap();
        prop_assert_eq!(exchange(&mut handover, &messages, &mut steps.into_iter()), Ok(expected));
        prop_assert_eq!(handover.end(), Ok(()));
    }

    #[test]
    fn any_messages_are_read_or_refused(
        messages in proptest::collection::vec((proptest::collection::vec(0_u8..4, 0..6), 0_usize..3), 0..20),
    ) {
        let mut handover = handover(&[1, 2, 0x0101]);
        for (bytes, fds) in messages {
            let _ = handover.feed(&bytes, fds);
            let _ = handover.end();
        }
    }
}
