//! Where the local stack listens: on loopback only, and what an operator who asks for more is told.
//!
//! It has no passwords: a process that reaches its ports owns its data.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

const LOOPBACK: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// Takes the one address that the local stack listens on.
///
/// # Errors
/// Why no other is taken, and what to do instead.
pub(crate) fn address(text: &str) -> Result<Ipv4Addr, String> {
    match text {
        "localhost" => Ok(LOOPBACK),
        _ if text.parse() == Ok(IpAddr::V4(LOOPBACK)) => Ok(LOOPBACK),
        _ => Err(only_loopback()),
    }
}

/// Takes a port, and refuses an address with it, with the reason.
///
/// # Errors
/// Why it is no port.
pub(crate) fn port(text: &str) -> Result<u16, String> {
    let with_address =
        text.contains(':') || text.parse::<SocketAddr>().is_ok() || text.parse::<IpAddr>().is_ok();
    match text.parse() {
        Ok(port) => Ok(port),
        Err(_) if with_address => Err(only_loopback()),
        Err(_) => Err("not a port from 0 to 65535".to_owned()),
    }
}

fn only_loopback() -> String {
    format!(
        "the local stack listens on {LOOPBACK} only, because it has no passwords\n\
         hint: for other hosts, run a nats-server and a ClickHouse of your own, with users, and name them with --nats \
         and --clickhouse"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_taken() {
        for text in ["127.0.0.1", "localhost"] {
            assert_eq!(address(text), Ok(LOOPBACK), "{text}");
        }
        let others = [
            "",
            "0.0.0.0",
            "*",
            "::",
            "::1",
            "127.0.0.2",
            "127.1",
            "10.0.0.1",
            "127.0.0.1:4222",
            "localhost.",
            "::ffff:127.0.0.1",
        ];
        for text in others {
            assert_eq!(address(text), Err(only_loopback()), "{text}");
        }
    }

    #[test]
    fn a_port_is_a_number_alone() {
        assert_eq!((port("0"), port("65535")), (Ok(0), Ok(65535)));
        for text in ["0.0.0.0:4222", "127.0.0.1:4222", "[::]:1", "0.0.0.0", ":4222", "nats://0.0.0.0:4222"] {
            assert_eq!(port(text), Err(only_loopback()), "{text}");
        }
        for text in ["", "65536", "-1", "x"] {
            assert_eq!(port(text), Err("not a port from 0 to 65535".to_owned()), "{text}");
        }
    }
}
