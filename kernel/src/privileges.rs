//! What a thread may do beyond its user's rights.

use std::io;

pub use rustix::thread::CapabilitySet;
use rustix::thread::{CapabilitySets, capabilities, set_capabilities, set_no_new_privs};

/// Takes every capability that is not in `keep` from the calling thread for good, and the means to get others by executing a
/// program. Other threads of the process keep theirs: capabilities(7) are a thread's.
///
/// Three system calls and nothing else: what `fork` leaves of a process with threads may call it.
///
/// # Errors
/// The errno of `prctl(2)` or `capset(2)`: neither is refused by a kernel as it is built.
pub fn renounce_but(keep: CapabilitySet) -> io::Result<()> {
    set_no_new_privs(true)?;
    let permitted = capabilities(None)?.permitted.intersection(keep);
    let inheritable = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: permitted, permitted, inheritable })?;
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
            renounce_but(CapabilitySet::NET_ADMIN).unwrap();
            let some = keys.map(of_this_thread);
            renounce_but(CapabilitySet::empty()).unwrap();
            (some, keys.map(of_this_thread))
        });
        let (some, nothing) = renounced.join().unwrap();
        let none = "0000000000000000".to_owned();
        let had = |caps: &str| u64::from_str_radix(caps, 16).unwrap() & CapabilitySet::NET_ADMIN.bits();
        let kept = format!("{:016x}", had(&before[1]));
        assert_eq!(some, [kept.clone(), kept, none.clone(), "1".into()]);
        assert_eq!(nothing, [none.clone(), none.clone(), none, "1".into()]);
        assert_eq!(keys.map(of_this_thread), before);
    }
}
