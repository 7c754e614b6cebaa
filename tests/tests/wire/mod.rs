//! A proxy that stands before ClickHouse and loses, invents and cuts.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use millstream::frame;

const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is passed on, and so is the answer.
    Pass,
    /// It is passed on; the answer is lost.
    LoseAnswer,
    /// It is passed on; the client is cut off as soon as the server runs it.
    CutWhenRunning,
    /// Half of its body is passed on, then both sides are cut.
    CutBody,
    /// The answer is 200, and ClickHouse never hears of it.
    Lie,
    /// The answer is code 252, and ClickHouse never hears of it.
    TooManyParts,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Request {
    /// The first line and the headers, without percent signs.
    pub head: String,
    /// The body.
    pub body: Vec<u8>,
}

/// A row of pipeline `trial` in an INSERT's body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its run.
    pub run: String,
    /// Its pass.
    pub pass: u32,
    /// Its batch.
    pub batch: u32,
    /// Its id.
    pub id: u64,
}

impl Request {
    /// The statement, wherever it stands, and everything around it.
    pub fn text(&self) -> String {
        format!("{}\n{}", self.head, String::from_utf8_lossy(&self.body))
    }

    /// Whether it brings rows.
    pub fn inserts_rows(&self) -> bool {
        self.head.contains("INSERT INTO") && self.head.contains("_rows")
    }

    /// The rows that it brings.
    pub fn rows(&self) -> Vec<Row> {
        let (mut raw, mut frames, mut rows) = (Vec::new(), &self.body[..], Vec::new());
        while let Some(length) = frame::frame_len(frames).expect("a frame") {
            frame::decompress(&frames[..length], &mut raw).expect("a sound frame");
            frames = &frames[length..];
        }
        let mut rest = &raw[..];
        while !rest.is_empty() {
            rows.extend(take_block(&mut rest));
        }
        rows
    }
}

/// The rows of one Native block: of its columns, those that a [`Row`] has.
fn take_block(rest: &mut &[u8]) -> Vec<Row> {
    let (columns, rows) = (take_varint(rest), take_varint(rest));
    let (mut run, mut numbers) = (Vec::new(), HashMap::new());
    for _ in 0..columns {
        let [name, kind] = [(); 2].map(|()| String::from_utf8(take_text(rest)).expect("text"));
        let width = match kind.as_str() {
            "String" => {
                (0..rows).for_each(|_| drop(take_text(rest)));
                continue;
            }
            "LowCardinality(String)" => {
                // One text for all rows: a version, flags, how many keys, the key, how many rows, an index each.
                let [version, _flags, keys] = [(); 3].map(|()| u64::from_le_bytes(take(rest)));
                assert_eq!((version, keys), (1, 1), "{name}");
                let text = take_text(rest);
                assert_eq!(u64::from_le_bytes(take(rest)), rows as u64, "{name}");
                assert!(rest.split_off(..rows).expect("indexes").iter().all(|index| *index == 0), "{name}");
                if name == "run" {
                    run = text;
                }
                continue;
            }
            "UInt32" => 4,
            "UInt64" => 8,
            kind if kind.starts_with("Enum8") => 1,
            kind if kind.starts_with("DateTime64") => 8,
            kind => panic!("column {name} of a type that these tests do not know: {kind}"),
        };
        let values = rest.split_off(..width * rows).expect("values").chunks(width);
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
        numbers.insert(name, values.map(number).collect::<Vec<u64>>());
    }
    let run = String::from_utf8(run).expect("text");
    let at = |name: &str, row: usize| numbers[name][row];
    let row = |row| Row {
        run: run.clone(),
        pass: at("pass", row) as u32,
        batch: at("batch", row) as u32,
        id: at("id", row),
    };
    (0..rows).map(row).collect()
}

fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let (head, rest) = bytes.split_first_chunk().expect("a whole block");
    *bytes = rest;
    *head
}

fn take_text(bytes: &mut &[u8]) -> Vec<u8> {
    let length = take_varint(bytes);
    bytes.split_off(..length).expect("a whole text").to_vec()
}

fn take_varint(bytes: &mut &[u8]) -> usize {
    let (mut value, mut shift) = (0, 0);
    loop {
        let [byte] = take(bytes);
        value |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte < 0x80 {
            return value;
        }
    }
}

type Rule = Box<dyn FnMut(&Request) -> Fate + Send>;

struct Shared {
    upstream: String,
    rule: Mutex<Rule>,
    seen: Mutex<Vec<Request>>,
    ended: AtomicBool,
}

/// Stands between a client and ClickHouse.
pub struct Proxy {
    /// Its address.
    pub url: String,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Passes everything on to the server at this address, until told otherwise.
    pub fn before(upstream: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            upstream: upstream.trim_start_matches("http://").trim_end_matches('/').to_owned(),
            rule: Mutex::new(Box::new(|_| Fate::Pass)),
            seen: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let accepting = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if accepting.ended.load(Ordering::Relaxed) {
                    break;
                }
                let shared = accepting.clone();
                // A client that goes away in mid-request is its own affair.
                std::thread::spawn(move || shared.serve(client).ok());
            }
        });
        Self { url: format!("http://{address}"), shared }
    }

    /// From now on this decides.
    pub fn rule(&self, rule: impl FnMut(&Request) -> Fate + Send + 'static) {
        *lock(&self.shared.rule) = Box::new(rule);
    }

    /// The first INSERTs of rows meet these fates, later ones pass.
    pub fn inserts_meet(&self, fates: &[Fate]) {
        let mut fates = Vec::from(fates).into_iter();
        self.rule(
            move |request| {
                if request.inserts_rows() { fates.next().unwrap_or(Fate::Pass) } else { Fate::Pass }
            },
        );
    }

    /// Every request so far.
    pub fn seen(&self) -> Vec<Request> {
        lock(&self.shared.seen).clone()
    }

    /// Every INSERT of rows so far.
    pub fn inserts(&self) -> Vec<Request> {
        lock(&self.shared.seen).iter().filter(|request| request.inserts_rows()).cloned().collect()
    }

    /// How many requests have this in their text.
    pub fn count(&self, part: &str) -> usize {
        lock(&self.shared.seen).iter().filter(|request| request.text().contains(part)).count()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        drop(TcpStream::connect(self.url.trim_start_matches("http://")));
    }
}

impl Shared {
    /// One request a connection.
    fn serve(&self, client: TcpStream) -> io::Result<()> {
        client.set_read_timeout(Some(ANSWER_WITHIN))?;
        let mut reader = BufReader::new(client.try_clone()?);
        let (head, raw, body) = read_request(&mut reader)?;
        let request = Request { head: unescaped(&head), body };
        let fate = (lock(&self.rule))(&request);
        lock(&self.seen).push(request.clone());
        match fate {
            Fate::Pass => (&client).write_all(&self.pass(&head, &raw)?)?,
            Fate::LoseAnswer => drop(self.pass(&head, &raw)?),
            Fate::CutWhenRunning => self.cut_when_running(&head, &raw, &request, &client)?,
            Fate::CutBody => drop(self.send(&head, &raw[..raw.len() / 2])?.shutdown(Shutdown::Both)),
            Fate::Lie => {
                (&client).write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")?
            }
            Fate::TooManyParts => (&client).write_all(too_many_parts().as_bytes())?,
        }
        client.shutdown(Shutdown::Both)
    }

    fn send(&self, head: &str, body: &[u8]) -> io::Result<TcpStream> {
        let mut server = TcpStream::connect(&self.upstream)?;
        server.set_read_timeout(Some(ANSWER_WITHIN))?;
        server.write_all(with_close(head).as_bytes())?;
        server.write_all(body)?;
        Ok(server)
    }

    fn pass(&self, head: &str, body: &[u8]) -> io::Result<Vec<u8>> {
        read_answer(self.send(head, body)?)
    }

    fn cut_when_running(
        &self,
        head: &str,
        body: &[u8],
        request: &Request,
        client: &TcpStream,
    ) -> io::Result<()> {
        let query_id = request.head.split("query_id=").nth(1).and_then(|rest| rest.split(['&', ' ']).next());
        let query_id = query_id.expect("inserts are named").to_owned();
        let server = self.send(head, body)?;
        // Ended or running, in either case the server has it.
        let answer = std::thread::spawn(move || read_answer(server));
        let question = format!("SELECT count() FROM system.processes WHERE query_id = '{query_id}'");
        while !answer.is_finished() && !self.answers_one(&question)? {}
        client.shutdown(Shutdown::Both)?;
        answer.join().expect("it reads to the end").map(drop)
    }

    fn answers_one(&self, question: &str) -> io::Result<bool> {
        let head = format!(
            "POST / HTTP/1.1\r\nhost: {}\r\ncontent-length: {}\r\n\r\n",
            self.upstream,
            question.len()
        );
        let answer = self.pass(&head, question.as_bytes())?;
        Ok(String::from_utf8_lossy(&answer).lines().any(|line| line == "1"))
    }
}

/// The head, the body as it came, and the body without chunks.
fn read_request(reader: &mut impl BufRead) -> io::Result<(String, Vec<u8>, Vec<u8>)> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
    let lower = head.to_ascii_lowercase();
    if lower.contains("transfer-encoding: chunked") {
        let (raw, body) = read_chunks(reader)?;
        return Ok((head, raw, body));
    }
    let length =
        lower.split("content-length:").nth(1).and_then(|rest| rest.split("\r\n").next()?.trim().parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body)?;
    Ok((head, body.clone(), body))
}

fn read_chunks(reader: &mut impl BufRead) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let (mut raw, mut body) = (Vec::new(), Vec::new());
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        raw.extend_from_slice(line.as_bytes());
        let size = usize::from_str_radix(line.trim(), 16).map_err(io::Error::other)?;
        let mut chunk = vec![0; size + 2];
        reader.read_exact(&mut chunk)?;
        raw.extend_from_slice(&chunk);
        body.extend_from_slice(&chunk[..size]);
        if size == 0 {
            return Ok((raw, body));
        }
    }
}

fn read_answer(mut server: TcpStream) -> io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    Ok(answer)
}

/// Both sides close after the answer, so that a connection has one request.
fn with_close(head: &str) -> String {
    let lines =
        head.lines().filter(|line| !line.is_empty() && !line.to_ascii_lowercase().starts_with("connection:"));
    let lines: String = lines.map(|line| format!("{line}\r\n")).collect();
    format!("{lines}connection: close\r\n\r\n")
}

fn too_many_parts() -> String {
    let text =
        "Code: 252. DB::Exception: Too many parts (300) in all partitions in total. (TOO_MANY_PARTS)\n";
    format!(
        "HTTP/1.1 500 Internal Server Error\r\nconnection: close\r\nX-ClickHouse-Exception-Code: 252\r\n\
         content-length: {}\r\n\r\n{text}",
        text.len()
    )
}

/// Undoes the escapes of a URL.
fn unescaped(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((byte, after)) = rest.split_first() {
        let escaped = || u8::from_str_radix(std::str::from_utf8(after.get(..2)?).ok()?, 16).ok();
        match (byte, escaped()) {
            (b'%', Some(value)) => {
                bytes.push(value);
                rest = &after[2..];
                continue;
            }
            (b'+', _) => bytes.push(b' '),
            _ => bytes.push(*byte),
        }
        rest = after;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
