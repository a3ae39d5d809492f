//! Threads for connections. One that is done waits a while for the next to come: to make a thread and to end it both
//! change the address space, which stops all that serve for a moment, so a client that did nothing but connect and
//! leave would slow the others down.

use std::collections::VecDeque;
use std::io::Result;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Most threads that wait for something to do. Each keeps what its stack has grown to.
const MOST_IDLE: usize = 8;
const IDLE_TIME: Duration = Duration::from_secs(1);

type Job = Box<dyn FnOnce() + Send>;

#[derive(Clone, Default)]
pub struct Crew(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    some: Condvar,
}

#[derive(Default)]
struct State {
    /// Fewer than `idle`: none waits while its thread is busy.
    jobs: VecDeque<Job>,
    idle: usize,
}

impl Crew {
    /// Has a thread do it at once: one that is idle, or a new one.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) -> Result<()> {
        let mut state = self.state();
        if state.idle > state.jobs.len() {
            state.jobs.push_back(Box::new(job));
            drop(state);
            self.0.some.notify_one();
            return Ok(());
        }
        drop(state);
        let crew = self.clone();
        let work = move || {
            job();
            while let Some(job) = crew.next() {
                job();
            }
        };
        std::thread::Builder::new().name("nbd-client".into()).spawn(work).map(drop)
    }

    /// None: there are idle ones enough, or nothing has come for long.
    fn next(&self) -> Option<Job> {
        let mut state = self.state();
        if state.idle >= MOST_IDLE {
            return None;
        }
        state.idle += 1;
        let nothing = |state: &mut State| state.jobs.is_empty();
        let waited = self.0.some.wait_timeout_while(state, IDLE_TIME, nothing);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.idle -= 1;
        state.jobs.pop_front()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No step under the lock leaves half a change.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::mpsc::channel;
    use std::sync::Barrier;

    #[test]
    fn one_after_another_share_a_thread_and_any_number_at_once_have_each_their_own() {
        let (crew, (tell, told)) = (Crew::default(), channel());
        let mut threads = HashSet::new();
        for _ in 0..100 {
            let tell = tell.clone();
            crew.run(move || tell.send(std::thread::current().id()).unwrap()).unwrap();
            threads.insert(told.recv().unwrap());
            // It has told before it is idle.
            while crew.state().idle == 0 {
                std::thread::yield_now();
            }
        }
        assert_eq!(threads.len(), 1);
        // None of them goes on before all are there.
        let all = Arc::new(Barrier::new(101));
        for _ in 0..100 {
            let (tell, all) = (tell.clone(), all.clone());
            crew.run(move || {
                all.wait();
                tell.send(std::thread::current().id()).unwrap();
            })
            .unwrap();
        }
        all.wait();
        assert_eq!(told.iter().take(100).collect::<HashSet<_>>().len(), 100);
        while crew.state().idle < MOST_IDLE {
            std::thread::yield_now();
        }
        assert!(crew.state().jobs.is_empty());
    }
}
