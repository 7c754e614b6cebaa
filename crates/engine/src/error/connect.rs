//! Why NATS cannot be reached, and what helps: one hint for each cause.

use async_nats::{ConnectError, ConnectErrorKind};

use super::full_cause;

const START: &str =
    "start nats-server there, name another with --nats URL or NATS_URL, or name none to use the local stack";

/// Words of the TLS library or of its peer, and what helps then. The first that is said counts.
const TLS: [(&str, &str); 7] = [
    ("InvalidContentType", "what listens there does not speak TLS: write nats:// instead of tls://"),
    (
        "UnknownIssuer",
        "the server's certificate is not of an authority that this system knows, or not of the one named: name its authority's \
         certificates with --nats-ca FILE, NATS_CA or [nats] ca",
    ),
    ("not valid for name", "the server's certificate is for other names: write the address with one of them"),
    ("certificate expired", "the server's certificate has expired: give nats-server a new one"),
    (
        "CertificateRequired",
        "the server wants a certificate of this process: name it with --nats-cert FILE and --nats-key FILE",
    ),
    (
        "UnknownCA",
        "the server does not know the authority of this process's certificate: name another with --nats-cert and --nats-key",
    ),
    (
        "BadCertificate",
        "the server does not take this process's certificate, or wants one: name another with --nats-cert and --nats-key",
    ),
];

/// What helps where a server could not be reached, to which `shown` was shown: nothing, or the login in words.
pub(super) fn hint(source: &ConnectError, shown: Option<&str>) -> String {
    let cause = full_cause(source);
    if let Some(helps) = tls(&cause) {
        return helps.to_owned();
    }
    let helps = match source.kind() {
        ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => return login(shown),
        ConnectErrorKind::Dns => "the host's name is not known: see that it is spelled as it should be",
        ConnectErrorKind::ServerParse => {
            "write / ? # @ and : in a user or password as %2F %3F %23 %40 and %3A"
        }
        ConnectErrorKind::Tls => {
            "see that --nats-key has the key of --nats-cert, and --nats-ca certificates of an authority"
        }
        ConnectErrorKind::TimedOut => {
            "what listens there says nothing that NATS would: see that the port is the one for clients (4222), and that the \
             address begins with tls:// where the server asks for TLS first"
        }
        _ => START,
    };
    helps.to_owned()
}

fn tls(cause: &str) -> Option<&'static str> {
    TLS.iter().find(|(words, _)| cause.contains(words)).map(|(_, helps)| *helps)
}

fn login(shown: Option<&str>) -> String {
    match shown {
        None => "the server wants credentials and none were given: give them with --nats-creds FILE, NATS_CREDS or [nats] creds, \
                 or in the address as nats://USER:PASSWORD@HOST or nats://TOKEN@HOST"
            .to_owned(),
        Some(shown) => format!(
            "the server wants other credentials than {shown}: give them with --nats-creds FILE or in the address"
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use async_nats::rustls::pki_types::UnixTime;
    use async_nats::rustls::{AlertDescription, CertificateError, Error};

    use super::*;

    #[test]
    fn what_the_library_says_of_a_certificate_has_its_hint() {
        let time = UnixTime::since_unix_epoch(Duration::from_secs(1));
        let expired = CertificateError::ExpiredContext { time, not_after: time };
        for (fault, part) in [
            (Error::InvalidCertificate(CertificateError::UnknownIssuer), "--nats-ca FILE"),
            (Error::InvalidCertificate(expired), "has expired"),
            (Error::AlertReceived(AlertDescription::CertificateRequired), "wants a certificate"),
            (
                Error::AlertReceived(AlertDescription::UnknownCA),
                "the authority of this process's certificate",
            ),
            (
                Error::AlertReceived(AlertDescription::BadCertificate),
                "does not take this process's certificate",
            ),
        ] {
            let found = tls(&fault.to_string()).unwrap_or_else(|| panic!("no hint for {fault}"));
            assert!(found.contains(part), "{fault}: {found}");
        }
        assert_eq!(tls("Connection refused (os error 111)"), None);
    }
}
