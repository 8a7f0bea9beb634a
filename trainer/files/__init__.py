"""Writing so that nothing is lost: atomic files, checksums, locks."""
