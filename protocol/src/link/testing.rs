//! Keys and authorities for tests.

use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::{Credentials, Fingerprint, Trust};

/// A key with its certificate.
pub(super) struct Party {
    pub(super) chain: Vec<CertificateDer<'static>>,
    key: Vec<u8>,
}

impl Party {
    pub(super) fn new() -> Self {
        let made = rcgen::generate_simple_self_signed(vec!["peer".into()]).unwrap();
        Self { chain: vec![made.cert.der().clone()], key: made.signing_key.serialize_der() }
    }

    /// With a certificate for `name` from an authority of its own; the authority's certificate as well.
    pub(super) fn vouched(names: &[&str]) -> (Vec<Self>, CertificateDer<'static>) {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::default();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let authority = parameters.self_signed(&key).unwrap().der().clone();
        let issuer = rcgen::Issuer::new(parameters, key);
        let party = |name: &&str| {
            let key = rcgen::KeyPair::generate().unwrap();
            let parameters = rcgen::CertificateParams::new(vec![(*name).to_owned()]).unwrap();
            let certificate = parameters.signed_by(&key, &issuer).unwrap();
            Self { chain: vec![certificate.der().clone()], key: key.serialize_der() }
        };
        (names.iter().map(party).collect(), authority)
    }

    pub(super) fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::try_from(self.key.clone()).unwrap()
    }

    pub(super) fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.chain[0]).unwrap()
    }

    pub(super) fn trusting(&self, trust: Trust) -> Credentials {
        Credentials::new(self.chain.clone(), self.key(), trust).unwrap()
    }

    pub(super) fn knowing(&self, peer: &Self) -> Credentials {
        self.trusting(Trust::Peers(vec![peer.fingerprint()]))
    }
}
