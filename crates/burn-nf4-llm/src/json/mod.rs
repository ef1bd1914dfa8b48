//! The JSON files of model folders, as Python writes them.

pub mod fields;
pub mod files;
