//! Every way to log in to NATS works against a nats-server that asks for it, from a flag, the environment and the file; and
//! each wrong one has its own message.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nkeys::KeyPair;
use serde_json::{Value, json};
use tests::nats_server::NatsServer;
use tests::{Called, Host, SOON, Up, wait_until};

/// A stack for ClickHouse's sake, and a place for the files of nats-servers.
struct Place {
    host: Host,
    up: Up,
}

impl Place {
    fn new() -> Self {
        let mut host = Host::new(env!("CARGO_BIN_EXE_trial"));
        host.env.push(("TRIAL_TAME".into(), "1".into()));
        let up = host.up();
        host.env.push(("CLICKHOUSE_URL".into(), up.clickhouse.clone()));
        Self { host, up }
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.host.path().join(name);
        fs::write(&path, text).expect("written");
        path.display().to_string()
    }

    fn server(&self, name: &str, settings: &str) -> NatsServer {
        NatsServer::start(&self.host.path().join(name), settings)
    }

    /// Calls `runs` with these settings of NATS, each by its key in the file: from flags, from the environment, from the file.
    fn three_ways(&self, settings: &[(&str, &str)]) -> [Called; 3] {
        let flags: Vec<String> =
            settings.iter().flat_map(|(key, value)| [flag(key), (*value).to_owned()]).collect();
        let flags: Vec<&str> =
            ["runs", "--json"].into_iter().chain(flags.iter().map(String::as_str)).collect();
        let env: Vec<(String, &str)> = settings.iter().map(|(key, value)| (variable(key), *value)).collect();
        let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        let lines = settings.iter().map(|(key, value)| format!("{key} = {}\n", json!(value)));
        self.file("servers.toml", &format!("[nats]\n{}", lines.collect::<String>()));
        [
            self.host.call(&flags),
            self.host.call_with_env(&["runs", "--json"], &env),
            self.host.call(&["runs", "--json", "--config", "servers.toml"]),
        ]
    }

    fn works(&self, settings: &[(&str, &str)]) {
        for called in self.three_ways(settings) {
            assert_eq!(called.expect(0).json(), json!([]), "{settings:?}");
        }
    }

    /// Each says these, and none of the secrets.
    fn refused(&self, settings: &[(&str, &str)], says: &[&str], secrets: &[&str]) {
        for called in self.three_ways(settings) {
            let said = called.expect(1).says(says).stderr;
            assert!(secrets.iter().all(|secret| !said.contains(secret)), "{said}");
            assert_eq!(said.matches("hint: ").count(), 1, "{said}");
        }
    }

    /// Makes streams and tables, so that there is something to list.
    fn set_up(&self, url: &str) {
        self.host.call(&["setup", "--nats", url]).expect(0);
    }
}

fn flag(key: &str) -> String {
    if key == "url" { "--nats".to_owned() } else { format!("--nats-{key}") }
}

fn variable(key: &str) -> String {
    format!("NATS_{}", key.to_uppercase())
}

const AWAY: &str = "hint: start nats-server there";

#[test]
fn users_and_tokens_are_in_the_address() {
    let place = Place::new();
    let odd = "p@ss:w/rd?#%,ü";
    let written = "p%40ss%3Aw%2Frd%3F%23%25%2C%C3%BC";
    let server =
        place.server("user", &format!("authorization {{ user: \"m e\", password: {} }}", json!(odd)));
    let right = server.url("nats", &format!("m%20e:{written}@"));
    place.set_up(&right);
    place.works(&[("url", &right)]);
    // As a secret that is a file has it, at its end.
    place.works(&[("url", &format!("{right}\n"))]);
    // One address of several may do without.
    place.works(&[("url", &format!("{right},{}", server.url("nats", "")))]);
    let wrong = server.url("nats", "m%20e:wrong@");
    place.refused(
        &[("url", &wrong)],
        &["authorization violation", "other credentials than user `m e` and the password in the address"],
        &["wrong", AWAY],
    );
    let none = server.url("nats", "");
    place.refused(&[("url", &none)], &["the server wants credentials and none were given"], &[AWAY]);

    let server = place.server("token", "authorization { token: \"s3cr:t/\" }");
    let right = server.url("nats", "s3cr%3At%2F@");
    place.set_up(&right);
    place.works(&[("url", &right)]);
    place.refused(
        &[("url", &server.url("nats", "0ther@"))],
        &["authorization violation", "other credentials than the token in the address"],
        &["0ther", AWAY],
    );
}

#[test]
fn an_nkey_is_in_a_file() {
    let place = Place::new();
    let (known, stranger) = (KeyPair::new_user(), KeyPair::new_user());
    let server =
        place.server("nkey", &format!("authorization {{ users: [ {{ nkey: {} }} ] }}", known.public_key()));
    let seed = |pair: &KeyPair| pair.seed().expect("a seed");
    let right = place.file("right.nk", &format!("{}\n", seed(&known)));
    let wrong = place.file("wrong.nk", &seed(&stranger));
    let url = server.url("nats", "");
    place.host.call(&["setup", "--nats", &url, "--nats-creds", &right]).expect(0);
    place.works(&[("url", &url), ("creds", &right)]);
    let shown = format!("other credentials than nkey {} in `{wrong}`", stranger.public_key());
    place.refused(&[("url", &url), ("creds", &wrong)], &[&shown], &[&seed(&stranger), AWAY]);
    let none = place.file("none.nk", "no seed\n");
    place.refused(
        &[("url", &url), ("creds", &none)],
        &["failed to read NATS credentials from", "hint: name a credentials file"],
        &[AWAY],
    );
}

#[test]
fn credentials_of_an_operators_server_may_be_renewed_while_a_worker_runs() {
    let place = Place::new();
    let fleet = Fleet::new();
    let mut server = place.server("jwt", &fleet.settings());
    let file = place.file("worker.creds", &fleet.creds("worker"));
    let url = server.url("nats", "");
    place.host.call(&["setup", "--nats", &url, "--nats-creds", &file]).expect(0);
    place.works(&[("url", &url), ("creds", &file)]);
    let stranger = place.file("stranger.creds", &Fleet::new().creds("stranger"));
    place.refused(
        &[("url", &url), ("creds", &stranger)],
        &["authorization violation", &format!("other credentials than those in `{stranger}`")],
        &[AWAY],
    );

    let words = |command: &[&'static str]| {
        let mut words: Vec<String> = command.iter().map(|word| (*word).to_owned()).collect();
        words.extend(["--nats", &url, "--nats-creds", &file].map(str::to_owned));
        words
    };
    let start = |name: &'static str| {
        let words = words(&[name]);
        place.host.start(name, &words.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let (_work, _sink) = (start("work"), start("sink"));
    place.host.wait_log("work", " working");
    place.host.wait_log("sink", " sinking");
    // Another operator, account and user: nothing of what was is known to the server that comes back.
    let renewed = Fleet { account: fleet.account, ..Fleet::new() };
    fs::write(&file, renewed.creds("worker")).expect("written");
    server.restart(&renewed.settings());
    let produce = words(&["produce", "--ids", "1..=1000", "--run", "a"]);
    let produce: Vec<&str> = produce.iter().map(String::as_str).collect();
    wait_until("the server with the same streams", SOON, || match place.host.call(&produce) {
        called if called.code == 0 => Ok(()),
        called => Err(called.stderr),
    });
    let sealed = "SELECT count() FROM millstream.trial_passes WHERE run = 'a'";
    wait_until("the seal by services that went on", SOON, || match place.up.number(sealed) {
        0 => Err(place.host.log("work")),
        _ => Ok(()),
    });
}

/// An operator, an account with JetStream, one for the system, and users of the account.
struct Fleet {
    operator: KeyPair,
    account: KeyPair,
    system: KeyPair,
}

impl Fleet {
    fn new() -> Self {
        Self {
            operator: KeyPair::new_operator(),
            account: KeyPair::new_account(),
            system: KeyPair::new_account(),
        }
    }

    fn settings(&self) -> String {
        let operator =
            jwt(&self.operator, &self.operator.public_key(), "operator", json!({ "type": "operator" }));
        let account = |pair: &KeyPair, storage: i64| {
            let limits = json!({
                "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1,
                "leaf": -1, "mem_storage": storage, "disk_storage": storage, "streams": storage, "consumer": storage,
            });
            let of = json!({ "type": "account", "limits": limits, "default_permissions": { "pub": {}, "sub": {} } });
            jwt(&self.operator, &pair.public_key(), "account", of)
        };
        format!(
            "operator: \"{operator}\"\nsystem_account: {0}\nresolver: MEMORY\nresolver_preload: {{ {0}: \"{1}\", {2}: \"{3}\" }}",
            self.system.public_key(),
            account(&self.system, 0),
            self.account.public_key(),
            account(&self.account, -1)
        )
    }

    /// The file of a new user.
    fn creds(&self, name: &str) -> String {
        let user = KeyPair::new_user();
        let of = json!({ "type": "user", "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1 });
        let token = jwt(&self.account, &user.public_key(), name, of);
        format!(
            "-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n-----BEGIN USER NKEY SEED-----\n{}\n\
             ------END USER NKEY SEED------\n",
            user.seed().expect("a seed")
        )
    }
}

/// A claim of NATS, signed.
fn jwt(issuer: &KeyPair, subject: &str, name: &str, mut nats: Value) -> String {
    nats["version"] = json!(2);
    let head = json!({ "typ": "JWT", "alg": "ed25519-nkey" });
    let body = json!({
        "jti": subject, "iat": 1_700_000_000, "iss": issuer.public_key(), "name": name, "sub": subject, "nats": nats,
    });
    let text =
        format!("{}.{}", base64url(head.to_string().as_bytes()), base64url(body.to_string().as_bytes()));
    let signature = issuer.sign(text.as_bytes()).expect("a seed");
    format!("{text}.{}", base64url(&signature))
}

fn base64url(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let bits =
            three.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        let digits = (0..=three.len()).map(|at| char::from(DIGITS[(bits >> (18 - 6 * at)) as usize & 63]));
        text.extend(digits);
    }
    text
}

/// Certificates of two authorities, made by the program `openssl`.
struct Certificates(PathBuf);

impl Certificates {
    fn new(directory: &Path) -> Self {
        fs::create_dir_all(directory).expect("a directory");
        let made = Self(directory.to_owned());
        for authority in ["ours", "theirs"] {
            made.make(authority, &format!("/CN={authority}"), &[]);
        }
        let (ours, ours_key) = (made.path("ours.pem"), made.path("ours.key"));
        let of_ours =
            ["-CA", &ours, "-CAkey", &ours_key, "-addext", "basicConstraints=critical,CA:FALSE", "-addext"];
        for (name, alternative) in [
            ("server", "subjectAltName=IP:127.0.0.1"),
            ("other", "subjectAltName=DNS:other.invalid"),
            ("client", "subjectAltName=DNS:client"),
        ] {
            made.make(name, &format!("/CN={name}"), &[&of_ours[..], &[alternative]].concat());
        }
        made
    }

    fn make(&self, name: &str, subject: &str, more: &[&str]) {
        let (key, out) = (self.path(&format!("{name}.key")), self.path(&format!("{name}.pem")));
        let output = Command::new("openssl")
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
                "-days",
                "30",
            ])
            .args(["-keyout", &key, "-out", &out, "-subj", subject])
            .args(more)
            .output()
            .expect("the program `openssl` is needed to make certificates");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    /// Settings of a server that shows this certificate.
    fn tls(&self, name: &str, more: &str) -> String {
        let (certificate, key) = (self.path(&format!("{name}.pem")), self.path(&format!("{name}.key")));
        format!("tls {{ cert_file: \"{certificate}\", key_file: \"{key}\", timeout: 10\n{more} }}")
    }
}

#[test]
fn an_authority_of_ones_own_is_named_and_so_is_what_is_wrong_with_a_certificate() {
    let place = Place::new();
    let made = Certificates::new(&place.host.path().join("tls"));
    let (ours, theirs) = (made.path("ours.pem"), made.path("theirs.pem"));
    let server = place.server("tls", &made.tls("server", ""));
    let url = server.url("tls", "");
    place.host.call(&["setup", "--nats", &url, "--nats-ca", &ours]).expect(0);
    place.works(&[("url", &url), ("ca", &ours)]);
    // A server that asks for TLS gets it, whatever the address says.
    let plain = server.url("nats", "");
    place.works(&[("url", &plain), ("ca", &ours)]);
    let unknown = "is not of an authority that this system knows, or not of the one named: name its authority's certificates with --nats-ca";
    for url in [&url, &plain] {
        place.refused(&[("url", url)], &[unknown], &[AWAY]);
        place.refused(&[("url", url), ("ca", &theirs)], &[unknown], &[AWAY]);
    }
    let missing = place.host.path().join("missing.pem").display().to_string();
    place.refused(
        &[("url", &url), ("ca", &missing)],
        &[
            &format!("failed to read the certificates for NATS from `{missing}`"),
            "No such file",
            "hint: name a PEM file",
        ],
        &[AWAY],
    );
    let key = made.path("ours.key");
    place.refused(
        &[("url", &url), ("ca", &key)],
        &[&format!("from `{key}`"), "there are no certificates in it", "hint: name a PEM file"],
        &[AWAY],
    );
    let server = place.server("other-name", &made.tls("other", ""));
    place.refused(
        &[("url", &server.url("tls", "")), ("ca", &ours)],
        &["hint: the server's certificate is for other names", "other.invalid"],
        &[AWAY],
    );
    let server = place.server("plain", "");
    place.refused(
        &[("url", &server.url("tls", "")), ("ca", &ours)],
        &["does not speak TLS: write nats:// instead of tls://"],
        &[AWAY],
    );
}

#[test]
fn a_certificate_of_this_process_is_shown_to_a_server_that_wants_one() {
    let place = Place::new();
    let made = Certificates::new(&place.host.path().join("tls"));
    let ours = made.path("ours.pem");
    let server = place.server("mutual", &made.tls("server", &format!("verify: true, ca_file: \"{ours}\"")));
    let url = server.url("tls", "");
    let (certificate, key) = (made.path("client.pem"), made.path("client.key"));
    place
        .host
        .call(&["setup", "--nats", &url, "--nats-ca", &ours, "--nats-cert", &certificate, "--nats-key", &key])
        .expect(0);
    place.works(&[("url", &url), ("ca", &ours), ("cert", &certificate), ("key", &key)]);
    place.refused(&[("url", &url), ("ca", &ours)], &["wants a certificate of this process"], &[AWAY]);
    let (strange, strange_key) = (made.path("theirs.pem"), made.path("theirs.key"));
    place.refused(
        &[("url", &url), ("ca", &ours), ("cert", &strange), ("key", &strange_key)],
        &["this process's certificate"],
        &[AWAY],
    );
    place.refused(
        &[("url", &url), ("ca", &ours), ("cert", &certificate), ("key", &certificate)],
        &["failed to read the private key for NATS from", "hint: name a PEM file"],
        &[AWAY],
    );
    place.refused(
        &[("url", &url), ("ca", &ours), ("cert", &certificate), ("key", &made.path("server.key"))],
        &["hint: see that --nats-key has the key of --nats-cert"],
        &[AWAY],
    );
    place
        .host
        .call(&["runs", "--nats", &url, "--nats-cert", &certificate])
        .expect(2)
        .says(&["are given both, or neither"]);
}
