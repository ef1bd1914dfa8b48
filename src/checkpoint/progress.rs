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

/// Counts parameters and bytes, and calls the callback after each parameter.
pub(crate) struct Counter<F> {
    callback: F,
    parameters: [usize; 2],
    bytes: [usize; 2],
}

impl<F: FnMut(Progress<'_>)> Counter<F> {
    /// `parameters_total` parameters of `bytes_total` bytes are to come.
    pub fn new(parameters_total: usize, bytes_total: usize, callback: F) -> Self {
        Self {
            callback,
            parameters: [0, parameters_total],
            bytes: [0, bytes_total],
        }
    }

    /// Begins anew.
    pub fn restart(&mut self, parameters_total: usize, bytes_total: usize) {
        self.parameters = [0, parameters_total];
        self.bytes = [0, bytes_total];
    }

    /// A parameter was done, of so many bytes.
    pub fn done(&mut self, parameter: &str, size_bytes: usize) {
        self.parameters[0] += 1;
        self.bytes[0] += size_bytes;
        (self.callback)(Progress {
            parameter,
            parameters_done: self.parameters[0],
            parameters_total: self.parameters[1],
            bytes_done: self.bytes[0],
            bytes_total: self.bytes[1],
        });
    }
}
