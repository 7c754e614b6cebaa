//! The C interface of `libchdb.so` behind three safe types: [`Engine`], [`Connection`], [`Output`].
//!
//! The engine is one per process and is booted by its first connection, which [`Engine`] keeps; the last connection's
//! end shuts it down. A connection is a session (database, settings) and runs one statement at a time. Every call
//! blocks, so none of this belongs on a tokio worker. The library is never unloaded: its threads outlive it.
//!
//! Not used, on purpose: the `chdb_stream_query` family. In 26.5 it formats every block as a result of its own (several
//! headers, several footers) and ends early at `WITH TOTALS` and at an empty block.

#![allow(unsafe_code, reason = "the engine is a C library; this file is the only door to it")]

use std::ffi::{CStr, CString, NulError, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use libloading::Library;

/// Why the engine could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The library cannot be loaded, or lacks a function.
    #[error("load the ClickHouse engine `{}`", lib.display())]
    Load {
        /// The library.
        lib: PathBuf,
        /// Why it cannot be loaded.
        #[source]
        source: libloading::Error,
    },
    /// The path of the data has a NUL in it.
    #[error("pass the path `{}` to the ClickHouse engine", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// Where the NUL is.
        #[source]
        source: NulError,
    },
    /// The engine does not boot on this data. It says why on stderr, if at all.
    #[error("open the ClickHouse data at `{}`", path.display())]
    Boot {
        /// The directory of the data.
        path: PathBuf,
    },
}

type RawConnection = *mut c_void;
type RawResult = *mut c_void;

/// The functions of `chdb.h` that are used here, as of 26.5. A connection is passed around as a pointer to its handle,
/// and used by the handle itself.
struct Api {
    connect: unsafe extern "C" fn(c_int, *mut *mut c_char) -> *mut RawConnection,
    close: unsafe extern "C" fn(*mut RawConnection),
    query: unsafe extern "C" fn(
        RawConnection,
        *const u8,
        usize,
        *const u8,
        usize,
        *const *const u8,
        *const usize,
        *const *const u8,
        *const usize,
        usize,
    ) -> RawResult,
    destroy: unsafe extern "C" fn(RawResult),
    error: unsafe extern "C" fn(RawResult) -> *const c_char,
    buffer: unsafe extern "C" fn(RawResult) -> *const u8,
    length: unsafe extern "C" fn(RawResult) -> usize,
    result_rows: unsafe extern "C" fn(RawResult) -> u64,
    result_bytes: unsafe extern "C" fn(RawResult) -> u64,
    read_rows: unsafe extern "C" fn(RawResult) -> u64,
    read_bytes: unsafe extern "C" fn(RawResult) -> u64,
    written_rows: unsafe extern "C" fn(RawResult) -> u64,
    written_bytes: unsafe extern "C" fn(RawResult) -> u64,
    _library: ManuallyDrop<Library>,
}

impl Api {
    fn load(lib: &Path) -> Result<Self, libloading::Error> {
        // SAFETY: loading runs the library's initialisers, which is what it is loaded for. The signatures are those of
        // chdb.h, and the library is never unloaded, so the function pointers stay valid for the process's life.
        unsafe {
            let library = ManuallyDrop::new(Library::new(lib)?);
            let silence: unsafe extern "C" fn(c_int) = *library.get(b"chdb_set_signal_handlers_enabled\0")?;
            // Without this the engine takes SIGINT, and a crash ends in its own report rather than in the crash.
            silence(0);
            Ok(Self {
                connect: *library.get(b"chdb_connect\0")?,
                close: *library.get(b"chdb_close_conn\0")?,
                query: *library.get(b"chdb_query_with_params_n\0")?,
                destroy: *library.get(b"chdb_destroy_query_result\0")?,
                error: *library.get(b"chdb_result_error\0")?,
                buffer: *library.get(b"chdb_result_buffer\0")?,
                length: *library.get(b"chdb_result_length\0")?,
                result_rows: *library.get(b"chdb_result_rows_read\0")?,
                result_bytes: *library.get(b"chdb_result_bytes_read\0")?,
                read_rows: *library.get(b"chdb_result_storage_rows_read\0")?,
                read_bytes: *library.get(b"chdb_result_storage_bytes_read\0")?,
                written_rows: *library.get(b"chdb_result_rows_written\0")?,
                written_bytes: *library.get(b"chdb_result_bytes_written\0")?,
                _library: library,
            })
        }
    }

    /// `None` where the engine refuses. It then says why on stderr, if at all.
    fn connect(&self, args: &[CString]) -> Option<NonNull<RawConnection>> {
        let mut argv: Vec<*mut c_char> = args.iter().map(|arg| arg.as_ptr().cast_mut()).collect();
        let argc = c_int::try_from(argv.len()).ok()?;
        // SAFETY: argv holds argc NUL-terminated strings that outlive the call; the engine copies and does not write.
        let raw = NonNull::new(unsafe { (self.connect)(argc, argv.as_mut_ptr()) })?;
        // SAFETY: a connection that is not null points to its handle.
        if unsafe { *raw.as_ptr() }.is_null() {
            return None;
        }
        Some(raw)
    }
}

/// The booted engine. Opens sessions; shuts down when it and the last session are dropped.
pub(crate) struct Engine {
    api: Arc<Api>,
    args: Vec<CString>,
    /// Held so that the engine does not shut down and boot again between two sessions.
    first: NonNull<RawConnection>,
}

// SAFETY: `first` is only ever closed, once, by drop. The API is thread-safe over distinct connections.
unsafe impl Send for Engine {}
// SAFETY: as above; `connect` takes the engine's own lock.
unsafe impl Sync for Engine {}

impl Engine {
    /// Loads the library and opens the data at `path` with the server settings `options` (`name=value`).
    pub(crate) fn open(lib: &Path, path: &Path, options: &[&str]) -> Result<Self, OpenError> {
        let api = Api::load(lib).map_err(|source| OpenError::Load { lib: lib.to_owned(), source })?;
        let args =
            arguments(path, options).map_err(|source| OpenError::Path { path: path.to_owned(), source })?;
        let first = api.connect(&args).ok_or_else(|| OpenError::Boot { path: path.to_owned() })?;
        Ok(Self { api: Arc::new(api), args, first })
    }

    /// A new session with the engine's default settings. Costs about a quarter of a millisecond. `None` if the engine
    /// refuses, which it has no reason to.
    pub(crate) fn connect(&self) -> Option<Connection> {
        let raw = self.api.connect(&self.args)?;
        Some(Connection { api: Arc::clone(&self.api), raw })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: opened by `open`, closed only here.
        unsafe { (self.api.close)(self.first.as_ptr()) }
    }
}

fn arguments(path: &Path, options: &[&str]) -> Result<Vec<CString>, NulError> {
    use std::os::unix::ffi::OsStrExt;

    let mut path_option = b"--path=".to_vec();
    path_option.extend_from_slice(path.as_os_str().as_bytes());
    let mut args = vec![CString::new("clickhouse")?, CString::new(path_option)?];
    for option in options {
        args.push(CString::new(format!("--{option}"))?);
    }
    Ok(args)
}

/// One session. A statement that failed or was killed stays in the engine's process list until the session ends.
pub(crate) struct Connection {
    api: Arc<Api>,
    raw: NonNull<RawConnection>,
}

/// What one statement did, and its result if it has one.
#[derive(Debug, Default)]
pub(crate) struct Output {
    pub(crate) data: Vec<u8>,
    pub(crate) result_rows: u64,
    pub(crate) result_bytes: u64,
    pub(crate) read_rows: u64,
    pub(crate) read_bytes: u64,
    pub(crate) written_rows: u64,
    pub(crate) written_bytes: u64,
}

impl Connection {
    /// Runs one statement to its end, with the query parameters `params`. The error is the engine's text, unchanged.
    pub(crate) fn query(
        &mut self,
        sql: &[u8],
        format: &str,
        params: &[(String, String)],
    ) -> Result<Output, String> {
        let names: Vec<*const u8> = params.iter().map(|(name, _)| name.as_ptr()).collect();
        let name_lengths: Vec<usize> = params.iter().map(|(name, _)| name.len()).collect();
        let values: Vec<*const u8> = params.iter().map(|(_, value)| value.as_ptr()).collect();
        let value_lengths: Vec<usize> = params.iter().map(|(_, value)| value.len()).collect();
        // SAFETY: the connection is open and used by one thread at a time (`&mut self`); every pointer comes with its
        // length and outlives the call, during which the engine copies what it keeps.
        let raw = unsafe {
            (self.api.query)(
                *self.raw.as_ptr(),
                sql.as_ptr(),
                sql.len(),
                format.as_ptr(),
                format.len(),
                names.as_ptr(),
                name_lengths.as_ptr(),
                values.as_ptr(),
                value_lengths.as_ptr(),
                params.len(),
            )
        };
        if raw.is_null() {
            return Err("the engine answered nothing".to_owned());
        }
        RawOutput { api: &self.api, raw }.read()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // SAFETY: opened by `Engine::connect`, closed only here; every result is destroyed before.
        unsafe { (self.api.close)(self.raw.as_ptr()) }
    }
}

/// A result that is destroyed when dropped.
struct RawOutput<'a> {
    api: &'a Api,
    raw: RawResult,
}

impl RawOutput<'_> {
    fn read(self) -> Result<Output, String> {
        let api = self.api;
        let raw = self.raw;
        // SAFETY: `raw` is a live result; its error is null or NUL-terminated, its buffer is null or `length` long, and
        // both live until it is destroyed, after they were copied.
        unsafe {
            let error = (api.error)(raw);
            if !error.is_null() {
                return Err(CStr::from_ptr(error).to_string_lossy().into_owned());
            }
            let buffer = (api.buffer)(raw);
            let length = (api.length)(raw);
            let data = if buffer.is_null() || length == 0 {
                Vec::new()
            } else {
                std::slice::from_raw_parts(buffer, length).to_vec()
            };
            Ok(Output {
                data,
                result_rows: (api.result_rows)(raw),
                result_bytes: (api.result_bytes)(raw),
                read_rows: (api.read_rows)(raw),
                read_bytes: (api.read_bytes)(raw),
                written_rows: (api.written_rows)(raw),
                written_bytes: (api.written_bytes)(raw),
            })
        }
    }
}

impl Drop for RawOutput<'_> {
    fn drop(&mut self) {
        // SAFETY: a live result, destroyed only here.
        unsafe { (self.api.destroy)(self.raw) }
    }
}
