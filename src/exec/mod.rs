//! Threads: the one place that knows about them, and the only file that names rayon.
//!
//! A call is one parallel region. The caller always works; helpers may join at any time and may never come. Inside the
//! region the caller runs phases one after another; the tiles of a phase are claimed with atomic counters, so a phase
//! costs a few atomic operations instead of a fork and a join (11 to 50 us with rayon, against 430 us for a whole BERT
//! layer on 16 tokens). No result depends on who computed a tile.
//!
//! Every tile runs inside [`Simd::vectorize`]: a closure that reached another thread has lost the caller's
//! target-feature frame and its intrinsics would become calls.

#![allow(
    unsafe_code,
    reason = "tiles of one phase are lent to several threads; the counters make each unique"
)]

mod blocks;

use core::any::Any;
use core::cell::UnsafeCell;
use core::ops::Range;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};

use crate::simd::Simd;
use crate::workspace::AlignedBuffer;

/// Where helpers come from. Implement it to run laneformer on threads of your own.
///
/// ```
/// use laneformer::{Context, Executor, Isa, Ticket};
///
/// /// One new thread per helper: simple, and slow to start.
/// struct Threads;
///
/// impl Executor for Threads {
///     fn helpers(&self) -> usize {
///         1
///     }
///     fn invite(&self, n: usize, ticket: &Ticket) {
///         for _ in 0..n {
///             let ticket = ticket.clone();
///             std::thread::spawn(move || ticket.help());
///         }
///     }
/// }
///
/// let mut x = [1.0, 2.0, 3.0, 4.0];
/// let ctx = Context::new(Isa::best(), &Threads);
/// laneformer::softmax(ctx, laneformer::MatMut::contiguous(&mut x, 2, 2)?)?;
/// # Ok::<(), laneformer::Error>(())
/// ```
pub trait Executor: Sync {
    /// How many helpers may be invited. Zero keeps a call on its own thread.
    fn helpers(&self) -> usize;

    /// Asks for `n` helpers, each to call [`Ticket::help`] once, and returns at once. Helpers may come late or never.
    fn invite(&self, n: usize, ticket: &Ticket);
}

/// No helpers: the calling thread does all the work and no other thread is touched.
#[derive(Clone, Copy, Debug, Default)]
pub struct Serial;

impl Executor for Serial {
    fn helpers(&self) -> usize {
        0
    }

    fn invite(&self, _: usize, _: &Ticket) {}
}

/// The current rayon pool: the one whose worker calls, else the global one. A call uses at most as many threads
/// as the pool has, the caller included.
#[cfg(feature = "rayon")]
#[derive(Clone, Copy, Debug, Default)]
pub struct Rayon;

#[cfg(feature = "rayon")]
impl Executor for Rayon {
    fn helpers(&self) -> usize {
        rayon::current_num_threads() - 1
    }

    fn invite(&self, n: usize, ticket: &Ticket) {
        // `spawn`, not `scope` or `install`: those wait for the pool, and on a busy one that took 290 ms.
        for _ in 0..n {
            let ticket = ticket.clone();
            rayon::spawn(move || ticket.help());
        }
    }
}

/// A rayon pool of the caller's own; the calling thread counts as one of its threads.
#[cfg(feature = "rayon")]
impl Executor for rayon::ThreadPool {
    fn helpers(&self) -> usize {
        self.current_num_threads() - 1
    }

    fn invite(&self, n: usize, ticket: &Ticket) {
        for _ in 0..n {
            let ticket = ticket.clone();
            self.spawn(move || ticket.help());
        }
    }
}

/// An invitation to help with one region. It can be kept, cloned, sent and used late: once the region is closed,
/// [`Ticket::help`] returns at once and touches nothing.
#[derive(Clone)]
pub struct Ticket {
    control: Arc<Control>,
    epoch: u32,
}

impl Ticket {
    /// Works on the region until it is closed, if it still is open and not all of its places are taken.
    ///
    /// For another thread than the one that makes the call, and not from inside a region (a fill of
    /// [`Linear::forward_filled`](crate::Linear::forward_filled)): a thread that waits for itself waits forever.
    pub fn help(&self) {
        if let Some(member) = self.control.enter(self.epoch) {
            self.control.work(member);
            self.control.leave();
        }
    }
}

impl core::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Ticket").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

/// Spins before a waiting thread starts to yield: some microseconds, longer than a phase's tail.
const SPINS: u32 = 4096;

/// Waits a little: spins at first, then gives the core away. Never rayon's yield, which runs foreign jobs.
struct Backoff(u32);

impl Backoff {
    fn wait(&mut self) {
        if self.0 < SPINS {
            self.0 += 1;
            core::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

/// One counter per cache line, so that members do not share lines they write.
#[repr(align(64))]
#[derive(Default)]
struct Line<T>(T);

/// A tile function with its type erased: `call(data, tile, member)`.
struct Job {
    data: *const (),
    call: unsafe fn(*const (), usize, usize),
}

/// What a region's members share. It outlives the region (tickets may), so nothing in it is trusted without
/// a successful claim.
struct Control {
    /// `epoch << 32 | open << 31 | places taken << 16 | members inside`, the caller not counted.
    gate: Line<AtomicU64>,
    /// How many helpers may enter.
    places: AtomicUsize,
    /// The current phase's job, valid while one of its tiles is claimed and not done.
    job: AtomicPtr<Job>,
    /// Tiles of the current phase, and where each member's own range ends.
    tiles: AtomicUsize,
    ranges: AtomicUsize,
    /// Per range: `phase << 32 | next tile`. The phase in the claim makes a late claim of an old phase fail.
    next: Box<[Line<AtomicU64>]>,
    phase: AtomicU64,
    /// Tiles of the current phase that are done and told.
    done: Line<AtomicUsize>,
    poisoned: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

const OPEN: u64 = 1 << 31;
const PLACE: u64 = 1 << 16;
const PLACES: u64 = (1 << 15) - 1;
const INSIDE: u64 = (1 << 16) - 1;

impl Control {
    fn new(members: usize) -> Control {
        Control {
            gate: Line::default(),
            places: AtomicUsize::new(0),
            job: AtomicPtr::new(ptr::null_mut()),
            tiles: AtomicUsize::new(0),
            ranges: AtomicUsize::new(0),
            next: (0..members).map(|_| Line::default()).collect(),
            phase: AtomicU64::new(0),
            done: Line::default(),
            poisoned: AtomicBool::new(false),
            panic: Mutex::new(None),
        }
    }

    /// A helper's member number, from 1, if the region of `epoch` is open and has a place.
    fn enter(&self, epoch: u32) -> Option<usize> {
        let mut gate = self.gate.0.load(Ordering::Acquire);
        loop {
            let taken = ((gate / PLACE) & PLACES) as usize;
            let open = (gate >> 32) as u32 == epoch && gate & OPEN != 0;
            if !open || taken >= self.places.load(Ordering::Relaxed) {
                return None;
            }
            let entered = gate + PLACE + 1;
            match self.gate.0.compare_exchange_weak(gate, entered, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(taken + 1),
                Err(now) => gate = now,
            }
        }
    }

    fn leave(&self) {
        self.gate.0.fetch_sub(1, Ordering::Release);
    }

    fn is_open(&self) -> bool {
        self.gate.0.load(Ordering::Acquire) & OPEN != 0
    }

    /// A helper's time in the region: phase after phase, until it is closed.
    fn work(&self, member: usize) {
        let mut seen = 0;
        let mut backoff = Backoff(0);
        while self.is_open() && !self.poisoned.load(Ordering::Relaxed) {
            let phase = self.phase.load(Ordering::Acquire);
            if phase == seen {
                backoff.wait();
                continue;
            }
            seen = phase;
            backoff = Backoff(0);
            self.work_phase(phase, member);
        }
    }

    /// Claims and runs tiles of `phase` until none is left: the member's own range first (its weights stay in its L2),
    /// then the others'.
    fn work_phase(&self, phase: u64, member: usize) {
        let tiles = self.tiles.load(Ordering::Acquire);
        let ranges = self.ranges.load(Ordering::Acquire);
        let job = self.job.load(Ordering::Acquire);
        // If one of these three is of a later phase, the counters were taken from this one before it was stored
        // (see `publish`), so every claim below fails.
        for step in 0..ranges.min(self.next.len()) {
            let range = (member + step) % ranges;
            let end = own_tiles(range, tiles, ranges).end;
            let mut done = 0;
            while let Some(tile) = self.claim(phase, range, end) {
                // SAFETY: the claim proves that `phase` is current and that tile undone, so its caller is still inside
                // `Crew::phase`, which keeps the job alive; it was stored before the phase was published.
                let Job { data, call } = unsafe { ptr::read(job) };
                // SAFETY: `call` is the shim that was made for `data`.
                let run = AssertUnwindSafe(|| unsafe { call(data, tile, member) });
                if let Err(payload) = catch_unwind(run) {
                    let mut first = self.panic.lock().unwrap_or_else(|e| e.into_inner());
                    match &*first {
                        None => *first = Some(payload),
                        // Dropping it could panic here, where nothing catches it and the caller waits for this tile.
                        Some(_) => core::mem::forget(payload),
                    }
                    self.poisoned.store(true, Ordering::Relaxed);
                }
                done += 1;
            }
            if done > 0 {
                self.done.0.fetch_add(done, Ordering::Release);
            }
        }
    }

    /// The next tile of a range, if `phase` still is the current one.
    fn claim(&self, phase: u64, range: usize, end: usize) -> Option<usize> {
        let next = &self.next[range].0;
        let mut now = next.load(Ordering::Acquire);
        loop {
            let tile = (now & u64::from(u32::MAX)) as usize;
            if now >> 32 != phase & u64::from(u32::MAX) || tile >= end {
                return None;
            }
            match next.compare_exchange_weak(now, now + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(tile),
                Err(seen) => now = seen,
            }
        }
    }
}

/// The most threads that work on one call, so that their number fits the gate.
pub(crate) const MAX_MEMBERS: usize = 1 << 14;

/// The members' common state and their scratch, made once and reused by every region.
pub(crate) struct Team {
    control: Arc<Control>,
    scratch: Box<[Scratch]>,
}

/// One member's scratch: only the member whose number it has touches it.
struct Scratch(UnsafeCell<AlignedBuffer>);

// SAFETY: a member number is unique inside a region (places are handed out once per epoch), so no two
// threads use one scratch at a time.
unsafe impl Sync for Scratch {}

impl core::fmt::Debug for Team {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Team").field("members", &self.members()).finish_non_exhaustive()
    }
}

impl Team {
    /// A team of `members` threads with `scratch_len` elements each.
    pub(crate) fn new(members: usize, scratch_len: usize) -> Team {
        let members = members.clamp(1, MAX_MEMBERS);
        let scratch =
            (0..members).map(|_| Scratch(UnsafeCell::new(AlignedBuffer::scratch(scratch_len)))).collect();
        Team { control: Arc::new(Control::new(members)), scratch }
    }

    pub(crate) fn members(&self) -> usize {
        self.scratch.len()
    }

    /// Every member's scratch.
    pub(crate) fn scratch(&mut self) -> impl Iterator<Item = &mut [f32]> {
        self.scratch.iter_mut().map(|scratch| &mut **scratch.0.get_mut())
    }

    pub(crate) fn bytes(&self) -> usize {
        // SAFETY: `&self` cannot be in a region, which borrows the team exclusively.
        self.scratch.iter().map(|s| unsafe { size_of_val(&**s.0.get()) }).sum()
    }

    /// Opens a region, runs `body` on this thread and closes the region. Helpers work on the body's phases.
    pub(crate) fn region<R>(&mut self, executor: &dyn Executor, body: impl FnOnce(&mut Crew<'_>) -> R) -> R {
        let control = &*self.control;
        let helpers = executor.helpers().min(self.scratch.len() - 1);
        control.poisoned.store(false, Ordering::Relaxed);
        control.places.store(helpers, Ordering::Relaxed);
        let epoch = ((control.gate.0.load(Ordering::Relaxed) >> 32) as u32).wrapping_add(1);
        control.gate.0.store(u64::from(epoch) << 32 | OPEN, Ordering::Release);
        // Closes the region even if the body panics: a helper must not outlive what the body lent it.
        let close = Close(control);
        let ticket = Ticket { control: Arc::clone(&self.control), epoch };
        if helpers > 0 {
            executor.invite(helpers, &ticket);
        }
        let mut crew = Crew { control, scratch: &self.scratch, members: helpers + 1 };
        let result = body(&mut crew);
        drop(close);
        result
    }
}

/// Closes the region when dropped and waits for the members that are inside.
struct Close<'a>(&'a Control);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        let gate = &self.0.gate.0;
        gate.fetch_and(!OPEN, Ordering::AcqRel);
        let mut backoff = Backoff(0);
        while gate.load(Ordering::Acquire) & INSIDE != 0 {
            backoff.wait();
        }
    }
}

/// The tiles that a member begins with, before it helps the others.
pub(crate) fn own_tiles(member: usize, tiles: usize, members: usize) -> Range<usize> {
    member * tiles / members..(member + 1) * tiles / members
}

/// The members of an open region, as its caller sees them: it runs phases.
pub(crate) struct Crew<'a> {
    control: &'a Control,
    scratch: &'a [Scratch],
    members: usize,
}

impl Crew<'_> {
    /// The members that may work, the caller included.
    pub(crate) fn members(&self) -> usize {
        self.members
    }

    /// Runs `f(tile, scratch)` for every tile in `0..tiles`, on whichever members are there, and returns when all are done.
    pub(crate) fn phase<S: Simd>(&mut self, s: S, tiles: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        let scratch = self.scratch;
        let run = |tile: usize, member: usize| {
            // SAFETY: `member` is this thread's own number, see `Scratch`.
            let scratch = unsafe { &mut *scratch[member].0.get() };
            s.vectorize(
                #[inline(always)]
                || f(tile, scratch),
            );
        };
        self.publish(tiles, &run);
    }

    fn publish<F: Fn(usize, usize) + Sync>(&mut self, tiles: usize, run: &F) {
        /// Calls the closure behind `data`.
        ///
        /// # Safety
        /// `data` points to a live `F`.
        unsafe fn shim<F: Fn(usize, usize)>(data: *const (), tile: usize, member: usize) {
            // SAFETY: the caller's promise.
            unsafe { (*data.cast::<F>())(tile, member) }
        }
        if self.members == 1 {
            (0..tiles).for_each(|tile| run(tile, 0));
            return;
        }
        assert!(tiles < u32::MAX as usize, "more tiles in a phase than a claim can count");
        let control = self.control;
        let mut job = Job { data: ptr::from_ref(run).cast(), call: shim::<F> };
        let ranges = self.members.min(control.next.len());
        let phase = control.phase.load(Ordering::Relaxed) + 1;
        // All counters leave the old phase before anything of the new one is written: a helper that is still looking at the
        // old phase may then read new values, but can no longer claim with them.
        let stamp = (phase & u64::from(u32::MAX)) << 32;
        for next in control.next.iter() {
            next.0.store(stamp | u64::from(u32::MAX), Ordering::Relaxed);
        }
        control.done.0.store(0, Ordering::Relaxed);
        control.tiles.store(tiles, Ordering::Release);
        control.ranges.store(ranges, Ordering::Release);
        control.job.store(&raw mut job, Ordering::Release);
        for (range, next) in control.next.iter().enumerate().take(ranges) {
            next.0.store(stamp | own_tiles(range, tiles, ranges).start as u64, Ordering::Release);
        }
        control.phase.store(phase, Ordering::Release);

        control.work_phase(phase, 0);
        let mut backoff = Backoff(0);
        while control.done.0.load(Ordering::Acquire) < tiles {
            backoff.wait();
        }
        if control.poisoned.load(Ordering::Relaxed) {
            let payload = control.panic.lock().unwrap_or_else(|e| e.into_inner()).take();
            resume_unwind(payload.unwrap_or_else(|| Box::new("a tile panicked")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Scalar;

    /// One new thread per helper.
    struct Threads(usize);

    impl Executor for Threads {
        fn helpers(&self) -> usize {
            self.0
        }
        fn invite(&self, n: usize, ticket: &Ticket) {
            for _ in 0..n {
                let ticket = ticket.clone();
                std::thread::spawn(move || ticket.help());
            }
        }
    }

    fn panic_of(team: &mut Team, executor: &dyn Executor, bad: usize) -> Option<String> {
        let run = AssertUnwindSafe(|| {
            team.region(executor, |crew| {
                crew.phase(Scalar, 64, |tile, _| {
                    // Long enough for helpers to come and to take part.
                    std::thread::sleep(std::time::Duration::from_micros(200));
                    assert!(tile != bad, "tile {tile} is bad");
                });
                crew.phase(Scalar, 8, |_, _| {});
            });
        });
        catch_unwind(run).err().and_then(|payload| payload.downcast_ref::<String>().cloned())
    }

    /// Panics where it is dropped, unless that is while another panic unwinds.
    struct Bomb;

    impl Drop for Bomb {
        fn drop(&mut self) {
            assert!(std::thread::panicking(), "dropped");
        }
    }

    #[test]
    fn a_panic_that_nobody_takes_is_not_dropped_in_a_region() {
        let mut team = Team::new(4, 0);
        let run = AssertUnwindSafe(|| {
            team.region(&Threads(3), |crew| {
                crew.phase(Scalar, 64, |_, _| {
                    std::thread::sleep(std::time::Duration::from_micros(200));
                    std::panic::panic_any(Bomb);
                });
            });
        });
        let first = catch_unwind(run).expect_err("64 panics");
        assert!(first.is::<Bomb>());
        core::mem::forget(first);
        assert_eq!(panic_of(&mut team, &Threads(3), usize::MAX), None);
    }

    #[test]
    fn a_panic_in_a_tile_reaches_the_caller_and_hangs_nobody() {
        for helpers in [0, 1, 3] {
            let mut team = Team::new(helpers + 1, 0);
            // First, last, and in the middle: the caller's own tiles and those of helpers.
            for bad in [0, 17, 40, 63] {
                let expected = Some(format!("tile {bad} is bad"));
                assert_eq!(panic_of(&mut team, &Threads(helpers), bad), expected, "{helpers} helpers");
                // The team works again, and its next region does not see the old panic.
                assert_eq!(panic_of(&mut team, &Threads(helpers), usize::MAX), None, "{helpers} helpers");
            }
        }
    }
}
