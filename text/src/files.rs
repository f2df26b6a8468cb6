//! Files that a directory may do without.

use std::io::ErrorKind;
use std::path::Path;

/// What a file says; `None` if there is none. A link that leads nowhere is one.
pub(crate) fn if_there<T, E>(path: &Path, read: impl FnOnce(&Path) -> Result<T, E>) -> Result<Option<T>, E> {
    let is_absent = path.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound);
    if is_absent { Ok(None) } else { read(path).map(Some) }
}
