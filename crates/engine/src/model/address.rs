//! Server addresses as logs and messages may print them.

/// The address without its password.
pub(crate) fn without_password(url: &str) -> String {
    url.split(',')
        .map(|part| match (part.find("://"), part.rfind('@')) {
            (Some(scheme), Some(at)) if at > scheme => format!("{}{}", &part[..scheme + 3], &part[at + 1..]),
            _ => part.to_owned(),
        })
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_shown_without_passwords() {
        assert_eq!(without_password("nats://u:p@a:1,nats://b:2"), "nats://a:1,nats://b:2");
        assert_eq!(without_password("http://localhost:8123"), "http://localhost:8123");
    }
}
