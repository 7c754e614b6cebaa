//! The addresses of NATS and ClickHouse, and what is shown to log in there.

use millstream_engine::{Environment, NatsAddress, StoreAddress};
use percent_encoding::percent_decode_str;

use super::{From, Reader, keys};
use crate::args::Options;

/// ClickHouse's usual user.
const USER: &str = "default";

impl Reader<'_> {
    /// NATS, where it is named.
    pub(super) fn nats(&mut self, options: &Options) -> Option<NatsAddress> {
        let url = self.text(&keys::NATS_URL, options.nats.as_deref());
        let creds = self.path(&keys::NATS_CREDS, options.nats_creds.as_deref());
        let ca = self.path(&keys::NATS_CA, options.nats_ca.as_deref());
        let certificate = self.path(&keys::NATS_CERT, options.nats_cert.as_deref());
        let key = self.path(&keys::NATS_KEY, options.nats_key.as_deref());
        if certificate.is_some() != key.is_some() {
            self.faults.push(
                "a certificate for NATS and its key are given both, or neither (--nats-cert, --nats-key)"
                    .into(),
            );
        }
        let From { value: url, origin } = url?;
        check_url(&url, &["nats", "tls"], &origin, self.faults);
        Some(NatsAddress { url, origin, creds, ca, certificate: certificate.zip(key) })
    }

    /// ClickHouse, where it is named.
    pub(super) fn clickhouse(
        &mut self,
        options: &Options,
        environment: &Environment,
    ) -> Option<StoreAddress> {
        let mut url = self.text(&keys::CLICKHOUSE_URL, options.clickhouse.as_deref());
        let mut user = self.text(&keys::CLICKHOUSE_USER, options.clickhouse_user.as_deref());
        let mut password = self.text(&keys::CLICKHOUSE_PASSWORD, None);
        if let Some(url) = &mut url {
            check_url(&url.value, &["http", "https"], &url.origin, self.faults);
            self.take_login(url, &mut user, &mut password);
        }
        for From { value, origin } in [&user, &password].into_iter().flatten() {
            if value.contains(|symbol: char| symbol.is_control()) {
                self.faults.push(format!(
                    "{origin}: it has a line end or another control character in it, which no server takes"
                ));
            }
        }
        let From { value: url, origin } = url?;
        // A password alone is that of ClickHouse's usual user.
        let usual = || if password.is_some() { USER.to_owned() } else { String::new() };
        Some(StoreAddress {
            url,
            origin,
            user: user.map_or_else(usual, |user| user.value),
            password: password.map(|password| password.value).unwrap_or_default(),
            environment: environment.clone(),
        })
    }

    /// Takes user and password out of an address that has them.
    fn take_login(&mut self, url: &mut From, user: &mut Option<From>, password: &mut Option<From>) {
        let Some((plain, named, secret)) = without_user(&url.value) else { return };
        let origin = url.origin.clone();
        let twice = [user.as_ref(), password.as_ref().filter(|_| secret.is_some())];
        for other in twice.into_iter().flatten() {
            self.faults.push(format!(
                "{origin}: the address names a user or a password, and {} does too",
                other.origin
            ));
        }
        if secret.is_some() && Some(origin.as_str()) == keys::CLICKHOUSE_URL.flag {
            self.faults.push(format!(
                "{origin}: a password in a flag is seen by all users of this host: give it in CLICKHOUSE_PASSWORD"
            ));
        }
        url.value = plain;
        if let Some(secret) = secret {
            *password = Some(From { value: secret, origin: origin.clone() });
        }
        *user = Some(From { value: named, origin });
    }
}

/// An address without the user and password in it, and those two.
fn without_user(url: &str) -> Option<(String, String, Option<String>)> {
    let (scheme, rest) = url.split_once("://")?;
    let host_ends = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (login, _) = rest[..host_ends].rsplit_once('@')?;
    let decoded = |text| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let (user, password) = match login.split_once(':') {
        Some((user, password)) => (user, Some(decoded(password))),
        None => (login, None),
    };
    Some((format!("{scheme}://{}", &rest[login.len() + 1..]), decoded(user), password))
}

/// Checks one address, or several of NATS with commas between. What stands before an `@` is not shown.
fn check_url(urls: &str, schemes: &[&str], origin: &str, faults: &mut Vec<String>) {
    let is_list = schemes.contains(&"nats");
    for url in urls.split(|symbol| is_list && symbol == ',').map(str::trim) {
        let rest =
            url.split_once("://").filter(|(scheme, host)| schemes.contains(scheme) && !host.is_empty());
        let Some((_, rest)) = rest else {
            let forms: Vec<String> = schemes.iter().map(|scheme| format!("{scheme}://host:port")).collect();
            let shown = url.rsplit_once('@').map_or(url.to_owned(), |(_, host)| format!("…@{host}"));
            faults.push(format!("{origin}: `{shown}` is not an address like {}", forms.join(" or ")));
            continue;
        };
        // Behind such a sign a reader of addresses takes the password for a path, and the user for the host.
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        if rest[end..].contains('@') && !rest[..end].contains('@') {
            faults.push(format!(
                "{origin}: in a user or password of an address, / ? # @ and , are written %2F %3F %23 %40 and %2C"
            ));
        }
    }
}
