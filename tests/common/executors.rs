//! Where helpers come from in the tests.

use laneformer::{Executor, Ticket};

/// One new thread per helper: works without the `rayon` feature, and helpers come at odd times.
pub struct Threads(pub usize);

impl Executor for Threads {
    fn helpers(&self) -> usize {
        self.0 - 1
    }

    fn invite(&self, n: usize, ticket: &Ticket) {
        for _ in 0..n {
            let ticket = ticket.clone();
            std::thread::spawn(move || ticket.help());
        }
    }
}

/// Executors of `threads` members, by name: rayon's pool where the feature is on, and plain threads.
pub fn of(threads: usize) -> Vec<Named> {
    let plain: Named = (format!("{threads} plain threads"), Box::new(Threads(threads)));
    #[cfg(feature = "rayon")]
    let pools: [Named; 1] = [(format!("a rayon pool of {threads}"), Box::new(pool(threads)))];
    #[cfg(not(feature = "rayon"))]
    let pools: [Named; 0] = [];
    std::iter::once(plain).chain(pools).collect()
}

type Named = (String, Box<dyn Executor>);

#[cfg(feature = "rayon")]
pub fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}
