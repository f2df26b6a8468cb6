//! Where results go: files written beside their place; embeddings as JSON lines on standard output or as a safetensors file.

use std::fs;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf, is_separator};

use anyhow::Context as _;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Serialize;
use tempfile::NamedTempFile;

/// A new file beside its place, which is taken when it is whole.
pub struct Beside {
    file: NamedTempFile,
    place: PathBuf,
}

impl Beside {
    /// Puts the file in its place.
    pub fn persist(self) -> io::Result<()> {
        self.file.persist(self.place)?;
        Ok(())
    }
}

impl Write for Beside {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for Beside {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// A new file beside `path`, or beside the file that a link there leads to. A device or a pipe is not replaced by a file.
fn beside(path: &Path) -> anyhow::Result<Beside> {
    create(path).with_context(|| format!("cannot write {}", path.display()))
}

/// Writes a file that is there when it is whole.
pub fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut file = beside(path)?;
    file.write_all(bytes).and_then(|()| file.persist()).with_context(|| path.display().to_string())
}

/// An error if no file can be written at `path`: better before the work than after it.
pub fn check_writable(path: &Path) -> anyhow::Result<()> {
    beside(path).map(drop)
}

fn create(path: &Path) -> io::Result<Beside> {
    match fs::metadata(path) {
        Ok(there) if there.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
        Ok(there) if !there.is_file() => return Err(io::Error::other("not a file")),
        _ => {}
    }
    if path.as_os_str().as_encoded_bytes().last().is_some_and(|&last| is_separator(last.into())) {
        return Err(io::Error::other("the name of a directory"));
    }
    let place = if path.is_symlink() { fs::canonicalize(path)? } else { path.into() };
    let dir = place.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    // The usual mode of a new file, less the umask, instead of a private one.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let file = builder.prefix(".laneformer-").tempfile_in(dir)?;
    Ok(Beside { file, place })
}

/// A place for embeddings.
pub enum Sink {
    Lines(JsonLines),
    File(SafetensorsFile),
}

impl Sink {
    /// `None` is standard output. A file is begun here, so that it is known to be writable before the work.
    pub fn open(path: Option<&Path>, dim: usize) -> anyhow::Result<Sink> {
        match path {
            None => Ok(Sink::Lines(JsonLines { out: BufWriter::new(io::stdout()), index: 0 })),
            Some(path) => Ok(Sink::File(SafetensorsFile::create(path, dim)?)),
        }
    }

    /// Writes whole rows of `dim` elements.
    pub fn write(&mut self, rows: &[f32], dim: usize) -> anyhow::Result<()> {
        match self {
            Sink::Lines(lines) => lines.write(rows, dim).context("standard output"),
            Sink::File(file) => file.write(rows).with_context(|| file.path.display().to_string()),
        }
    }

    /// Puts a file in its place.
    pub fn finish(self) -> anyhow::Result<()> {
        match self {
            Sink::Lines(_) => Ok(()),
            Sink::File(file) => {
                let path = file.path.clone();
                file.finish().with_context(|| path.display().to_string())
            }
        }
    }
}

/// One JSON object per embedding.
pub struct JsonLines {
    out: BufWriter<io::Stdout>,
    index: usize,
}

#[derive(Serialize)]
struct Record<'a> {
    index: usize,
    embedding: &'a [f32],
}

impl JsonLines {
    fn write(&mut self, rows: &[f32], dim: usize) -> io::Result<()> {
        for embedding in rows.chunks_exact(dim) {
            serde_json::to_writer(&mut self.out, &Record { index: self.index, embedding })?;
            self.out.write_all(b"\n")?;
            self.index += 1;
        }
        self.out.flush()
    }
}

/// A file with one tensor `embeddings` [rows, dim], written beside its place and renamed at the end. Rows are written
/// as they come, so that memory does not grow with the input: the header follows when their number is known.
pub struct SafetensorsFile {
    path: PathBuf,
    file: BufWriter<Beside>,
    dim: usize,
    rows: usize,
}

/// Room for the header, a multiple of the alignment that readers want for the data behind it.
const HEADER_BYTES: usize = 256;

impl SafetensorsFile {
    fn create(path: &Path, dim: usize) -> anyhow::Result<SafetensorsFile> {
        let mut file = BufWriter::new(beside(path)?);
        file.write_all(&[b' '; HEADER_BYTES])?;
        Ok(SafetensorsFile { path: path.into(), file, dim, rows: 0 })
    }

    fn write(&mut self, rows: &[f32]) -> io::Result<()> {
        self.rows += rows.len() / self.dim;
        rows.iter().try_for_each(|x| self.file.write_all(&x.to_le_bytes()))
    }

    fn finish(mut self) -> io::Result<()> {
        let header = self.header()?;
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&header)?;
        self.file.into_inner()?.persist()
    }

    /// The length of the header, the header, and spaces up to the data.
    fn header(&self) -> io::Result<Vec<u8>> {
        let tensor = TensorInfo {
            dtype: Dtype::F32,
            shape: vec![self.rows, self.dim],
            data_offsets: (0, self.rows * self.dim * size_of::<f32>()),
        };
        let metadata = Metadata::new(None, vec![("embeddings".into(), tensor)]).map_err(io::Error::other)?;
        let json = serde_json::to_string(&metadata)?;
        let room = HEADER_BYTES - size_of::<u64>();
        let mut header = (room as u64).to_le_bytes().to_vec();
        write!(header, "{json:room$}")?;
        Ok(header)
    }
}
