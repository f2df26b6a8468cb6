//! A memory-mapped safetensors file: tensors by name, checked for type and shape. And one without a file, of random numbers.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bytemuck::{AnyBitPattern, NoUninit};
use half::{bf16, f16};
use memmap2::Mmap;
use rand_pcg::Pcg32;
use rand_pcg::rand_core::{Rng, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, SafeTensors, TensorInfo};

use crate::{Error, Result, Weights};

/// The length of the header stands before it, in this many bytes.
const HEADER_LEN_BYTES: usize = 8;

/// A safetensors file, or random numbers in the place of one.
///
/// Models ask for their tensors by name. What a file has beyond that, other heads and buffers, is left alone; only more layers than
/// the configuration has are an error.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    source: Source,
}

#[derive(Debug)]
enum Source {
    File { map: Mmap, data_start: usize, metadata: Metadata },
    Random { seed: u64, asked: Mutex<BTreeMap<String, Vec<usize>>> },
}

impl Checkpoint {
    /// Maps the file and reads its header.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let map = File::open(path).and_then(|file| map(&file)).map_err(Error::io(path))?;
        let (header_len, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|reason| Error::Safetensors { path: path.into(), reason })?;
        let data_start = HEADER_LEN_BYTES + header_len;
        Ok(Checkpoint { path: path.into(), source: Source::File { map, data_start, metadata } })
    }

    /// A checkpoint that has every tensor in the shape in which [`Checkpoint::tensor`] is asked for it, so that any model
    /// can be built at any size: its own loader says what it needs.
    ///
    /// The numbers depend on the seed and the name alone. They are uniform: around 1 for gains, variances and scalars,
    /// around 0 for other vectors, and otherwise such that a row has about length 1, which keeps activations at their size
    /// from layer to layer. What is optional, as poolers are, is there.
    pub fn random(seed: u64) -> Checkpoint {
        let path = format!("random weights of seed {seed}").into();
        Checkpoint { path, source: Source::Random { seed, asked: Mutex::default() } }
    }

    /// The names and shapes that a random checkpoint has been asked for: what somebody else needs to have the same model.
    /// Empty for a file.
    pub fn asked(&self) -> BTreeMap<String, Vec<usize>> {
        match &self.source {
            Source::File { .. } => BTreeMap::new(),
            Source::Random { asked, .. } => asked.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is such a tensor.
    pub fn has(&self, name: &str) -> bool {
        match &self.source {
            Source::File { metadata, .. } => metadata.info(name).is_some(),
            // All, but each once: this is another name for the same.
            Source::Random { .. } => !matches!(last(name), "gamma" | "in_proj_weight"),
        }
    }

    /// The first of the file's tensors whose names begin with `prefix` and a dot.
    pub(crate) fn first_below(&self, prefix: &str) -> Option<String> {
        let Source::File { metadata, .. } = &self.source else { return None };
        let names = metadata.offset_keys().into_iter();
        names.filter(|name| name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('.'))).min()
    }

    /// The shape of a tensor of a file.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.find(name)?.0.shape)
    }

    /// A tensor of floats, which must have this shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Cow<'_, [f32]>> {
        if let Source::Random { seed, asked } = &self.source {
            let tensor = random(*seed, name, shape)?;
            let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
            asked.insert(name.into(), shape.into());
            return Ok(Cow::Owned(tensor));
        }
        let actual = self.shape(name)?;
        if actual != shape {
            let (path, name) = (self.path.clone(), name.into());
            return Err(Error::Shape { path, name, expected: shape.into(), actual: actual.into() });
        }
        self.f32(name)
    }

    /// A tensor of floats of a file; halves and bfloats are widened, which is exact.
    pub fn f32(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        let floats = [Dtype::F32, Dtype::F16, Dtype::BF16];
        let (dtype, bytes) = self.find_of(name, "F32, F16 or BF16", &floats)?;
        let widened = |widen: fn(u16) -> f32| {
            Cow::Owned(elements::<u16>(bytes).iter().map(|&bits| widen(bits)).collect())
        };
        Ok(match dtype {
            Dtype::F16 => widened(|bits| f16::from_bits(bits).to_f32()),
            Dtype::BF16 => widened(|bits| bf16::from_bits(bits).to_f32()),
            _ => elements(bytes),
        })
    }

    /// A tensor of integers of a file.
    pub fn i64(&self, name: &str) -> Result<Cow<'_, [i64]>> {
        Ok(elements(self.find_of(name, "I64", &[Dtype::I64])?.1))
    }

    /// A tensor of bytes of a file.
    pub fn u8(&self, name: &str) -> Result<&[u8]> {
        Ok(self.find_of(name, "U8 or BOOL", &[Dtype::U8, Dtype::BOOL])?.1)
    }

    /// The names behind a prefix: the first of `prefixes` with which `probe` is there, else the first. Published
    /// checkpoints have the same names with and without the name of the model before them.
    pub fn root<'a>(&'a self, prefixes: &[&str], probe: &str) -> Weights<'a> {
        let prefix = prefixes.iter().find(|prefix| self.has(&format!("{prefix}{probe}")));
        Weights::new(self, prefix.or(prefixes.first()).unwrap_or(&"").trim_end_matches('.'))
    }

    fn find(&self, name: &str) -> Result<(&TensorInfo, &[u8])> {
        if let Source::File { map, data_start, metadata } = &self.source
            && let Some(info) = metadata.info(name)
        {
            let (start, end) = info.data_offsets;
            return Ok((info, &map[data_start + start..data_start + end]));
        }
        Err(Error::MissingTensor { path: self.path.clone(), name: name.into() })
    }

    /// A tensor of one of these types, which are what is `expected`.
    fn find_of(&self, name: &str, expected: &'static str, types: &[Dtype]) -> Result<(Dtype, &[u8])> {
        let (&TensorInfo { dtype, .. }, bytes) = self.find(name)?;
        if types.contains(&dtype) {
            return Ok((dtype, bytes));
        }
        Err(Error::Dtype { path: self.path.clone(), name: name.into(), expected, actual: dtype })
    }
}

/// See [`Checkpoint::random`].
fn random(seed: u64, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let product = |sizes: &[usize]| sizes.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
    let n = product(shape).filter(|&n| n <= isize::MAX as usize / size_of::<f32>());
    let n = n.ok_or(laneformer::Error::Overflow { arg: "elements of a random tensor" })?;
    let (centre, reach) = match (shape, last(name)) {
        ([], _) | ([_], "weight" | "running_var") => (1.0, 0.1),
        ([_], _) => (0.0, 0.1),
        // A uniform number of this reach has the mean square 1 / row.
        ([rows, ..], _) => (0.0, (3.0 * *rows as f32 / n as f32).sqrt()),
    };
    // FNV-1a, so that every tensor has numbers of its own, in whatever order they are loaded.
    let hash = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let mut rng = Pcg32::seed_from_u64(seed ^ name.bytes().fold(0xcbf2_9ce4_8422_2325, hash));
    // 24 bits are exact in an f32: from -1 up to 1.
    let uniform = |bits: u32| (bits >> 8) as f32 / (1 << 23) as f32 - 1.0;
    Ok((0..n).map(|_| centre + reach * uniform(rng.next_u32())).collect())
}

fn last(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
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
fn map(file: &File) -> io::Result<Mmap> {
    if file.metadata()?.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    // SAFETY: the map is read-only and private to `Checkpoint`. As with every map of a file, nobody may shorten or
    // rewrite the file in place while it is open; writers of checkpoints replace files by renaming, as this one does.
    unsafe { Mmap::map(file) }
}
