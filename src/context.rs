//! What a call runs on: an instruction set and an executor.

use crate::exec::{Executor, MAX_MEMBERS, Serial};
use crate::isa::Isa;

/// Work below which inviting helpers costs more than it brings: about 20 us on one core.
const SERIAL_FLOPS: usize = 4_000_000;

/// The instruction set and the executor of a call. Results do not depend on the executor, nor, on every
/// [`Isa`] inside the promise, on the instruction set.
#[derive(Clone, Copy)]
pub struct Context<'e> {
    isa: Isa,
    executor: &'e dyn Executor,
}

impl Context<'static> {
    /// The best instruction set of this CPU, on the calling thread alone.
    pub fn serial() -> Self {
        Context { isa: Isa::best(), executor: &Serial }
    }
}

impl<'e> Context<'e> {
    /// A context from its parts.
    pub fn new(isa: Isa, executor: &'e dyn Executor) -> Self {
        Context { isa, executor }
    }

    /// The instruction set that the kernels run on.
    pub fn isa(self) -> Isa {
        self.isa
    }

    /// Who may help with the work.
    pub fn executor(self) -> &'e dyn Executor {
        self.executor
    }

    /// How many threads may work on one call, the caller included.
    pub fn members(self) -> usize {
        self.executor.helpers().saturating_add(1).min(MAX_MEMBERS)
    }

    /// Threads that are worth inviting for so many floating-point operations, and so many tiles at most.
    pub(crate) fn members_for(self, flops: usize, tiles: usize) -> usize {
        if flops < SERIAL_FLOPS { 1 } else { self.members().min(tiles).max(1) }
    }

    /// The same instruction set on the calling thread alone.
    pub fn on_caller(self) -> Context<'static> {
        Context { isa: self.isa, executor: &Serial }
    }
}

impl core::fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Context").field("isa", &self.isa).field("members", &self.members()).finish()
    }
}
