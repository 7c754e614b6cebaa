//! NATS's own protocol, as far as a test asks questions in it: no code of the engine between.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::{Value, json};

use crate::{SOON, wait_until};

/// The first line that nats-server says.
///
/// # Errors
/// When nobody listens there, or somebody else does.
pub fn nats_info(address: &str) -> io::Result<(BufReader<TcpStream>, String)> {
    let stream = TcpStream::connect(address.trim_start_matches("nats://"))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let (mut reader, mut line) = (BufReader::new(stream), String::new());
    reader.read_line(&mut line)?;
    if line.starts_with("INFO ") { Ok((reader, line)) } else { Err(io::Error::other(line)) }
}

/// How many messages a stream holds; 0 without such a stream. Waits for a server that is away.
pub fn stream_messages(address: &str, stream: &str) -> u64 {
    let ask = || -> io::Result<Value> {
        let (mut reader, _) = nats_info(address)?;
        let question = format!(
            "CONNECT {{\"verbose\":false}}\r\nSUB kills.answer 1\r\nPUB $JS.API.STREAM.INFO.{stream} kills.answer 0\r\n\r\n"
        );
        reader.get_mut().write_all(question.as_bytes())?;
        let mut line = String::new();
        while !line.starts_with("MSG ") {
            line.clear();
            if reader.read_line(&mut line)? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        let length = line.trim().rsplit(' ').next().and_then(|length| length.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        Ok(serde_json::from_slice(&body)?)
    };
    let info = wait_until("an answer of nats-server", SOON, || ask().map_err(|error| error.to_string()));
    info["state"]["messages"].as_u64().unwrap_or(0)
}

/// The names of all streams.
pub fn streams(address: &str) -> Vec<String> {
    let answer = Nats::connect(address).request("$JS.API.STREAM.NAMES", "", b"");
    let answer: Value = serde_json::from_slice(&answer.payload).expect("JSON");
    serde_json::from_value(answer["streams"].clone()).unwrap_or_default()
}

/// A connection.
pub struct Nats {
    reader: BufReader<TcpStream>,
    asked: u64,
}

/// A message of NATS.
#[derive(Debug, Clone)]
pub struct Message {
    /// Where an ack goes, or an answer.
    pub reply: String,
    /// The bytes.
    pub payload: Vec<u8>,
}

impl Nats {
    /// Connects to `nats://host:port`.
    pub fn connect(url: &str) -> Self {
        let stream =
            TcpStream::connect(url.trim_start_matches("nats://").trim_end_matches('/')).expect("NATS");
        stream.set_read_timeout(Some(SOON)).expect("a timeout");
        let mut nats = Self { reader: BufReader::new(stream), asked: 0 };
        let options = json!({ "verbose": false, "headers": true, "no_responders": true, "protocol": 1 });
        nats.write(format!("CONNECT {options}\r\nSUB answer.{}.* 1\r\n", std::process::id()).as_bytes());
        nats
    }

    /// Sends a message and waits for the answer.
    pub fn request(&mut self, subject: &str, headers: &str, payload: &[u8]) -> Message {
        self.asked += 1;
        let reply = format!("answer.{}.{}", std::process::id(), self.asked);
        let mut bytes = if headers.is_empty() {
            format!("PUB {subject} {reply} {}\r\n", payload.len()).into_bytes()
        } else {
            let headers = format!("NATS/1.0\r\n{headers}\r\n\r\n");
            let total = headers.len() + payload.len();
            format!("HPUB {subject} {reply} {} {total}\r\n{headers}", headers.len()).into_bytes()
        };
        bytes.extend_from_slice(payload);
        bytes.extend_from_slice(b"\r\n");
        self.write(&bytes);
        loop {
            let (subject, message) = self.read();
            if subject == reply || message.reply.starts_with("$JS.ACK") {
                return message;
            }
        }
    }

    /// Gives a durable consumer another `ack_wait`.
    pub fn set_ack_wait(&mut self, stream: &str, name: &str, ack_wait: Duration) {
        let mut config = self.api(&format!("CONSUMER.INFO.{stream}.{name}"), &json!({}))["config"].clone();
        config["ack_wait"] = (ack_wait.as_nanos() as u64).into();
        let request = json!({ "stream_name": stream, "config": config });
        let changed = self.api(&format!("CONSUMER.DURABLE.CREATE.{stream}.{name}"), &request);
        assert_eq!(changed["config"]["ack_wait"], config["ack_wait"], "{changed}");
    }

    /// Asks JetStream's API.
    pub fn api(&mut self, subject: &str, question: &Value) -> Value {
        let message = self.request(&format!("$JS.API.{subject}"), "", question.to_string().as_bytes());
        serde_json::from_slice(&message.payload).expect("JSON")
    }

    /// A stream's state and settings.
    pub fn stream(&mut self, name: &str) -> Value {
        self.api(&format!("STREAM.INFO.{name}"), &json!({}))
    }

    /// Messages in a stream.
    pub fn messages(&mut self, stream: &str) -> u64 {
        number(&self.stream(stream)["state"]["messages"])
    }

    /// Where a consumer stands.
    pub fn consumer(&mut self, stream: &str, name: &str) -> Consumer {
        let found = self.api(&format!("CONSUMER.INFO.{stream}.{name}"), &json!({}));
        Consumer {
            delivered: number(&found["delivered"]["consumer_seq"]),
            acked_up_to: number(&found["ack_floor"]["stream_seq"]),
            open: number(&found["num_ack_pending"]),
            redelivered: number(&found["num_redelivered"]),
            pending: number(&found["num_pending"]),
        }
    }

    /// Takes a message from a consumer; `None` when it has none to give now.
    pub fn pull(&mut self, stream: &str, consumer: &str) -> Option<Message> {
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}");
        let message = self.request(&subject, "", br#"{"batch":1,"no_wait":true}"#);
        message.reply.starts_with("$JS.ACK").then_some(message)
    }

    /// From now on, messages under this subject are for [`Self::heard`].
    pub fn listen(&mut self, subject: &str) {
        self.write(format!("SUB {subject} 2\r\n").as_bytes());
        // The server has read that once it answers.
        self.api("INFO", &json!({}));
    }

    /// Waits for the next message under a subject that is listened to.
    pub fn heard(&mut self) -> (String, Vec<u8>) {
        let (subject, message) = self.read();
        (subject, message.payload)
    }

    /// Hands a message back, and waits until the server knows.
    pub fn nak(&mut self, message: &Message) {
        self.request(&message.reply, "", b"-NAK");
    }

    fn write(&mut self, bytes: &[u8]) {
        self.reader.get_mut().write_all(bytes).expect("NATS listens");
    }

    /// The next message, with its subject.
    fn read(&mut self) -> (String, Message) {
        loop {
            let mut line = String::new();
            self.reader.read_line(&mut line).expect("NATS answers");
            let words: Vec<&str> = line.split_whitespace().collect();
            let size = |index: usize| words[words.len() - index].parse::<usize>().expect("a size");
            match words.first().copied() {
                Some("PING") => self.write(b"PONG\r\n"),
                Some("MSG") => {
                    return self.body(words[1], words.get(3).filter(|_| words.len() > 4), 0, size(1));
                }
                Some("HMSG") => {
                    return self.body(words[1], words.get(3).filter(|_| words.len() > 5), size(2), size(1));
                }
                Some("-ERR") | None => panic!("NATS says: {line}"),
                _ => {}
            }
        }
    }

    fn body(
        &mut self,
        subject: &str,
        reply: Option<&&str>,
        headers: usize,
        total: usize,
    ) -> (String, Message) {
        let mut bytes = vec![0; total + 2];
        self.reader.read_exact(&mut bytes).expect("a whole message");
        let message = Message {
            reply: reply.map(|reply| (*reply).to_owned()).unwrap_or_default(),
            payload: bytes[headers..total].to_vec(),
        };
        (subject.to_owned(), message)
    }
}

/// Where a consumer stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Consumer {
    /// Deliveries so far, repeats counted.
    pub delivered: u64,
    /// Every message up to this one is acked.
    pub acked_up_to: u64,
    /// Deliveries that are not acked.
    pub open: u64,
    /// Of those, the ones that were delivered more than once.
    pub redelivered: u64,
    /// Messages that nobody has taken.
    pub pending: u64,
}

/// Decodes base64, as JetStream's API gives payloads.
pub fn from_base64(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = text.bytes().filter_map(|byte| DIGITS.iter().position(|digit| *digit == byte));
    let bits = digits.flat_map(|digit| (0..6).rev().map(move |bit| digit >> bit & 1)).collect::<Vec<_>>();
    bits.chunks_exact(8).map(|byte| byte.iter().fold(0, |byte, bit| byte << 1 | *bit as u8)).collect()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("not a number: {value}"))
}
