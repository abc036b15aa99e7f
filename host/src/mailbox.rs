//! A channel whose receiving end can be polled beside sockets and processes.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Receiving end; readable when something is there.
#[derive(Debug)]
pub struct Mailbox<T> {
    letters: Receiver<T>,
    bell: UnixStream,
}

/// Sending end.
#[derive(Debug)]
pub struct Post<T> {
    letters: Sender<T>,
    bell: Arc<UnixStream>,
}

impl<T> Clone for Post<T> {
    fn clone(&self) -> Self {
        Self { letters: self.letters.clone(), bell: self.bell.clone() }
    }
}

/// A mailbox and its sending end.
///
/// # Errors
/// The errno of making a socket pair.
pub fn mailbox<T>() -> io::Result<(Post<T>, Mailbox<T>)> {
    let (sender, letters) = channel();
    let (ring, bell) = UnixStream::pair()?;
    ring.set_nonblocking(true)?;
    bell.set_nonblocking(true)?;
    Ok((Post { letters: sender, bell: Arc::new(ring) }, Mailbox { letters, bell }))
}

impl<T> Post<T> {
    /// Posts a letter; one to a mailbox that is gone is dropped.
    pub fn send(&self, letter: T) {
        if self.letters.send(letter).is_ok() {
            // A full socket means that the bell is ringing already.
            let _ = (&*self.bell).write(&[1]);
        }
    }
}

impl<T> AsFd for Mailbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

impl<T> Mailbox<T> {
    /// Every letter that is there, without waiting. The bell is silenced first, so a letter posted
    /// meanwhile rings again.
    #[must_use]
    pub fn empty(&self) -> Vec<T> {
        let mut bytes = [0; 64];
        while matches!((&self.bell).read(&mut bytes), Ok(1..)) {}
        self.letters.try_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::waiting::readable_within;
    use std::time::Duration;

    #[test]
    fn rings_until_emptied() {
        let (post, mailbox) = mailbox().unwrap();
        assert!(!readable_within(mailbox.as_fd(), Duration::ZERO).unwrap());
        post.send(1);
        post.clone().send(2);
        assert!(readable_within(mailbox.as_fd(), Duration::from_secs(5)).unwrap());
        assert_eq!(mailbox.empty(), [1, 2]);
        assert!(!readable_within(mailbox.as_fd(), Duration::ZERO).unwrap());
        drop(mailbox);
        post.send(3);
    }
}
