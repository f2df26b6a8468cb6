//! Sets of keys as bits: one row per query, per sequence or per group, 64 keys to a word.

use crate::error::{Error, check_size};

/// Rows of bits over the keys of a sequence, and which row a query has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bits {
    words: Vec<u64>,
    keys: usize,
    select: Select,
}

/// Which row of bits belongs to a query.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Select {
    /// `sequence * strides[0] + head * strides[1] + place in the sequence * strides[2]`, each below its size where the stride is not 0.
    Strided { strides: [usize; 3], sizes: [usize; 3] },
    /// `sequence * groups + the query's group`, groups by packed query row.
    Group { ids: Vec<u32>, groups: usize },
}

/// A query: its sequence, head, place among its sequence's queries, and row in the packed batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Query {
    pub(crate) segment: usize,
    pub(crate) head: usize,
    pub(crate) place: usize,
    pub(crate) row: usize,
}

impl Bits {
    /// `f(sequence, head, query, key)` for a batch of `[sequences, heads, queries, keys]`; one sequence, head or query serves all.
    ///
    /// # Errors
    /// [`Error::ZeroDim`] if sequences, heads or queries are 0, [`Error::Overflow`].
    pub fn dense(
        [sequences, heads, queries, keys]: [usize; 4],
        f: impl Fn(usize, usize, usize, usize) -> bool,
    ) -> Result<Bits, Error> {
        for (arg, n) in [("sequences", sequences), ("heads", heads), ("queries", queries)] {
            crate::error::check_dim(arg, n)?;
        }
        let rows = crate::error::checked_product("bits", &[sequences, heads, queries])?;
        crate::error::checked_product("bits", &[rows, keys])?;
        // A row is whole words of 64 keys, each as large as two elements.
        crate::error::checked_product("bits", &[rows, keys.div_ceil(64), 2])?;
        let words =
            pack(rows, keys, |row, key| f(row / queries / heads, row / queries % heads, row % queries, key));
        let stride = |n: usize, step: usize| if n == 1 { 0 } else { step };
        let strides = [stride(sequences, heads * queries), stride(heads, queries), stride(queries, 1)];
        Ok(Bits { words, keys, select: Select::Strided { strides, sizes: [sequences, heads, queries] } })
    }

    /// One set of keys per sequence, each as long as its sequence: padding, or columns that all queries see. Keys behind the end of a set
    /// are not in it.
    ///
    /// # Errors
    /// None; it is a `Result` as the others are.
    pub fn keys(sequences: &[&[bool]]) -> Result<Bits, Error> {
        let keys = sequences.iter().map(|row| row.len()).max().unwrap_or(0);
        let words = pack(sequences.len(), keys, |row, key| sequences[row].get(key) == Some(&true));
        let select = Select::Strided { strides: [1, 0, 0], sizes: [sequences.len(), 1, 1] };
        Ok(Bits { words, keys, select })
    }

    /// Which group of queries sees which group of keys: `table[query group * groups + key group]`. `queries` and
    /// `keys` hold the groups of packed tokens; `key_offsets` says where each sequence's keys begin.
    ///
    /// # Errors
    /// [`Error::Size`] if the table is not square, [`Error::TooLarge`] if a group is outside of it, [`Error::TooSmall`] if there are tokens and
    /// no groups, [`Error::NotAscending`].
    pub fn groups(
        queries: &[u32],
        keys: &[u32],
        key_offsets: &[usize],
        groups: usize,
        table: &[bool],
    ) -> Result<Bits, Error> {
        check_size("table.len()", crate::error::checked_product("groups", &[groups, groups])?, table.len())?;
        if groups == 0 && queries.len() + keys.len() > 0 {
            return Err(Error::TooSmall { arg: "groups", min: 1, actual: 0 });
        }
        super::check_offsets("key_offsets", key_offsets, keys.len())?;
        for &id in queries.iter().chain(keys) {
            if id as usize >= groups {
                return Err(Error::TooLarge { arg: "group id", max: groups - 1, actual: id as usize });
            }
        }
        let sequences = key_offsets.len() - 1;
        let longest = key_offsets.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
        let words = pack(sequences * groups, longest, |row, key| {
            let (sequence, group) = (row / groups, row % groups);
            let at = key_offsets[sequence] + key;
            at < key_offsets[sequence + 1] && table[group * groups + keys[at] as usize]
        });
        Ok(Bits { words, keys: longest, select: Select::Group { ids: queries.to_vec(), groups } })
    }

    /// Whether every query of the batch has a row, and keys are as many as the longest sequence's. `args` are the names of the sizes: sequences,
    /// heads, queries, keys.
    pub(crate) fn check(
        &self,
        args: [&'static str; 4],
        segments: usize,
        heads: usize,
        longest_query: usize,
        rows: usize,
        longest_key: usize,
    ) -> Result<(), Error> {
        if self.keys < longest_key {
            return Err(Error::TooSmall { arg: args[3], min: longest_key, actual: self.keys });
        }
        match &self.select {
            Select::Strided { strides, sizes } => {
                let needed = [segments, heads, longest_query];
                for (((&stride, &size), needed), arg) in strides.iter().zip(sizes).zip(needed).zip(args) {
                    if stride != 0 && size < needed {
                        return Err(Error::TooSmall { arg, min: needed, actual: size });
                    }
                }
            }
            Select::Group { ids, groups } => {
                check_size(args[2], rows, ids.len())?;
                let available = self.words.len() / self.row_words().max(1);
                if self.row_words() > 0 && available < segments * groups {
                    return Err(Error::TooSmall { arg: args[0], min: segments, actual: available / groups });
                }
            }
        }
        Ok(())
    }

    /// Whether queries of a sequence may have rows of their own.
    pub(crate) fn differ_by_query(&self) -> bool {
        match &self.select {
            Select::Strided { strides, .. } => strides[2] != 0,
            Select::Group { .. } => true,
        }
    }

    /// Whether heads may have rows of their own.
    pub(crate) fn differ_by_head(&self) -> bool {
        matches!(self.select, Select::Strided { strides: [_, head, _], .. } if head != 0)
    }

    /// Whether the query has a row.
    pub(crate) fn has(&self, query: Query) -> bool {
        match &self.select {
            Select::Strided { strides, sizes } => {
                let at = [query.segment, query.head, query.place];
                at.iter().zip(strides).zip(sizes).all(|((&i, &stride), &size)| stride == 0 || i < size)
            }
            Select::Group { ids, .. } => query.row < ids.len(),
        }
    }

    /// Keys up to the last that any row has, in whole words.
    pub(crate) fn end(&self) -> usize {
        let len = |row: &[u64]| row.iter().rposition(|&word| word != 0).map_or(0, |last| last + 1);
        let lens = self.words.chunks(self.row_words().max(1)).map(len);
        64 * lens.max().unwrap_or(0)
    }

    /// The first key that any row has.
    pub(crate) fn start(&self) -> Option<usize> {
        let first = |row: &[u64]| {
            let (i, word) = row.iter().enumerate().find(|(_, word)| **word != 0)?;
            Some(64 * i + word.trailing_zeros() as usize)
        };
        self.words.chunks(self.row_words().max(1)).filter_map(first).min()
    }

    fn row_words(&self) -> usize {
        self.keys.div_ceil(64)
    }

    /// The bits of keys `64 * block..` for a query; none past the last key.
    #[inline(always)]
    pub(crate) fn word(&self, query: Query, block: usize) -> u64 {
        let row = match &self.select {
            Select::Strided { strides: [s, h, q], .. } => {
                query.segment * s + query.head * h + query.place * q
            }
            Select::Group { ids, groups } => query.segment * groups + ids[query.row] as usize,
        };
        let row_words = self.row_words();
        if block < row_words { self.words[row * row_words + block] } else { 0 }
    }
}

fn pack(rows: usize, keys: usize, f: impl Fn(usize, usize) -> bool) -> Vec<u64> {
    let mut words = Vec::with_capacity(rows * keys.div_ceil(64));
    for row in 0..rows {
        for start in (0..keys).step_by(64) {
            let bits = (start..keys.min(start + 64)).map(|key| u64::from(f(row, key)) << (key - start));
            words.push(bits.fold(0, |word, bit| word | bit));
        }
    }
    words
}
