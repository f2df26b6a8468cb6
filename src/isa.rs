//! Which instruction set a call runs on: detection, the cap, and [`dispatch!`], the one place that chooses code by CPU.

#![allow(unsafe_code, reason = "tokens are made here, after detection")]

#[cfg(target_arch = "x86_64")]
use core::arch::x86_64::__cpuid;
use core::fmt;
use core::str::FromStr;
#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

use crate::error::Error;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Portable, Scalar};

/// An instruction set that this CPU has. One that it lacks cannot be constructed.
///
/// ```
/// use laneformer::Isa;
/// assert!(Isa::available().contains(&Isa::SCALAR));
/// assert_eq!("portable".parse::<Isa>()?, Isa::PORTABLE);
/// # Ok::<(), laneformer::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Isa {
    token: Token,
    features: Features,
}

/// The vector code that runs, with the proof that the CPU has it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Token {
    Scalar(Scalar),
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

/// Features beside the f32 vector code. A set, not a ladder: CPUs have them in any combination.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Features {
    avx512_bf16: bool,
    avx512_vnni: bool,
}

impl Isa {
    /// Every name that [`FromStr`] knows, from the plainest to the widest.
    pub const NAMES: [&'static str; 4] = ["scalar", "portable", "avx2", "avx512"];

    /// Sixteen plain `f32` with fused multiply-add: slow, and the oracle of the bits.
    pub const SCALAR: Isa = Isa { token: Token::Scalar(Scalar), features: Features::NONE };

    /// The vectors of the `wide` crate, chosen when the library is built. Without a fused multiply-add in
    /// the build's target it rounds twice, so it is outside the promise of equal bits.
    pub const PORTABLE: Isa = Isa { token: Token::Portable(Portable), features: Features::NONE };

    /// AVX2 with FMA, if the CPU has both.
    #[cfg(target_arch = "x86_64")]
    pub fn avx2() -> Option<Isa> {
        Avx2::detect().map(|t| Isa { token: Token::Avx2(t), features: Features::NONE })
    }

    /// AVX-512 (F, BW, DQ, VL), if the CPU has it.
    #[cfg(target_arch = "x86_64")]
    pub fn avx512() -> Option<Isa> {
        Avx512::detect().map(|t| Isa { token: Token::Avx512(t), features: Features::detect() })
    }

    /// The instruction sets of this CPU, from the plainest to the widest.
    pub fn available() -> Vec<Isa> {
        Isa::NAMES.iter().filter_map(|name| name.parse().ok()).collect()
    }

    /// The widest instruction set of this CPU.
    pub fn best() -> Isa {
        #[cfg(target_arch = "x86_64")]
        if let Some(isa) = Isa::avx512().or_else(Isa::avx2) {
            return isa;
        }
        Isa::PORTABLE
    }

    /// `"scalar"`, `"portable"`, `"avx2"` or `"avx512"`.
    pub fn name(self) -> &'static str {
        match self.token {
            Token::Scalar(_) => "scalar",
            Token::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Token::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Token::Avx512(_) => "avx512",
        }
    }

    /// Whether results have the bits that the crate promises: all but [`Isa::PORTABLE`].
    pub fn keeps_bits(self) -> bool {
        !matches!(self.token, Token::Portable(_))
    }

    /// Names of the features beside the f32 vector code, such as `"avx512_bf16"`.
    pub fn features(self) -> impl Iterator<Item = &'static str> {
        let Features { avx512_bf16, avx512_vnni } = self.features;
        [(avx512_bf16, "avx512_bf16"), (avx512_vnni, "avx512_vnni")]
            .into_iter()
            .filter_map(|(has, name)| has.then_some(name))
    }

    pub(crate) fn token(self) -> Token {
        self.token
    }
}

impl Features {
    const NONE: Features = Features { avx512_bf16: false, avx512_vnni: false };

    #[cfg(target_arch = "x86_64")]
    fn detect() -> Features {
        Features {
            avx512_bf16: std::arch::is_x86_feature_detected!("avx512bf16"),
            avx512_vnni: std::arch::is_x86_feature_detected!("avx512vnni"),
        }
    }
}

impl FromStr for Isa {
    type Err = Error;

    /// # Errors
    /// [`Error::UnknownIsa`], or [`Error::UnsupportedIsa`] if this CPU or build lacks it.
    fn from_str(name: &str) -> Result<Isa, Error> {
        let Some(&name) = Isa::NAMES.iter().find(|known| **known == name) else {
            return Err(Error::UnknownIsa);
        };
        let isa = match name {
            "scalar" => Some(Isa::SCALAR),
            "portable" => Some(Isa::PORTABLE),
            #[cfg(target_arch = "x86_64")]
            "avx2" => Isa::avx2(),
            #[cfg(target_arch = "x86_64")]
            "avx512" => Isa::avx512(),
            _ => None,
        };
        isa.ok_or(Error::UnsupportedIsa { name })
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Whether L1 waits for few lines at a time, as AMD's Zen 4 does: some twenty. Those that are fetched early, one after another, then go to L2. (Its
/// family is also Zen 3's, which takes both instructions for the same.)
#[cfg(target_arch = "x86_64")]
pub(crate) fn waits_for_few_lines() -> bool {
    // The instruction is slow, in a virtual machine some microseconds.
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        #[allow(unused_unsafe, reason = "newer compilers call it safe")]
        // SAFETY: every x86-64 has the instruction.
        let (vendor, version) = unsafe { (__cpuid(0), __cpuid(1)) };
        let family = (version.eax >> 8 & 0xF) + (version.eax >> 20 & 0xFF);
        vendor.ebx.to_le_bytes() == *b"Auth" && family == 0x19
    })
}

/// The same.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn waits_for_few_lines() -> bool {
    false
}

/// Runs `$body` with `$s` bound to the token of `$isa`. The body is compiled once per instruction set, so it is one
/// call of a generic function; no `return` or `?` inside.
macro_rules! dispatch {
    ($isa:expr, |$s:ident| $body:expr) => {
        match $isa.token() {
            $crate::isa::Token::Scalar($s) => $body,
            $crate::isa::Token::Portable($s) => $body,
            #[cfg(target_arch = "x86_64")]
            $crate::isa::Token::Avx2($s) => $body,
            #[cfg(target_arch = "x86_64")]
            $crate::isa::Token::Avx512($s) => $body,
        }
    };
}
pub(crate) use dispatch;
