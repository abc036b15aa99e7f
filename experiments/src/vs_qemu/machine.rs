//! A virtual machine whose guest runs programs of ours.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use kernel::spawn::CommandSetup;

use super::cpio::Archive;
use super::guest::MARK;
use super::qmp::Qmp;
use crate::tool::{Tool, is_installed};

/// The program.
pub const QEMU: &str = "qemu-system-x86_64";
/// Memory of the guest besides what is measured: kernel, initramfs (twice while it is unpacked), page tables.
const MORE_MIB: usize = 256;
const START_LIMIT: Duration = Duration::from_secs(20);
/// Of a guest that boots, fills its memory or reads it, translated at that.
const LINE_LIMIT: Duration = Duration::from_secs(60);

/// What machines are made from.
#[derive(Clone, Debug)]
pub struct Parts {
    kernel: PathBuf,
    initramfs: PathBuf,
    /// What runs the guest's instructions.
    pub accelerator: Accelerator,
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU's translator. A read that waits for its page waits in the same way; others take longer.
    Tcg,
}

impl Accelerator {
    /// The processor where it can. A `/dev/kvm` alone does not say so: without the hardware's help there may be a KVM
    /// that takes only guests made for it.
    fn find() -> Self {
        let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let has_help = cpus.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
        let opens = || std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
        if has_help && opens() { Self::Kvm } else { Self::Tcg }
    }

    /// What QEMU calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    const fn cpu(self) -> &'static str {
        match self {
            Self::Kvm => "host",
            Self::Tcg => "max",
        }
    }
}

impl Parts {
    /// The kernel to boot.
    ///
    /// # Errors
    /// Why there can be no machine here.
    pub fn kernel() -> Result<PathBuf, String> {
        if !is_installed(QEMU) {
            return Err(format!("there is no {QEMU}; scripts/setup --qemu installs it"));
        }
        let own = std::env::current_exe().unwrap_or_default();
        // A test's program is one directory further down.
        let places = own.ancestors().skip(2).take(3).map(|dir| dir.join("guest-kernel/vmlinuz"));
        let mut places = places.chain([PathBuf::from("target/guest-kernel/vmlinuz")]);
        places
            .find(|path| path.exists())
            .ok_or_else(|| "there is no kernel for the guest; scripts/setup --qemu fetches it".to_owned())
    }

    /// Makes the guest's root file system, in `dir`, of programs by their place in it, and what they are linked with. The one called
    /// `init` is its first process.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn new(kernel: PathBuf, dir: &Path, programs: &[(&str, &Path)]) -> anyhow::Result<Self> {
        let mut archive = Archive::default();
        let mut made: Vec<PathBuf> = Vec::new();
        let mut directories = |archive: &mut Archive, path: &Path| {
            let mut parents: Vec<&Path> =
                path.ancestors().skip(1).filter(|dir| dir.parent().is_some()).collect();
            parents.reverse();
            for parent in parents {
                if !made.iter().any(|dir| dir == parent) {
                    made.push(parent.to_owned());
                    archive.directory(&in_archive(parent));
                }
            }
        };
        directories(&mut archive, Path::new("/dev/console"));
        archive.device("dev/console", (5, 1));
        let mut linked = BTreeSet::new();
        for (place, program) in programs {
            directories(&mut archive, &Path::new("/").join(place));
            archive.program(place, &std::fs::read(program)?);
            linked.extend(libraries(program)?);
        }
        for library in linked {
            directories(&mut archive, &library);
            archive.program(&in_archive(&library), &std::fs::read(&library)?);
        }
        let initramfs = dir.join("initramfs");
        std::fs::write(&initramfs, archive.finish())?;
        Ok(Self { kernel, initramfs, accelerator: Accelerator::find() })
    }
}

fn in_archive(path: &Path) -> String {
    path.to_string_lossy().trim_start_matches('/').to_owned()
}

/// The files that a program is linked with, its loader among them.
fn libraries(program: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("running ldd")?;
    ensure!(output.status.success(), "ldd {program:?} failed");
    Ok(parse_ldd(&String::from_utf8_lossy(&output.stdout)))
}

/// `libc.so.6 => /lib/libc.so.6 (0x..)`, `/lib64/ld-linux.so.2 (0x..)`, `linux-vdso.so.1 (0x..)`
fn parse_ldd(text: &str) -> Vec<PathBuf> {
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    text.lines().filter_map(path).collect()
}

/// What a machine is to be.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// Memory besides what the kernel needs.
    pub mib: usize,
    /// Processors.
    pub processors: usize,
    /// Further words for its kernel.
    pub kernel_line: &'a str,
    /// Arguments of its first process.
    pub arguments: &'a str,
    /// Whether it waits for a migration.
    pub is_incoming: bool,
}

/// A running machine. Dropping it ends it.
#[derive(Debug)]
pub struct Machine {
    pub(super) qmp: Qmp,
    pub(super) tool: Tool,
    console: BufReader<UnixStream>,
}

impl Machine {
    /// Starts one; `name` names its files in `dir`.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(parts: &Parts, name: &str, guest: Guest<'_>, dir: &Path) -> anyhow::Result<Self> {
        let [control, console] = ["control", "console"].map(|what| dir.join(format!("{name}.{what}")));
        let mut command = Command::new(QEMU);
        // Ctrl-C is for the experiment, which lets the run in hand end; a machine has no end of its own.
        command.process_group(0).die_with_parent();
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-smp", &guest.processors.to_string()]);
        let accelerator = parts.accelerator;
        command.args(["-machine", &format!("pc,accel={}", accelerator.name()), "-cpu", accelerator.cpu()]);
        command.args(["-m", &format!("{}M", guest.mib + MORE_MIB)]);
        command.arg("-kernel").arg(&parts.kernel).arg("-initrd").arg(&parts.initramfs);
        let Guest { kernel_line, arguments, .. } = guest;
        command.arg("-append").arg(format!("console=ttyS0 quiet panic=-1 {kernel_line} -- {arguments}"));
        command.args(["-serial", &format!("unix:{},server=on,wait=off", console.display())]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", control.display())]);
        if guest.is_incoming {
            command.args(["-incoming", "defer"]);
        }
        let mut tool = Tool::start(QEMU, command, dir.join(format!("{name}.log")))?;
        tool.wait_until(START_LIMIT, |_| control.exists() && console.exists())?;
        let stream = UnixStream::connect(&console).context("connecting to the console")?;
        stream.set_read_timeout(Some(LINE_LIMIT))?;
        Ok(Self { qmp: Qmp::connect(&control)?, tool, console: BufReader::new(stream) })
    }

    /// The next line that the guest's program has marked.
    ///
    /// # Errors
    /// If none comes in time.
    pub fn line(&mut self) -> anyhow::Result<String> {
        let deadline = Instant::now() + LINE_LIMIT;
        let mut said = String::new();
        loop {
            let mut line = Vec::new();
            let read = self
                .console
                .read_until(b'\n', &mut line)
                .with_context(|| format!("the guest said {said:?}"))?;
            ensure!(read > 0, "the console was closed: {said:?}: {}", self.tool.last_lines());
            let line = String::from_utf8_lossy(&line).trim().to_owned();
            if let Some((_, line)) = line.split_once(MARK) {
                return Ok(line.to_owned());
            }
            ensure!(Instant::now() < deadline, "the guest says nothing: {said:?}");
            said.push_str(&line);
        }
    }

    /// Types a line.
    pub(super) fn type_line(&mut self) -> anyhow::Result<()> {
        Ok(self.console.get_mut().write_all(b"\n")?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_the_loader_are_found() {
        let text = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x2)\n\t/lib64/ld-linux-x86-64.so.2 (0x3)\n";
        assert_eq!(parse_ldd(text), ["/lib/x/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from));
        assert!(parse_ldd("\tstatically linked\n").is_empty());
    }
}
