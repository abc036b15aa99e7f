//! Who this side is, and whom it talks to: the keys behind the links that authenticate.
//!
//! A peer is known by the fingerprint of its key ([`Trust::Peers`]) or by a certificate authority
//! ([`Trust::Authority`]). Both sides of a connection prove who they are; there is no anonymous peer and no TLS
//! before 1.3.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs as provider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore,
    ServerConfig, SignatureScheme,
};

/// Names our protocol inside TLS, so that a key that is also used elsewhere cannot be played against us.
const APPLICATION: &[u8] = b"postcopy/1";

/// Names a key: SHA-256 of the certificate's `SubjectPublicKeyInfo`. A certificate that is issued anew for the same
/// key keeps it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// The fingerprint of a certificate's key.
    ///
    /// # Errors
    /// If it is no X.509 certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, rustls::Error> {
        let key = ParsedCertificate::try_from(certificate)?.subject_public_key_info();
        let suite = provider::cipher_suite::TLS13_AES_128_GCM_SHA256;
        let suite = suite.tls13().ok_or_else(no_tls13)?;
        let mut hash = [0; 32];
        hash.copy_from_slice(suite.common.hash_provider.hash(&key).as_ref());
        Ok(Self(hash))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

impl FromStr for Fingerprint {
    type Err = String;

    /// Reads 64 hexadecimal digits; colons between them, as other tools print them, are passed over.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("fingerprint {text:?} is not 64 hexadecimal digits, as `identity` prints them");
        let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b':').collect();
        let mut hash = [0; 32];
        if digits.len() != 2 * hash.len() {
            return Err(wrong());
        }
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |ascii: u8| char::from(ascii).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
            let (high, low) = digit(pair[0]).zip(digit(pair[1])).ok_or_else(wrong)?;
            *byte = high << 4 | low;
        }
        Ok(Self(hash))
    }
}

/// Whom this side talks to.
#[derive(Debug)]
pub enum Trust {
    /// Peers whose keys have these fingerprints.
    Peers(Vec<Fingerprint>),
    /// Peers with a certificate of one of these authorities. The one that is dialled must also have the name or
    /// address it is dialled by in its certificate.
    Authority(Vec<CertificateDer<'static>>),
}

/// Credentials that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// Key, certificate or authority are no good.
    #[error("cannot use key and certificate: {0}")]
    Unusable(#[from] rustls::Error),
    /// The authorities do not make a verifier.
    #[error("cannot use the certificate authority: {0}")]
    Authority(#[from] rustls::server::VerifierBuilderError),
    /// Nobody would be let in.
    #[error("no peer is named")]
    Nobody,
}

/// This side's key and certificate, and whom it talks to, ready for handshakes.
pub struct Credentials {
    own: Fingerprint,
    pub(super) client: Arc<ClientConfig>,
    pub(super) server: Arc<ServerConfig>,
    #[cfg(test)]
    verifier: Arc<dyn ServerCertVerifier>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("own", &self.own).finish_non_exhaustive()
    }
}

impl Credentials {
    /// Credentials of the owner of `key`, whose certificate stands first in `chain`.
    ///
    /// # Errors
    /// [`CredentialsError`].
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        trust: Trust,
    ) -> Result<Self, CredentialsError> {
        let provider = Arc::new(fastest_first());
        let certificate = chain.first().ok_or(rustls::Error::NoCertificatesPresented)?;
        let own = Fingerprint::of(certificate)?;
        let (servers, clients): (Arc<dyn ServerCertVerifier>, Arc<dyn ClientCertVerifier>) = match trust {
            Trust::Peers(peers) if peers.is_empty() => return Err(CredentialsError::Nobody),
            Trust::Peers(peers) => {
                let pinned = Arc::new(Pinned { peers, provider: provider.clone() });
                (pinned.clone(), pinned)
            }
            Trust::Authority(authorities) => {
                let mut roots = RootCertStore::empty();
                for authority in authorities {
                    roots.add(authority)?;
                }
                let roots = Arc::new(roots);
                (
                    WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone()).build()?,
                    WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build()?,
                )
            }
        };
        #[cfg(test)]
        let verifier = servers.clone();
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(servers)
            .with_client_auth_cert(chain.clone(), key.clone_key())?;
        // Three connections in a move: resuming one would save nothing and keep secrets.
        client.resumption = Resumption::disabled();
        client.alpn_protocols = vec![APPLICATION.to_vec()];
        client.enable_secret_extraction = true;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, key)?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.alpn_protocols = vec![APPLICATION.to_vec()];
        server.enable_secret_extraction = true;
        Ok(Self {
            own,
            client: Arc::new(client),
            server: Arc::new(server),
            #[cfg(test)]
            verifier,
        })
    }

    /// What checks the keys of servers.
    #[cfg(test)]
    pub(super) fn server_verifier(&self) -> Arc<dyn ServerCertVerifier> {
        self.verifier.clone()
    }

    /// The fingerprint of this side's key.
    #[must_use]
    pub const fn fingerprint(&self) -> Fingerprint {
        self.own
    }
}

/// The library's provider with the cipher first that is the fastest on this processor.
fn fastest_first() -> CryptoProvider {
    use provider::cipher_suite as suite;
    #[cfg(target_arch = "x86_64")]
    let has_aes = std::arch::is_x86_feature_detected!("aes");
    #[cfg(not(target_arch = "x86_64"))]
    let has_aes = true;
    let mut cipher_suites = vec![
        suite::TLS13_AES_128_GCM_SHA256,
        suite::TLS13_AES_256_GCM_SHA384,
        suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    if !has_aes {
        cipher_suites.rotate_right(1);
    }
    CryptoProvider { cipher_suites, ..provider::default_provider() }
}

/// A key that is none of those this side was told of.
#[derive(Debug, thiserror::Error)]
#[error("its key has the fingerprint {seen}, which is not one of those given with --peer")]
pub(super) struct NotPinned {
    pub(super) seen: Fingerprint,
}

/// Accepts the keys it was told of, whatever their certificates say; that the peer holds the key is proven by its
/// signature over the handshake, which the library checks.
#[derive(Debug)]
struct Pinned {
    peers: Vec<Fingerprint>,
    provider: Arc<CryptoProvider>,
}

impl Pinned {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let seen = Fingerprint::of(certificate)?;
        // Fingerprints are public: no need to compare them in constant time.
        if self.peers.contains(&seen) {
            return Ok(());
        }
        Err(CertificateError::Other(OtherError(Arc::new(NotPinned { seen }))).into())
    }

    fn check_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

pub(super) fn no_tls13() -> rustls::Error {
    rustls::Error::General("TLS 1.3 is missing".into())
}

fn no_tls12() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is not spoken here".into())
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(certificate).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(certificate).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_are_read_as_they_are_printed() {
        let print = Fingerprint(std::array::from_fn(|i| u8::try_from(i * 7).unwrap()));
        assert_eq!(print.to_string().parse(), Ok(print));
        let with_colons: Vec<String> = print.0.iter().map(|byte| format!("{byte:02X}")).collect();
        assert_eq!(with_colons.join(":").parse(), Ok(print));
        for bad in
            ["", "00", &"0".repeat(63), &"0".repeat(65), &"g".repeat(64), &"+".repeat(64), &"é".repeat(32)]
        {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
    }

    #[test]
    fn nobody_is_no_peer() {
        let key = rcgen::generate_simple_self_signed(vec![]).unwrap();
        let chain = vec![key.cert.der().clone()];
        let secret = PrivateKeyDer::try_from(key.signing_key.serialize_der()).unwrap();
        let made = Credentials::new(chain, secret, Trust::Peers(vec![]));
        assert!(matches!(made, Err(CredentialsError::Nobody)));
    }
}
