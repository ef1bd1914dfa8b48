//! The optimizer of several ranks.

use burn::tensor::{DType, Tensor};

use super::rank::Rank;
use crate::error::Nf4Error;
use crate::format::check_len;
use crate::op::FlatAdamW;

impl FlatAdamW {
    /// Sums the gradients that were accumulated over the ranks of a group, as one tensor; for all ranks. A tensor has a
    /// gradient then if it has one on some rank.
    ///
    /// # Errors
    /// [`Nf4Error::Parallel`] if a rank has failed, [`Nf4Error::Length`] unless all ranks have the same tensors. Those
    /// that were accumulated may be dropped then.
    pub fn all_reduce(&mut self, rank: &Rank) -> Result<(), Nf4Error> {
        let all = rank.exchange(self.has_gradient.clone())?;
        for of_rank in &all {
            check_len(
                "gradients of another rank",
                self.has_gradient.len(),
                of_rank.len(),
            )?;
            for (has, other) in self.has_gradient.iter_mut().zip(of_rank) {
                *has |= other;
            }
        }
        if !self.has_gradient.contains(&true) {
            return Ok(());
        }
        match rank.all_reduce(self.grads.take()) {
            Ok(sums) => {
                self.grads.put(sums);
                Ok(())
            }
            Err(error) => {
                let options = (&self.device, DType::F32);
                self.grads
                    .put(Tensor::zeros([self.layout.elems()], options));
                self.has_gradient.fill(false);
                Err(error)
            }
        }
    }

    /// Takes the values of rank 0 of a group; for all ranks. Moments stay as they are.
    ///
    /// # Errors
    /// [`Nf4Error::Parallel`] if a rank has failed, [`Nf4Error::Length`] unless all ranks have the same tensors.
    pub fn broadcast(&mut self, rank: &Rank) -> Result<(), Nf4Error> {
        let elems = self.layout.elems();
        for of_rank in rank.exchange(elems)? {
            check_len("values of another rank", elems, of_rank)?;
        }
        let values = match rank.index() {
            0 => self.values.tensor(),
            _ => Tensor::zeros([elems], (&self.device, DType::F32)),
        };
        let values = rank.all_reduce(values)?;
        self.values.put(values);
        Ok(())
    }
}
