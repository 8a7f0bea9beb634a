"""Safe file access: atomic writes, checksums and locks."""
