//! The certificates that a connection to NATS uses. Files are read beforehand, so that an error names the
//! faulty file.

use std::path::Path;

use async_nats::ConnectOptions;
use async_nats::rustls::pki_types::pem::{Error as PemError, PemObject};
use async_nats::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::NatsAddress;
use crate::error::Error;

/// Adds the certificates of an address to the connection options.
///
/// # Errors
/// [`Error::Certificates`] for a file that cannot be read, or holds no certificate or key.
pub(super) async fn with_certificates(
    mut options: ConnectOptions,
    address: &NatsAddress,
) -> Result<ConnectOptions, Error> {
    if let Some(path) = &address.ca {
        has::<CertificateDer<'_>>(path, "certificates", "there are no certificates in it").await?;
        options = options.add_root_certificates(path.clone());
    }
    if let Some((certificate, key)) = &address.certificate {
        has::<CertificateDer<'_>>(certificate, "certificate", "there is no certificate in it").await?;
        has::<PrivateKeyDer<'_>>(key, "private key", "there is no private key in it").await?;
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    Ok(options)
}

async fn has<T: PemObject>(path: &Path, what: &'static str, none: &'static str) -> Result<(), Error> {
    let failed = |source| Error::Certificates { what, path: path.display().to_string(), source };
    let bytes = tokio::fs::read(path).await.map_err(|fault| failed(fault.into()))?;
    match T::from_pem_slice(&bytes) {
        Ok(_) => Ok(()),
        Err(PemError::NoItemsFound) => Err(failed(none.into())),
        Err(fault) => Err(failed(fault.to_string().into())),
    }
}
