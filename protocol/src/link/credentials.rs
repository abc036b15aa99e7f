//! Who this side is, and whom it talks to: the keys behind the links that authenticate.
//!
//! A peer is known by the fingerprint of its key ([`Trust::Peers`]) or by a certificate authority
//! ([`Trust::Authority`]). Both sides of a connection prove who they are; there is no anonymous peer and no TLS
//! before 1.3.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

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
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    provider: Arc<CryptoProvider>,
    pub(super) servers: Arc<dyn ServerCertVerifier>,
    clients: Arc<dyn ClientCertVerifier>,
    /// For TLS.
    pub(super) client: Arc<ClientConfig>,
    /// For TLS.
    pub(super) server: Arc<ServerConfig>,
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
        let party = (&chain[..], &key);
        let client = client_config(provider.clone(), servers.clone(), party)?;
        let server = server_config(provider.clone(), clients.clone(), party)?;
        let (client, server) = (Arc::new(client), Arc::new(server));
        Ok(Self { own, chain, key, provider, servers, clients, client, server })
    }

    /// For a QUIC connection that is dialled. QUIC tells of a refused key in words only: its fingerprint goes to `seen`.
    pub(super) fn quic_client(
        &self,
        seen: Arc<OnceLock<Fingerprint>>,
    ) -> Result<ClientConfig, rustls::Error> {
        let servers = Arc::new(Telling { verifier: self.servers.clone(), seen });
        client_config(Arc::new(in_one_datagram(&self.provider)), servers, (&self.chain, &self.key))
    }

    /// As [`Credentials::quic_client`], for one that is accepted.
    pub(super) fn quic_server(
        &self,
        seen: Arc<OnceLock<Fingerprint>>,
    ) -> Result<ServerConfig, rustls::Error> {
        let clients = Arc::new(Telling { verifier: self.clients.clone(), seen });
        server_config(Arc::new(in_one_datagram(&self.provider)), clients, (&self.chain, &self.key))
    }

    /// The fingerprint of this side's key.
    #[must_use]
    pub const fn fingerprint(&self) -> Fingerprint {
        self.own
    }
}

/// A certificate chain and its key.
type Party<'a> = (&'a [CertificateDer<'static>], &'a PrivateKeyDer<'static>);

fn client_config(
    provider: Arc<CryptoProvider>,
    servers: Arc<dyn ServerCertVerifier>,
    (chain, key): Party<'_>,
) -> Result<ClientConfig, rustls::Error> {
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(servers)
        .with_client_auth_cert(chain.to_vec(), key.clone_key())?;
    // Three connections in a move: resuming one would save nothing and keep secrets.
    client.resumption = Resumption::disabled();
    client.alpn_protocols = vec![APPLICATION.to_vec()];
    client.enable_secret_extraction = true;
    Ok(client)
}

fn server_config(
    provider: Arc<CryptoProvider>,
    clients: Arc<dyn ClientCertVerifier>,
    (chain, key): Party<'_>,
) -> Result<ServerConfig, rustls::Error> {
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain.to_vec(), key.clone_key())?;
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    server.alpn_protocols = vec![APPLICATION.to_vec()];
    server.enable_secret_extraction = true;
    Ok(server)
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

/// With key exchanges whose first message fits into one datagram: who listens for QUIC makes a socket for the first one
/// of a peer, and a second would find it not yet there.
fn in_one_datagram(provider: &CryptoProvider) -> CryptoProvider {
    let mut provider = provider.clone();
    provider.kx_groups.retain(|group| group.name() != rustls::NamedGroup::X25519MLKEM768);
    provider
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

/// Judges as another does, and tells whose key was not pinned.
#[derive(Debug)]
struct Telling<V: ?Sized> {
    seen: Arc<OnceLock<Fingerprint>>,
    verifier: Arc<V>,
}

impl<V: ?Sized> Telling<V> {
    fn told<T>(&self, verdict: Result<T, rustls::Error>) -> Result<T, rustls::Error> {
        if let Err(error) = &verdict {
            if let Some(seen) = NotPinned::seen_in(error) {
                // Set before by the same certificate, at most.
                let _ = self.seen.set(seen);
            }
        }
        verdict
    }
}

impl NotPinned {
    /// Whose key an error of the handshake is about.
    pub(super) fn seen_in(error: &rustls::Error) -> Option<Fingerprint> {
        let rustls::Error::InvalidCertificate(CertificateError::Other(other)) = error else { return None };
        other.0.downcast_ref::<Self>().map(|refused| refused.seen)
    }
}

impl ServerCertVerifier for Telling<dyn ServerCertVerifier> {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.told(self.verifier.verify_server_cert(certificate, intermediates, name, ocsp, now))
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
        self.verifier.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

impl ClientCertVerifier for Telling<dyn ClientCertVerifier> {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.verifier.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.told(self.verifier.verify_client_cert(certificate, intermediates, now))
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
        self.verifier.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
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
