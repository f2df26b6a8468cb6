//! Sentences, one per line.

use std::fs::{File, Metadata};
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context as _, anyhow, ensure};

/// Large enough to fill many batches at one go.
const BUFFER_BYTES: usize = 1 << 20;

/// Some editors begin a file with it; it is no part of the text.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The lines of a file or of standard input.
pub struct Lines {
    name: String,
    /// Length of the input if it is a file.
    pub total_bytes: Option<u64>,
    reader: BufReader<Box<dyn Read>>,
    /// Bytes of the lines so far.
    pub bytes: u64,
    /// Number of lines so far.
    pub count: usize,
}

impl Lines {
    /// `None` is standard input.
    pub fn open(path: Option<&Path>) -> anyhow::Result<Lines> {
        let (name, total_bytes, source): (_, _, Box<dyn Read>) = match path {
            None => ("standard input".into(), None, Box::new(io::stdin())),
            Some(path) => {
                let name = path.display().to_string();
                let (file, metadata) = open(path)?;
                (name, metadata.is_file().then_some(metadata.len()), Box::new(file))
            }
        };
        Ok(Lines { total_bytes, ..Lines::of(&name, source) })
    }

    /// Those of anything that can be read; `name` is for messages.
    pub fn of(name: &str, source: Box<dyn Read>) -> Lines {
        let reader = BufReader::with_capacity(BUFFER_BYTES, source);
        Lines { name: name.into(), total_bytes: None, reader, bytes: 0, count: 0 }
    }

    /// The next line without its end; `None` behind the last.
    pub fn next(&mut self) -> anyhow::Result<Option<String>> {
        let mut line = vec![];
        let bytes = self.reader.read_until(b'\n', &mut line).with_context(|| self.name.clone())?;
        if bytes == 0 {
            return Ok(None);
        }
        self.bytes += bytes as u64;
        self.count += 1;
        if self.count == 1 && line.starts_with(BYTE_ORDER_MARK) {
            line.drain(..BYTE_ORDER_MARK.len());
        }
        if line.ends_with(b"\n") {
            line.pop();
            if line.ends_with(b"\r") {
                line.pop();
            }
        }
        let line = String::from_utf8(line);
        let at = |error: std::string::FromUtf8Error| {
            let valid = error.utf8_error().valid_up_to();
            anyhow!("{}: not UTF-8 from byte {} on", self.place(), valid + 1)
        };
        line.map(Some).map_err(at)
    }

    /// Whether the next line has already been read from the source, so that it can be had without waiting.
    pub fn is_ready(&self) -> bool {
        self.reader.buffer().contains(&b'\n')
    }

    /// The last line, for messages.
    pub fn place(&self) -> String {
        self.place_of(self.count)
    }

    /// The same of a line before it.
    pub fn place_of(&self, line: usize) -> String {
        format!("{}: line {line}", self.name)
    }
}

/// A file that can be read, which a directory cannot.
pub fn open(path: &Path) -> anyhow::Result<(File, Metadata)> {
    let file = File::open(path).and_then(|file| Ok((file.metadata()?, file)));
    let (metadata, file) = file.with_context(|| path.display().to_string())?;
    ensure!(!metadata.is_dir(), "{}: {}", path.display(), io::Error::from(io::ErrorKind::IsADirectory));
    Ok((file, metadata))
}
