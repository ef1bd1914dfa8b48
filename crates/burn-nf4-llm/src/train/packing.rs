//! Which examples share a row.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};

/// Puts examples into rows of at most `room` tokens: the longest first, each into the row with the least
/// room that it fits in, or into a new one. That is best-fit decreasing, as TRL's `bfd` packs.
///
/// Returns the examples of each row by their indices. One that is longer than `room` has a row of its own.
pub fn best_fit_decreasing(lengths: &[usize], room: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&example| Reverse(lengths[example]));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    // Rows by the room that is left in them, the oldest first.
    let mut open: BTreeMap<usize, VecDeque<usize>> = BTreeMap::new();
    for example in order {
        let length = lengths[example];
        let fit = open.range_mut(length..).next();
        let (left, row) = match fit.and_then(|(&left, of_room)| Some((left, of_room.pop_front()?)))
        {
            Some(found) => found,
            None => {
                rows.push(Vec::new());
                (room, rows.len() - 1)
            }
        };
        if open.get(&left).is_some_and(VecDeque::is_empty) {
            open.remove(&left);
        }
        rows[row].push(example);
        if let Some(left) = left.checked_sub(length).filter(|&left| left > 0) {
            open.entry(left).or_default().push_back(row);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::fills_the_fullest(&[6, 3, 5, 4, 2], 10, vec![vec![0, 3], vec![2, 1, 4]])]
    #[case::equal_lengths_in_order(&[5, 5, 5], 10, vec![vec![0, 1], vec![2]])]
    #[case::exact(&[4, 6], 10, vec![vec![1, 0]])]
    #[case::too_long(&[3, 12, 7], 10, vec![vec![1], vec![2, 0]])]
    #[case::oldest_of_equal_room(&[7, 7, 3, 3], 10, vec![vec![0, 2], vec![1, 3]])]
    #[case::none(&[], 10, vec![])]
    fn rows_are_filled_best(
        #[case] lengths: &[usize],
        #[case] room: usize,
        #[case] expected: Vec<Vec<usize>>,
    ) {
        assert_eq!(best_fit_decreasing(lengths, room), expected);
    }
}
