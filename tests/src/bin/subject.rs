//! A process for a test to operate on: `subject CALL` waits in a system call, `subject memory` obeys orders about memory,
//! `subject tracker PID` tracks another process until it is killed, `subject guest CHECKS` is the first process of a guest.
//! See `tests::subject`, `tests::guest`.
#![forbid(unsafe_code)]

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    tests::subject::main(&arguments)
}
