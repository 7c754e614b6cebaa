//! How a process logs in to NATS: not at all, with a token or a user in the address, or with a file.
//!
//! The file is read at every connection, so that credentials which are renewed while a service runs are used at
//! its next connection.

use std::path::{Path, PathBuf};

use async_nats::{Auth, AuthError, ServerAddr};
use nkeys::KeyPair;

use super::{NatsAddress, percent_decoded};
use crate::error::Error;
use crate::model::address::without_password;

const JWT: &str = "-----BEGIN NATS USER JWT-----";
const SEED: &str = "-----BEGIN USER NKEY SEED-----";

/// The login that the client shows to every server of an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Login {
    /// Nothing.
    Open,
    /// `nats://TOKEN@host`.
    Token(String),
    /// `nats://USER:PASSWORD@host`.
    User(String, String),
    /// A credentials file, or a file with an nkey's seed.
    File(PathBuf),
}

impl Login {
    /// The login that an address asks for.
    ///
    /// # Errors
    /// [`Error::MixedLogins`] when the servers of the address have different logins, because the client has one
    /// login for all.
    pub(super) fn of(address: &NatsAddress) -> Result<Self, Error> {
        let mut found: Option<Self> = None;
        for server in address.url.split(',') {
            let Some(login) = in_url(server.trim()) else { continue };
            if found.as_ref().is_some_and(|found| *found != login) {
                return Err(Error::MixedLogins {
                    server: without_password(&address.url),
                    origin: address.origin.clone(),
                });
            }
            found = Some(login);
        }
        Ok(match &address.creds {
            Some(path) => Self::File(path.clone()),
            None => found.unwrap_or(Self::Open),
        })
    }

    /// Describes the login without its secret; `None` for an open login. Reports an unusable file early.
    ///
    /// # Errors
    /// [`Error::Credentials`].
    pub(super) async fn check(&self) -> Result<Option<String>, Error> {
        Ok(match self {
            Self::Open => None,
            Self::Token(_) => Some("the token in the address".to_owned()),
            Self::User(user, _) => Some(format!("user `{user}` and the password in the address")),
            Self::File(path) => {
                let path = path.display().to_string();
                let secrets = read(path.as_ref()).await;
                match secrets.map_err(|source| Error::Credentials { path: path.clone(), source })? {
                    Secrets { jwt: Some(_), .. } => Some(format!("those in `{path}`")),
                    Secrets { jwt: None, pair } => Some(format!("nkey {} in `{path}`", pair.public_key())),
                }
            }
        })
    }

    /// The client's answer to a server's `nonce`.
    pub(super) async fn auth(&self, nonce: &[u8]) -> Result<Auth, AuthError> {
        let mut auth = Auth::new();
        match self {
            Self::Open => {}
            Self::Token(token) => auth.token = Some(token.clone()),
            Self::User(user, password) => {
                (auth.username, auth.password) = (Some(user.clone()), Some(password.clone()));
            }
            Self::File(path) => {
                let Secrets { jwt, pair } = read(path)
                    .await
                    .map_err(|error| AuthError::new(format!("`{}`: {error}", path.display())))?;
                auth.signature = Some(pair.sign(nonce).map_err(AuthError::new)?);
                auth.nkey = jwt.is_none().then(|| pair.public_key());
                auth.jwt = jwt;
            }
        }
        Ok(auth)
    }
}

fn in_url(server: &str) -> Option<Login> {
    let named = server.parse::<ServerAddr>().ok()?;
    let user = percent_decoded(named.username()?);
    Some(match named.password() {
        Some(password) => Login::User(user, percent_decoded(password)),
        None => Login::Token(user),
    })
}

struct Secrets {
    jwt: Option<String>,
    pair: KeyPair,
}

async fn read(path: &Path) -> std::io::Result<Secrets> {
    secrets(&tokio::fs::read_to_string(path).await?)
}

/// The secrets in a file's text: a JWT and a seed between markers, or only a seed.
fn secrets(text: &str) -> std::io::Result<Secrets> {
    let bad = |what: &str| std::io::Error::new(std::io::ErrorKind::InvalidData, what.to_owned());
    let mut lines = text.lines().map(str::trim);
    let mut after = |marker: &str| lines.by_ref().skip_while(|line| *line != marker).nth(1);
    let (jwt, seed) = if text.contains(JWT) {
        (after(JWT).map(str::to_owned), after(SEED))
    } else {
        (None, lines.find(|line| !line.is_empty() && !line.starts_with('#')))
    };
    let seed = seed.ok_or_else(|| bad("there is no nkey seed in it"))?;
    let pair =
        KeyPair::from_seed(seed).map_err(|error| bad(&format!("its nkey seed is invalid: {error}")))?;
    Ok(Secrets { jwt, pair })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(url: &str) -> Result<Login, Error> {
        Login::of(&NatsAddress { url: url.into(), ..NatsAddress::default() })
    }

    #[test]
    fn tokens_and_users_are_in_the_address() {
        let user = |user: &str, password: &str| Login::User(user.into(), password.into());
        for (url, expected) in [
            ("nats://a:1", Login::Open),
            ("nats://s3cret@a:1", Login::Token("s3cret".into())),
            ("nats://me:p%40ss%3A%2F@a:1", user("me", "p@ss:/")),
            ("nats://me:x@a:1,nats://me:x@b:1", user("me", "x")),
            ("nats://a:1, nats://me:x@b:1", user("me", "x")),
        ] {
            assert_eq!(login(url).expect(url), expected, "{url}");
        }
        assert!(matches!(login("nats://me:x@a:1,nats://you:y@b:1"), Err(Error::MixedLogins { .. })));
    }

    #[tokio::test]
    async fn a_file_has_a_jwt_and_a_seed_or_a_seed_alone() {
        let pair = KeyPair::new_user();
        let seed = pair.seed().expect("a seed");
        let creds = format!(
            "{JWT}\neyJ0\n------END NATS USER JWT------\n\n****\n\n{SEED}\n{seed}\n------END USER NKEY SEED------\n"
        );
        let dir = tempfile::tempdir().expect("a directory");
        for (text, jwt) in [(&creds, Some("eyJ0".to_owned())), (&format!("# mine\n{seed}\n"), None)] {
            let path = dir.path().join("login");
            std::fs::write(&path, text).expect("written");
            let auth = Login::File(path).auth(b"nonce").await.expect("a login");
            let nkey = jwt.is_none().then(|| pair.public_key());
            assert_eq!((auth.jwt, auth.nkey), (jwt, nkey));
            pair.verify(b"nonce", &auth.signature.expect("signed")).expect("by that pair");
        }
        for text in ["", "nonsense", JWT, &format!("{JWT}\nx\n")] {
            assert!(secrets(text).is_err(), "{text}");
        }
    }
}
