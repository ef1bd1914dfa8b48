//! A folder that is written under temporary names and put in place at once.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::names::{INDEX_FILE, is_inside, is_model_file, names_in};
use crate::error::Nf4Error;

/// Files on their way into a folder.
///
/// They lie in a hidden folder inside of it, so that the last step renames them and copies
/// nothing. Dropped before [`commit`](Self::commit), it takes everything back.
#[derive(Debug)]
pub(super) struct Staging {
    folder: PathBuf,
    /// `None` only while it is dropped.
    hidden: Option<TempDir>,
    /// Whether the folder was made here, and goes when nothing came into it.
    made_folder: bool,
    overwrite: bool,
    /// Paths relative to the folder.
    files: BTreeSet<String>,
}

impl Staging {
    /// Makes the folder if it is not there.
    ///
    /// # Errors
    /// [`Nf4Error::FolderNotEmpty`] if it holds anything, unless `overwrite`; [`Nf4Error::Io`].
    pub fn create(folder: &Path, overwrite: bool) -> Result<Self, Nf4Error> {
        let made_folder = !folder.exists();
        fs::create_dir_all(folder).map_err(Nf4Error::io(folder))?;
        let mut staging = Self {
            folder: folder.into(),
            hidden: None,
            made_folder,
            overwrite,
            files: BTreeSet::new(),
        };
        let mut entries = fs::read_dir(folder).map_err(Nf4Error::io(folder))?;
        if !overwrite && entries.next().is_some() {
            return Err(Nf4Error::FolderNotEmpty {
                path: folder.into(),
            });
        }
        let hidden = tempfile::Builder::new()
            .prefix(".burn-nf4-")
            .tempdir_in(folder)
            .map_err(Nf4Error::io(folder))?;
        staging.hidden = Some(hidden);
        Ok(staging)
    }

    /// The folder that is being written.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where files lie until they are put in place.
    pub fn hidden(&self) -> &Path {
        match &self.hidden {
            Some(hidden) => hidden.path(),
            None => &self.folder,
        }
    }

    /// The permissions that a file made in the usual way gets here; those of temporary files are
    /// narrower.
    pub fn permissions(&self) -> Result<Permissions, Nf4Error> {
        let probe = self.hidden().join("permissions");
        let made = File::create(&probe).and_then(|file| file.metadata());
        made.map(|metadata| metadata.permissions())
            .map_err(Nf4Error::io(&self.folder))
    }

    /// Reserves a name and says where to write the file.
    ///
    /// # Errors
    /// [`Nf4Error::NameTaken`] if there is such a file already, if the name is one of the model's
    /// own files or if it leads out of the folder; [`Nf4Error::Io`].
    pub fn reserve(&mut self, name: &str) -> Result<PathBuf, Nf4Error> {
        if !is_inside(name) || is_model_file(name) || !self.files.insert(name.into()) {
            return Err(Nf4Error::NameTaken {
                path: self.folder.clone(),
                name: name.into(),
            });
        }
        let path = self.hidden().join("files").join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Nf4Error::io(self.folder.join(name)))?;
        }
        Ok(path)
    }

    /// Puts everything in place: the shards, each with its final name, then the reserved files,
    /// then the index. What an earlier checkpoint left in an overwritten folder goes.
    pub fn commit(mut self, shards: &[(PathBuf, String)], index: &str) -> Result<(), Nf4Error> {
        let hidden = self.hidden().to_path_buf();
        let files = hidden.join("files");
        let mut moves: Vec<(PathBuf, PathBuf)> = shards
            .iter()
            .map(|(path, name)| (path.clone(), self.folder.join(name)))
            .collect();
        moves.extend(
            self.files
                .iter()
                .map(|name| (files.join(name), self.folder.join(name))),
        );
        if shards.len() > 1 {
            let path = hidden.join(INDEX_FILE);
            let place = self.folder.join(INDEX_FILE);
            fs::write(&path, index).map_err(Nf4Error::io(&place))?;
            moves.push((path, place));
        }
        if self.overwrite {
            // First, as the index of other shards would hide a new single file.
            self.remove_model_files()?;
        }
        let mut done: Vec<&Path> = Vec::new();
        for (from, to) in &moves {
            let moved = to
                .parent()
                .map_or(Ok(()), fs::create_dir_all)
                .and_then(|()| fs::rename(from, to));
            if let Err(error) = moved {
                for path in done {
                    // Nothing more can be done about a file that does not go.
                    let _ = fs::remove_file(path);
                }
                return Err(Nf4Error::io(to)(error));
            }
            done.push(to);
        }
        self.made_folder = false;
        Ok(())
    }

    fn remove_model_files(&self) -> Result<(), Nf4Error> {
        for name in names_in(&self.folder)? {
            if is_model_file(&name) {
                let path = self.folder.join(name);
                fs::remove_file(&path).map_err(Nf4Error::io(&path))?;
            }
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        drop(self.hidden.take());
        if self.made_folder {
            // Fails where something came into it meanwhile, which then stays.
            let _ = fs::remove_dir(&self.folder);
        }
    }
}
