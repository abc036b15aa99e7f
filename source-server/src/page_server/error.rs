//! Why pages are not served.

use std::error::Error;
use std::fmt::Write;
use std::io;

use protocol::criu::checkpoint::ImageError;
use protocol::criu::pages::PagesError;
use protocol::link::LinkError;
use protocol::units::TaskId;

/// Why the page server did not start, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum PageServerError {
    /// The image directory cannot be read.
    #[error("cannot serve the images: {}", with_causes(.0))]
    Images(ImageError),
    /// The pages of a task cannot be read.
    #[error("cannot serve the pages of task {task}: {}", with_causes(.source))]
    TaskPages {
        /// The task.
        task: TaskId,
        /// The cause.
        source: PagesError,
    },
    /// Images of a lazy dump.
    #[error(
        "{pages} pages of task {task} were left on the source by criu dump --lazy-pages, they are not in the \
         images; while the tasks are frozen there, serve them with --pid"
    )]
    LeftOnSource {
        /// A task with such pages.
        task: TaskId,
        /// How many.
        pages: u64,
    },
    /// No such process.
    #[error("there is no process {0}")]
    NoProcess(u32),
    /// The process cannot be looked at.
    #[error("cannot read process {pid}: {source}; it takes root, or the right to trace it")]
    Process {
        /// Its pid.
        pid: u32,
        /// The cause.
        source: io::Error,
    },
    /// The process, or one below it, is not frozen.
    #[error(
        "process {0} is running: freeze it first, for example with criu dump --lazy-pages --leave-stopped or \
         kill -STOP"
    )]
    Running(u32),
    /// Nobody can connect.
    #[error("cannot {0}; is another server running there? give another --port, or 0")]
    Listen(LinkError),
    /// A system call of the server itself failed.
    #[error("page server failed to {doing}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// A task did not stay still while its pages were served.
    #[error(
        "process {0} was resumed while its pages were served; what its clients have is not one state of its \
         memory: discard what they restored"
    )]
    NotStill(u32),
    /// A task ended while its pages were served.
    #[error(
        "process {0} has ended and its pages are gone; clients who did not have all of them cannot go on"
    )]
    Ended(u32),
    /// A signal came while clients were connected.
    #[error("interrupted with {0} clients connected, who have not closed their sessions")]
    Interrupted(usize),
}

impl PageServerError {
    /// The exit status for it: 2 for what is wrong before anything is served.
    #[must_use]
    pub const fn exit_status(&self) -> u8 {
        match self {
            Self::Images(_)
            | Self::TaskPages { .. }
            | Self::LeftOnSource { .. }
            | Self::NoProcess(_)
            | Self::Process { .. }
            | Self::Running(_)
            | Self::Listen(_) => 2,
            Self::Io { .. } | Self::NotStill(_) | Self::Ended(_) | Self::Interrupted(_) => 1,
        }
    }

    pub(super) const fn io(doing: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}

/// An error with its causes, in one line.
pub(super) fn with_causes(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a string does not fail.
        let _ = write!(line, ": {error}");
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_in_one_line() {
        let source = io::Error::other("no such thing");
        let error = ImageError::Io { action: "open", path: "/images".into(), source };
        let told = PageServerError::Images(error);
        assert_eq!(told.to_string(), "cannot serve the images: open /images: no such thing");
        assert_eq!(told.exit_status(), 2);
        assert_eq!(PageServerError::Interrupted(1).exit_status(), 1);
    }
}
