//! What a long read or write says of itself on the way.

/// How far a load, a conversion or a merge has come, handed to its callback after each parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The parameter that was just done.
    pub parameter: &'a str,
    /// Parameters done, this one included.
    pub parameters_done: usize,
    /// Parameters in all.
    pub parameters_total: usize,
    /// Bytes of the source read so far.
    pub bytes_done: usize,
    /// Bytes of the source to be read in all.
    pub bytes_total: usize,
}
