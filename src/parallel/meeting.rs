//! Where the threads of a group wait for each other.

use std::any::Any;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::Nf4Error;

/// A value of each rank, in their order.
type Values = Arc<dyn Any + Send + Sync>;

/// Threads that exchange values in host memory. All of them must come to each exchange.
pub(super) struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// What each rank has brought to this exchange.
    brought: Vec<Option<Box<dyn Any + Send>>>,
    /// Exchanges that are over.
    round: u64,
    /// Of the last one that is over. The next ends when all ranks have come, and so have taken this.
    values: Option<Values>,
    /// Why there will be no more: the first rank that failed or left, and what it said.
    broken: Option<(usize, String)>,
}

impl Meeting {
    pub fn new(size: usize) -> Self {
        let state = State {
            brought: (0..size).map(|_| None).collect(),
            round: 0,
            values: None,
            broken: None,
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The values of all ranks, once all have come.
    ///
    /// # Errors
    /// [`Nf4Error::Parallel`] if a rank has failed, has ended, or has brought a value of another type.
    pub fn exchange<T>(&self, rank: usize, value: T) -> Result<Vec<T>, Nf4Error>
    where
        T: Clone + Send + Sync + 'static,
    {
        let mut state = self.state();
        if let Some(broken) = &state.broken {
            return Err(error(broken));
        }
        state.brought[rank] = Some(Box::new(value));
        if state.brought.iter().all(Option::is_some) {
            let mut values = Vec::with_capacity(state.brought.len());
            for (other, brought) in state.brought.iter_mut().enumerate() {
                let value = brought.take().expect("all have come");
                match value.downcast::<T>() {
                    Ok(value) => values.push(*value),
                    Err(_) => {
                        let broken = (other, "it is at another exchange than the others".into());
                        let error = error(&broken);
                        state.broken.get_or_insert(broken);
                        self.changed.notify_all();
                        return Err(error);
                    }
                }
            }
            state.values = Some(Arc::new(values));
            state.round += 1;
            self.changed.notify_all();
        } else {
            let round = state.round;
            while state.round == round {
                if let Some(broken) = &state.broken {
                    return Err(error(broken));
                }
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
        let values = state
            .values
            .as_ref()
            .and_then(|values| values.downcast_ref::<Vec<T>>());
        match values {
            Some(values) => Ok(values.clone()),
            None => Err(error(&(
                rank,
                "it is at another exchange than the others".into(),
            ))),
        }
    }

    /// Whether all ranks are there still, as far as is known.
    ///
    /// # Errors
    /// [`Nf4Error::Parallel`] if a rank has failed or has ended.
    pub fn check(&self) -> Result<(), Nf4Error> {
        match &self.state().broken {
            Some(broken) => Err(error(broken)),
            None => Ok(()),
        }
    }

    /// Has all ranks know that one will not come any more.
    pub fn leave(&self, rank: usize, message: String) {
        let mut state = self.state();
        state.broken.get_or_insert((rank, message));
        self.changed.notify_all();
    }
}

fn error((rank, message): &(usize, String)) -> Nf4Error {
    Nf4Error::Parallel {
        rank: *rank,
        message: message.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn values_of_all_ranks_are_exchanged_again_and_again() {
        let meeting = Meeting::new(3);
        thread::scope(|scope| {
            for rank in 0..3 {
                let meeting = &meeting;
                scope.spawn(move || {
                    for round in 0..200 {
                        let values = meeting.exchange(rank, (round, rank)).unwrap();
                        assert_eq!(values, [(round, 0), (round, 1), (round, 2)]);
                    }
                });
            }
        });
    }

    #[test]
    fn those_who_wait_are_told_of_one_that_left() {
        let meeting = Meeting::new(2);
        let told = thread::scope(|scope| {
            let waiting = scope.spawn(|| meeting.exchange(0, ()));
            meeting.leave(1, "out of memory".into());
            waiting.join().unwrap()
        });
        let expected = Nf4Error::Parallel {
            rank: 1,
            message: "out of memory".into(),
        };
        assert_eq!(told, Err(expected.clone()));
        assert_eq!(meeting.exchange(0, ()), Err(expected));
    }

    #[test]
    fn ranks_at_different_exchanges_are_an_error() {
        let meeting = Meeting::new(2);
        let told = thread::scope(|scope| {
            let first = scope.spawn(|| meeting.exchange(0, 1u8).is_err());
            let second = scope.spawn(|| meeting.exchange(1, 1u16).is_err());
            [first, second].map(|thread| thread.join().unwrap())
        });
        assert_eq!(told, [true, true]);
    }
}
