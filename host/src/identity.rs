//! This host's key and certificate, by which the peers of its moves know it.
//!
//! A directory of mode 0700 with two files of mode 0600: `identity.key`, a private key in PKCS #8, and
//! `identity.crt`, its certificate, or the chain that an authority gave for it. What others could have changed or
//! read is not used.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use nix::fcntl::{Flock, FlockArg, OFlag};
use protocol::link::{Credentials, CredentialsError, Fingerprint, Trust};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Where the identity is if nothing else is said.
pub const DEFAULT_DIR: &str = "/etc/postcopy";
/// The private key.
const KEY: &str = "identity.key";
/// The certificate, first of its chain.
const CERTIFICATE: &str = "identity.crt";
/// Most bytes of a key or a chain: the largest keys and chains in use have a few tens of KiB.
const FILE_MAX: u64 = 256 << 10;

/// An identity that is not there or must not be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// There is none.
    #[error("there is no key in {}; make one: `uffd-daemon identity --dir {}` (`source-server identity` does the same)", .0.display(), .0.display())]
    Missing(PathBuf),
    /// The operating system refused.
    #[error("{doing} {}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// With what.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Somebody else could read or change it.
    #[error("{} {wrong}; {remedy}", path.display())]
    Exposed {
        /// What.
        path: PathBuf,
        /// What is wrong with it.
        wrong: String,
        /// What to do.
        remedy: String,
    },
    /// A file does not hold what it should.
    #[error("{}: {source}", path.display())]
    Pem {
        /// Which.
        path: PathBuf,
        /// The cause.
        source: pem::Error,
    },
    /// No key could be made.
    #[error("cannot make a key: {0}")]
    Generate(#[from] rcgen::Error),
    /// Key, certificate and trust do not go together.
    #[error("{}: {source}", dir.display())]
    Unusable {
        /// Where they are.
        dir: PathBuf,
        /// The cause.
        source: CredentialsError,
    },
}

/// A key and its certificate.
#[derive(Debug)]
pub struct Identity {
    dir: PathBuf,
    key: PrivateKeyDer<'static>,
    chain: Vec<CertificateDer<'static>>,
    fingerprint: Fingerprint,
}

impl Identity {
    /// The identity in `dir`; made there if there is none.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn make(dir: &Path) -> Result<Self, IdentityError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(failed("make", dir))?;
        check(dir, &fs::symlink_metadata(dir).map_err(failed("look at", dir))?)?;
        // Two that find nothing must not make two keys.
        let opened = File::open(dir).map_err(failed("open", dir))?;
        let _alone = Flock::lock(opened, FlockArg::LockExclusive)
            .map_err(|(_, errno)| failed("lock", dir)(errno.into()))?;
        if !exists(&dir.join(KEY))? {
            generate(dir)?;
        }
        Self::load(dir)
    }

    /// The identity in `dir`.
    ///
    /// # Errors
    /// [`IdentityError`]: there is none, others could have read or changed it, or it is none.
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        let path = dir.join(KEY);
        if !exists(dir)? || !exists(&path)? {
            return Err(IdentityError::Missing(dir.to_owned()));
        }
        check(dir, &fs::symlink_metadata(dir).map_err(failed("look at", dir))?)?;
        let key = PrivateKeyDer::from_pem_slice(&read_private(&path)?);
        let key = key.map_err(|source| IdentityError::Pem { path, source })?;
        let path = dir.join(CERTIFICATE);
        let chain = certificates(&path, &read_private(&path)?)?;
        let unusable =
            |source: rustls::Error| IdentityError::Unusable { dir: dir.to_owned(), source: source.into() };
        let first = chain.first().ok_or(IdentityError::Pem { path, source: pem::Error::NoItemsFound })?;
        let fingerprint = Fingerprint::of(first).map_err(unusable)?;
        Ok(Self { dir: dir.to_owned(), key, chain, fingerprint })
    }

    /// By what peers know it.
    #[must_use]
    pub const fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Makes it ready for links to the peers that `trust` names.
    ///
    /// # Errors
    /// [`IdentityError::Unusable`].
    pub fn credentials(self, trust: Trust) -> Result<Credentials, IdentityError> {
        let Self { dir, key, chain, .. } = self;
        Credentials::new(chain, key, trust).map_err(|source| IdentityError::Unusable { dir, source })
    }
}

/// The certificates in a file that is no secret.
///
/// # Errors
/// [`IdentityError`].
pub fn authorities(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    certificates(path, &read(File::open(path).map_err(failed("open", path))?, path)?)
}

fn certificates(path: &Path, bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let pem = |source| IdentityError::Pem { path: path.to_owned(), source };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(bytes).collect::<Result<_, _>>().map_err(pem)?;
    if chain.is_empty() { Err(pem(pem::Error::NoItemsFound)) } else { Ok(chain) }
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IdentityError {
    let path = path.to_owned();
    move |source| IdentityError::Io { doing, path, source }
}

fn exists(path: &Path) -> Result<bool, IdentityError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed("look at", path)(error)),
    }
}

/// A key whose certificate stands beside it. The key comes last: with it the identity is there.
fn generate(dir: &Path) -> Result<(), IdentityError> {
    let key = rcgen::KeyPair::generate()?;
    let mut parameters = rcgen::CertificateParams::default();
    parameters.distinguished_name.push(rcgen::DnType::CommonName, "postcopy");
    let certificate = parameters.self_signed(&key)?;
    write_private(&dir.join(CERTIFICATE), &certificate.pem())?;
    write_private(&dir.join(KEY), &key.serialize_pem())
}

/// Writes a file that is whole or not there.
fn write_private(path: &Path, text: &str) -> Result<(), IdentityError> {
    let unfinished = path.with_extension("new");
    let write = || {
        match fs::remove_file(&unfinished) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&unfinished, path)
    };
    write().map_err(failed("write", path))
}

/// Reads a file that only its owner, who is this user, may touch.
fn read_private(path: &Path) -> Result<Vec<u8>, IdentityError> {
    // Looked at through the descriptor: what is checked is what is read. A FIFO would wait for a writer.
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = opened.map_err(failed("open", path))?;
    let metadata = file.metadata().map_err(failed("look at", path))?;
    if !metadata.is_file() {
        let (wrong, remedy) = ("is no file".into(), "put the file itself there".into());
        return Err(IdentityError::Exposed { path: path.to_owned(), wrong, remedy });
    }
    check(path, &metadata)?;
    read(file, path)
}

fn read(file: File, path: &Path) -> Result<Vec<u8>, IdentityError> {
    let mut bytes = Vec::new();
    file.take(FILE_MAX).read_to_end(&mut bytes).map_err(failed("read", path))?;
    Ok(bytes)
}

/// Only this user may read or change it.
fn check(path: &Path, metadata: &fs::Metadata) -> Result<(), IdentityError> {
    let exposed = |wrong, remedy| Err(IdentityError::Exposed { path: path.to_owned(), wrong, remedy });
    let user = nix::unistd::geteuid().as_raw();
    if metadata.uid() != user {
        let wrong = format!("belongs to user {}, not to {user}", metadata.uid());
        return exposed(wrong, format!("chown {user} {}, if you trust what is in it", path.display()));
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        let wanted = if metadata.is_dir() { 0o700 } else { 0o600 };
        let remedy =
            format!("chmod {wanted:o} {}, and make a new key if others may have read it", path.display());
        return exposed(format!("has mode {mode:o}: others may use it"), remedy);
    }
    Ok(())
}

/// Arguments of the verb `identity`.
#[derive(Debug, Args)]
pub struct IdentityArguments {
    /// Where key and certificate are, or will be
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DIR)]
    dir: PathBuf,
}

impl IdentityArguments {
    /// Makes the identity if there is none, and prints its fingerprint on standard output, for scripts; what it
    /// means goes to standard error. Status 2 if it cannot be had.
    #[must_use]
    pub fn run(&self, program: &str) -> ExitCode {
        match Identity::make(&self.dir) {
            Ok(identity) => {
                eprintln!(
                    "{program}: the key in {} has this fingerprint (SHA-256 of its public key); give it to the peer: \
                     --peer",
                    self.dir.display()
                );
                println!("{}", identity.fingerprint());
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("{program}: {error}");
                ExitCode::from(2)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn is_made_once_and_is_private() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("etc/postcopy");
        assert!(matches!(Identity::load(&dir), Err(IdentityError::Missing(_))));
        let made = Identity::make(&dir).unwrap().fingerprint();
        assert_eq!((mode(&dir), mode(&dir.join(KEY)), mode(&dir.join(CERTIFICATE))), (0o700, 0o600, 0o600));
        assert_eq!(Identity::make(&dir).unwrap().fingerprint(), made);
        assert_eq!(Identity::load(&dir).unwrap().fingerprint(), made);
        let another = Identity::make(&place.path().join("another")).unwrap().fingerprint();
        assert_ne!(another, made);
        let left: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }

    #[test]
    fn is_made_once_by_many() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("postcopy");
        let make = || Identity::make(&dir).unwrap().fingerprint();
        let made = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(make)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert!(made.iter().all(|print| *print == made[0]), "{made:?}");
    }

    #[test]
    fn what_others_may_touch_is_refused_with_a_remedy() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("postcopy");
        let made = Identity::make(&dir).unwrap().fingerprint();
        for (path, good, bad) in [
            (dir.clone(), 0o700, 0o750),
            (dir.join(KEY), 0o600, 0o640),
            (dir.join(CERTIFICATE), 0o600, 0o602),
        ] {
            set_mode(&path, bad);
            for result in [Identity::load(&dir), Identity::make(&dir)] {
                let error = result.unwrap_err().to_string();
                let chmod = format!("chmod {good:o} {}", path.display());
                assert!(error.contains(&chmod) && error.contains(&format!("{bad:o}")), "{error}");
            }
            set_mode(&path, good);
            assert_eq!(Identity::load(&dir).unwrap().fingerprint(), made);
        }
    }

    #[test]
    fn what_belongs_to_others_or_is_a_link_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("postcopy");
        drop(Identity::make(&dir).unwrap());
        let key = dir.join(KEY);
        if nix::unistd::geteuid().is_root() {
            for path in [&key, &dir] {
                chown(path, Some(65534), None).unwrap();
                let error = Identity::load(&dir).unwrap_err().to_string();
                assert!(error.contains("65534") && error.contains("chown 0"), "{error}");
                chown(path, Some(0), None).unwrap();
            }
        } else {
            eprintln!("skipped in part: only root can give files away");
        }
        fs::rename(&key, place.path().join(KEY)).unwrap();
        symlink(place.path().join(KEY), &key).unwrap();
        assert!(matches!(Identity::load(&dir), Err(IdentityError::Io { .. })));
    }

    #[test]
    fn what_is_no_key_is_named() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("postcopy");
        drop(Identity::make(&dir).unwrap());
        let own = fs::read(dir.join(CERTIFICATE)).unwrap();
        let other = place.path().join("other");
        drop(Identity::make(&other).unwrap());
        // Another's certificate does not go with this key.
        fs::copy(other.join(CERTIFICATE), dir.join(CERTIFICATE)).unwrap();
        let identity = Identity::load(&dir).unwrap();
        let trust = Trust::Peers(vec![identity.fingerprint()]);
        assert!(matches!(identity.credentials(trust), Err(IdentityError::Unusable { .. })));
        fs::write(dir.join(CERTIFICATE), own).unwrap();
        fs::write(dir.join(KEY), "no key").unwrap();
        let error = Identity::load(&dir).unwrap_err().to_string();
        assert!(error.contains(KEY), "{error}");
    }
}
