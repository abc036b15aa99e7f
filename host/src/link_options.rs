//! The options by which both programs are told how pages travel, and to whom.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use protocol::link::{Endpoint, Fingerprint, LinkKind, Protection, Trust};

use crate::identity::{self, DEFAULT_DIR, Identity};

/// How pages travel, and who the sides are.
#[derive(Debug, Args)]
pub struct LinkOptions {
    /// How pages travel: tcp (plain), tls or quic (encrypted, both sides prove who they are) or unix
    #[arg(long, default_value = "tcp", value_name = "LINK")]
    link: LinkKind,
    /// With tls and quic: the directory with this host's key and certificate, made by the verb identity [default: /etc/postcopy]
    #[arg(long, value_name = "DIR")]
    identity: Option<PathBuf>,
    /// With tls and quic: a peer to talk to, by the fingerprint that `identity` printed on its host; for each peer once
    #[arg(long = "peer", value_name = "FINGERPRINT", conflicts_with = "ca")]
    peers: Vec<Fingerprint>,
    /// With tls and quic: talk to peers with a certificate from an authority in this PEM file, as this host must have
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Allow plain tcp on addresses other than loopback: unencrypted, and open to everybody there
    #[arg(long)]
    insecure: bool,
}

impl LinkOptions {
    /// The peer's or our own address, with what the link needs.
    ///
    /// # Errors
    /// What is wrong or missing, and what to do.
    pub fn endpoint(&self, address: &str) -> Result<Endpoint, String> {
        Endpoint::parse(self.link, address, &self.protection()?)
    }

    /// The same options as a command line has them, for a process that begins elsewhere.
    #[must_use]
    pub fn to_arguments(&self) -> Vec<String> {
        let absolute =
            |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.into()).display().to_string();
        let mut arguments = vec!["--link".to_owned(), self.link.to_string()];
        if let Some(dir) = &self.identity {
            arguments.extend(["--identity".into(), absolute(dir)]);
        }
        for peer in &self.peers {
            arguments.extend(["--peer".into(), peer.to_string()]);
        }
        if let Some(file) = &self.ca {
            arguments.extend(["--ca".into(), absolute(file)]);
        }
        if self.insecure {
            arguments.push("--insecure".into());
        }
        arguments
    }

    /// Reads what [`LinkOptions::to_arguments`] has made.
    ///
    /// # Errors
    /// What is wrong.
    pub fn from_arguments(arguments: &[String]) -> Result<Self, String> {
        #[derive(clap::Parser)]
        #[command(no_binary_name = true)]
        struct Options {
            #[command(flatten)]
            link: LinkOptions,
        }
        let options = <Options as clap::Parser>::try_parse_from(arguments);
        options.map(|options| options.link).map_err(|error| error.to_string())
    }

    fn protection(&self) -> Result<Protection, String> {
        if !self.link.authenticates() {
            let given = [
                ("--peer", !self.peers.is_empty()),
                ("--ca", self.ca.is_some()),
                ("--identity", self.identity.is_some()),
            ];
            if let Some((option, _)) = given.iter().find(|(_, given)| *given) {
                return Err(format!(
                    "{option} has no effect on --link {}, which authenticates nobody; give --link tls or quic",
                    self.link
                ));
            }
            return Ok(if self.insecure { Protection::Insecure } else { Protection::Loopback });
        }
        let trust = match &self.ca {
            Some(path) => {
                let certificates = identity::authorities(path);
                Trust::Authority(certificates.map_err(|error| format!("--ca: {error}"))?)
            }
            None if self.peers.is_empty() => {
                return Err(format!(
                    "--link {} talks only to peers it knows: run `identity` on the other host (`uffd-daemon identity`, \
                     `source-server identity`) and give what it prints with --peer FINGERPRINT, or give --ca FILE",
                    self.link
                ));
            }
            None => Trust::Peers(self.peers.clone()),
        };
        let dir = self.identity.clone().unwrap_or_else(|| DEFAULT_DIR.into());
        let credentials = Identity::load(&dir).and_then(|identity| identity.credentials(trust));
        Ok(Protection::Authenticated(Arc::new(credentials.map_err(|error| error.to_string())?)))
    }
}
