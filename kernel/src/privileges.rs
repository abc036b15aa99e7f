//! What a thread may do beyond its user's rights.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};

/// Takes every capability from the calling thread for good, and the means to get others by executing a program. Other
/// threads of the process keep theirs: capabilities(7) are a thread's.
///
/// Two system calls and nothing else: what `fork` leaves of a process with threads may call it.
///
/// # Errors
/// The errno of `prctl(2)` or `capset(2)`: neither is refused by a kernel as it is built.
pub fn renounce() -> io::Result<()> {
    const NONE: CapabilitySet = CapabilitySet::empty();
    set_no_new_privs(true)?;
    set_capabilities(None, CapabilitySets { effective: NONE, permitted: NONE, inheritable: NONE })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_this_thread(key: &str) -> String {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        status.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim().to_owned()
    }

    #[test]
    fn a_thread_gives_up_its_capabilities_and_the_others_keep_theirs() {
        let keys = ["CapEff:", "CapPrm:", "CapInh:", "NoNewPrivs:"];
        let before = keys.map(of_this_thread);
        let renounced = std::thread::spawn(move || {
            renounce().unwrap();
            keys.map(of_this_thread)
        });
        let none = "0000000000000000";
        assert_eq!(renounced.join().unwrap(), [none, none, none, "1"]);
        assert_eq!(keys.map(of_this_thread), before);
    }
}
