//! Threads: allocations, busy pools, late and missing helpers, panics, nesting, sharing.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::compare::assert_bits;
use common::data::Rng;
use common::executors::Threads;
use common::model::{Map, Model, Shape};
use laneformer::{Context, Epilogue, Executor, Graph, Isa, Layer, MatMut, MatRef, Ticket, Workspace};

/// The system's allocator, counting the calls of each thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    // A thread that is ending has no counter any more.
    let _ = ALLOCATIONS.try_with(|n| n.set(n.get() + 1));
}

// SAFETY: every call is passed on unchanged; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(ptr, layout, size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Allocations of this thread while `f` runs.
fn allocations(f: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.get();
    f();
    ALLOCATIONS.get() - before
}

/// A layer, a batch of two segments, and its right answer.
struct Fixture {
    layer: Layer,
    x: Vec<f32>,
    expected: Vec<f32>,
}

const D: usize = 128;
const OFFSETS: [usize; 3] = [0, 37, 100];

impl Fixture {
    fn new() -> Fixture {
        let mut rng = Rng::new(1);
        let layer = Model::new(Shape::new(2, 64, 500), &mut rng).layer();
        let x = rng.vec(100 * D, 1.0);
        let mut fixture = Fixture { layer, x, expected: Vec::new() };
        fixture.expected = fixture.run(Context::serial());
        fixture
    }

    fn workspace(&self, members: usize) -> Workspace {
        self.layer.workspace(100, 2, members).unwrap()
    }

    fn forward(&self, ctx: Context<'_>, y: &mut [f32], workspace: &mut Workspace) {
        let y = MatMut::contiguous(y, 100, D).unwrap();
        self.layer.forward(ctx, y, &OFFSETS, &Graph::causal(), workspace).unwrap();
    }

    fn run(&self, ctx: Context<'_>) -> Vec<f32> {
        let mut y = self.x.clone();
        self.forward(ctx, &mut y, &mut self.workspace(ctx.members()));
        y
    }

    #[track_caller]
    fn check(&self, ctx: Context<'_>, what: &str) {
        assert_bits(&self.run(ctx), &self.expected, what);
    }
}

#[test]
fn forward_allocates_nothing_alone() {
    let fixture = Fixture::new();
    let mut workspace = fixture.workspace(1);
    for isa in Isa::available() {
        let mut y = fixture.x.clone();
        // The first call too: the workspace holds all of it.
        let ctx = common::serial(isa);
        assert_eq!(allocations(|| fixture.forward(ctx, &mut y, &mut workspace)), 0, "{isa}");
    }
}

#[cfg(feature = "rayon")]
#[test]
fn forward_allocates_a_job_per_helper_with_rayon() {
    let fixture = Fixture::new();
    for threads in [1, 2, 3, 5] {
        let pool = common::executors::pool(threads);
        let ctx = Context::new(Isa::best(), &pool);
        let mut workspace = fixture.workspace(threads);
        let counts: Vec<usize> = (0..200)
            .map(|_| {
                let mut y = fixture.x.clone();
                allocations(|| fixture.forward(ctx, &mut y, &mut workspace))
            })
            .collect();
        // rayon's queue takes a block now and then for 63 jobs; all else is a job for each helper.
        let helpers = threads - 1;
        assert_eq!(counts.iter().min(), Some(&helpers), "{counts:?}");
        assert!(counts.iter().all(|&n| n <= helpers + 1), "{counts:?}");
        let blocks = counts.iter().filter(|&&n| n > helpers).count();
        assert!(blocks <= 1 + 200 * helpers / 31, "{blocks} of 200 calls took more: {counts:?}");
    }
}

#[test]
fn forward_allocates_nothing_for_helpers_of_its_own() {
    /// Keeps its tickets in a list that is long enough.
    struct Kept(Mutex<Vec<Ticket>>);
    impl Executor for Kept {
        fn helpers(&self) -> usize {
            3
        }
        fn invite(&self, n: usize, ticket: &Ticket) {
            self.0.lock().unwrap().extend((0..n).map(|_| ticket.clone()));
        }
    }
    let fixture = Fixture::new();
    let kept = Kept(Mutex::new(Vec::with_capacity(10)));
    let mut workspace = fixture.workspace(4);
    let mut y = fixture.x.clone();
    let n = allocations(|| fixture.forward(Context::new(Isa::best(), &kept), &mut y, &mut workspace));
    assert_eq!(n, 0);
}

#[cfg(feature = "rayon")]
#[test]
fn a_busy_pool_does_not_delay() {
    let fixture = Fixture::new();
    let pool = common::executors::pool(2);
    let (release, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Arc::new(Mutex::new(wait));
    for _ in 0..2 {
        let wait = wait.clone();
        // Busy until the test is over: a layer that waited for these would take far longer than the limit below.
        pool.spawn(move || {
            let _ = wait.lock().unwrap().recv_timeout(Duration::from_secs(20));
        });
    }
    let best = |ctx: Context<'_>| {
        let mut workspace = fixture.workspace(2);
        let time = |_| {
            let mut y = fixture.x.clone();
            let start = std::time::Instant::now();
            fixture.forward(ctx, &mut y, &mut workspace);
            let time = start.elapsed();
            assert_bits(&y, &fixture.expected, "on a busy pool");
            time
        };
        (0..20).map(time).min().unwrap()
    };
    let alone = best(Context::serial());
    let busy = best(Context::new(Isa::best(), &pool));
    drop(release);
    // Noise of other processes apart, the same: five times and a millisecond is far from a job's end.
    assert!(busy < alone * 5 + Duration::from_millis(1), "{busy:?} on a busy pool, {alone:?} alone");
}

#[test]
fn helpers_that_never_come() {
    struct Never;
    impl Executor for Never {
        fn helpers(&self) -> usize {
            7
        }
        fn invite(&self, _: usize, _: &Ticket) {}
    }
    Fixture::new().check(Context::new(Isa::best(), &Never), "without the helpers");
}

#[test]
fn helpers_that_come_late_or_after_the_end() {
    struct Late(Mutex<Vec<std::thread::JoinHandle<()>>>);
    impl Executor for Late {
        fn helpers(&self) -> usize {
            4
        }
        fn invite(&self, n: usize, ticket: &Ticket) {
            let start = |i| {
                let ticket = ticket.clone();
                std::thread::spawn(move || {
                    // Some inside the region, some after it, when the workspace is used again or gone.
                    std::thread::sleep(Duration::from_micros([0, 50, 500, 20_000][i % 4]));
                    ticket.help();
                    ticket.help();
                })
            };
            self.0.lock().unwrap().extend((0..n).map(start));
        }
    }
    let fixture = Fixture::new();
    let late = Late(Mutex::default());
    for _ in 0..20 {
        fixture.check(Context::new(Isa::best(), &late), "with late helpers");
    }
    late.0.into_inner().unwrap().into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn tickets_kept_for_later_are_void() {
    struct Keep(Mutex<Vec<Ticket>>);
    impl Executor for Keep {
        fn helpers(&self) -> usize {
            2
        }
        fn invite(&self, _: usize, ticket: &Ticket) {
            self.0.lock().unwrap().push(ticket.clone());
        }
    }
    let fixture = Fixture::new();
    let keep = Keep(Mutex::default());
    let ctx = Context::new(Isa::best(), &keep);
    let mut workspace = fixture.workspace(3);
    for _ in 0..3 {
        let mut y = fixture.x.clone();
        fixture.forward(ctx, &mut y, &mut workspace);
        assert_bits(&y, &fixture.expected, "while tickets are kept");
    }
    let tickets = keep.0.into_inner().unwrap();
    assert_eq!(tickets.len(), 3);
    // Closed, reused, and at last gone: each returns at once.
    tickets[0].help();
    drop(workspace);
    tickets.iter().for_each(Ticket::help);
}

#[test]
fn more_helpers_than_invited_are_turned_away() {
    struct Crowd;
    impl Executor for Crowd {
        fn helpers(&self) -> usize {
            1
        }
        fn invite(&self, n: usize, ticket: &Ticket) {
            Threads(8 * n + 1).invite(8 * n, ticket);
        }
    }
    let fixture = Fixture::new();
    for _ in 0..20 {
        fixture.check(Context::new(Isa::best(), &Crowd), "with a crowd");
    }
}

#[test]
fn a_workspace_for_fewer_members_limits_the_helpers() {
    let fixture = Fixture::new();
    let (three, mut workspace) = (Threads(3), fixture.workspace(1));
    let mut y = fixture.x.clone();
    fixture.forward(Context::new(Isa::best(), &three), &mut y, &mut workspace);
    assert_bits(&y, &fixture.expected, "three threads, a workspace for one");
    let mut workspace = fixture.workspace(8);
    y.copy_from_slice(&fixture.x);
    fixture.forward(Context::new(Isa::best(), &three), &mut y, &mut workspace);
    assert_bits(&y, &fixture.expected, "three threads, a workspace for eight");
}

/// Says that it has helpers when it is first asked, and none afterwards.
struct Shrinking(AtomicUsize);

impl Executor for Shrinking {
    fn helpers(&self) -> usize {
        self.0.swap(0, Ordering::Relaxed)
    }

    fn invite(&self, _: usize, _: &Ticket) {}
}

type Operation<'a> = &'a dyn Fn(Context<'_>, MatMut<'_>);

#[test]
fn helpers_that_are_fewer_when_the_work_begins() {
    let (d, d_ff) = (96, 2000);
    let model = Model::new(Shape::new(2, 48, d_ff), &mut Rng::new(3));
    let (linear, ffn) = (Map::new(d_ff, d, &mut Rng::new(5)).packed(), model.ffn());
    for rows in [16, 40, 90, 200] {
        let x = Rng::new(4).vec(rows * d, 1.0);
        let x = MatRef::contiguous(&x, rows, d).unwrap();
        let run = |ctx: Context<'_>, cols: usize, f: Operation<'_>| {
            let mut y = vec![0.0; rows * cols];
            f(ctx, MatMut::contiguous(&mut y, rows, cols).unwrap());
            y
        };
        let of_linear = |ctx: Context<'_>, y: MatMut<'_>| linear.forward(ctx, x, &Epilogue::NONE, y).unwrap();
        let of_ffn = |ctx: Context<'_>, y: MatMut<'_>| ffn.forward(ctx, x, y).unwrap();
        for helpers in [1, 3, 7] {
            let forms: [(usize, Operation<'_>); 2] = [(d_ff, &of_linear), (d, &of_ffn)];
            for (cols, f) in forms {
                let shrinking = Shrinking(AtomicUsize::new(helpers));
                let y = run(Context::new(Isa::best(), &shrinking), cols, f);
                assert_bits(&y, &run(Context::serial(), cols, f), &format!("{rows} rows, {helpers} helpers"));
            }
        }
    }
}

#[test]
fn more_threads_than_cores() {
    let fixture = Fixture::new();
    let cores = std::thread::available_parallelism().map_or(2, |n| n.get());
    let many = Threads(4 * cores + 1);
    for _ in 0..10 {
        fixture.check(Context::new(Isa::best(), &many), "many threads");
    }
}

#[test]
fn a_panic_of_the_executor_reaches_the_caller_and_leaves_the_workspace_usable() {
    /// Invites a helper, which may be inside by then, and panics.
    struct Broken;
    impl Executor for Broken {
        fn helpers(&self) -> usize {
            2
        }
        fn invite(&self, n: usize, ticket: &Ticket) {
            Threads(n + 1).invite(n, ticket);
            std::thread::sleep(Duration::from_millis(2));
            panic!("no threads today");
        }
    }
    let fixture = Fixture::new();
    let mut workspace = fixture.workspace(3);
    for _ in 0..5 {
        let mut y = fixture.x.clone();
        let ctx = Context::new(Isa::best(), &Broken);
        let result = catch_unwind(AssertUnwindSafe(|| fixture.forward(ctx, &mut y, &mut workspace)));
        assert_eq!(result.unwrap_err().downcast_ref(), Some(&"no threads today"));
        let threads = Threads(3);
        y.copy_from_slice(&fixture.x);
        fixture.forward(Context::new(Isa::best(), &threads), &mut y, &mut workspace);
        assert_bits(&y, &fixture.expected, "after a panic");
    }
}

#[test]
fn two_threads_share_a_layer() {
    let fixture = Fixture::new();
    std::thread::scope(|scope| {
        for members in [1, 2] {
            let fixture = &fixture;
            scope.spawn(move || {
                let threads = Threads(members);
                let ctx = Context::new(Isa::best(), &threads);
                let mut workspace = fixture.workspace(members);
                for _ in 0..50 {
                    let mut y = fixture.x.clone();
                    fixture.forward(ctx, &mut y, &mut workspace);
                    assert_bits(&y, &fixture.expected, "beside another thread");
                }
            });
        }
    });
}

#[cfg(feature = "rayon")]
#[test]
fn inside_a_rayon_worker() {
    use laneformer::Rayon;
    use rayon::iter::{IntoParallelIterator, ParallelIterator};

    let fixture = Fixture::new();
    let pool = common::executors::pool(3);
    pool.install(|| {
        assert_eq!(Context::new(Isa::best(), &Rayon).members(), 3);
        fixture.check(Context::new(Isa::best(), &Rayon), "from a worker");
        // Every worker runs layers, whose helpers are jobs of the same pool.
        (0..30).into_par_iter().for_each(|_| {
            fixture.check(Context::new(Isa::best(), &Rayon), "from every worker");
            fixture.check(Context::new(Isa::best(), &pool), "with the pool by name");
        });
    });
    // And the global pool, from outside.
    fixture.check(Context::new(Isa::best(), &Rayon), "the global pool");
}
