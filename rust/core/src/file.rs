//! Reading files at a position, on every platform, from any number of threads.

use std::fs::File;

use rawzip::ReaderAt;

/// Fills `out` from byte `offset` on.
pub(crate) fn read_at(file: &File, out: &mut [u8], offset: u64) -> std::io::Result<()> {
    Positioned(file).read_exact_at(out, offset)
}

/// A file as the zip reader wants it.
pub(crate) struct Positioned<'a>(pub(crate) &'a File);

impl ReaderAt for Positioned<'_> {
    #[cfg(unix)]
    fn read_at(&self, out: &mut [u8], offset: u64) -> std::io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(self.0, out, offset)
    }

    #[cfg(windows)]
    fn read_at(&self, out: &mut [u8], offset: u64) -> std::io::Result<usize> {
        std::os::windows::fs::FileExt::seek_read(self.0, out, offset)
    }

    #[cfg(unix)]
    fn read_exact_at(&self, out: &mut [u8], offset: u64) -> std::io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self.0, out, offset)
    }
}
