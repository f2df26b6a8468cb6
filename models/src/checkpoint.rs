//! A memory-mapped safetensors file: tensors by name, checked for type and shape.

use std::borrow::Cow;
use std::fs::File;
use std::path::{Path, PathBuf};

use bytemuck::{AnyBitPattern, NoUninit};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, SafeTensors, TensorInfo};

use crate::weights::Weights;
use crate::{Error, Result};

/// The length of the header stands before it, in this many bytes.
const HEADER_LEN_BYTES: usize = 8;

/// A safetensors file.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    map: Mmap,
    data_start: usize,
    metadata: Metadata,
}

impl Checkpoint {
    /// Maps the file and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Safetensors`] if the header and the length of the file do not agree.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let map = File::open(path).and_then(|file| map(&file)).map_err(Error::io(path))?;
        let (header_len, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|reason| Error::Safetensors { path: path.into(), reason })?;
        Ok(Checkpoint { path: path.into(), map, data_start: HEADER_LEN_BYTES + header_len, metadata })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the file has the tensor.
    pub fn has(&self, name: &str) -> bool {
        self.metadata.info(name).is_some()
    }

    /// The shape of a tensor.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.info(name)?.shape)
    }

    /// A tensor of floats; halves and bfloats are widened, which is exact.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::Dtype`].
    pub fn f32(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        let info = self.info(name)?;
        let bytes = self.bytes(info);
        match info.dtype {
            Dtype::F32 => Ok(elements(bytes)),
            Dtype::F16 => {
                Ok(Cow::Owned(elements::<u16>(bytes).iter().map(|&b| f16::from_bits(b).to_f32()).collect()))
            }
            Dtype::BF16 => {
                Ok(Cow::Owned(elements::<u16>(bytes).iter().map(|&b| bf16::from_bits(b).to_f32()).collect()))
            }
            _ => Err(self.wrong_dtype(name, "F32, F16 or BF16", info)),
        }
    }

    /// A tensor of integers.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::Dtype`].
    pub fn i64(&self, name: &str) -> Result<Cow<'_, [i64]>> {
        let info = self.info(name)?;
        match info.dtype {
            Dtype::I64 => Ok(elements(self.bytes(info))),
            _ => Err(self.wrong_dtype(name, "I64", info)),
        }
    }

    /// A tensor of bytes.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::Dtype`].
    pub fn u8(&self, name: &str) -> Result<&[u8]> {
        let info = self.info(name)?;
        match info.dtype {
            Dtype::U8 | Dtype::BOOL => Ok(self.bytes(info)),
            _ => Err(self.wrong_dtype(name, "U8 or BOOL", info)),
        }
    }

    /// The names of the file behind a prefix: the first of `prefixes` with which `probe` is there, else the first.
    /// Published checkpoints have the same names with and without the name of the model before them.
    pub fn root<'a>(&'a self, prefixes: &[&str], probe: &str) -> Weights<'a> {
        let prefix = prefixes.iter().find(|prefix| self.has(&format!("{prefix}{probe}")));
        Weights::new(self, prefix.or(prefixes.first()).unwrap_or(&"").trim_end_matches('.'))
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        let info = self.metadata.info(name);
        info.ok_or_else(|| Error::MissingTensor { path: self.path.clone(), name: name.into() })
    }

    fn bytes(&self, info: &TensorInfo) -> &[u8] {
        let (start, end) = info.data_offsets;
        &self.map[self.data_start + start..self.data_start + end]
    }

    fn wrong_dtype(&self, name: &str, expected: &'static str, info: &TensorInfo) -> Error {
        Error::Dtype { path: self.path.clone(), name: name.into(), expected, actual: info.dtype }
    }
}

/// The elements in place, or a copy of them where the file does not align them.
fn elements<T: AnyBitPattern + NoUninit>(bytes: &[u8]) -> Cow<'_, [T]> {
    const { assert!(cfg!(target_endian = "little"), "safetensors data is little-endian") };
    match bytemuck::try_cast_slice(bytes) {
        Ok(elements) => Cow::Borrowed(elements),
        Err(_) => Cow::Owned(bytemuck::pod_collect_to_vec(bytes)),
    }
}

#[allow(unsafe_code, reason = "the one memory map")]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only and private to `Checkpoint`. As with every map of a file, nobody may shorten or
    // rewrite the file in place while it is open; writers of checkpoints replace files by renaming, as this one does.
    unsafe { Mmap::map(file) }
}
